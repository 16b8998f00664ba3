"""The sampler against Hugging Face's processors, against definitions, and against itself in other company."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ziphius.engine.penalties import LogitAdjuster
from ziphius.engine.sampler import SampledTokens, Sampler, uniform
from ziphius.ipc.messages import SamplingParams, TokenLogprob

CPU = torch.device("cpu")
VOCAB = 300
EOS = (7,)


def params(**options: Any) -> SamplingParams:
    return SamplingParams(**({"max_new_tokens": 100, "seed": 0} | options))


def sample(logits: Tensor, each: list[SamplingParams], outputs: list[list[int]] | None = None) -> SampledTokens:
    """One step of a fresh sampler; every prompt is [1, 2, 3, 3]."""
    sampler = Sampler(len(each), logits.shape[1], EOS, CPU)
    for row, one in enumerate(each):
        sampler.start_row(row, [1, 2, 3, 3], outputs[row] if outputs else [], one)
    return sampler.sample(logits.clone(), np.arange(len(each)))


def drawn(logits: Tensor, count: int, **options: Any) -> list[int]:
    """`count` draws from one distribution [vocab], by as many seeds."""
    rows = logits.expand(count, -1)
    tokens: list[int] = sample(rows, [params(seed=seed, **options) for seed in range(count)]).tokens.tolist()
    return tokens


def random_logits(rows: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def test_greedy_takes_the_most_likely_and_the_lowest_id_among_equals() -> None:
    logits = random_logits(3)
    logits[1, [40, 50]] = 99.0
    tokens = sample(logits, [params(temperature=0.0), params(temperature=0.0), params(top_k=1)]).tokens
    assert tokens.tolist() == [int(logits[0].argmax()), 40, int(logits[2].argmax())]


def test_repetition_penalty_is_hugging_faces() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = random_logits(1)
    wanted = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[1, 2, 3, 3, 9, 11]]), logits.clone())
    assert_adjusted(logits, wanted, [9, 11], repetition_penalty=1.7)


def test_frequency_and_presence_count_generated_tokens_only() -> None:
    logits = random_logits(1)
    wanted = logits.clone()
    wanted[0, 9] -= 0.5 * 3 + 0.25
    wanted[0, 11] -= 0.5 + 0.25
    assert_adjusted(logits, wanted, [9, 11, 9, 9], frequency_penalty=0.5, presence_penalty=0.25)


def test_penalties_apply_in_their_stated_order_with_bias_last() -> None:
    logits = random_logits(1)
    wanted = logits.clone()
    seen = [1, 2, 3, 9]
    wanted[0, seen] = torch.where(wanted[0, seen] > 0, wanted[0, seen] / 1.3, wanted[0, seen] * 1.3)
    wanted[0, 9] -= 0.7 * 2 + 0.1
    wanted[0, 9] += 4.0
    wanted[0, 20] -= 2.0
    options = {"repetition_penalty": 1.3, "frequency_penalty": 0.7, "presence_penalty": 0.1}
    assert_adjusted(logits, wanted, [9, 9], logit_bias={9: 4.0, 20: -2.0}, **options)


def assert_adjusted(logits: Tensor, wanted: Tensor, output_ids: list[int], **options: Any) -> None:
    adjuster = LogitAdjuster(2, VOCAB, EOS, CPU)
    adjuster.start_row(1, [1, 2, 3, 3], output_ids, params(**options))
    changed = logits.clone()
    adjuster.apply(changed, np.array([1]), np.array([len(output_ids)]))
    torch.testing.assert_close(changed, wanted)


def test_tokens_are_counted_as_they_are_chosen() -> None:
    """A flat distribution under a strong presence penalty visits every token once."""
    sampler = Sampler(3, VOCAB, EOS, CPU)
    for row in range(3):
        sampler.start_row(row, [0], [], params(temperature=0.0, presence_penalty=float(row)))
    chosen = [sampler.sample(torch.zeros(2, VOCAB), np.array([2, 0])).tokens.tolist() for _ in range(20)]
    assert [tokens[0] for tokens in chosen] == list(range(20))
    assert {tokens[1] for tokens in chosen} == {0}


def test_a_row_taken_over_forgets_the_one_before() -> None:
    sampler = Sampler(1, VOCAB, EOS, CPU)
    options: list[dict[str, Any]] = [{"presence_penalty": 1.0, "logit_bias": {5: 3.0}}, {}, {"presence_penalty": 1.0}]
    for option in options:
        sampler.start_row(0, [0], [], params(temperature=0.0, **option))
        first = sampler.sample(torch.zeros(1, VOCAB), np.array([0])).tokens.tolist()
        assert first == [5 if "logit_bias" in option else 0]


def test_end_tokens_wait_for_min_new_tokens() -> None:
    logits = random_logits(1)
    logits[0, 7], logits[0, 30] = 50.0, 60.0
    options = {"temperature": 0.0, "min_new_tokens": 2, "stop_token_ids": [30]}
    best_other = int(logits[0].index_fill(0, torch.tensor([7, 30]), -100.0).argmax())
    assert sample(logits, [params(**options)]).tokens.tolist() == [best_other]
    assert sample(logits, [params(**options)], [[4, 4]]).tokens.tolist() == [30]
    # Ignored, the end token ends nothing, so it is not held back.
    assert sample(logits, [params(**options, ignore_eos=True)]).tokens.tolist() == [7]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"top_k": 12}, {"top_p": 0.8}, {"min_p": 0.05}])
def test_draws_follow_the_distribution(options: dict[str, Any]) -> None:
    """Chi-squared over a few thousand seeds; each filter alone is Hugging Face's."""
    logits = random_logits(1, spread=2.0)[0]
    probabilities = hugging_face_distribution(logits, **options)
    count = 6000
    tokens = torch.tensor(drawn(logits, count, **options))
    observed = torch.bincount(tokens, minlength=VOCAB).double()
    assert observed[probabilities == 0].sum() == 0
    often = probabilities * count > 5
    expected = probabilities[often] * count
    chi_squared = float(((observed[often] - expected) ** 2 / expected).sum())
    freedom = int(often.sum())
    assert chi_squared < freedom + 5 * (2 * freedom) ** 0.5


def hugging_face_distribution(logits: Tensor, **options: Any) -> Tensor:
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    ids, scores = torch.zeros(1, 1, dtype=torch.long), logits[None].clone()
    warpers = {
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    for name, value in options.items():
        scores = warpers[name](value)(ids, scores)
    return torch.softmax(scores[0].double(), dim=-1)


def test_filters_are_judged_together_on_one_distribution() -> None:
    logits = torch.full((1, VOCAB), -50.0)
    weights = torch.tensor([0.4, 0.2, 0.15, 0.1, 0.1, 0.05])
    logits[0, :6] = weights.log()
    # Of the top 4 the nucleus of 0.7 over the whole distribution has three; of the top 4 alone it would have two.
    assert set(drawn(logits[0], 400, top_k=4, top_p=0.7)) == {0, 1, 2}
    assert set(drawn(logits[0], 400, top_k=2, top_p=0.7)) == {0, 1}
    assert set(drawn(logits[0], 400, top_p=0.9, min_p=0.45)) == {0, 1}
    assert set(drawn(logits[0], 400, top_p=0.9, min_p=0.24)) == {0, 1, 2, 3, 4}


def test_tiny_and_huge_temperatures_stay_defined() -> None:
    logits = random_logits(1)[0]
    assert set(drawn(logits, 50, temperature=1e-5)) == {int(logits.argmax())}
    assert len(set(drawn(logits, 200, temperature=1e6))) > 100


def test_a_token_does_not_depend_on_the_rest_of_the_batch() -> None:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {},
        {"top_p": 0.9},
        {"top_k": 20, "min_p": 0.01, "temperature": 0.7},
        {"repetition_penalty": 1.4, "top_p": 0.95},
        {"min_p": 0.1},
        {"logit_bias": {3: 5.0}, "logprobs": True, "top_logprobs": 2},
        {"logprobs": True},
    ]
    each = [params(seed=40 + i, **kind) for i, kind in enumerate(kinds)]
    logits = random_logits(len(each), seed=5)
    together = sample(logits, each)
    alone = [sample(logits[i : i + 1], [one]) for i, one in enumerate(each)]
    assert together.tokens.tolist() == [one.tokens.item() for one in alone]
    assert messages(together) == [message for one in alone for message in messages(one)]
    backwards = sample(logits.flip(0), each[::-1])
    assert backwards.tokens.tolist() == together.tokens.tolist()[::-1]


def messages(sampled: SampledTokens) -> list[TokenLogprob]:
    return [] if sampled.logprobs is None else sampled.logprobs.to_messages(sampled.top_counts)


def test_a_resumed_row_goes_on_as_if_it_had_never_stopped() -> None:
    logits = [random_logits(1, seed=i) for i in range(8)]
    options = params(seed=3, presence_penalty=0.5, top_p=0.9)
    sampler = Sampler(1, VOCAB, EOS, CPU)
    sampler.start_row(0, [1, 2], [], options)
    whole = [int(sampler.sample(step.clone(), np.array([0])).tokens) for step in logits]
    resumed = Sampler(4, VOCAB, EOS, CPU)
    resumed.start_row(2, [1, 2], whole[:5], options)
    assert [int(resumed.sample(step.clone(), np.array([2])).tokens) for step in logits[5:]] == whole[5:]


def test_random_numbers_are_fixed_by_seed_and_index() -> None:
    """Written down: an upgrade must not change what a seed gives. Seed 0 is SplitMix64's published stream."""
    seeds = np.array([0, 0, 1, 2**64 - 1], dtype=np.uint64)
    numbers = uniform(seeds, np.array([0, 1, 0, 1000], dtype=np.int64))
    assert numbers.tolist() == [0.883310808101669, 0.43152799690142274, 0.7497482411563396, 0.9290188977029175]
    many = uniform(np.arange(20000, dtype=np.uint64), np.zeros(20000, dtype=np.int64))
    assert many.min() >= 0.0
    assert many.max() < 1.0
    assert abs(float(many.mean()) - 0.5) < 0.01


def test_negative_seeds_are_seeds_too() -> None:
    logits = random_logits(1)[0]
    assert (
        sample(logits[None], [params(seed=-1)]).tokens.tolist()
        == sample(logits[None], [params(seed=2**64 - 1)]).tokens.tolist()
    )


def test_logprobs_are_the_models_own_whatever_the_sampling() -> None:
    logits = random_logits(2)
    wanted = torch.log_softmax(logits.double(), dim=-1)
    options = {"temperature": 0.5, "repetition_penalty": 2.0, "logit_bias": {17: 100.0}}
    sampled = sample(logits, [params(logprobs=True, top_logprobs=3, **options), params(temperature=0.0)])
    assert sampled.logprobs_of == [0]
    (message,) = messages(sampled)
    assert message.token_id == 17
    assert message.logprob == pytest.approx(float(wanted[0, 17]), abs=1e-5)
    best = wanted[0].topk(3)
    assert [i for _, i in message.top] == best.indices.tolist()
    assert [p for p, _ in message.top] == pytest.approx(best.values.tolist(), abs=1e-5)
