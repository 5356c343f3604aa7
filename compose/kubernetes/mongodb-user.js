// The first start of MongoDB makes the user of the nodes. It may read and write their database, and nothing else.
const password = require("fs").readFileSync("/run/mcp-api/password", "utf8").trim();
const database = process.env.MCP_DATABASE;
db.getSiblingDB("admin").createUser({
  user: "mcp",
  pwd: password,
  roles: [{ role: "readWrite", db: database }],
});
