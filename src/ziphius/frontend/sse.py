"""GenerationResponse: sends an answer as JSON or SSE, and notices clients that leave or stop reading.

It is plain ASGI and no StreamingResponse: all the news of a step are one write, and a request needs no task group.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ziphius.errors import ZiphiusError
from ziphius.frontend.error_responses import JSON, error_response
from ziphius.frontend.stream import Generation, RequestStream

logger = logging.getLogger(__name__)

_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class AnswerFormat(Protocol):
    """How one API writes an answer: the last stage of its way out."""

    def events(self, stream: RequestStream) -> bytes:
        """SSE events for a sequence's news; b"" when there is nothing to send yet."""
        ...

    def closing(self, generation: Generation) -> bytes:
        """SSE events after the last sequence has ended, [DONE] included."""
        ...

    def failed(self, error: ZiphiusError) -> bytes:
        """The last SSE event of a stream that failed after it had begun."""
        ...

    def complete(self, generation: Generation) -> bytes:
        """The JSON body of an answer that is not streamed."""
        ...


class GenerationResponse(Response):
    """The answer to one generation. However it ends, sequences that still run are aborted."""

    def __init__(self, generation: Generation, form: AnswerFormat, write_timeout_s: float) -> None:
        super().__init__()
        self._generation = generation
        self._form = form
        self._write_timeout_s = write_timeout_s
        self._writing_since: float | None = None
        self._gave_up = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(self._watch(receive))
        guard = _WriteGuard(self, self._write_timeout_s)
        try:
            if self._generation.streaming:
                await self._stream(scope, receive, send)
            else:
                await self._answer(scope, receive, send)
        except asyncio.CancelledError:
            if not self._gave_up:
                raise
            logger.warning("a client read nothing for %g s: its request is aborted", self._write_timeout_s)
        finally:
            guard.stop()
            watch.cancel()
            self._generation.close()

    def check_writing(self, task: asyncio.Task[None], now: float) -> None:
        """Abort the request when the current write has been waiting for too long."""
        if self._writing_since is not None and now - self._writing_since >= self._write_timeout_s:
            self._gave_up = True
            self._generation.close()
            task.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._generation.leave()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        generation = self._generation
        await generation.news()
        if generation.client_gone:
            return
        failure = generation.failure
        if failure is not None:
            await error_response(failure)(scope, receive, send)
            return
        response = Response(self._form.complete(generation), media_type=JSON)
        self._writing_since = asyncio.get_running_loop().time()
        await response(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        generation, form = self._generation, self._form
        loop = asyncio.get_running_loop()
        started = False
        while True:
            news = await generation.news()
            if generation.client_gone:
                return
            failure = generation.failure
            if failure is not None and not started:
                # Nothing was sent yet, so the error can have its own status
                await error_response(failure)(scope, receive, send)
                return
            body = b"".join([form.events(stream) for stream in news if stream.finish is None or failure is None])
            last = generation.ended or failure is not None
            if last:
                body += form.closing(generation) if failure is None else form.failed(failure)
            if not body:
                continue
            self._writing_since = loop.time()
            if not started:
                started = True
                await send({"type": "http.response.start", "status": 200, "headers": _SSE_HEADERS})
            await send({"type": "http.response.body", "body": body, "more_body": not last})
            self._writing_since = None
            if last:
                return


class _WriteGuard:
    """Checks at intervals whether a response's write is stuck, with one timer for the whole response."""

    def __init__(self, response: GenerationResponse, timeout_s: float) -> None:
        self._response = response
        self._interval_s = timeout_s / 4
        self._loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._timer = self._loop.call_later(self._interval_s, self._check)

    def stop(self) -> None:
        self._timer.cancel()

    def _check(self) -> None:
        self._response.check_writing(self._task, self._loop.time())
        self._timer = self._loop.call_later(self._interval_s, self._check)
