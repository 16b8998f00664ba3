"""What machines (nodes) of one instance say to each other, and the TCP connection they say it on; it judges nothing.

One connection from each node to node 0: messages as msgpack, each behind its length in four bytes. It is neither
encrypted nor authenticated, like the traffic of the ranks themselves: it belongs on a network of one's own.
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
"""Whoever connects must have introduced itself by then."""


class NodeHello(msgspec.Struct, tag=True, kw_only=True):
    """A node asks to join. All but `node_rank` must be the same everywhere."""

    node_rank: int
    nnodes: int
    tp: int
    version: str
    model: str
    """`model_digest` of its checkpoint."""


class NodeWelcome(msgspec.Struct, tag=True, kw_only=True):
    """Every node is there: start your ranks, now."""

    config: ServeConfig
    """Node 0's, without its API key: settings need not be repeated on the other nodes."""
    rendezvous: str
    """WorkerSpec.rendezvous."""


class NodeRefused(msgspec.Struct, tag=True, kw_only=True):
    message: str


class NodeBeat(msgspec.Struct, tag=True, kw_only=True):
    """A node lives; `beats`: the last one of each of its ranks that has beaten since the last message."""

    beats: list[Beat] = []


class NodeFailed(msgspec.Struct, tag=True, kw_only=True):
    """A node > 0 cannot go on, or was told to stop."""

    cause: Cause
    message: str


class NodeEnd(msgspec.Struct, tag=True, kw_only=True):
    """Node 0 ends, and so must all. `message` is "" when it was told to stop."""

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
        """Returns at once. Nothing happens when the other end has gone: `receive` tells."""
        if not self._writer.is_closing():
            data = self._encoder.encode(message)
            self._writer.write(_LENGTH.pack(len(data)) + data)

    async def receive(self) -> NodeMessage | None:
        """The next message; None once the other end has gone, or says what no node says."""
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if length > _LARGEST:
                return None
            message: NodeMessage = self._decoder.decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, OSError, msgspec.MsgspecError):
            return None
        return message

    async def close(self) -> None:
        """What was sent goes out first, as far as the other end takes it within a second."""
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
