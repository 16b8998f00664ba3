"""What an answer of /generate holds, for /openapi.json; `sglang_format` writes the bytes itself."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

TokenEntry = tuple[float | None, int, str | None]
"""Log-probability, token id, the token's text."""


class Length(msgspec.Struct, frozen=True, tag="length"):
    """The answer has as many tokens as were asked for."""

    length: int


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """The answer ended with an end token's id or a stop string."""

    matched: int | str | None


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Somebody ended the request."""

    message: str | None
    status_code: None
    err_type: None


class CachedTokens(msgspec.Struct, frozen=True):
    """How many tokens of the prompt came from the prefix cache, by where they were."""

    device: int
    host: int


class MetaInfo(msgspec.Struct, frozen=True):
    """Times are seconds; those with `_ts` are seconds since the epoch."""

    id: str
    finish_reason: Length | Stop | Abort | None
    prompt_tokens: int
    weight_version: str
    num_retractions: int
    reasoning_tokens: int
    completion_tokens: int
    cached_tokens: int
    cached_tokens_details: CachedTokens | None
    dp_rank: None
    # With return_logprob:
    input_token_logprobs: list[TokenEntry] | UnsetType = UNSET
    input_top_logprobs: list[list[TokenEntry] | None] | UnsetType = UNSET
    output_token_logprobs: list[TokenEntry] | UnsetType = UNSET
    output_token_logprobs_length: int | UnsetType = UNSET
    output_top_logprobs: list[list[TokenEntry]] | UnsetType = UNSET
    # Once the answer has ended:
    e2e_latency: float | UnsetType = UNSET
    first_token_latency: float | UnsetType = UNSET
    request_received_ts: float | UnsetType = UNSET
    request_finished_ts: float | UnsetType = UNSET
    response_sent_to_client_ts: float | UnsetType = UNSET
    decode_throughput: float | UnsetType = UNSET


class GenerateAnswer(msgspec.Struct, frozen=True):
    text: str
    output_ids: list[int]
    meta_info: MetaInfo
    prompt_token_ids: list[int] | UnsetType = UNSET
