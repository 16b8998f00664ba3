"""LLM: the engine in the caller's own process, without a server."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ziphius.checkpoint.checkpoint import open_configured
from ziphius.config import resolve
from ziphius.engine.channel import MemoryChannel
from ziphius.engine.loading import load_rank
from ziphius.errors import ContextLengthExceeded, EngineFailed, InvalidRequest, ModelError
from ziphius.installation import ziphius_home
from ziphius.ipc.messages import (
    AbortRequest,
    AddRequest,
    FinishKind,
    LoadProgress,
    RequestOutput,
    SamplingParams,
    StepOutput,
    TokenLogprob,
)
from ziphius.tokenizer.tokenizer import Tokenizer

_DEFAULT_NEW_TOKENS = 128

Prompt = str | Sequence[int]
"""Text, or token ids."""


@dataclass(slots=True)
class Completion:
    """One answer."""

    prompt_ids: list[int]
    text: str = ""
    """Without special tokens; "" when the checkpoint has no tokenizer."""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishKind = "length"
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """One for each of `token_ids`, when the sampling parameters ask for them."""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    cached_tokens: int = 0
    """How many of the prompt's tokens came from the prefix cache."""


class LLM:
    """A model, loaded once: `LLM("SmolLM2-135M-Instruct").generate(["Once upon a time"])`.

    `model` is a model id or a folder, and `options` are those of `ziphius serve` (context_length=..., dtype=...).
    Raises ConfigError, ModelError or DoesNotFit when the model cannot be loaded. Only one thread at a time may use it.
    """

    def __init__(self, model: str, **options: Any) -> None:
        config = resolve({"model": model, **options}, env={}).config
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        checkpoint = open_configured(config, ziphius_home(os.environ))
        self.tokenizer = None if checkpoint.tokenizer is None else Tokenizer.from_files(checkpoint.tokenizer)
        loaded = load_rank(config, checkpoint, _ignore)
        self.context_length = loaded.ready.context_length
        self.vocab_size = loaded.ready.vocab_size
        self._channel = MemoryChannel()
        self._engine = loaded.make_engine(self._channel)
        self._request_ids = itertools.count()

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Complete `prompts`, which are computed together. The answers have the order of the prompts.

        `sampling`: one for all prompts, or one for each. Without it: 128 tokens at temperature 1, with random seeds.
        Raises InvalidRequest or ContextLengthExceeded before anything runs, and EngineFailed when a step failed.
        """
        every = _prompt_list(prompts)
        each = _sampling_list(sampling, len(every))
        requests: dict[str, AddRequest] = {}
        for prompt, one in zip(every, each, strict=True):
            rid = str(next(self._request_ids))
            requests[rid] = AddRequest(rid=rid, prompt_ids=self._encode(prompt), sampling=self._checked(one))
        return self._run(requests)

    def chat(self, messages: Sequence[Mapping[str, Any]], sampling: SamplingParams | None = None) -> Completion:
        """The assistant's answer to `messages` ({"role": ..., "content": ...}), through the model's chat template."""
        tokenizer = self._tokenizer()
        if tokenizer.chat is None:
            raise InvalidRequest("this checkpoint has no chat template")
        text = tokenizer.chat.render(messages)
        return self.generate([tokenizer.encode(text, add_special_tokens=False)], sampling)[0]

    def _run(self, requests: Mapping[str, AddRequest]) -> list[Completion]:
        completions = {rid: Completion(request.prompt_ids) for rid, request in requests.items()}
        unfinished = set(requests)
        failures: list[str] = []
        self._channel.to_engine.extend(requests.values())
        try:
            while unfinished:
                self._engine.turn()
                for output in self._outputs():
                    _take(completions[output.rid], output)
                    if output.finish is not None:
                        unfinished.discard(output.rid)
                        if output.finish.kind == "error":
                            failures.append(output.finish.message or "the engine failed")
        finally:
            self._abort(unfinished)
        if failures:
            raise EngineFailed(failures[0])
        for completion in completions.values():
            if self.tokenizer is not None:
                completion.text = self.tokenizer.decode(completion.token_ids)
        return list(completions.values())

    def _outputs(self) -> list[RequestOutput]:
        outputs: list[RequestOutput] = []
        while self._channel.from_engine:
            message = self._channel.from_engine.popleft()
            if isinstance(message, StepOutput):
                outputs += message.outputs
        return outputs

    def _abort(self, rids: set[str]) -> None:
        """End these requests after an interruption: the next `generate` must find an empty engine."""
        if rids:
            self._channel.to_engine.extend(AbortRequest(rid=rid) for rid in rids)
            self._engine.turn()
            self._channel.from_engine.clear()

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ModelError("this checkpoint has no tokenizer; give token ids")
        return self.tokenizer

    def _encode(self, prompt: Prompt) -> list[int]:
        ids = self._tokenizer().encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise InvalidRequest("a prompt has no tokens")
        if not all(0 <= i < self.vocab_size for i in ids):
            raise InvalidRequest(f"a prompt has a token id outside 0..{self.vocab_size - 1}")
        if len(ids) >= self.context_length:
            raise ContextLengthExceeded(
                f"a prompt has {len(ids)} tokens; with an answer, {self.context_length} fit into the context"
            )
        return ids

    def _checked(self, sampling: SamplingParams) -> SamplingParams:
        if not all(0 <= i < self.vocab_size for i in sampling.logit_bias):
            raise InvalidRequest(f"logit_bias has a token id outside 0..{self.vocab_size - 1}", param="logit_bias")
        return sampling


def _take(completion: Completion, output: RequestOutput) -> None:
    completion.token_ids += output.token_ids
    completion.logprobs += output.logprobs
    completion.prompt_logprobs += output.prompt_logprobs
    completion.cached_tokens = output.cached_tokens
    if output.finish is not None:
        completion.finish_reason = output.finish.kind


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A single prompt counts as a list of one."""
    if isinstance(prompts, str):
        return [prompts]
    return [list(prompts)] if any(isinstance(p, int) for p in prompts) else list(prompts)  # type: ignore[arg-type]


def _sampling_list(sampling: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if sampling is None:
        return [SamplingParams(max_new_tokens=_DEFAULT_NEW_TOKENS, seed=random.getrandbits(63)) for _ in range(count)]
    if isinstance(sampling, SamplingParams):
        return [sampling] * count
    if len(sampling) != count:
        raise InvalidRequest(f"{count} prompts, but {len(sampling)} sampling parameters", param="sampling")
    return list(sampling)


def _ignore(progress: LoadProgress) -> None:
    """Progress of loading is not shown."""
