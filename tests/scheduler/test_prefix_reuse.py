"""Which tokens come from the prefix cache, and that it never holds what was not computed."""

from __future__ import annotations

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]


def test_the_same_prompt_again_computes_at_least_one_token(simulate):
    sim = simulate(page_size=2)
    first = sim.add(PROMPT)
    sim.run()
    again = sim.add(PROMPT)
    sim.step()
    (new,) = sim.last_batch.new_rows
    assert len(new.pages) == 3
    assert [(w.position, w.token_ids) for w in sim.last_batch.work] == [(6, [7, 8])]
    sim.run()
    assert sim.verify(first).cached_tokens == 0
    assert sim.verify(again).cached_tokens == 6
    assert sim.answers[first].tokens == sim.answers[again].tokens


def test_a_conversation_goes_on_from_its_last_answer(simulate):
    sim = simulate(page_size=2, num_pages=30)
    first = sim.add(PROMPT, max_new_tokens=6)
    sim.run()
    # 8 + 6 tokens, but the KV of the last one was never computed: 6 full pages.
    second = sim.add([*PROMPT, *sim.answers[first].tokens, 9, 9, 9])
    sim.run()
    assert sim.verify(second).cached_tokens == 12


def test_an_aborted_request_leaves_what_it_computed(simulate):
    sim = simulate(page_size=2, chunk=4)
    rid = sim.add(PROMPT)
    sim.step()
    sim.scheduler.abort(rid)
    sim.run()
    again = sim.add(PROMPT)
    sim.run()
    assert sim.verify(again).cached_tokens == 4


def test_a_running_prompt_is_shared_before_it_ends(simulate):
    sim = simulate(page_size=2, num_pages=40)
    first = sim.add(PROMPT, max_new_tokens=20)
    for _ in range(3):
        sim.step()
    assert sim.answers[first].finish is None
    second = sim.add([*PROMPT, 9], max_new_tokens=2)
    sim.run()
    assert sim.verify(second).cached_tokens == 8
    sim.verify(first)


def test_two_at_once_with_the_same_prompt_leave_one_copy(simulate):
    sim = simulate(page_size=2, chunk=32)
    rids = [sim.add(PROMPT, max_new_tokens=1) for _ in range(3)]
    sim.run()
    for rid in rids:
        assert sim.verify(rid).cached_tokens == 0
    assert sim.scheduler.stats().pages_cached == 4


def test_prompt_logprobs_need_their_tokens_computed(simulate):
    sim = simulate(page_size=2)
    sim.add(PROMPT)
    sim.run()
    wanted = {}
    for first, cached in (0, 0), (1, 0), (2, 0), (3, 2), (4, 2), (5, 4), (7, 6):
        wanted[sim.add(PROMPT, prompt_logprobs_from=first)] = cached
        sim.run()
    for rid, cached in wanted.items():
        assert sim.verify(rid).cached_tokens == cached


def test_without_a_prefix_cache_nothing_is_kept(simulate):
    sim = simulate(prefix_cache=False)
    rids = []
    for _ in range(2):
        rids.append(sim.add(PROMPT))
        sim.run()
        assert sim.scheduler.stats().pages_free == sim.num_pages
    assert [sim.verify(rid).cached_tokens for rid in rids] == [0, 0]


def test_old_prefixes_make_room(simulate):
    sim = simulate(page_size=2, num_pages=8)
    for start in range(1, 60, 10):
        rid = sim.add(range(start, start + 8), max_new_tokens=3)
        sim.run()
        assert sim.verify(rid).preemptions == 0
    assert sim.scheduler.stats().preemptions == 0


def test_flushing_is_refused_while_requests_run(simulate):
    sim = simulate(page_size=2)
    rid = sim.add(PROMPT)
    sim.step()
    assert not sim.scheduler.flush_cache()
    sim.run()
    assert sim.verify(rid)
    assert sim.scheduler.stats().pages_cached > 0
    sim.add([5])  # One that only waits does not mind.
    assert sim.scheduler.flush_cache()
    assert sim.scheduler.stats().pages_free == sim.num_pages
    again = sim.add(PROMPT)
    sim.run()
    assert sim.verify(again).cached_tokens == 0


def test_a_failed_step_ends_its_requests_and_leaves_nothing_behind(simulate):
    sim = simulate(page_size=2, chunk=4, num_pages=32)
    good = sim.add([9, 9, 9, 9, 9], max_new_tokens=1)
    sim.run()
    cached = sim.scheduler.stats().pages_cached
    bad = [sim.add(PROMPT), sim.add([*PROMPT, 3])]
    sim.step()
    if sim.overlap:
        sim.land()
    later = sim.add([9, 9, 9, 9, 9, 9])
    sim.step(fails=True)
    if sim.overlap:
        sim.land(fails=True)
    assert sim.answers[bad[0]].finish.kind == "error"
    assert sim.answers[bad[0]].finish.message == "it broke"
    # Nothing of a failed request is kept, not even the chunk that had succeeded.
    assert sim.scheduler.stats().pages_cached == cached
    again = sim.add(PROMPT)
    sim.run()
    assert sim.verify(again).cached_tokens == 0
    assert sim.verify(later).finish.kind == "length"
    assert sim.verify(good).finish.kind == "length"


def test_a_step_after_a_failed_one_does_not_make_its_hole_reusable(engine):
    sim = engine.Simulation(overlap=1, page_size=2, chunk=4)
    bad = sim.add([*PROMPT, 9, 9, 9, 9])
    sim.step()
    sim.step(fails=True)
    assert sim.answers[bad].finish.kind == "error"
    sim.land()
    assert sim.scheduler.stats().pages_cached == 0
    again = sim.add(PROMPT)
    sim.run()
    assert sim.verify(again).cached_tokens == 0
