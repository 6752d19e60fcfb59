"""A TCP relay that delays all data: `python -m tests.bench.relay PORT TARGET SECONDS`.

The delay is without loss, and both sides have a TCP connection to a near host, so their congestion control
does not see the distance. A new connection waits for one more round trip, the time of a TCP handshake.
"""

from __future__ import annotations

import asyncio
import sys


async def _carry(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float, opened: float
) -> None:
    loop = asyncio.get_running_loop()
    held: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def deliver() -> None:
        while True:
            due, data = await held.get()
            await asyncio.sleep(due - loop.time())
            if not data:
                if writer.can_write_eof():
                    writer.write_eof()
                return
            writer.write(data)
            await writer.drain()

    delivering = asyncio.create_task(deliver())
    try:
        while data := await reader.read(1 << 18):
            held.put_nowait((max(loop.time(), opened) + delay, data))
    except OSError:
        pass
    held.put_nowait((max(loop.time(), opened) + delay, b""))
    try:
        await delivering
    except OSError:
        reader.feed_eof()


async def _relay(port: int, target: int, delay: float) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", target, limit=1 << 20)
        opened = asyncio.get_running_loop().time() + 2 * delay
        await asyncio.gather(
            _carry(reader, far_writer, delay, opened), _carry(far_reader, writer, delay, opened)
        )
        writer.close()
        far_writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", port, limit=1 << 20)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_relay(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
