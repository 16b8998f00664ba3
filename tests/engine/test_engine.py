"""The engine end to end in one process: scheduler, runner, model and sampler, against transformers."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ziphius.engine.loading import LoadedRank
from ziphius.ipc.messages import (
    AbortRequest,
    AddRequest,
    EngineStats,
    FlushCache,
    FlushResult,
    Shutdown,
    TokenLogprob,
)

Add = Callable[..., AddRequest]
Drive = Callable[..., Any]

VOCAB = 128


def prompt(length: int, seed: int = 0) -> list[int]:
    source = random.Random(f"{seed} {length}")
    return [source.randrange(3, VOCAB) for _ in range(length)]


@pytest.mark.parametrize("overlap", [False, True])
def test_greedy_text_is_transformers_in_mixed_batches(
    tiny: Any, loaded: LoadedRank, drive: Drive, add: Add, overlap: bool
) -> None:
    """64 tokens for prompts of many lengths at once, in chunks of 16, begun at different times."""
    prompts = {str(length): prompt(length) for length in (1, 3, 16, 17, 60, 100)}
    driver = drive(loaded, overlap=overlap, chunked_prefill_size=16, max_running_requests=4)
    for rid, ids in prompts.items():
        driver.send(add(rid, ids, max_new_tokens=64))
        driver.turn()
    answers = driver.finish()
    for rid, ids in prompts.items():
        assert answers[rid].token_ids == tiny.generate(ids, 64), rid
        assert answers[rid].finish.kind == "length"


@pytest.mark.parametrize("overlap", [False, True])
def test_prefix_cache_hits_change_nothing(tiny: Any, loaded: LoadedRank, drive: Drive, add: Add, overlap: bool) -> None:
    shared = prompt(50)
    driver = drive(loaded, overlap=overlap)
    first = driver.run([add("first", shared)])["first"]
    follow_up = shared + first.token_ids + prompt(5)
    answers = driver.run([add("again", shared), add("follow-up", follow_up), add("short", shared[:21])])
    assert first.cached_tokens == 0
    assert answers["again"].cached_tokens == 48
    assert answers["follow-up"].cached_tokens == 64
    assert answers["short"].cached_tokens == 20
    assert answers["again"].token_ids == first.token_ids == tiny.generate(shared, 16)
    assert answers["follow-up"].token_ids == tiny.generate(follow_up, 16)
    assert answers["short"].token_ids == tiny.generate(shared[:21], 16)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_preempted_requests_resume_unchanged(
    tiny: Any, loaded: LoadedRank, drive: Drive, add: Add, overlap: bool, prefix_cache: bool
) -> None:
    """A cache of 80 tokens for three requests of 60: sampled ones repeat their own choices, penalties included."""
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {},
        "sampled": {"temperature": 0.8, "seed": 5, "top_p": 0.9},
        "penalized": {"temperature": 0.7, "seed": 6, "presence_penalty": 0.8, "repetition_penalty": 1.2},
    }
    requests = [add(rid, prompt(20, seed=i), max_new_tokens=40, **kind) for i, (rid, kind) in enumerate(kinds.items())]
    calm = drive(loaded).run(requests)
    tight = drive(loaded, overlap=overlap, num_pages=20, prefix_cache=prefix_cache).run(requests)
    assert sum(answer.preemptions for answer in tight.values()) > 0
    for rid, answer in calm.items():
        assert answer.preemptions == 0
        assert tight[rid].token_ids == answer.token_ids, rid
    assert calm["greedy"].token_ids == tiny.generate(requests[0].prompt_ids, 40)


def test_a_seed_gives_the_same_answer_in_any_company(loaded: LoadedRank, drive: Drive, add: Add) -> None:
    wanted = add("wanted", prompt(30), max_new_tokens=30, temperature=1.0, seed=11)
    alone = drive(loaded).run([wanted])["wanted"].token_ids
    others = [add(str(i), prompt(10 + i, seed=i), max_new_tokens=25, temperature=1.0, seed=i) for i in range(6)]
    driver = drive(loaded, chunked_prefill_size=13)
    driver.send(*others)
    for _ in range(7):
        driver.turn()
    answers = driver.run([wanted])
    assert answers["wanted"].token_ids == alone
    other_seed = add("other", prompt(30), max_new_tokens=30, temperature=1.0, seed=12)
    assert drive(loaded).run([other_seed])["other"].token_ids != alone


def test_stop_ids_end_an_answer(tiny: Any, loaded: LoadedRank, drive: Drive, add: Add) -> None:
    ids = prompt(12)
    text = tiny.generate(ids, 16)
    stop = text[5]
    at = text.index(stop)
    answers = drive(loaded).run(
        [
            add("stop", ids, stop_token_ids=[stop]),
            add("later", ids, stop_token_ids=[stop], min_new_tokens=at + 3),
            add("one", ids, max_new_tokens=1),
            add("none", ids, max_new_tokens=0),
        ]
    )
    assert answers["stop"].token_ids == text[: at + 1]
    assert (answers["stop"].finish.kind, answers["stop"].finish.matched) == ("stop", stop)
    assert stop not in answers["later"].token_ids[: at + 3]
    assert answers["one"].token_ids == text[:1]
    assert answers["none"].token_ids == []
    assert {answers[rid].finish.kind for rid in ("one", "none")} == {"length"}


def test_the_models_end_token_ends_an_answer_unless_ignored(loaded: LoadedRank, drive: Drive, add: Add) -> None:
    end = loaded.checkpoint.config.eos_token_ids[0]
    answers = drive(loaded).run(
        [
            add("ends", prompt(9), logit_bias={end: 1000.0}, ignore_eos=False),
            add("ignores", prompt(9), logit_bias={end: 1000.0}, max_new_tokens=3),
            add("waits", prompt(9), logit_bias={end: 1000.0}, ignore_eos=False, min_new_tokens=4),
        ]
    )
    assert (answers["ends"].token_ids, answers["ends"].finish.matched) == ([end], end)
    assert answers["ignores"].token_ids == [end] * 3
    assert len(answers["waits"].token_ids) == 5
    assert answers["waits"].token_ids.index(end) == 4


@pytest.mark.parametrize("overlap", [False, True])
def test_logprobs_are_transformers(tiny: Any, loaded: LoadedRank, drive: Drive, add: Add, overlap: bool) -> None:
    ids = prompt(30)
    answers = drive(loaded, overlap=overlap).run(
        [
            add("wanted", ids, logprobs=True, top_logprobs=4),
            add("sampled", ids, logprobs=True, temperature=1.3, seed=2),
            add("silent", prompt(7)),
        ]
    )
    assert answers["silent"].logprobs == []
    for rid, top in (("wanted", 4), ("sampled", 0)):
        answer = answers[rid]
        wanted = torch.log_softmax(tiny.logits(ids + answer.token_ids).double(), dim=-1)[len(ids) - 1 : -1]
        assert [told.token_id for told in answer.logprobs] == answer.token_ids
        assert_told(answer.logprobs, wanted, top)


@pytest.mark.parametrize("first", [0, 1, 9, 39])
def test_prompt_logprobs_are_transformers(tiny: Any, loaded: LoadedRank, drive: Drive, add: Add, first: int) -> None:
    """In chunks of 16, with the prompt in the prefix cache, beside others."""
    ids = prompt(40)
    driver = drive(loaded, chunked_prefill_size=16)
    driver.run([add("before", ids)])
    answers = driver.run(
        [
            add("other", prompt(30, seed=9)),
            add("wanted", ids, prompt_logprobs_from=first, logprobs=True, top_logprobs=2, max_new_tokens=3),
        ]
    )
    answer = answers["wanted"]
    told = answer.prompt_logprobs
    assert [one.token_id for one in told] == ids[first:]
    assert len(answer.logprobs) == 3
    if first == 0:
        assert told[0] == TokenLogprob(logprob=None, token_id=ids[0])
        told = told[1:]
    wanted = torch.log_softmax(tiny.logits(ids).double(), dim=-1)[max(first, 1) - 1 : -1]
    assert_told(told, wanted, 2)


def test_a_preempted_prompt_tells_its_logprobs_once(tiny: Any, loaded: LoadedRank, drive: Drive, add: Add) -> None:
    requests = [
        add(str(i), prompt(20, seed=i), max_new_tokens=40, prompt_logprobs_from=0, logprobs=True) for i in range(3)
    ]
    answers = drive(loaded, num_pages=20, chunked_prefill_size=8).run(requests)
    assert sum(answer.preemptions for answer in answers.values()) > 0
    for request in requests:
        told = answers[request.rid].prompt_logprobs
        assert [one.token_id for one in told] == request.prompt_ids
        wanted = torch.log_softmax(tiny.logits(request.prompt_ids).double(), dim=-1)
        assert_told(told[1:], wanted[:-1], 0)


def assert_told(told: list[TokenLogprob], wanted: torch.Tensor, top: int) -> None:
    """`wanted` [positions, vocab]: log-probabilities."""
    assert len(told) == len(wanted)
    for one, row in zip(told, wanted, strict=True):
        assert one.logprob == pytest.approx(float(row[one.token_id]), abs=1e-4)
        assert [value for value, _ in one.top] == pytest.approx(row.topk(top).values.tolist(), abs=1e-4)
        assert [float(row[i]) for _, i in one.top] == pytest.approx([value for value, _ in one.top], abs=1e-4)


@pytest.mark.parametrize(
    "penalties",
    [{"repetition_penalty": 1.5}, {"repetition_penalty": 0.8}],
)
def test_penalized_greedy_text_is_transformers(
    tiny: Any, loaded: LoadedRank, drive: Drive, add: Add, penalties: dict[str, float]
) -> None:
    ids = prompt(25)
    answers = drive(loaded).run([add("penalized", ids, max_new_tokens=40, **penalties), add("plain", ids)])
    assert answers["penalized"].token_ids == tiny.generate(ids, 40, **penalties)
    assert answers["plain"].token_ids == tiny.generate(ids, 16)


@pytest.mark.parametrize("overlap", [False, True])
def test_an_abort_ends_a_request_and_frees_its_pages(
    loaded_llama: LoadedRank, drive: Drive, add: Add, overlap: bool
) -> None:
    driver = drive(loaded_llama, overlap=overlap, prefix_cache=False)
    driver.send(add("gone", prompt(30), max_new_tokens=400), add("stays", prompt(20), max_new_tokens=30))
    for _ in range(5):
        driver.turn()
    driver.send(AbortRequest(rid="gone"), AbortRequest(rid="never was"))
    answers = driver.finish()
    assert answers["gone"].finish.kind == "abort"
    assert 0 < len(answers["gone"].token_ids) < 10
    assert len(answers["stays"].token_ids) == 30
    stats = [message for message in driver.others if isinstance(message, EngineStats)][-1]
    assert (stats.running, stats.queued, stats.pages_free) == (0, 0, stats.pages_total)


def test_flush_is_refused_while_requests_run(loaded_llama: LoadedRank, drive: Drive, add: Add) -> None:
    driver = drive(loaded_llama)
    driver.send(add("busy", prompt(30)))
    driver.turn()
    driver.send(FlushCache())
    driver.finish()
    driver.send(FlushCache())
    driver.finish()
    results = [message for message in driver.others if isinstance(message, FlushResult)]
    assert [result.flushed for result in results] == [False, True]
    assert results[0].reason
    stats = driver.others[-1]
    assert isinstance(stats, EngineStats)
    assert stats.pages_free == stats.pages_total


def test_an_impossible_prompt_gets_an_error_and_the_engine_goes_on(
    loaded_llama: LoadedRank, drive: Drive, add: Add
) -> None:
    answers = drive(loaded_llama).run([add("long", prompt(600)), add("fits", prompt(500), max_new_tokens=100)])
    assert answers["long"].finish.kind == "error"
    assert "512" in answers["long"].finish.message
    # The context ends it before its 100 tokens.
    assert (answers["fits"].finish.kind, len(answers["fits"].token_ids)) == ("length", 12)


@pytest.mark.parametrize("overlap", [False, True])
def test_shutdown_loses_nothing(loaded_llama: LoadedRank, drive: Drive, add: Add, overlap: bool) -> None:
    driver = drive(loaded_llama, overlap=overlap, max_running_requests=2)
    driver.send(*(add(str(i), prompt(10), max_new_tokens=300) for i in range(5)))
    for _ in range(3):
        driver.turn()
    driver.send(Shutdown())
    driver.engine.run()
    driver.read()
    assert [answer.finish.kind for answer in driver.answers.values()] == ["abort"] * 5
    assert all("shutting down" in answer.finish.message for answer in driver.answers.values())


def test_gauges_come_at_once_then_seldom_and_when_idle(loaded_llama: LoadedRank, drive: Drive, add: Add) -> None:
    driver = drive(loaded_llama)
    driver.run([add("a", prompt(10), max_new_tokens=30)])
    stats = [message for message in driver.others if isinstance(message, EngineStats)]
    assert stats[0].running == 1
    assert (stats[-1].running, stats[-1].generated_tokens, stats[-1].steps) == (0, 30, 30)
    for _ in range(3):
        driver.turn()
    assert len([message for message in driver.others if isinstance(message, EngineStats)]) == len(stats)
