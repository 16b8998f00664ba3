"""Pages run out: who gives way, how it comes back, and what a step in flight changes about it; and aborts."""

from __future__ import annotations

import pytest

from ziphius.ipc.messages import SamplingParams


def test_the_youngest_gives_way_and_comes_back_with_the_same_answer(simulate):
    sim = simulate(page_size=2, num_pages=12, max_running=3, chunk=100)
    rids = [sim.add([start, start, start], max_new_tokens=14) for start in (1, 2, 3)]
    sim.run()
    old, middle, young = [sim.verify(rid) for rid in rids]
    assert old.preemptions == 0
    assert young.preemptions > 0
    assert young.preemptions >= middle.preemptions
    assert [len(a.tokens) for a in (old, middle, young)] == [14, 14, 14]
    assert sim.scheduler.stats().preemptions == middle.preemptions + young.preemptions


def test_the_preempted_is_next_in_the_queue(simulate):
    sim = simulate(page_size=2, num_pages=8, max_running=2, chunk=100)
    rids = [sim.add([1] * 4, max_new_tokens=8), sim.add([2] * 4, max_new_tokens=8), sim.add([3], max_new_tokens=1)]
    admitted = []
    while sim.scheduler.has_work:
        sim.step()
        admitted += [new.prompt_ids[0] for new in sim.last_batch.new_rows] if sim.last_batch else []
    assert admitted == [1, 2, 2, 3]
    assert [sim.verify(rid).preemptions for rid in rids] == [0, 1, 0]


def test_resuming_is_cheap_when_its_pages_survive(simulate):
    sim = simulate(page_size=2, num_pages=12, max_running=2, chunk=100)
    sim.add([1] * 8, max_new_tokens=5)
    second = sim.add([2] * 10, max_new_tokens=8)
    recomputed = []
    while sim.scheduler.has_work:
        sim.step()
        if sim.last_batch and sim.last_batch.new_rows and sim.last_batch.new_rows[0].output_ids:
            (new,) = sim.last_batch.new_rows
            recomputed.append(len(sim.last_batch.work[-1].token_ids))
            assert new.prompt_ids == [2] * 10
            assert new.output_ids == sim.answers[second].tokens[: len(new.output_ids)]
    answer = sim.verify(second)
    assert answer.preemptions == 1
    assert answer.cached_tokens == 0, "as it was when first admitted"
    assert recomputed[0] <= 5


def test_prompt_logprobs_are_told_once_whatever_happens(simulate):
    sim = simulate(page_size=2, num_pages=10, max_running=3, chunk=3)
    rids = [sim.add([n] * 5, max_new_tokens=8, prompt_logprobs_from=0, logprobs=True) for n in (1, 2, 3)]
    sim.run()
    assert sum(sim.verify(rid).preemptions for rid in rids) > 0


def test_eviction_comes_before_preemption(simulate):
    sim = simulate(page_size=2, num_pages=12, max_running=2)
    sim.add([7] * 10, max_new_tokens=1)
    sim.run()
    assert sim.scheduler.stats().pages_cached == 5
    rids = [sim.add([n] * 4, max_new_tokens=6) for n in (1, 2)]
    sim.run()
    assert [sim.verify(rid).preemptions for rid in rids] == [0, 0]


@pytest.mark.parametrize(("reserved_tokens", "waits"), [(0, False), (2, True)])
def test_a_prompt_is_not_admitted_just_to_be_preempted(simulate, reserved_tokens, waits):
    """It waits until the running requests can go on for a while beside it."""
    sim = simulate(page_size=2, num_pages=6, max_running=2, chunk=100, reserved_tokens=reserved_tokens)
    first = sim.add([1] * 4, max_new_tokens=6)
    sim.step()
    second = sim.add([2] * 6, max_new_tokens=2)
    sim.step()
    assert sim.scheduler.stats().queued == waits
    sim.run()
    assert sim.verify(first).preemptions == 0
    assert (sim.verify(second).preemptions == 0) == waits


def test_what_is_about_to_end_needs_no_reserve(simulate):
    sim = simulate(page_size=2, num_pages=6, max_running=2, chunk=100, reserved_tokens=16)
    sim.add([1] * 4, max_new_tokens=2)
    sim.step()
    sim.add([2] * 6, max_new_tokens=1)
    sim.step()
    assert sim.scheduler.stats().queued == 0
    sim.run()


def test_with_a_step_in_flight_a_token_beyond_the_last_is_not_scheduled(engine):
    sim = engine.Simulation(overlap=1)
    rid = sim.add([1, 2, 3], max_new_tokens=2)
    positions = []
    while sim.scheduler.has_work:
        sim.step()
        positions += [work.position for work in sim.last_batch.work] if sim.last_batch else []
    assert positions == [0, 3]
    assert len(sim.verify(rid).tokens) == 2


def test_a_request_that_ends_in_flight_keeps_its_pages_until_the_step_lands(engine):
    sim = engine.Simulation(overlap=1, page_size=1)
    one_token = SamplingParams(max_new_tokens=1, seed=0, ignore_eos=True)
    prompt = next([n, 2] for n in range(1, 99) if engine.alone([n, 2], one_token, 64)[0] == [4])
    rid = sim.add(prompt, max_new_tokens=9, stop_token_ids=[4])
    sim.step()
    sim.step()
    assert sim.answers[rid].finish.kind == "stop"
    assert len(sim.in_flight) == 1
    stats = sim.scheduler.stats()
    assert stats.running == 0
    assert stats.pages_free + stats.pages_cached < stats.pages_total
    assert not sim.scheduler.flush_cache()
    sim.run()
    assert sim.verify(rid).tokens == [4]


def test_rather_than_preempt_a_row_waits_for_pages_about_to_be_free(engine):
    sim = engine.Simulation(overlap=1, page_size=1, num_pages=8, max_running=2)
    stays = sim.add([1, 1], max_new_tokens=6)
    leaves = sim.add([2, 2], max_new_tokens=6)
    while sim.scheduler.stats().pages_free:
        sim.step()
    sim.scheduler.abort(leaves)
    sim.step()
    assert sim.last_batch is None, "all pages are in use, some only until the step in flight lands"
    sim.run()
    assert sim.verify(stays).preemptions == 0


def test_a_token_sampled_while_its_request_was_preempted_counts(engine):
    sim = engine.Simulation(overlap=1, page_size=1, num_pages=8, max_running=2, chunk=100)
    rids = [sim.add([n], max_new_tokens=7) for n in (1, 2)]
    sim.run()
    assert sim.verify(rids[1]).preemptions > 0
    assert len(sim.answers[rids[1]].tokens) == 7


@pytest.mark.parametrize("when", ["queued", "prefilling", "decoding", "preempted"])
def test_abort(simulate, when):
    sim = simulate(page_size=2, num_pages=10, max_running=2, chunk=4)
    other = sim.add([1] * 6, max_new_tokens=12)
    victim = sim.add([2] * 6, max_new_tokens=12)
    steps = {"queued": 0, "prefilling": 2, "decoding": 5}
    for _ in range(steps.get(when, 0)):
        sim.step()
    while when == "preempted" and sim.scheduler.stats().preemptions == 0:
        sim.step()
    sim.scheduler.abort(victim, "the client has gone")
    sim.scheduler.abort(victim)
    sim.run()
    finish = sim.verify(victim).finish
    assert (finish.kind, finish.message) == ("abort", "the client has gone")
    assert sim.verify(other).finish.kind == "length"


def test_aborting_what_is_not_there_does_nothing(simulate):
    sim = simulate()
    rid = sim.add([1, 2], max_new_tokens=1)
    sim.scheduler.abort("nobody")
    sim.run()
    sim.scheduler.abort(rid)
    assert sim.scheduler.take_outputs() == []
    assert not sim.scheduler.has_work


def test_abort_all(simulate):
    sim = simulate(max_running=1)
    rids = [sim.add([n, n], max_new_tokens=9) for n in (1, 2, 3)]
    sim.step()
    sim.scheduler.abort_all("the server is shutting down")
    sim.run()
    assert [sim.answers[rid].finish.kind for rid in rids] == ["abort"] * 3
