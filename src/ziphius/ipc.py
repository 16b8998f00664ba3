"""Sockets between the frontend and rank 0: typed messages in order, both ways; it decides nothing about them.

A PAIR of ZeroMQ sockets on a Unix socket: one frontend, one engine. The messages are those of
`ziphius.messages`, as msgpack. A peer that has died is not noticed here: its process is watched instead.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from ziphius.messages import FromEngine, ToEngine


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
        """All messages that are there; waits up to `timeout_s` for the first (None: for ever, 0: not at all)."""
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
