"""A simulated engine: the real scheduler over a fake model whose text shows what its page tables really hold."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from ziphius.ipc.messages import AddRequest, Finish, SamplingParams, ScheduledBatch, TokenLogprob
from ziphius.scheduler.scheduler import Sampled, Scheduler, StepResult

VOCAB = 12
EOS = 0


def kv_value(token, context):
    """What the fake model keeps of a token: it depends on all that came before, like real keys and values."""
    return hash((token, tuple(context)))


def next_token(values, index):
    """The `index`-th token of an answer, from the KV of everything before it."""
    return hash((tuple(values), index)) % VOCAB


def alone(prompt, sampling, context_length):
    """(answer, finish kind, prompt log-probabilities) of a request, computed with no scheduler and no cache."""
    values: list[int] = []
    for token in prompt:
        values.append(kv_value(token, values))
    told = []
    if sampling.prompt_logprobs_from >= 0:
        told = [
            (None if p == 0 else float(hash(tuple(values[:p]))), prompt[p])
            for p in range(sampling.prompt_logprobs_from, len(prompt))
        ]
    stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else {EOS})
    answer: list[int] = []
    while len(answer) < sampling.max_new_tokens and len(prompt) + len(answer) < context_length:
        token = next_token(values, len(answer))
        values.append(kv_value(token, values))
        answer.append(token)
        if token in stops and len(answer) > sampling.min_new_tokens:
            return answer, "stop", told
    return answer, "length", told


@dataclass
class Row:
    pages: list[int]
    prompt: list[int]
    index: int
    """Of the token sampled next."""
    sampling: SamplingParams
    scored: bool
    last_token: int = -1


class FakeModel:
    """Runs batches over a KV cache that is a dict slot -> value, reading through the page tables it was given."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.kv: dict[int, int] = {}
        self.rows: dict[int, Row] = {}

    def run(self, batch: ScheduledBatch) -> StepResult:
        self._begin(batch)
        result = StepResult(sampled={})
        for work in batch.work:
            row = self.rows[work.row]
            tokens = work.token_ids or [row.last_token]
            values = [self.kv.get(slot, -1) for slot in self._slots(row, 0, work.position)]
            for token, slot in zip(tokens, self._slots(row, work.position, len(tokens)), strict=True):
                values.append(kv_value(token, values))
                self.kv[slot] = values[-1]
            if row.scored and work.token_ids:
                result.prompt_logprobs[work.row] = self._score(row, work.position, values)
            if work.sample:
                row.last_token = next_token(values, row.index)
                row.index += 1
                logprob = TokenLogprob(logprob=-1.0, token_id=row.last_token) if row.sampling.logprobs else None
                result.sampled[work.row] = Sampled(row.last_token, logprob)
        return result

    def break_down(self, batch: ScheduledBatch) -> None:
        """The step raises half-way: what it was to write is garbage."""
        self._begin(batch)
        for work in batch.work:
            for slot in self._slots(self.rows[work.row], work.position, len(work.token_ids) or 1):
                self.kv[slot] = -999

    def _begin(self, batch: ScheduledBatch) -> None:
        for new in batch.new_rows:
            scored = new.sampling.prompt_logprobs_from >= 0
            assert not (scored and new.output_ids), "a resumed request has told its prompt log-probabilities"
            self.rows[new.row] = Row(list(new.pages), new.prompt_ids, len(new.output_ids), new.sampling, scored)
        decodes = [not work.token_ids for work in batch.work]
        assert decodes == sorted(decodes, reverse=True), "decode rows come first"
        assert len({work.row for work in batch.work}) == len(batch.work), "a row is in a step once"
        for work in batch.work:
            self.rows[work.row].pages += work.new_pages

    def _slots(self, row: Row, start: int, count: int) -> list[int]:
        size = self.page_size
        return [row.pages[p // size] * size + p % size for p in range(start, start + count)]

    @staticmethod
    def _score(row: Row, position: int, values: list[int]) -> list[TokenLogprob]:
        first = row.sampling.prompt_logprobs_from
        start = max(position + 1, first)
        told = [TokenLogprob(logprob=None, token_id=row.prompt[0])] if position == 0 == first else []
        for p in range(start, min(len(values) + 1, len(row.prompt))):
            told.append(TokenLogprob(logprob=float(hash(tuple(values[:p]))), token_id=row.prompt[p]))
        return told


@dataclass
class Answer:
    prompt: list[int]
    sampling: SamplingParams
    tokens: list[int] = field(default_factory=list)
    prompt_logprobs: list = field(default_factory=list)
    cached_tokens: int = 0
    preemptions: int = 0
    finish: Finish | None = None


class Simulation:
    """Scheduler and fake model in a loop like the engine's; `overlap` steps are in flight while one is scheduled.

    A batch runs as late as it may, just before its `update`: it must not change after it was scheduled.
    """

    def __init__(
        self,
        *,
        num_pages=16,
        page_size=2,
        max_running=4,
        chunk=8,
        context=64,
        prefix_cache=True,
        reserved_tokens=2,
        overlap=0,
    ):
        self.scheduler = Scheduler(
            num_pages=num_pages,
            page_size=page_size,
            max_running_requests=max_running,
            chunked_prefill_size=chunk,
            context_length=context,
            eos_token_ids=(EOS,),
            prefix_cache=prefix_cache,
            reserved_tokens=reserved_tokens,
        )
        self.num_pages, self.chunk = num_pages, chunk
        self.context = min(context, num_pages * page_size)
        self.model = FakeModel(page_size)
        self.overlap = overlap
        self.in_flight: deque[ScheduledBatch] = deque()
        self.answers: dict[str, Answer] = {}
        self.refused: list[Finish] = []
        self.last_batch: ScheduledBatch | None = None

    def add(self, prompt, max_new_tokens=4, **sampling) -> str:
        """Ends by count unless told otherwise; returns the request's id."""
        rid = f"r{len(self.answers)}"
        sampling = {"ignore_eos": True, "seed": 0, **sampling}
        params = SamplingParams(max_new_tokens=max_new_tokens, **sampling)
        self.answers[rid] = Answer(list(prompt), params)
        self.scheduler.add(AddRequest(rid=rid, prompt_ids=list(prompt), sampling=params))
        return rid

    def add_again(self, rid: str) -> None:
        """A second request under a live one's id: refused with the next outputs."""
        answer, before = self.answers[rid], len(self.refused)
        assert answer.finish is None
        self.take(self.scheduler.take_outputs())
        self.scheduler.add(AddRequest(rid=rid, prompt_ids=[1], sampling=answer.sampling))
        (output,) = self.scheduler.take_outputs()
        assert output.rid == rid
        assert output.finish.kind == "error"
        self.refused.append(output.finish)
        assert len(self.refused) == before + 1

    def step(self, fails: bool = False) -> None:
        """Schedule, then land what may no longer be in flight; the first of those steps may fail."""
        self.last_batch = batch = self.scheduler.schedule()
        if batch is not None:
            self.in_flight.append(batch)
            assert sum(len(work.token_ids) for work in batch.work) <= self.chunk
        elif not self.in_flight:
            self.take(self.scheduler.take_outputs())
            assert not self.scheduler.has_work, "work, but nothing to run and nothing in flight"
        self.check()
        while len(self.in_flight) > (self.overlap if batch is not None else 0):
            self.land(fails)
            fails = False

    def land(self, fails: bool = False) -> None:
        """The oldest step in flight ends."""
        batch = self.in_flight.popleft()
        if fails:
            self.model.break_down(batch)
            self.take(self.scheduler.fail(batch, "it broke"))
        else:
            self.take(self.scheduler.update(batch, self.model.run(batch)))
        self.check()

    def take(self, outputs) -> None:
        for output in outputs:
            answer = self.answers[output.rid]
            assert answer.finish is None, f"news of {output.rid} after its end"
            assert not (answer.tokens and output.prompt_logprobs), "prompt log-probabilities come with the first token"
            assert len(output.logprobs) == (len(output.token_ids) if answer.sampling.logprobs else 0)
            answer.tokens += output.token_ids
            answer.prompt_logprobs += [(told.logprob, told.token_id) for told in output.prompt_logprobs]
            answer.cached_tokens, answer.preemptions = output.cached_tokens, output.preemptions
            answer.finish = output.finish

    def check(self) -> None:
        """free + cached + held = all pages, and none has two owners."""
        self.scheduler.check_pages()
        assert sorted(self.scheduler.page_owners()) == list(range(self.num_pages))

    def run(self, max_steps=20_000) -> None:
        """Until nothing is left to do; then every request must have ended."""
        while self.scheduler.has_work:
            max_steps -= 1
            assert max_steps, "the scheduler does not get on"
            self.step()
        assert all(answer.finish for answer in self.answers.values())
        stats = self.scheduler.stats()
        assert (stats.running, stats.queued) == (0, 0)
        assert stats.pages_free + stats.pages_cached == stats.pages_total

    def verify(self, rid: str) -> Answer:
        """Its answer is what it would be alone, or a beginning of that where it was cut short."""
        answer = self.answers[rid]
        tokens, kind, told = alone(answer.prompt, answer.sampling, self.context)
        if answer.finish is not None and answer.finish.kind in ("stop", "length"):
            assert (answer.tokens, answer.finish.kind) == (tokens, kind)
            assert answer.prompt_logprobs == told
        else:
            assert answer.tokens == tokens[: len(answer.tokens)]
            if answer.tokens:
                assert answer.prompt_logprobs == told
        return answer


@pytest.fixture
def engine():
    """The simulation's parts: `engine.Simulation(...)`, `engine.alone(...)`, `engine.EOS`, `engine.VOCAB`."""
    return SimpleNamespace(Simulation=Simulation, alone=alone, EOS=EOS, VOCAB=VOCAB)


@pytest.fixture(params=[0, 1], ids=["no overlap", "overlap"])
def simulate(request):
    """Makes a Simulation; the test runs once without and once with a step in flight."""
    return lambda **settings: Simulation(overlap=request.param, **settings)
