"""A CONNECT proxy for the user `backupd` with the password `secret`; run as a process."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
import sys

_SIGNED_IN = b"proxy-authorization: basic " + base64.b64encode(b"backupd:secret").lower()


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    if _SIGNED_IN not in head.lower():
        writer.write(b"HTTP/1.1 407 Sign In\r\nContent-Length: 0\r\n\r\n")
        writer.close()
        return
    host, _, port = head.split(b" ")[1].decode().rpartition(":")
    target_reader, target_writer = await asyncio.open_connection(host, int(port))
    writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
    await asyncio.gather(_relay(reader, target_writer), _relay(target_reader, writer))


async def _relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(64 * 1024):
            writer.write(piece)
            await writer.drain()
    writer.close()


async def _main(fd: int) -> None:
    server = await asyncio.start_server(_serve, sock=socket.socket(fileno=fd))
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1])))
