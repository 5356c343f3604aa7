// An echo server on the official SDK for TypeScript. Its argument is any file of the folder in which that is installed.
const sdk = require("node:module").createRequire(process.argv[1]);
const { McpServer } = sdk("@modelcontextprotocol/sdk/server/mcp.js");
const { StdioServerTransport } = sdk("@modelcontextprotocol/sdk/server/stdio.js");
const { z } = sdk("zod");

const server = new McpServer({ name: "echo", version: "1" });
const text = (text) => ({ content: [{ type: "text", text }] });
server.registerTool("echo", { inputSchema: { text: z.string() } }, (args) => text(args.text));
server.registerTool("sleep", { inputSchema: { ms: z.number() } }, async ({ ms }) => {
  await new Promise((resolve) => setTimeout(resolve, ms));
  return text(`slept ${ms}`);
});
server.connect(new StdioServerTransport());
