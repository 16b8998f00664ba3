"""How /generate writes answers, whole or as SGLang's cumulative SSE.

Each event repeats the whole answer so far. Its text, ids and log-probabilities are kept as encoded JSON,
so that an event copies them and does not encode them again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from ziphius.errors import ZiphiusError
from ziphius.frontend.error_responses import SSE_DONE, error_event
from ziphius.frontend.openai_logprobs import finite
from ziphius.frontend.stream import Generation, RequestStream, StreamFinish
from ziphius.ipc.messages import TokenLogprob
from ziphius.tokenizer.tokenizer import Tokenizer

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class SglangOptions:
    """What the format needs to know of its request; lists have one entry for each sequence."""

    received_at: float
    """Seconds since the epoch."""
    as_list: bool
    """A batch or copies: the answer is an array, and events carry an index."""
    logprobs: tuple[bool, ...]
    top_logprobs: tuple[bool, ...]
    text_in_logprobs: bool
    prompt_token_ids: bool


@dataclass(slots=True)
class _Written:
    """One sequence's answer so far, as the inside of JSON strings and arrays."""

    text: bytearray = field(default_factory=bytearray)
    ids: bytearray = field(default_factory=bytearray)
    logprobs: bytearray = field(default_factory=bytearray)
    top: bytearray = field(default_factory=bytearray)
    prompt: bytes = b""
    """`input_token_logprobs` and `input_top_logprobs`; written once."""


class SglangFormat:
    """The format of /generate."""

    def __init__(self, options: SglangOptions, tokenizer: Tokenizer) -> None:
        self._options = options
        self._tokenizer = tokenizer
        self._written: dict[int, _Written] = {}

    def events(self, stream: RequestStream) -> bytes:
        index = b',"index":%d' % stream.index if self._options.as_list else b""
        return b"data: " + self._object(stream, index) + b"\n\n"

    def closing(self, generation: Generation) -> bytes:
        return SSE_DONE

    def failed(self, error: ZiphiusError) -> bytes:
        return error_event(error)

    def complete(self, generation: Generation) -> bytes:
        objects = [self._object(stream, b"") for stream in generation.streams]
        return b"[" + b",".join(objects) + b"]" if self._options.as_list else objects[0]

    def _object(self, stream: RequestStream, index: bytes) -> bytes:
        written = self._update(stream)
        prompt_ids = b""
        if self._options.prompt_token_ids:
            prompt_ids = b',"prompt_token_ids":' + _encode(stream.request.prompt_ids)
        return b"".join(
            (
                b'{"text":"', written.text, b'","output_ids":[', written.ids, b'],"meta_info":{',
                self._meta(stream, written), b"}", prompt_ids, index, b"}",
            )
        )  # fmt: skip

    def _update(self, stream: RequestStream) -> _Written:
        delta = stream.take()
        written = self._written.get(stream.index)
        if written is None:
            written = self._written[stream.index] = _Written()
            if self._options.logprobs[stream.index]:
                written.prompt = self._prompt_logprobs(stream)
        if delta.text:
            written.text += _encode(delta.text)[1:-1]
        _join(written.ids, _encode(delta.token_ids)[1:-1])
        if self._options.logprobs[stream.index]:
            _join(written.logprobs, b",".join([self._entry(e.logprob, e.token_id) for e in delta.logprobs]))
            _join(written.top, b",".join([self._top(e) for e in delta.logprobs]))
        return written

    def _meta(self, stream: RequestStream, written: _Written) -> bytes:
        request = stream.request
        cached = stream.cached_tokens
        parts = [
            b'"id":%b,"finish_reason":%b,"prompt_tokens":%d,"weight_version":"default","num_retractions":%d'
            % (_encode(request.public_rid), _finish(stream), len(request.prompt_ids), stream.preemptions)
        ]
        if self._options.logprobs[stream.index]:
            parts.append(written.prompt)
            parts.append(b'"output_token_logprobs":[%b]' % bytes(written.logprobs))
            parts.append(b'"output_token_logprobs_length":%d' % stream.completion_tokens)
            if self._options.top_logprobs[stream.index]:
                parts.append(b'"output_top_logprobs":[%b]' % bytes(written.top))
        details = b'{"device":%d,"host":0}' % cached if cached else b"null"
        parts.append(
            b'"reasoning_tokens":0,"completion_tokens":%d,"cached_tokens":%d,"cached_tokens_details":%b,"dp_rank":null'
            % (stream.completion_tokens, cached, details)
        )
        if stream.finish is not None:
            parts.append(self._times(stream))
        return b",".join(parts)

    def _times(self, stream: RequestStream) -> bytes:
        assert stream.finished_at is not None
        received, total = self._options.received_at, stream.finished_at - stream.created_at
        first = total if stream.first_token_at is None else stream.first_token_at - stream.created_at
        decoding = total - first
        throughput = b""
        if stream.completion_tokens > 1 and decoding > 0:
            throughput = b',"decode_throughput":%b' % _encode((stream.completion_tokens - 1) / decoding)
        return b'"e2e_latency":%b,"first_token_latency":%b,"request_received_ts":%b,"request_finished_ts":%b%b' % (
            _encode(total),
            _encode(first),
            _encode(received),
            _encode(received + total),
            throughput,
        ) + b',"response_sent_to_client_ts":%b' % _encode(time.time())

    def _prompt_logprobs(self, stream: RequestStream) -> bytes:
        entries = stream.prompt_logprobs
        inputs = b",".join([self._entry(e.logprob, e.token_id) for e in entries])
        if not self._options.top_logprobs[stream.index]:
            return b'"input_token_logprobs":[%b]' % inputs
        tops = b",".join([b"null" if e.logprob is None else self._top(e) for e in entries])
        return b'"input_token_logprobs":[%b],"input_top_logprobs":[%b]' % (inputs, tops)

    def _entry(self, logprob: float | None, token_id: int) -> bytes:
        text = self._tokenizer.token_text(token_id) if self._options.text_in_logprobs else None
        return _encode((None if logprob is None else finite(logprob), token_id, text))

    def _top(self, entry: TokenLogprob) -> bytes:
        return b"[" + b",".join([self._entry(value, token) for value, token in entry.top]) + b"]"


def _join(array: bytearray, items: bytes) -> None:
    """Append JSON array items to others."""
    if items:
        if array:
            array += b","
        array += items


def _finish(stream: RequestStream) -> bytes:
    finish: StreamFinish | None = stream.finish
    if finish is None:
        return b"null"
    if finish.kind == "length":
        return b'{"type":"length","length":%d}' % stream.completion_tokens
    if finish.kind == "stop":
        return b'{"type":"stop","matched":%b}' % _encode(finish.matched)
    return b'{"type":"abort","message":%b,"status_code":null,"err_type":null}' % _encode(finish.message)


def per_sequence(values: Sequence[bool], copies: int) -> tuple[bool, ...]:
    """Each prompt's value, once for each of its copies."""
    return tuple(value for value in values for _ in range(copies))
