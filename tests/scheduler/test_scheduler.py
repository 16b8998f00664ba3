"""What the scheduler puts into a step and how requests end, scenario by scenario."""

from __future__ import annotations

import pytest

from ziphius.ipc.messages import AddRequest, SamplingParams
from ziphius.scheduler.scheduler import Sampled, Scheduler, StepResult

EOS = 99


def new_scheduler(**settings):
    defaults = {
        "num_pages": 16,
        "page_size": 4,
        "max_running_requests": 4,
        "chunked_prefill_size": 8,
        "context_length": 64,
        "eos_token_ids": (EOS,),
    }
    return Scheduler(**{**defaults, **settings})


def add(scheduler, rid, prompt, max_new_tokens=3, **sampling):
    params = SamplingParams(max_new_tokens=max_new_tokens, seed=0, **sampling)
    scheduler.add(AddRequest(rid=rid, prompt_ids=list(prompt), sampling=params))


def land(scheduler, batch, token=1):
    """Every row that samples gets `token`."""
    return scheduler.update(batch, StepResult({w.row: Sampled(token, None) for w in batch.work if w.sample}))


def step(scheduler, token=1):
    return land(scheduler, scheduler.schedule(), token)


def work(batch):
    """(row, position, number of prompt tokens, samples) of each part."""
    return [(w.row, w.position, len(w.token_ids), w.sample) for w in batch.work]


def finishes(outputs):
    return {o.rid: o.finish.kind for o in outputs if o.finish}


def test_one_request_from_prompt_to_end():
    scheduler = new_scheduler()
    add(scheduler, "a", range(10, 16), max_new_tokens=3)
    batch = scheduler.schedule()
    (new,) = batch.new_rows
    assert (new.row, new.pages, new.prompt_ids, new.output_ids) == (0, [], [10, 11, 12, 13, 14, 15], [])
    (prompt,) = batch.work
    assert (prompt.position, prompt.token_ids, prompt.new_pages) == (0, [10, 11, 12, 13, 14, 15], [0, 1])
    (output,) = land(scheduler, batch, 7)
    assert (output.rid, output.token_ids, output.finish, output.cached_tokens) == ("a", [7], None, 0)
    batch = scheduler.schedule()
    (decode,) = batch.work
    assert (batch.new_rows, decode.position, decode.token_ids, decode.new_pages) == ([], 6, [], [])
    assert land(scheduler, batch, 8)[0].finish is None
    (output,) = step(scheduler, 9)
    assert (output.token_ids, output.finish.kind) == ([9], "length")
    assert scheduler.schedule() is None
    assert not scheduler.has_work


def test_a_page_is_added_when_the_last_one_is_full():
    scheduler = new_scheduler()
    add(scheduler, "a", range(4), max_new_tokens=9)
    new_pages = []
    for _ in range(6):
        batch = scheduler.schedule()
        new_pages.append(batch.work[0].new_pages)
        land(scheduler, batch)
    assert new_pages == [[0], [1], [], [], [], [2]]


def test_a_long_prompt_comes_in_chunks_and_only_the_last_samples():
    scheduler = new_scheduler()
    add(scheduler, "a", range(20))
    for expected, told in ((0, 0, 8, False), 0), ((0, 8, 8, False), 0), ((0, 16, 4, True), 1):
        batch = scheduler.schedule()
        assert work(batch) == [expected]
        assert len(land(scheduler, batch)) == told


def test_prompts_share_a_step_with_decoding_rows_which_come_first():
    scheduler = new_scheduler()
    add(scheduler, "a", range(6))
    step(scheduler)
    add(scheduler, "b", range(50, 63))
    add(scheduler, "c", range(70, 76))
    batch = scheduler.schedule()
    assert work(batch) == [(0, 6, 0, True), (1, 0, 8, False)]
    land(scheduler, batch)
    batch = scheduler.schedule()
    assert work(batch) == [(0, 7, 0, True), (1, 8, 5, True), (2, 0, 3, False)]


def test_nobody_overtakes_in_the_queue():
    scheduler = new_scheduler(num_pages=8)
    add(scheduler, "a", range(20), max_new_tokens=2)
    step(scheduler)
    add(scheduler, "long", range(30, 50), max_new_tokens=1)
    add(scheduler, "short", range(60, 62), max_new_tokens=1)
    batch = scheduler.schedule()
    assert work(batch) == [(0, 8, 8, False)]
    land(scheduler, batch)
    assert work(scheduler.schedule()) == [(0, 16, 4, True)], "'short' would fit, but came later"


def test_rows_limit_what_runs():
    scheduler = new_scheduler(max_running_requests=2, chunked_prefill_size=100)
    for rid in "abc":
        add(scheduler, rid, [1, 2, 3], max_new_tokens=1)
    batch = scheduler.schedule()
    assert len(batch.work) == 2
    assert scheduler.stats().queued == 1
    assert finishes(land(scheduler, batch)) == {"a": "length", "b": "length"}
    assert finishes(step(scheduler)) == {"c": "length"}


@pytest.mark.parametrize(
    ("sampling", "tokens", "kind", "matched"),
    [
        ({}, [5, EOS], "stop", EOS),
        ({"stop_token_ids": [6]}, [5, 6], "stop", 6),
        ({"stop_token_ids": [6]}, [5, EOS], "stop", EOS),
        ({"ignore_eos": True}, [EOS, EOS, EOS, EOS], "length", None),
        ({"ignore_eos": True, "stop_token_ids": [6]}, [EOS, 6], "stop", 6),
        ({"min_new_tokens": 2}, [EOS, EOS, EOS], "stop", EOS),
        ({"min_new_tokens": 2, "stop_token_ids": [6]}, [6, 6, 6], "stop", 6),
        ({}, [5, 5, 5, EOS], "stop", EOS),
        ({}, [5, 5, 5, 5], "length", None),
    ],
)
def test_when_an_answer_ends(sampling, tokens, kind, matched):
    scheduler = new_scheduler()
    add(scheduler, "a", [1, 2, 3], max_new_tokens=4, **sampling)
    outputs = []
    while scheduler.has_work:
        outputs += step(scheduler, tokens[len(outputs)])
    assert [o.token_ids for o in outputs] == [[t] for t in tokens]
    assert [o.finish for o in outputs[:-1]] == [None] * (len(tokens) - 1)
    assert (outputs[-1].finish.kind, outputs[-1].finish.matched) == (kind, matched)


def test_no_token_is_wanted():
    scheduler = new_scheduler()
    add(scheduler, "a", range(12), max_new_tokens=0)
    first = scheduler.schedule()
    assert land(scheduler, first) == []
    last = scheduler.schedule()
    assert work(last) == [(0, 8, 4, False)]
    (output,) = land(scheduler, last)
    assert (output.token_ids, output.finish.kind) == ([], "length")
    assert scheduler.stats().generated_tokens == 0


@pytest.mark.parametrize(("prompt_length", "answer_length"), [(7, 3), (9, 1), (10, 0)])
def test_prompt_and_answer_end_at_the_context_length(simulate, prompt_length, answer_length):
    sim = simulate(context=10)
    rid = sim.add(range(1, prompt_length + 1), max_new_tokens=50)
    sim.run()
    answer = sim.verify(rid)
    assert (answer.finish.kind, len(answer.tokens)) == ("length", answer_length)


def test_what_can_never_run_is_refused():
    scheduler = new_scheduler(context_length=10)
    add(scheduler, "long", range(11))
    add(scheduler, "empty", [])
    assert scheduler.has_work
    outputs = scheduler.take_outputs()
    assert finishes(outputs) == {"long": "error", "empty": "error"}
    assert outputs[0].finish.message == "the prompt has 11 tokens; at most 10 fit"
    assert not scheduler.has_work


def test_the_context_is_never_longer_than_the_cache(simulate):
    sim = simulate(num_pages=4, page_size=4, context=1000)
    alone = sim.add([1, 2, 3], max_new_tokens=500)
    full = sim.add(range(16), max_new_tokens=5)
    too_long = sim.add(range(17), max_new_tokens=5)
    sim.run()
    assert len(sim.verify(alone).tokens) == 13
    assert sim.verify(full).finish.kind == "length"
    assert sim.answers[too_long].finish.kind == "error"


def test_a_request_id_in_use_is_refused_and_the_first_goes_on(simulate):
    sim = simulate()
    rid = sim.add([1, 2, 3])
    sim.step()
    sim.add_again(rid)
    assert sim.refused[0].message == "request id r0 is in use"
    sim.run()
    assert sim.verify(rid).finish.kind == "length"


def test_a_request_id_is_free_again_after_its_end():
    scheduler = new_scheduler()
    add(scheduler, "a", [1, 2], max_new_tokens=1)
    first = scheduler.schedule()
    scheduler.abort("a")
    add(scheduler, "a", [3, 4], max_new_tokens=1)
    assert finishes(land(scheduler, first)) == {"a": "abort"}
    assert finishes(step(scheduler)) == {"a": "length"}


def test_updates_come_in_order():
    scheduler = new_scheduler()
    add(scheduler, "a", [1, 2])
    first = scheduler.schedule()
    second = scheduler.schedule()
    with pytest.raises(RuntimeError, match="step 2 is not the oldest"):
        land(scheduler, second)
    land(scheduler, first)
    land(scheduler, second)
    with pytest.raises(RuntimeError, match="step 2 is not the oldest"):
        land(scheduler, second)


def test_logprobs_go_with_their_tokens(simulate):
    sim = simulate(chunk=4)
    rid = sim.add(range(1, 10), logprobs=True, prompt_logprobs_from=0)
    sim.run()
    answer = sim.verify(rid)
    assert [token for _, token in answer.prompt_logprobs] == list(range(1, 10))
    assert answer.prompt_logprobs[0][0] is None


def test_stats_count(simulate):
    sim = simulate(page_size=2, num_pages=16)
    sim.add([1, 2, 3, 4, 5], max_new_tokens=4)
    sim.run()
    sim.add([1, 2, 3, 4, 6], max_new_tokens=4)
    sim.add([7, 8], max_new_tokens=2)
    sim.step()
    stats = sim.scheduler.stats()
    assert (stats.running, stats.queued) == (2, 0)
    # Of 16 pages, 4 were cached, 2 of them are read again; the two requests hold one page each.
    assert (stats.pages_total, stats.pages_free, stats.pages_cached) == (16, 10, 2)
    sim.run()
    stats = sim.scheduler.stats()
    assert (stats.prompt_tokens, stats.cached_tokens, stats.generated_tokens) == (12, 4, 10)
    assert (stats.running, stats.preemptions, stats.page_size) == (0, 0, 2)
    assert stats.steps == 8
