"""What crosses a process boundary: typed messages that hold integers and strings, and no tensors.

Frontend -> rank 0:   AddRequest, AbortRequest, FlushCache, Shutdown
rank 0 -> frontend:   LoadProgress, Ready, StepOutput, FlushResult, EngineStats, Fatal
rank 0 -> ranks > 0:  RankMessage, which holds a ScheduledBatch or Shutdown
rank -> frontend:     Beat, RankFailed
"""

from __future__ import annotations

from typing import Literal

import msgspec

FinishKind = Literal["stop", "length", "abort", "error"]
"""`stop`: an end token; `length`: max_new_tokens or the context; `abort`: it was aborted; `error`: it failed."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How one request's tokens are chosen. Validated where it is parsed; the engine trusts it.

    `seed` is never None here: the frontend draws one when the caller gave none, so that a
    preempted request repeats its own choices. Stop *strings* live in the frontend, which has the text.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 1.0
    """0 means greedy."""
    top_p: float = 1.0
    top_k: int = -1
    """-1 means the whole vocabulary."""
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int
    stop_token_ids: list[int] = []
    """In addition to the model's own end tokens."""
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    """How many alternatives to report per position (only with `logprobs`)."""
    prompt_logprobs_from: int = -1
    """First prompt position whose log-probability is wanted; -1: none."""


class AddRequest(msgspec.Struct, tag=True, kw_only=True):
    rid: str
    prompt_ids: list[int]
    sampling: SamplingParams


class AbortRequest(msgspec.Struct, tag=True, kw_only=True):
    """Ends one request. rank 0 answers with a terminal output unless the request has already ended."""

    rid: str


class FlushCache(msgspec.Struct, tag=True):
    """Empties the prefix cache; answered by FlushResult. Refused while requests run."""


class Shutdown(msgspec.Struct, tag=True):
    """rank 0 ends its loop at once; running requests get an `abort`."""


class TokenLogprob(msgspec.Struct, array_like=True):
    logprob: float | None
    """None for the first prompt token, which nothing predicts."""
    token_id: int
    top: list[tuple[float, int]] = []
    """The most likely (log-probability, token id), best first."""


class Finish(msgspec.Struct, array_like=True):
    kind: FinishKind
    matched: int | None = None
    """The end token's id, for `stop`."""
    message: str | None = None
    """What went wrong, for `error` and `abort`."""


class RequestOutput(msgspec.Struct, array_like=True, kw_only=True):
    """What one step produced for one request. `finish` is set exactly once, in the request's last output."""

    rid: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] = []
    """One for each of `token_ids`, where asked for."""
    prompt_logprobs: list[TokenLogprob] = []
    """In the first output only, when the request asks for them."""
    cached_tokens: int = 0
    """How many prompt tokens came from the prefix cache (the same in each output of a request)."""
    preemptions: int = 0
    finish: Finish | None = None


class EngineStats(msgspec.Struct, tag=True, kw_only=True):
    """Gauges of rank 0, sent with the steps, at most a few times a second, and once when it becomes idle."""

    running: int = 0
    queued: int = 0
    pages_total: int = 0
    pages_free: int = 0
    pages_cached: int = 0
    page_size: int = 1
    prompt_tokens: int = 0
    """Since start, prompts of admitted requests (cached ones included)."""
    cached_tokens: int = 0
    """Since start, prompt tokens found in the prefix cache."""
    generated_tokens: int = 0
    preemptions: int = 0
    steps: int = 0


class StepOutput(msgspec.Struct, tag=True, kw_only=True):
    """All outputs of one step, in one message."""

    outputs: list[RequestOutput]


class FlushResult(msgspec.Struct, tag=True, kw_only=True):
    flushed: bool
    reason: str | None = None


class LoadProgress(msgspec.Struct, tag=True, kw_only=True):
    """`phase` is a short word for a person: loading, kernels, cache, capturing, warm-up."""

    phase: str
    done: int = 0
    total: int = 0
    unit: str = ""
    detail: str = ""


class Ready(msgspec.Struct, tag=True, kw_only=True):
    """The engine is loaded and has generated a first token. The numbers are measured, not predicted."""

    context_length: int
    kv_tokens: int
    kv_bytes_per_token: int
    weight_bytes: int
    load_seconds: float
    device: str
    vocab_size: int
    max_running_requests: int
    predicted_weight_bytes: int = 0
    predicted_kv_tokens: int = 0


class Fatal(msgspec.Struct, tag=True, kw_only=True):
    """rank 0 cannot go on; the process ends after this message."""

    error: str
    """The class name in ziphius.errors."""
    message: str


ToEngine = AddRequest | AbortRequest | FlushCache | Shutdown
FromEngine = LoadProgress | Ready | StepOutput | FlushResult | EngineStats | Fatal


class NewRow(msgspec.Struct, array_like=True, kw_only=True):
    """A new request in row `row` of the ranks' request table (page table, last token, sampling state)."""

    row: int
    pages: list[int]
    """Pages already holding the row's first `cached` tokens (from the prefix cache)."""
    prompt_ids: list[int]
    output_ids: list[int]
    """What the request had generated before it was preempted; [] for a new request."""
    sampling: SamplingParams


class RowWork(msgspec.Struct, array_like=True, kw_only=True):
    """One row's part of a step: compute `token_ids` at `position`..., or the one token sampled last."""

    row: int
    position: int
    """Tokens of this row already in the cache."""
    token_ids: list[int]
    """A chunk of the prompt; [] for decode, where the input is the row's last sampled token on the device."""
    new_pages: list[int]
    """Appended to the row's page table before the step."""
    sample: bool
    """False for a chunk that does not reach the end of its prompt."""


class ScheduledBatch(msgspec.Struct, tag=True, kw_only=True):
    """One step, decided by rank 0, in integers. Decode rows come first, in one block."""

    step: int
    new_rows: list[NewRow]
    work: list[RowWork]


class RankMessage(msgspec.Struct, array_like=True):
    """What rank 0 sends to every other rank. `sequence` counts from 0: a gap means that a message was lost."""

    sequence: int
    content: ScheduledBatch | Shutdown


class Beat(msgspec.Struct, tag=True, kw_only=True):
    """A sign of life of a rank. Its own thread sends it at short intervals, whatever the rank does."""

    rank: int
    phase: str
    """What the rank is doing, in words for a person: starting, loading, ..., serving."""
    busy: bool = False
    """Whether the rank is in the middle of a step."""
    collectives: int = 0
    """How many the rank has entered. When ranks wait for each other, the lowest count is to blame."""


class RankFailed(msgspec.Struct, tag=True, kw_only=True):
    """A rank cannot go on; its process ends after this message."""

    rank: int
    error: str
    """The class name in ziphius.errors."""
    message: str


FromRank = Beat | RankFailed
