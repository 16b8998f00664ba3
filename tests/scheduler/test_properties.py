"""Whatever happens to it, each request ends once with the answer it would have had alone, and no page goes astray."""

from __future__ import annotations

import random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

SHAPES = st.fixed_dictionaries(
    {
        "num_pages": st.sampled_from([12, 8, 6, 16, 4, 2]),
        "page_size": st.sampled_from([2, 1, 3, 4]),
        "max_running": st.sampled_from([5, 3, 2, 1]),
        "chunk": st.sampled_from([8, 3, 1]),
        "context": st.sampled_from([30, 12, 5]),
        "prefix_cache": st.sampled_from([True, True, False]),
        "reserved_tokens": st.sampled_from([1, 0, 16]),
        "overlap": st.integers(0, 2),
    }
)
# Few stems, so that prompts share prefixes, and pages, often.
STEMS = ([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 9, 9, 9], [5])
PROMPTS = st.tuples(st.sampled_from(STEMS), st.integers(0, 8), st.lists(st.integers(1, 11), max_size=6)).map(
    lambda parts: parts[0][: parts[1]] + parts[2] or [3]
)
SAMPLING = st.fixed_dictionaries(
    {
        "max_new_tokens": st.sampled_from([12, 20, 5, 2, 1, 0]),
        "min_new_tokens": st.sampled_from([0, 3]),
        "ignore_eos": st.booleans(),
        "stop_token_ids": st.sampled_from([[], [], [4, 7]]),
        "logprobs": st.booleans(),
        "prompt_logprobs_from": st.sampled_from([-1, -1, -1, 0, 1, 4]),
    }
)


class AnySchedule(RuleBasedStateMachine):
    """The test hands over `engine`."""

    engine = None

    @initialize(shape=SHAPES)
    def start(self, shape):
        self.sim = self.engine.Simulation(**shape)

    @property
    def live(self):
        return [rid for rid, answer in self.sim.answers.items() if answer.finish is None]

    @rule(requests=st.lists(st.tuples(PROMPTS, SAMPLING), min_size=1, max_size=5))
    def add(self, requests):
        for prompt, sampling in requests:
            scored_from = min(sampling["prompt_logprobs_from"], len(prompt) - 1)
            self.sim.add(prompt, **{**sampling, "prompt_logprobs_from": scored_from})

    @rule(count=st.integers(1, 6))
    def step(self, count):
        for _ in range(count):
            self.sim.step()

    @rule()
    def fail_a_step(self):
        self.sim.step(fails=True)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data):
        self.sim.scheduler.abort(data.draw(st.sampled_from(self.live)))
        self.sim.check()

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def add_a_duplicate(self, data):
        self.sim.take(self.sim.scheduler.take_outputs())
        if self.live:
            self.sim.add_again(data.draw(st.sampled_from(self.live)))

    @rule()
    def flush(self):
        idle = self.sim.scheduler.stats().running == 0 and not self.sim.in_flight
        flushed = self.sim.scheduler.flush_cache()
        assert flushed or not idle
        if flushed:
            assert self.sim.scheduler.stats().pages_free == self.sim.num_pages

    def teardown(self):
        if not hasattr(self, "sim"):
            return
        self.sim.run()
        for rid in self.sim.answers:
            self.sim.verify(rid)


def test_any_schedule(engine):
    run_state_machine_as_test(
        type("AnySchedule", (AnySchedule,), {"engine": engine}),
        settings=settings(
            max_examples=120, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )


def random_life(engine, seed):
    """A longer and more crowded life than hypothesis likes to draw."""
    draw = random.Random(seed)
    sim = engine.Simulation(
        num_pages=draw.choice([2, 4, 6, 8, 12, 16, 30]),
        page_size=draw.choice([1, 2, 3, 4]),
        max_running=draw.choice([1, 2, 3, 5, 8]),
        chunk=draw.choice([1, 3, 8, 20]),
        context=draw.choice([5, 12, 30, 60]),
        prefix_cache=draw.random() < 0.7,
        reserved_tokens=draw.choice([0, 1, 16]),
        overlap=draw.choice([0, 1, 1, 2]),
    )
    for _ in range(80):
        what = draw.random()
        if what < 0.3:
            for _ in range(draw.randint(1, 5)):
                stem = draw.choice(STEMS)[: draw.randint(0, 8)]
                prompt = (stem + [draw.randint(1, 11) for _ in range(draw.randint(0, 6))] or [3]) * draw.choice(
                    [1, 1, 3]
                )
                sim.add(
                    prompt,
                    max_new_tokens=draw.choice([0, 1, 2, 5, 12, 20, 60]),
                    min_new_tokens=draw.choice([0, 3]),
                    ignore_eos=draw.random() < 0.6,
                    stop_token_ids=draw.choice([[], [4, 7]]),
                    logprobs=draw.random() < 0.3,
                    prompt_logprobs_from=min(draw.choice([-1, -1, 0, 1, 4]), len(prompt) - 1),
                )
        elif what < 0.9:
            for _ in range(draw.randint(1, 8)):
                sim.step()
        elif what < 0.92:
            sim.step(fails=True)
        elif what < 0.96 and (live := [rid for rid, answer in sim.answers.items() if answer.finish is None]):
            sim.scheduler.abort(draw.choice(live))
        else:
            sim.scheduler.flush_cache()
        sim.check()
    sim.run()
    return [sim.verify(rid) for rid in sim.answers]


def test_crowded_lives(engine):
    answers = [answer for seed in range(150) for answer in random_life(engine, seed)]
    assert {answer.finish.kind for answer in answers} == {"stop", "length", "abort", "error"}
    # What the test is about did happen, often.
    assert sum(answer.preemptions for answer in answers) > 100
    assert sum(answer.cached_tokens for answer in answers) > 1000
