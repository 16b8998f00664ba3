"""Log-probabilities in OpenAI's two shapes, as JSON."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ziphius.ipc.messages import TokenLogprob
from ziphius.tokenizer.tokenizer import Tokenizer

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot express. OpenAI uses the same number."""

_encode = msgspec.json.Encoder().encode


class _TopLogprob(msgspec.Struct):
    token: str
    bytes: list[int]
    logprob: float


class _ChatLogprob(msgspec.Struct):
    token: str
    bytes: list[int]
    logprob: float
    top_logprobs: list[_TopLogprob]


class _CompletionLogprobs(msgspec.Struct):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


def finite(logprob: float) -> float:
    return max(logprob, LOWEST)


def chat_logprobs(entries: Sequence[TokenLogprob], tokenizer: Tokenizer) -> list[bytes]:
    """One JSON object for each token of a chat answer."""
    text, raw = tokenizer.token_text, tokenizer.token_bytes
    return [
        _encode(
            _ChatLogprob(
                text(entry.token_id),
                list(raw(entry.token_id)),
                finite(entry.logprob if entry.logprob is not None else LOWEST),
                [_TopLogprob(text(token), list(raw(token)), finite(value)) for value, token in entry.top],
            )
        )
        for entry in entries
    ]


def completion_logprobs(entries: Sequence[TokenLogprob], tokenizer: Tokenizer, offset: int) -> tuple[bytes, int]:
    """The `logprobs` object for some tokens of a completion, and the character where they end.

    `offset`: the character where they begin.
    """
    logprobs = _CompletionLogprobs([], [], [], [])
    any_top = any(entry.top for entry in entries)
    for entry in entries:
        text = tokenizer.token_text(entry.token_id)
        logprobs.text_offset.append(offset)
        logprobs.token_logprobs.append(None if entry.logprob is None else finite(entry.logprob))
        logprobs.tokens.append(text)
        if any_top:
            # Several tokens may have the same text: the likeliest comes first and is kept
            best: dict[str, float] = {}
            for value, token in entry.top:
                best.setdefault(tokenizer.token_text(token), finite(value))
            logprobs.top_logprobs.append(best or None)
        offset += len(text)
    return _encode(logprobs), offset
