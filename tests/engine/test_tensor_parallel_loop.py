"""The loops of rank 0 and of the others, with fakes for model and sockets: order of sending and running, failures."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from ziphius.engine.channel import MemoryChannel
from ziphius.engine.deferred import DeferredRunner
from ziphius.engine.engine import Engine
from ziphius.engine.follower import Follower
from ziphius.engine.loading import LoadedRank
from ziphius.engine.team import Team
from ziphius.errors import ConfigError, EngineFailed, RankLost
from ziphius.ipc.messages import AddRequest, ScheduledBatch, Shutdown, StepOutput
from ziphius.scheduler.scheduler import Sampled, Scheduler, StepResult

Add = Callable[..., AddRequest]


@dataclass
class FakeStep:
    batch: ScheduledBatch

    def result(self) -> StepResult:
        return StepResult(sampled={w.row: Sampled(7, None) for w in self.batch.work if w.sample}, prompt_logprobs={})


@dataclass
class FakeRunner:
    """Notes what runs; `fail_at` raises `error` in that step."""

    notes: list[str] = field(default_factory=list)
    fail_at: int = -1
    error: Exception = field(default_factory=lambda: RuntimeError("boom"))
    ran: int = 0

    def run(self, batch: ScheduledBatch) -> FakeStep:
        self.notes.append(f"run {self.ran}")
        if self.ran == self.fail_at:
            raise self.error
        self.ran += 1
        return FakeStep(batch)


def make_engine(runner: FakeRunner, channel: MemoryChannel, deferred: bool = True, alone: bool = False) -> Engine:
    sent: list[int] = []

    def broadcast(batch: ScheduledBatch) -> None:
        runner.notes.append(f"send {len(sent)}")
        sent.append(batch.step)

    scheduler = Scheduler(num_pages=64, page_size=4, max_running_requests=4, chunked_prefill_size=16,
                          context_length=64, eos_token_ids=())  # fmt: skip
    return Engine(scheduler, DeferredRunner(runner) if deferred else runner, channel, overlap=deferred,
                  broadcast=broadcast, alone=alone)  # fmt: skip


def drive(engine: Engine) -> None:
    engine.turn()
    while not engine.idle:
        engine.turn()


def test_the_next_batch_is_sent_before_the_current_step_runs(add: Add) -> None:
    runner, channel = FakeRunner(), MemoryChannel()
    engine = make_engine(runner, channel)
    channel.to_engine.append(add("a", [1, 2, 3], max_new_tokens=5))
    drive(engine)
    assert runner.notes == [
        "send 0", "send 1", "run 0", "send 2", "run 1", "send 3", "run 2", "send 4", "run 3", "run 4"
    ]  # fmt: skip
    outputs = [o for m in channel.from_engine if isinstance(m, StepOutput) for o in m.outputs]
    assert [token for output in outputs for token in output.token_ids] == [7] * 5


def test_what_was_sent_is_run_also_when_the_server_stops(add: Add) -> None:
    runner, channel = FakeRunner(), MemoryChannel()
    engine = make_engine(runner, channel)
    channel.to_engine.append(add("a", [1, 2, 3], max_new_tokens=30))
    for _ in range(3):
        engine.turn()
    channel.to_engine.append(Shutdown())
    engine.run()
    count = len(runner.notes) // 2
    assert sorted(runner.notes) == sorted([f"send {i}" for i in range(count)] + [f"run {i}" for i in range(count)])


@pytest.mark.parametrize("deferred", [True, False])
def test_a_lost_rank_ends_the_engine_and_leaves_the_answer_to_the_frontend(add: Add, deferred: bool) -> None:
    """The frontend knows which rank is gone, and tells every open request."""
    runner, channel = FakeRunner(fail_at=1, error=RankLost("rank 0 lost the others")), MemoryChannel()
    engine = make_engine(runner, channel, deferred)
    channel.to_engine.append(add("a", [1, 2, 3], max_new_tokens=9))
    with pytest.raises(RankLost):
        drive(engine)
    outputs = [o for m in channel.from_engine if isinstance(m, StepOutput) for o in m.outputs]
    assert all(output.finish is None for output in outputs)


@pytest.mark.parametrize("deferred", [True, False])
def test_a_failed_step_ends_an_engine_of_several_ranks_at_once(add: Add, deferred: bool) -> None:
    """The others are in the middle of that step, and wait for this rank."""
    runner, channel = FakeRunner(fail_at=1), MemoryChannel()
    engine = make_engine(runner, channel, deferred)
    channel.to_engine.append(add("a", [1, 2, 3], max_new_tokens=9))
    with pytest.raises(EngineFailed, match="failed on rank 0 with RuntimeError: boom"):
        drive(engine)


def test_one_rank_alone_survives_a_failed_step(add: Add) -> None:
    runner, channel = FakeRunner(fail_at=1), MemoryChannel()
    engine = make_engine(runner, channel, deferred=False, alone=True)
    channel.to_engine.append(add("a", [1, 2, 3], max_new_tokens=9))
    drive(engine)
    outputs = [o for m in channel.from_engine if isinstance(m, StepOutput) for o in m.outputs]
    assert outputs[-1].finish is not None
    assert outputs[-1].finish.kind == "error"


def batches(count: int) -> deque[ScheduledBatch | Shutdown]:
    return deque([*(ScheduledBatch(step=i, new_rows=[], work=[]) for i in range(count)), Shutdown()])


def test_a_follower_runs_every_batch_until_told_to_end() -> None:
    runner, words = FakeRunner(), batches(4)
    follower = Follower(runner, words.popleft)
    follower.run()
    assert runner.notes == ["run 0", "run 1", "run 2", "run 3"]
    assert not follower.busy


def test_a_follower_whose_step_fails_ends() -> None:
    follower = Follower(FakeRunner(fail_at=2), batches(4).popleft)
    with pytest.raises(RuntimeError, match="boom"):
        follower.run()
    assert follower.busy


def test_the_pool_is_what_every_rank_has_room_for(
    llama: object, load: Callable[..., LoadedRank], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rank has less memory free: all take its size and its context."""
    monkeypatch.setattr(Team, "smallest", lambda self, *values: [min(v, 100) for v in values])
    loaded = load(llama.folder)  # type: ignore[attr-defined]
    assert (loaded.ready.context_length, loaded.ready.kv_tokens, loaded.num_pages) == (100, 100, 25)


def test_offline_use_is_for_one_rank(llama: object, load: Callable[..., LoadedRank]) -> None:
    with pytest.raises(ConfigError, match="only `ziphius serve` and `start` start several") as raised:
        load(llama.folder, tp=2)  # type: ignore[attr-defined]
    assert raised.value.param == "tp"


def test_one_rank_needs_no_group() -> None:
    team = Team()
    assert team.alone
    assert team.smallest(3, 4) == [3, 4]
    team.broadcast(Shutdown())
    assert torch.equal(team.parallel.all_reduce(torch.ones(2)), torch.ones(2))
