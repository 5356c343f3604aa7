# An echo server on the official SDK for Python.
import logging

import anyio
from mcp.server.mcpserver import MCPServer

server = MCPServer("echo", log_level="ERROR")


@server.tool()
async def echo(text: str) -> str:
    return text


@server.tool()
async def sleep(ms: float) -> str:
    await anyio.sleep(ms / 1000)
    return f"slept {ms:g}"


logging.disable(logging.INFO)
server.run("stdio")
