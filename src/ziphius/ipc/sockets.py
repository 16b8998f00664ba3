"""Sockets between the processes of one instance: typed messages that arrive in order.

The frontend and rank 0 share a PAIR of ZeroMQ sockets on a Unix socket. Rank 0 sends its batches to the other ranks,
and each rank sends its beats to its frontend: over Unix sockets on one machine, over TCP where ranks are on several.
The messages are those of `ziphius.ipc.messages`, as msgpack. A socket does not notice that its peer has died, so
the peer's process is watched instead.
"""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from ziphius.errors import EngineFailed
from ziphius.ipc.messages import (
    Beat,
    FromEngine,
    FromRank,
    RankFailed,
    RankMessage,
    ScheduledBatch,
    Shutdown,
    ToEngine,
)


def socket_address(folder: Path) -> str:
    """The address both sides use; `folder` belongs to one instance and is readable by its user only."""
    return f"ipc://{folder}/engine.sock"


class EngineChannel:
    """rank 0's end. Blocking, for one thread."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.connect(address)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToEngine)

    def send(self, message: FromEngine) -> None:
        self._socket.send(self._encoder.encode(message), copy=False)

    def receive(self, timeout_s: float | None) -> list[ToEngine]:
        """All messages that have arrived. Waits up to `timeout_s` for the first one (None: for ever, 0: not at all)."""
        messages: list[ToEngine] = []
        if self._socket.poll(None if timeout_s is None else int(timeout_s * 1000)):
            while True:
                try:
                    messages.append(self._decoder.decode(self._socket.recv(zmq.NOBLOCK)))
                except zmq.Again:
                    break
        return messages

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class FrontendChannel:
    """The frontend's end, for its event loop. Binds, so that it exists before the engine does."""

    def __init__(self, address: str) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(address)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)

    async def send(self, message: ToEngine) -> None:
        await self._socket.send(self._encoder.encode(message))

    async def receive(self) -> FromEngine:
        """The next message; waits for it."""
        message: FromEngine = self._decoder.decode(await self._socket.recv())
        return message

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class BatchSender:
    """rank 0's end. Binds; every message goes to every rank that has been waited for. For one thread."""

    def __init__(self, address: str) -> None:
        """`address`: ipc://PATH, or tcp://IP:* for a port that is free."""
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.XPUB)
        self._socket.set_hwm(0)
        # Report every subscription, also a second one to the same topic.
        self._socket.setsockopt(zmq.XPUB_VERBOSE, 1)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.setsockopt(zmq.IPV6, 1)
        self._socket.bind(address)
        self.endpoint: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        """Where the receivers connect to."""
        self._encoder = msgspec.msgpack.Encoder()
        self._sent = 0

    def wait_for(self, count: int) -> None:
        """Return once `count` more receivers have connected: they do not get what was sent before."""
        for _ in range(count):
            self._socket.recv()

    def send(self, content: ScheduledBatch | Shutdown) -> None:
        """Returns at once; the message travels while the caller goes on."""
        self._socket.send(self._encoder.encode(RankMessage(self._sent, content)), copy=False)
        self._sent += 1

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class BatchReceiver:
    """The end of a rank > 0. Blocking, for one thread."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IPV6, 1)
        self._socket.connect(endpoint)
        self._socket.subscribe(b"")
        self._decoder = msgspec.msgpack.Decoder(RankMessage)
        self._received = 0

    def receive(self) -> ScheduledBatch | Shutdown:
        """Wait for the next message. EngineFailed when one was lost: this rank can then follow no longer."""
        message = self._decoder.decode(self._socket.recv())
        if message.sequence != self._received:
            raise EngineFailed(f"message {self._received} of rank 0 was lost: number {message.sequence} came after it")
        self._received += 1
        return message.content

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class BeatSender:
    """A rank's end. Never waits to send; any thread may send.

    `linger_ms`: how long `close` waits for messages that the frontend has not taken yet.
    """

    def __init__(self, address: str, linger_ms: int = 1000) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.LINGER, linger_ms)
        self._socket.connect(address)
        self._encoder = msgspec.msgpack.Encoder()
        self._lock = threading.Lock()

    def send(self, message: Beat | RankFailed) -> None:
        """Send a message. It is dropped when the frontend has read none for a very long time."""
        with self._lock, contextlib.suppress(zmq.Again):
            self._socket.send(self._encoder.encode(message), zmq.NOBLOCK)

    def close(self) -> None:
        with self._lock:
            self._socket.close()
        self._context.term()


class BeatReceiver:
    """The frontend's end, for its event loop. Binds, so that it exists before the ranks do."""

    def __init__(self, address: str) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(address)
        self._decoder = msgspec.msgpack.Decoder(FromRank)

    async def receive(self) -> FromRank:
        """The next message; waits for it."""
        message: FromRank = self._decoder.decode(await self._socket.recv())
        return message

    def close(self) -> None:
        self._socket.close()
        self._context.term()
