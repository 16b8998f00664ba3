"""Answers on their way from the engine to a client: what has come, what is new, how it ended.

A RequestStream is one sequence in the engine. A Generation is all the sequences of one HTTP request
(copies, batches) and what its handler waits for. News that nobody has fetched are merged, so that a client
that does not read needs no more memory than its answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ziphius.errors import EngineFailed, ZiphiusError
from ziphius.frontend.answer_text import AnswerText, Delta, MakeParser, PlainText
from ziphius.frontend.sampling import TextOptions
from ziphius.ipc.messages import Finish, FinishKind, RequestOutput, SamplingParams, TokenLogprob
from ziphius.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One sequence to generate: what the engine gets and how its text is made."""

    public_rid: str
    """The id that the caller sees and can abort."""
    group_rid: str
    """The id that aborts the whole batch, with all copies."""
    prompt_ids: list[int]
    sampling: SamplingParams
    text: TextOptions
    wants_no_tokens: bool = False
    """The caller asked for 0 tokens: the one token that the engine makes is thrown away."""
    make_parser: MakeParser = PlainText


@dataclass(frozen=True, slots=True)
class StreamFinish:
    """Why an answer ended. It is set once."""

    kind: FinishKind
    matched: int | str | None = None
    """The end token's id or the stop string."""
    message: str | None = None
    error: ZiphiusError | None = None
    """Only when `kind` is `error`."""


class RequestStream:
    """The answer of one sequence. `accept` is called by the engine client, `take` by the handler."""

    def __init__(self, request: SequenceRequest, index: int, engine_rid: str, tokenizer: Tokenizer, now: float) -> None:
        self.request = request
        self.index = index
        self.engine_rid = engine_rid
        self.created_at = now
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        self.finished_at: float | None = None
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.preemptions = 0
        self.prompt_logprobs: list[TokenLogprob] = []
        self.finish: StreamFinish | None = None
        self.dirty = False
        """Whether it is in its generation's list of news."""
        self._text = AnswerText(tokenizer, request.text, request.sampling.min_new_tokens, request.make_parser())
        self._pending = Delta("", [], [])

    def accept(self, output: RequestOutput, now: float) -> bool:
        """Take the engine's news of one step. Returns whether there is something new for the client."""
        if self.finish is not None:
            return False
        self.cached_tokens, self.preemptions = output.cached_tokens, output.preemptions
        if output.prompt_logprobs:
            self.prompt_logprobs = output.prompt_logprobs
        ids = output.token_ids
        if ids and self.first_token_at is None:
            self.first_token_at = now
        if ids and self.request.wants_no_tokens:
            self._end(StreamFinish("length"), now)
            return True
        if ids:
            self.last_token_at = now
            self._add_tokens(output, now)
        if output.finish is not None and self.finish is None:
            self._finish_from_engine(output, now)
        return bool(ids) or self.finish is not None

    def end(self, finish: StreamFinish, now: float) -> bool:
        """End it from this side (an abort, a dead engine). False when it had ended before."""
        if self.finish is not None:
            return False
        if finish.kind == "error" or not self._flush_text(now):
            self._end(finish, now)
        return True

    @property
    def has_text(self) -> bool:
        """Whether `take` would return text."""
        return bool(self._pending.text)

    def take(self) -> Delta:
        """The news since the last call."""
        pending, self._pending = self._pending, Delta("", [], [])
        return pending

    def _add_tokens(self, output: RequestOutput, now: float) -> None:
        ids, logprobs, pending = output.token_ids, output.logprobs, self._pending
        hidden = output.finish is not None and self._hidden_end(output.finish, output.token_ids[-1])
        if not self._text.has_stops:
            pending.token_ids += ids
            pending.logprobs += logprobs
            self.completion_tokens += len(ids)
            self._text.push(ids[:-1] if hidden else ids, self.completion_tokens, pending)
            return
        for n, token_id in enumerate(ids):
            pending.token_ids.append(token_id)
            pending.logprobs += logprobs[n : n + 1]
            self.completion_tokens += 1
            if hidden and n == len(ids) - 1:
                return
            matched = self._text.push((token_id,), self.completion_tokens, pending)
            if matched is not None:
                self._end(StreamFinish("stop", matched=matched), now)
                return

    def _hidden_end(self, finish: Finish, last_id: int) -> bool:
        """Whether the last token ended the answer and stays out of its text."""
        return finish.kind == "stop" and finish.matched == last_id and not self.request.text.no_stop_trim

    def _finish_from_engine(self, output: RequestOutput, now: float) -> None:
        finish = output.finish
        assert finish is not None
        if finish.kind == "error":
            message = finish.message or "the engine failed on this request"
            self._end(StreamFinish("error", message=message, error=EngineFailed(message)), now)
            return
        if not self._flush_text(now):
            matched: int | str | None = finish.matched
            if finish.matched is not None:
                matched = self.request.text.stop_token_texts.get(finish.matched, finish.matched)
            self._end(StreamFinish(finish.kind, matched=matched, message=finish.message), now)

    def _flush_text(self, now: float) -> bool:
        """Bring out the text that is withheld; True when a stop string in it ended the answer."""
        matched = self._text.end(self.completion_tokens, self._pending)
        if matched is None:
            return False
        self._end(StreamFinish("stop", matched=matched), now)
        return True

    def _end(self, finish: StreamFinish, now: float) -> None:
        self.finish = finish
        self.finished_at = now


@dataclass(slots=True, eq=False)
class Generation:
    """The sequences of one HTTP request. One handler waits for their news."""

    streams: Sequence[RequestStream]
    on_close: Callable[[Generation], None]
    """Ends what still runs; called by `close`."""
    streaming: bool
    """False: the handler is woken once, when all sequences have ended."""
    client_gone: bool = False
    _open: int = 0
    _news: list[RequestStream] = field(default_factory=list)
    _waiter: asyncio.Future[None] | None = None

    def __post_init__(self) -> None:
        self._open = len(self.streams)

    def notify(self, stream: RequestStream) -> None:
        """`stream`, one of the sequences, has news."""
        if stream.finish is not None:
            self._open -= 1
        if not stream.dirty:
            stream.dirty = True
            self._news.append(stream)
        if self.streaming or not self._open or (stream.finish is not None and stream.finish.error is not None):
            self._wake()

    async def news(self) -> list[RequestStream]:
        """Wait until there are sequences with news, and return them. Empty when the client has left."""
        due = self._news and (self.streaming or self.ended or self.failure is not None)
        if not due and not self.client_gone:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self.client_gone:
            return []
        news, self._news = self._news, []
        for stream in news:
            stream.dirty = False
        return news

    @property
    def ended(self) -> bool:
        return self._open == 0

    @property
    def failure(self) -> ZiphiusError | None:
        """The first error among the sequences. With one, the request as a whole has failed."""
        for stream in self.streams:
            if stream.finish is not None and stream.finish.error is not None:
                return stream.finish.error
        return None

    def leave(self) -> None:
        """The client has left: end what still runs and wake the handler."""
        self.client_gone = True
        self.close()
        self._wake()

    def close(self) -> None:
        """End what still runs. The handler must call it, however it ends."""
        self.on_close(self)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
