"""The frontend's side of the engine: admission, open requests, aborts, statistics.

Whatever happens, each stream that `submit` opened gets exactly one finish: from the engine, from an abort,
or from `fail` when the engine has gone.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ziphius.errors import EngineFailed, InvalidRequest, Overloaded, ZiphiusError
from ziphius.frontend.metrics import Metrics
from ziphius.frontend.stream import Generation, RequestStream, SequenceRequest, StreamFinish
from ziphius.ipc.messages import (
    AbortRequest,
    AddRequest,
    EngineStats,
    Fatal,
    FlushCache,
    FlushResult,
    FromEngine,
    LoadProgress,
    Ready,
    RequestOutput,
    Shutdown,
    StepOutput,
    ToEngine,
)
from ziphius.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

STALL_S = 120.0
"""An engine that has requests and sends nothing for so long counts as stuck."""


class EngineTransport(Protocol):
    """ipc.FrontendChannel, or a fake in tests."""

    async def send(self, message: ToEngine) -> None: ...

    async def receive(self) -> FromEngine: ...


@dataclass(frozen=True, slots=True)
class EngineEvents:
    """What to call for messages that are not about a request."""

    progress: Callable[[LoadProgress], None]
    ready: Callable[[Ready], None]
    fatal: Callable[[Fatal], None]


@dataclass(slots=True)
class _Open:
    stream: RequestStream
    generation: Generation


class EngineClient:
    """One engine. `run` must be running for anything else to make progress."""

    def __init__(self, transport: EngineTransport, capacity: int, metrics: Metrics, events: EngineEvents) -> None:
        self._transport = transport
        self.capacity = capacity
        """Requests that may be open at once, running and queued together."""
        self._metrics = metrics
        self._events = events
        self._open: dict[str, _Open] = {}
        """By the engine's rid, until the engine has ended the request: then its place is free again."""
        self._by_public_rid: dict[str, RequestStream] = {}
        """Requests whose client still waits."""
        self._outbox: deque[ToEngine] = deque()
        self._outbox_filled = asyncio.Event()
        self._flushes: deque[asyncio.Future[FlushResult]] = deque()
        self._idle = asyncio.Event()
        self._idle.set()
        self._failure: ZiphiusError | None = None
        self._next_rid = 0
        self._heard_at = time.monotonic()

    async def run(self) -> None:
        """Carry messages both ways until cancelled.

        An error in one direction ends both; otherwise requests would wait for ever.
        """
        async with asyncio.TaskGroup() as both:
            both.create_task(self._send_all())
            both.create_task(self._receive_all())

    @property
    def num_open(self) -> int:
        """Requests that the engine has not ended yet."""
        return len(self._open)

    @property
    def stalled(self) -> bool:
        """Whether the engine has sent nothing for a long time although it has work."""
        return bool(self._open) and time.monotonic() - self._heard_at > STALL_S

    @property
    def heard_recently(self) -> bool:
        """Whether the engine made progress on some request in the last second."""
        return bool(self._open) and time.monotonic() - self._heard_at < 1.0

    def submit(self, requests: Sequence[SequenceRequest], tokenizer: Tokenizer, streaming: bool) -> Generation:
        """Start all of `requests` (at least one) as one generation, or none of them.

        Overloaded when there is no room now; InvalidRequest when there never will be, or for a rid in use.
        """
        self.check_room(len(requests))
        self._check_rids(requests)
        now = time.monotonic()
        if not self._open:
            self._heard_at = now
        streams = [RequestStream(r, i, self._new_rid(), tokenizer, now) for i, r in enumerate(requests)]
        generation = Generation(streams, self.close, streaming)
        for stream in streams:
            request = stream.request
            self._open[stream.engine_rid] = _Open(stream, generation)
            self._by_public_rid[request.public_rid] = stream
            self._post(
                AddRequest(rid=stream.engine_rid, prompt_ids=request.prompt_ids, sampling=request.sampling)
            )  # fmt: skip
        self._idle.clear()
        self._metrics.open_requests = len(self._open)
        return generation

    def check_room(self, count: int) -> None:
        """Raise what `submit` would raise for `count` sequences now. It is cheap: call it before encoding."""
        if self._failure is not None:
            raise self._failure
        if count > self.capacity:
            raise InvalidRequest(
                f"{count} sequences (prompts times n) in one request: this server takes at most {self.capacity} at a "
                "time (--max-running-requests and --max-queued-requests together)",
                param="n",
            )
        if len(self._open) + count > self.capacity:
            self._metrics.rejected["queue_full"] += 1
            raise Overloaded("The request queue is full.")

    def close(self, generation: Generation) -> None:
        """End those of `generation` that still run."""
        for stream in generation.streams:
            self._abort(stream, generation, "Aborted")

    def abort(self, public_rid: str) -> None:
        """End the request with exactly this rid, or all sequences of the batch or the copies with this rid."""
        for rid, stream in list(self._by_public_rid.items()):
            if public_rid in (rid, stream.request.group_rid):
                self._abort(stream, self._open[stream.engine_rid].generation, "Aborted")

    def abort_all(self, message: str) -> None:
        for entry in list(self._open.values()):
            self._abort(entry.stream, entry.generation, message)

    async def flush_cache(self) -> FlushResult:
        """Empty the engine's prefix cache; not while requests run."""
        if self._failure is not None:
            raise self._failure
        future: asyncio.Future[FlushResult] = asyncio.get_running_loop().create_future()
        self._flushes.append(future)
        self._post(FlushCache())
        return await future

    async def wait_idle(self) -> None:
        """Wait until no request is open."""
        await self._idle.wait()

    async def shutdown(self) -> None:
        """Tell the engine to end its loop."""
        await self._transport.send(Shutdown())

    def fail(self, reason: str) -> None:
        """The engine has died: end every open request with an error, and refuse every later one."""
        self._failure = EngineFailed(reason)
        now = time.monotonic()
        for rid, entry in list(self._open.items()):
            finish = StreamFinish("error", message=reason, error=EngineFailed(reason))
            if entry.stream.end(finish, now):
                self._ended(entry.stream)
                entry.generation.notify(entry.stream)
            self._forget(rid)
        while self._flushes:
            flush = self._flushes.popleft()
            if not flush.done():
                flush.set_exception(EngineFailed(reason))

    def _check_rids(self, requests: Iterable[SequenceRequest]) -> None:
        seen: set[str] = set()
        for request in requests:
            if request.public_rid in seen:
                raise InvalidRequest(
                    f"Duplicate request IDs detected within the request: ['{request.public_rid}']", param="rid"
                )
            if request.public_rid in self._by_public_rid:
                raise InvalidRequest(f"Duplicate request ID detected: {request.public_rid}", param="rid")
            seen.add(request.public_rid)

    def _new_rid(self) -> str:
        self._next_rid += 1
        return str(self._next_rid)

    def _abort(self, stream: RequestStream, generation: Generation, message: str) -> None:
        if stream.end(StreamFinish("abort", message=message), time.monotonic()):
            self._post(AbortRequest(rid=stream.engine_rid))
            self._ended(stream)
            generation.notify(stream)

    def _handle(self, message: FromEngine) -> None:
        self._heard_at = time.monotonic()
        if isinstance(message, StepOutput):
            for output in message.outputs:
                self._handle_output(output, self._heard_at)
        elif isinstance(message, EngineStats):
            self._metrics.engine = message
        elif isinstance(message, LoadProgress):
            self._events.progress(message)
        elif isinstance(message, Ready):
            self._events.ready(message)
        elif isinstance(message, FlushResult):
            if self._flushes:
                flush = self._flushes.popleft()
                if not flush.done():
                    flush.set_result(message)
        else:
            self._events.fatal(message)

    def _handle_output(self, output: RequestOutput, now: float) -> None:
        entry = self._open.get(output.rid)
        if entry is None:
            return
        stream = entry.stream
        self._measure(stream, output, now)
        if stream.accept(output, now):
            if stream.finish is not None:
                self._ended(stream)
                if output.finish is None:
                    self._post(AbortRequest(rid=stream.engine_rid))
            entry.generation.notify(stream)
        if output.finish is not None:
            self._forget(output.rid)

    def _measure(self, stream: RequestStream, output: RequestOutput, now: float) -> None:
        count = len(output.token_ids)
        if not count or stream.finish is not None:
            return
        metrics = self._metrics
        if stream.last_token_at is None:
            metrics.time_to_first_token.observe(now - stream.created_at)
            metrics.prompt_tokens += len(stream.request.prompt_ids)
            metrics.prompt_rate.add(len(stream.request.prompt_ids))
            metrics.cached_tokens += output.cached_tokens
        else:
            metrics.inter_token_latency.observe((now - stream.last_token_at) / count, count)
        metrics.generated_tokens += count
        metrics.generated_rate.add(count)

    def _ended(self, stream: RequestStream) -> None:
        """Count an answer's end and log it, once."""
        self._by_public_rid.pop(stream.request.public_rid, None)
        finish, metrics = stream.finish, self._metrics
        assert finish is not None
        assert stream.finished_at is not None
        seconds = stream.finished_at - stream.created_at
        metrics.requests += 1
        metrics.aborted += finish.kind == "abort"
        metrics.failed += finish.kind == "error"
        metrics.e2e_latency.observe(seconds)
        metrics.prompt_lengths.observe(len(stream.request.prompt_ids))
        metrics.generation_lengths.observe(stream.completion_tokens)
        first = -1.0 if stream.first_token_at is None else stream.first_token_at - stream.created_at
        logger.info(
            "%s %s: prompt %d (cached %d), answer %d, first token %.3f s, total %.3f s",
            stream.request.public_rid, finish.kind, len(stream.request.prompt_ids), stream.cached_tokens,
            stream.completion_tokens, first, seconds,
        )  # fmt: skip

    def _forget(self, rid: str) -> None:
        """The engine has ended this request: its place is free."""
        del self._open[rid]
        self._metrics.open_requests = len(self._open)
        if not self._open:
            self._idle.set()

    def _post(self, message: ToEngine) -> None:
        self._outbox.append(message)
        self._outbox_filled.set()

    async def _receive_all(self) -> None:
        while True:
            self._handle(await self._transport.receive())

    async def _send_all(self) -> None:
        while True:
            await self._outbox_filled.wait()
            self._outbox_filled.clear()
            while self._outbox:
                await self._transport.send(self._outbox.popleft())


def new_rid() -> str:
    """A rid for a request whose caller gave none."""
    return uuid.uuid4().hex
