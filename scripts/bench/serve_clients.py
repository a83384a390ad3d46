"""Clients of serve_cpu.py, in a process of their own: they send requests and note the answers, and check nothing.

python scripts/bench/serve_clients.py PORT CLIENTS REQUESTS BODIES ANSWERS

BODIES is a pickled list of bodies, of which each request sends one at random. ANSWERS becomes a pickled dictionary:
"answers" with (body, status, sent, answered, content) of each request, times as time.monotonic() gives them, and
"cpu_s" of this process. A request that has no answer, after 60 s or because the connection ended, has the status 0.
"""

from __future__ import annotations

import asyncio
import pickle
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

Answer = tuple[int, int, float, float, bytes]
_LONGEST_S = 60.0
_PROGRESS_S = 10.0


class Load:
    """What all clients share: the requests that are left, and the answers."""

    def __init__(self, bodies: Sequence[bytes], count: int) -> None:
        head = b"POST /recommend HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: "
        self._messages = [b"%b%d\r\n\r\n%b" % (head, len(body), body) for body in bodies]
        self._draw, self.left = random.Random(0), count
        self.answers: list[Answer] = []

    def next(self) -> tuple[int, bytes] | None:
        """(number of a body, request); None: all have been sent."""
        if not self.left:
            return None
        self.left -= 1
        number = self._draw.randrange(len(self._messages))
        return number, self._messages[number]


class Client(asyncio.Protocol):
    """One connection, which sends its next request when it has the answer."""

    def __init__(self, load: Load) -> None:
        self._load, self._received = load, b""
        self._number, self.sent = -1, 0.0
        self.transport: asyncio.Transport | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        """Note an answer that is complete, and send the next request."""
        self._received += data
        head, end, content = self._received.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]) if end else 1
        if end and len(content) >= length:
            self._note(int(head[9:12]), content)
            self._send()

    def connection_lost(self, _: Exception | None) -> None:
        """A request that waits has no answer."""
        if self._number >= 0:
            self._note(0, b"")
        self.ended.set_result(None)

    def _send(self) -> None:
        assert self.transport is not None
        if (found := self._load.next()) is None:
            self.transport.close()
            return
        self._number, message = found
        self.sent = time.monotonic()
        self.transport.write(message)

    def _note(self, status: int, content: bytes) -> None:
        self._load.answers.append((self._number, status, self.sent, time.monotonic(), content))
        self._number, self._received = -1, b""


async def send_all(port: int, clients: int, load: Load) -> None:
    """Send all requests of ``load`` by so many clients at once."""
    running: dict[int, Client] = {}

    async def keep_open(place: int) -> None:
        while load.left:
            _, running[place] = await asyncio.get_running_loop().create_connection(
                lambda: Client(load), "127.0.0.1", port
            )
            await running[place].ended

    watching = asyncio.create_task(_watch(load, running))
    await asyncio.gather(*(keep_open(place) for place in range(clients)))
    watching.cancel()


async def _watch(load: Load, running: dict[int, Client]) -> None:
    """Report progress, and end connections that wait too long."""
    count = load.left
    while True:
        before = len(load.answers)
        await asyncio.sleep(_PROGRESS_S)
        rate = (len(load.answers) - before) / _PROGRESS_S
        print(f"  {len(load.answers):,}/{count:,} requests, {rate:.0f}/s", file=sys.stderr, flush=True)
        for client in running.values():
            if client.transport is not None and time.monotonic() - client.sent > _LONGEST_S:
                client.transport.abort()


def main(arguments: Sequence[str]) -> None:
    """Command line."""
    port, clients, count = map(int, arguments[:3])
    bodies, answers = map(Path, arguments[3:])
    load = Load(pickle.loads(bodies.read_bytes()), count)
    begun = time.process_time()
    asyncio.run(send_all(port, clients, load))
    cpu_s = time.process_time() - begun
    answers.write_bytes(pickle.dumps({"answers": load.answers, "cpu_s": cpu_s}))


if __name__ == "__main__":
    main(sys.argv[1:])
