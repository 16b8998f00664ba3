"""Request: one request's tokens, its position and its state."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum

import msgspec

from ziphius.ipc.messages import AddRequest, Finish, RequestOutput, SamplingParams, TokenLogprob
from ziphius.kv_cache.radix_cache import TOKEN_TYPE, RadixNode

NO_ROW = -1


class RequestState(Enum):
    WAITING = "waiting"
    """In the queue, new or preempted. It has no row and no pages."""
    RUNNING = "running"
    """It has a row and pages, and may be part of a step."""
    FINISHED = "finished"
    """Its last output has been sent. It keeps its row and pages while a step in flight uses them."""


@dataclass(slots=True)
class Holding:
    """A running request's pages. Written by `RequestPages` only."""

    node: RadixNode
    """The node where its pages in the prefix cache end. It is locked."""
    pages: list[int]
    """Its page table."""
    num_shared: int
    """This many of the first `pages` belong to the prefix cache, the rest to the request."""

    @property
    def num_private(self) -> int:
        return len(self.pages) - self.num_shared


@dataclass(slots=True, eq=False)
class Request:
    """One request from `add` to its terminal output, and a little longer while a step is in flight.

    Invariant: 0 <= computed <= launched <= len(tokens) + samples_in_flight. The KV of the last sampled token is
    computed by the next step, so a finished request has the KV of all tokens but that one.
    """

    rid: str
    sampling: SamplingParams
    tokens: array[int]
    """Prompt and answer."""
    prompt_length: int
    max_length: int
    """The most tokens that prompt and answer may have together."""
    stop_ids: frozenset[int]
    state: RequestState = RequestState.WAITING
    row: int = NO_ROW
    holding: Holding | None = None
    prefill_end: int = 0
    """Tokens to compute in chunks since it was last admitted; what follows is decode."""
    launched: int = 0
    """Tokens whose KV is computed or in flight."""
    computed: int = 0
    """Tokens whose KV a finished step has computed."""
    steps_in_flight: int = 0
    samples_in_flight: int = 0
    keeps_prefix: bool = True
    """False once a step with it has failed: its pages must not be reused."""
    cached_tokens: int | None = None
    """How many tokens came from the prefix cache when it was first admitted; None before."""
    preemptions: int = 0
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """Collected, and not yet sent."""

    @classmethod
    def from_message(cls, add: AddRequest, context_length: int, eos_token_ids: frozenset[int]) -> Request:
        """Prompt and answer end at `context_length` tokens. OverflowError for an id beyond 64 bits."""
        sampling = add.sampling
        stop_ids = frozenset() if sampling.ignore_eos else eos_token_ids
        return cls(
            rid=add.rid,
            sampling=sampling,
            tokens=array(TOKEN_TYPE, add.prompt_ids),
            prompt_length=len(add.prompt_ids),
            max_length=min(len(add.prompt_ids) + sampling.max_new_tokens, context_length),
            stop_ids=stop_ids.union(sampling.stop_token_ids) if sampling.stop_token_ids else stop_ids,
        )

    @property
    def is_prefilling(self) -> bool:
        return self.launched < self.prefill_end

    @property
    def last_token_is_in_flight(self) -> bool:
        """Whether the steps in flight will give it all tokens that it may have."""
        return len(self.tokens) + self.samples_in_flight >= self.max_length

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt log-probabilities must still be sent. They go out with the first token."""
        return self.sampling.prompt_logprobs_from >= 0 and len(self.tokens) == self.prompt_length

    @property
    def max_cached_tokens(self) -> int:
        """The most tokens that may come from the prefix cache. The rest must be computed for its logits."""
        if self.wants_prompt_logprobs:
            return min(len(self.tokens) - 1, max(0, self.sampling.prompt_logprobs_from - 1))
        return len(self.tokens) - 1

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.prompt_length

    def begin(self, row: int, cached_tokens: int) -> None:
        """Admit it to `row`. The KV of its first `cached_tokens` is in the cache already."""
        self.state = RequestState.RUNNING
        self.row = row
        self.prefill_end = len(self.tokens)
        self.launched = self.computed = cached_tokens
        self.prompt_logprobs.clear()
        if self.cached_tokens is None:
            self.cached_tokens = cached_tokens

    def requeue(self) -> None:
        """Preempt it. A step in flight may still give it a token; the rest is computed again."""
        self.state = RequestState.WAITING
        self.prefill_end = self.launched = self.computed = 0
        self.preemptions += 1

    def launch(self, num_tokens: int) -> LaunchedRow:
        """Put its next `num_tokens` into a step."""
        self.launched += num_tokens
        self.steps_in_flight += 1
        samples = self.launched >= self.prefill_end and not self.last_token_is_in_flight
        self.samples_in_flight += samples
        return LaunchedRow(self, self.row, self.launched, samples)

    def land(self, launch: LaunchedRow) -> None:
        """Take in that a step has ended."""
        self.steps_in_flight -= 1
        self.samples_in_flight -= launch.samples
        if self.holding is not None:
            # For an aborted request, a step may end after the tokens that were kept.
            self.computed = min(launch.end, len(self.tokens))

    def finish_after(self, token_id: int) -> Finish | None:
        """Whether the answer ends with `token_id`, its newest token."""
        if token_id in self.stop_ids and self.num_output_tokens > self.sampling.min_new_tokens:
            return Finish(kind="stop", matched=token_id)
        if len(self.tokens) >= self.max_length:
            return Finish(kind="length")
        return None

    def sampling_for_row(self) -> SamplingParams:
        """The sampling parameters for the ranks. A resumed request does not ask for prompt log-probabilities again."""
        if self.sampling.prompt_logprobs_from >= 0 and not self.wants_prompt_logprobs:
            return msgspec.structs.replace(self.sampling, prompt_logprobs_from=-1)
        return self.sampling

    def output(
        self, token_ids: list[int], logprob: TokenLogprob | None = None, finish: Finish | None = None
    ) -> RequestOutput:
        """Its output for one step, with the prompt log-probabilities collected so far."""
        prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, []
        return RequestOutput(
            rid=self.rid,
            token_ids=token_ids,
            logprobs=[] if logprob is None else [logprob],
            prompt_logprobs=prompt_logprobs,
            cached_tokens=self.cached_tokens or 0,
            preemptions=self.preemptions,
            finish=finish,
        )


class LaunchedRow(msgspec.Struct, frozen=True):
    """One request's part of a step in flight. A Struct, because one is made for each row of each step."""

    request: Request
    row: int
    end: int
    """How many of its tokens are in the cache after the step."""
    samples: bool
