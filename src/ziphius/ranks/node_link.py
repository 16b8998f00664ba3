"""What machines (nodes) of one instance say to each other, and the TCP connection between them.

One connection from each node to node 0: messages as msgpack, each after its length in four bytes. It is neither
encrypted nor authenticated, like the traffic of the ranks themselves, so it needs a private network.
"""

from __future__ import annotations

import asyncio
import hashlib
import struct
from dataclasses import replace

import msgspec

from ziphius.checkpoint.config import ModelConfig
from ziphius.config import ServeConfig
from ziphius.ipc.messages import Beat
from ziphius.ranks.failures import Cause

_LENGTH = struct.Struct("!I")
_LARGEST = 1 << 20
HELLO_S = 10.0
"""A node that connects must introduce itself within this time."""


class NodeHello(msgspec.Struct, tag=True, kw_only=True):
    """A node asks to join. All values except `node_rank` must be the same on every node."""

    node_rank: int
    nnodes: int
    tp: int
    version: str
    model: str
    """The result of `model_digest` for its checkpoint."""


class NodeWelcome(msgspec.Struct, tag=True, kw_only=True):
    """Every node is there: start your ranks, now."""

    config: ServeConfig
    """Node 0's settings without its API key, so that the other nodes need not repeat them."""
    rendezvous: str
    """WorkerSpec.rendezvous."""


class NodeRefused(msgspec.Struct, tag=True, kw_only=True):
    message: str


class NodeBeat(msgspec.Struct, tag=True, kw_only=True):
    """A sign of life of a node. `beats`: the last beat of each of its ranks since the last message."""

    beats: list[Beat] = []


class NodeFailed(msgspec.Struct, tag=True, kw_only=True):
    """A node > 0 cannot go on, or was told to stop."""

    cause: Cause
    message: str


class NodeEnd(msgspec.Struct, tag=True, kw_only=True):
    """Node 0 ends, and all nodes must end. `message` is "" when it was told to stop."""

    message: str


NodeMessage = NodeHello | NodeWelcome | NodeRefused | NodeBeat | NodeFailed | NodeEnd


class NodeLink:
    """One end of the connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(NodeMessage)

    def send(self, message: NodeMessage) -> None:
        """Send without waiting. It does nothing when the other end has gone, which `receive` reports."""
        if not self._writer.is_closing():
            data = self._encoder.encode(message)
            self._writer.write(_LENGTH.pack(len(data)) + data)

    async def receive(self) -> NodeMessage | None:
        """Wait for the next message. None once the other end has gone, or sends what is no message."""
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if length > _LARGEST:
                return None
            message: NodeMessage = self._decoder.decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, OSError, msgspec.MsgspecError):
            return None
        return message

    async def close(self) -> None:
        """Close the connection. What was sent before still goes out if the other end reads it within a second."""
        self._writer.close()
        try:
            await asyncio.wait_for(self._writer.wait_closed(), 1.0)
        except (OSError, TimeoutError):
            self._writer.transport.abort()


def model_digest(config: ModelConfig) -> str:
    """Equal for equal models: SHA-256 of the config as JSON."""
    return hashlib.sha256(msgspec.json.encode(config)).hexdigest()


def without_secrets(config: ServeConfig) -> ServeConfig:
    return replace(config, api_key=None)
