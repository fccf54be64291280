"""A tunnel as `ssh -L` makes one: a port of one machine leads to the same port of another.

    python tests/cluster/tunnel.py FROM_PID TO_PID PORT

Each machine is named by a process in its network. It says `ready` once it listens, and ends with
its process, and every connection with it.
"""

import asyncio
import contextlib
import ctypes
import os
import socket
import sys

_CLONE_NEWNET = 0x40000000  # of Linux: a network


def enter(pid: int) -> None:
    """Make new sockets of this thread belong to the network of a process."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/{pid}/ns/net", "rb") as network:  # noqa: PTH123 - a handle, not a file
        if libc.setns(network.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")


async def lead(listener: socket.socket, port: int) -> None:
    """Carry bytes both ways until this process is killed."""

    async def carry(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError), contextlib.closing(target):
            while block := await source.read(2**16):
                target.write(block)
                await target.drain()

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError), contextlib.closing(writer):
            source, target = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.gather(carry(reader, target), carry(source, writer))

    server = await asyncio.start_server(meet, sock=listener)
    os.write(1, b"ready\n")
    async with server:
        await server.serve_forever()


def main(words: list[str]) -> None:
    """Listen in one network, and lead to another."""
    start, end, port = map(int, words)
    enter(start)
    listener = socket.create_server(("127.0.0.1", port))
    enter(end)
    asyncio.run(lead(listener, port))


if __name__ == "__main__":
    main(sys.argv[1:])
