"""The same engine on a GPU: the CPU's answers in float32, and no waiting for the device before the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from ziphius.engine.loading import LoadedRank
from ziphius.engine.sampler import SampledTokens, Sampler
from ziphius.ipc.messages import AddRequest, SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

Add = Callable[..., AddRequest]

KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"top_p": 0.9},
    {"top_k": 20, "min_p": 0.01, "temperature": 0.7},
    {"repetition_penalty": 1.4, "frequency_penalty": 0.2, "top_p": 0.95},
    {"min_p": 0.1, "min_new_tokens": 3},
    {"logit_bias": {3: 2.0}, "logprobs": True, "top_logprobs": 2},
    {"logprobs": True},
]


@pytest.fixture
def _waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def sample(logits: torch.Tensor, steps: int) -> list[SampledTokens]:
    rows = np.arange(len(logits))
    sampler = Sampler(len(rows), logits.shape[1], [7], logits.device)
    for row in rows.tolist():
        options: dict[str, Any] = {"max_new_tokens": 100, "seed": row} | KINDS[row % len(KINDS)]
        sampler.start_row(row, [1, 2, 3, 3], [9, 9], SamplingParams(**options))
    return [sampler.sample(logits.clone(), rows) for _ in range(steps)]


@pytest.mark.usefixtures("_waiting_is_an_error")
def test_sampling_launches_without_waiting() -> None:
    sample(torch.randn(64, 1000, device="cuda") * 3, 3)


def test_sampling_gives_the_cpus_tokens() -> None:
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)) * 3
    for there, here in zip(sample(logits.cuda(), 3), sample(logits, 3), strict=True):
        assert there.tokens.tolist() == here.tokens.tolist()
        assert there.logprobs is not None
        assert here.logprobs is not None
        torch.testing.assert_close(there.logprobs.chosen.cpu(), here.logprobs.chosen)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_pages", [None, 40])
def test_answers_are_the_cpus(
    tiny: Any, loaded: LoadedRank, load: Callable[..., LoadedRank], drive: Any, add: Add, overlap: bool, num_pages: Any
) -> None:
    """Greedy and sampled, in chunks, with preemptions where the cache is small, prompts told."""
    on_gpu = load(tiny.folder, device="cuda")
    requests = [
        add(
            str(i),
            [(3 + 7 * i + 5 * j) % 125 + 3 for j in range(5 + 9 * i)],
            **({"max_new_tokens": 40, "seed": i} | KINDS[i] | {"prompt_logprobs_from": 0 if i == 6 else -1}),
        )
        for i in range(len(KINDS))
    ]
    wanted = drive(loaded).run(requests)
    answers = drive(on_gpu, overlap=overlap, num_pages=num_pages, chunked_prefill_size=32).run(requests)
    for rid, answer in answers.items():
        assert answer.token_ids == wanted[rid].token_ids, rid
        assert [one.logprob for one in answer.logprobs] == pytest.approx(
            [one.logprob for one in wanted[rid].logprobs], abs=1e-3
        )
        assert len(answer.prompt_logprobs) == len(wanted[rid].prompt_logprobs)
