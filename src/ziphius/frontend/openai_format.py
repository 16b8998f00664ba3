"""How OpenAI's routes write answers: chat and completions, whole or as SSE.

The bytes of a streamed chunk are joined from parts that were made once; only the text is encoded for each chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Generic, TypeVar

import msgspec

from ziphius.errors import ZiphiusError
from ziphius.frontend.error_responses import SSE_DONE, error_event
from ziphius.frontend.openai_logprobs import chat_logprobs, completion_logprobs
from ziphius.frontend.stream import Generation, RequestStream
from ziphius.tokenizer.tokenizer import Tokenizer

_encode = msgspec.json.Encoder().encode


Logprobs = Annotated[msgspec.Raw, msgspec.Meta(extra_json_schema={"type": ["object", "null"]})]
"""Written by `openai_logprobs`."""


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptTokensDetails
    reasoning_tokens: int = 0
    completion_tokens_details: None = None


class Metadata(msgspec.Struct, frozen=True):
    weight_version: str = "default"


class ChatAnswerMessage(msgspec.Struct, frozen=True):
    role: str
    content: str
    reasoning_content: None = None


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    message: ChatAnswerMessage
    logprobs: Logprobs
    finish_reason: str
    matched_stop: int | str | None


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    text: str
    logprobs: Logprobs
    finish_reason: str
    matched_stop: int | str | None


_Choice = TypeVar("_Choice", ChatChoice, CompletionChoice)


class Answer(msgspec.Struct, Generic[_Choice], frozen=True, kw_only=True):
    id: str
    object: str
    created: int
    model: str
    choices: list[_Choice]
    usage: Usage
    metadata: Metadata = Metadata()


class ChatAnswer(Answer[ChatChoice], frozen=True, kw_only=True):
    """A chat answer that is not streamed."""


class CompletionAnswer(Answer[CompletionChoice], frozen=True, kw_only=True):
    """A completion that is not streamed."""


@dataclass(frozen=True, slots=True)
class FormatOptions:
    """What a format needs to know of its request."""

    rid: str
    created: int
    model: str
    copies: int
    """Sequences of each prompt. They follow one another."""
    logprobs: bool
    include_usage: bool = False
    continuous_usage: bool = False
    echo: tuple[str, ...] = ()
    """The prompts' texts, if they are to stand before the answers; else empty."""


def usage_of(streams: Sequence[RequestStream], copies: int) -> Usage:
    """The usage of these sequences. Each prompt counts once, however many copies of it there are."""
    firsts = [stream for stream in streams if stream.index % copies == 0] or streams
    prompt = sum(len(stream.request.prompt_ids) for stream in firsts)
    completion = sum(stream.completion_tokens for stream in streams)
    return Usage(
        prompt_tokens=prompt,
        total_tokens=prompt + completion,
        completion_tokens=completion,
        prompt_tokens_details=PromptTokensDetails(sum(stream.cached_tokens for stream in firsts)),
    )


class _OpenAIFormat:
    """What chat and completions share: the frame of a chunk, and usage."""

    OBJECT = ""
    NO_USAGE = b""

    def __init__(self, options: FormatOptions, tokenizer: Tokenizer) -> None:
        self.options = options
        self.tokenizer = tokenizer
        self._frame = b'data: {"id":%b,"object":"%b","created":%d,"model":%b,"choices":[' % (
            _encode(options.rid), self.OBJECT.encode(), options.created, _encode(options.model),
        )  # fmt: skip

    def closing(self, generation: Generation) -> bytes:
        if not self.options.include_usage:
            return SSE_DONE
        usage = _encode(usage_of(generation.streams, self.options.copies))
        return self._frame + b'],"usage":' + usage + b"}\n\n" + SSE_DONE

    def failed(self, error: ZiphiusError) -> bytes:
        return error_event(error)

    def _chunk_usage(self, stream: RequestStream) -> bytes:
        """The end of a chunk after its choices."""
        if not self.options.continuous_usage:
            return self.NO_USAGE
        return b',"usage":' + _encode(usage_of([stream], self.options.copies))


def _finish_of(stream: RequestStream) -> bytes:
    finish = stream.finish
    if finish is None:
        return b',"finish_reason":null,"matched_stop":null}]'
    return b',"finish_reason":"%b","matched_stop":%b}]' % (finish.kind.encode(), _encode(finish.matched))


class ChatFormat(_OpenAIFormat):
    """/v1/chat/completions."""

    OBJECT = "chat.completion.chunk"

    def __init__(self, options: FormatOptions, tokenizer: Tokenizer) -> None:
        super().__init__(options, tokenizer)
        self._begun: set[int] = set()
        self._late_logprobs: dict[int, list[bytes]] = {}
        """By sequence: the log-probabilities of tokens whose text is still withheld."""

    def events(self, stream: RequestStream) -> bytes:
        delta = stream.take()
        index = stream.index
        start = self._frame + b'{"index":%d,"delta":{"reasoning_content":null' % index
        usage = self._chunk_usage(stream)
        end = b"}" if not usage else usage + b"}"
        unfinished = b',"finish_reason":null,"matched_stop":null}]' + end + b"\n\n"
        parts = []
        if index not in self._begun:
            self._begun.add(index)
            parts.append(start + b',"role":"assistant","content":""},"logprobs":null' + unfinished)
        if self.options.logprobs and delta.logprobs:
            self._late_logprobs.setdefault(index, []).extend(chat_logprobs(delta.logprobs, self.tokenizer))
        if delta.text:
            text = b',"content":' + _encode(delta.text) + b'},"logprobs":'
            parts.append(start + text + self._logprobs(index) + unfinished)
        if stream.finish is not None:
            parts.append(start + b'},"logprobs":' + self._logprobs(index) + _finish_of(stream) + end + b"\n\n")
        return b"".join(parts)

    def complete(self, generation: Generation) -> bytes:
        choices = []
        for stream in generation.streams:
            delta, finish = stream.take(), stream.finish
            assert finish is not None
            if self.options.logprobs:
                self._late_logprobs[stream.index] = chat_logprobs(delta.logprobs, self.tokenizer)
            choices.append(
                ChatChoice(
                    index=stream.index,
                    message=ChatAnswerMessage("assistant", delta.text),
                    logprobs=msgspec.Raw(self._logprobs(stream.index, b'{"content":[]}')),
                    finish_reason=finish.kind,
                    matched_stop=finish.matched,
                )
            )
        return _encode(
            ChatAnswer(
                id=self.options.rid,
                object="chat.completion",
                created=self.options.created,
                model=self.options.model,
                choices=choices,
                usage=usage_of(generation.streams, self.options.copies),
            )
        )

    def _logprobs(self, index: int, empty: bytes = b"null") -> bytes:
        if not self.options.logprobs:
            return b"null"
        entries = self._late_logprobs.pop(index, None)
        return b'{"content":[' + b",".join(entries) + b"]}" if entries else empty


class CompletionFormat(_OpenAIFormat):
    """/v1/completions."""

    OBJECT = "text_completion"
    NO_USAGE = b',"usage":null'

    def __init__(self, options: FormatOptions, tokenizer: Tokenizer) -> None:
        super().__init__(options, tokenizer)
        self._begun: set[int] = set()
        self._offsets: dict[int, int] = {}

    def events(self, stream: RequestStream) -> bytes:
        if not stream.has_text and stream.finish is None:
            return b""  # the text is withheld, and its log-probabilities wait for it
        text, logprobs = self._text_and_logprobs(stream)
        return b"".join(
            (
                self._frame,
                b'{"index":%d,"text":' % stream.index,
                _encode(text),
                b',"logprobs":',
                logprobs,
                _finish_of(stream),
                self._chunk_usage(stream),
                b"}\n\n",
            )
        )

    def complete(self, generation: Generation) -> bytes:
        choices = []
        for stream in generation.streams:
            finish = stream.finish
            assert finish is not None
            text, logprobs = self._text_and_logprobs(stream)
            choices.append(
                CompletionChoice(
                    index=stream.index,
                    text=text,
                    logprobs=msgspec.Raw(logprobs),
                    finish_reason=finish.kind,
                    matched_stop=finish.matched,
                )
            )
        return _encode(
            CompletionAnswer(
                id=self.options.rid,
                object=self.OBJECT,
                created=self.options.created,
                model=self.options.model,
                choices=choices,
                usage=usage_of(generation.streams, self.options.copies),
            )
        )

    def _text_and_logprobs(self, stream: RequestStream) -> tuple[str, bytes]:
        """The stream's news. If the prompt is to be echoed, it stands before the first of them."""
        options, index = self.options, stream.index
        delta = stream.take()
        first = index not in self._begun
        self._begun.add(index)
        echo = options.echo[index // options.copies] if options.echo and first else ""
        if not options.logprobs:
            return echo + delta.text, b"null"
        entries = [*stream.prompt_logprobs, *delta.logprobs] if first else delta.logprobs
        offset = self._offsets.get(index, 0)
        written, self._offsets[index] = completion_logprobs(entries, self.tokenizer, offset)
        return echo + delta.text, written
