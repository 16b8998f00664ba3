"""ParallelState: shares, the single rank, and the collectives over real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ziphius import distributed
from ziphius.distributed import SINGLE, ParallelState, PeerSums
from ziphius.errors import ConfigError

RANK = """
import os
import sys
import torch
from ziphius.distributed import Rendezvous, join
from ziphius.errors import RankLost

rank, path = int(sys.argv[1]), sys.argv[2]
group = join(Rendezvous(path=path), rank, 2, torch.device("cpu"))
state, store = group.__enter__()
store.set(f"rank {rank}", str(rank * 10))
assert store.get(f"rank {1 - rank}") == str(10 - rank * 10).encode()
assert not state.capturable
x = torch.tensor([[1.0, 2.0]]) * (rank + 1)
assert state.all_reduce(x.clone()).tolist() == [[3.0, 6.0]]
assert state.all_gather(x).tolist() == [[1.0, 2.0, 2.0, 4.0]]
assert state.all_gather(x, dim=0).tolist() == [[1.0, 2.0], [2.0, 4.0]]
assert state.all_gather(torch.arange(6.0).view(2, 3).t() + 10 * rank).tolist()[0] == [0.0, 3.0, 10.0, 13.0]
assert state.broadcast(x.clone()).tolist() == [[1.0, 2.0]]
assert state.broadcast(x.clone(), source=1).tolist() == [[2.0, 4.0]]
assert state.smallest([5 + rank, 7 - rank], torch.device("cpu")) == [5, 6]
assert state.count.entered == 7
if rank == 1:
    sys.stderr.flush()
    os._exit(0)  # without a word, as when it is killed
try:
    while True:
        state.all_reduce(x)
except RankLost as error:
    assert "rank 0 lost the others in collective" in error.message, error.message
    os._exit(0)  # as a rank does: torch.distributed's threads may break the interpreter's own end
"""


def test_a_single_rank_changes_nothing() -> None:
    x = torch.randn(2, 3)
    assert SINGLE.all_reduce(x) is x
    assert SINGLE.all_gather(x) is x
    assert SINGLE.broadcast(x) is x
    assert SINGLE.shard(7, "heads") == 7
    assert SINGLE.smallest([4, 5], torch.device("cpu")) == [4, 5]
    assert SINGLE.capturable


def test_two_ranks(tmp_path: Path) -> None:
    args = [sys.executable, "-c", RANK]
    ranks = [subprocess.Popen([*args, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE) for rank in range(2)]
    for rank in ranks:
        _, stderr = rank.communicate(timeout=120)
        assert rank.returncode == 0, stderr.decode()


def test_shares() -> None:
    assert ParallelState(1, 4).shard(12, "heads") == 3
    with pytest.raises(ConfigError, match="heads 10 is not a multiple of the tensor-parallel size 4"):
        ParallelState(1, 4).shard(10, "heads")
    assert [ParallelState(0, size).shard_kv_heads(4) for size in (1, 2, 4, 8, 16)] == [4, 2, 1, 1, 1]
    with pytest.raises(ConfigError, match="num_key_value_heads"):
        ParallelState(0, 6).shard_kv_heads(4)


class DoubledSums(PeerSums):
    """As if another rank had the same tensor."""

    def __init__(self, any_size: bool) -> None:
        self._any_size = any_size
        self.sizes: list[int] = []

    def _sum(self, x: Tensor) -> Tensor:
        self.sizes.append(x.nbytes)
        return 2 * x


def test_only_small_sums_go_through_shared_memory_unless_no_sum_may_know_its_size() -> None:
    small, large = torch.ones(3, 8), torch.arange(300_000.0).view(3, 100_000)
    usual, fixed = DoubledSums(False), DoubledSums(True)
    assert usual.takes(small)
    assert not usual.takes(large)
    assert not usual.takes(small.half())
    for x in (small, large, small.half()):
        assert fixed.takes(x)
        total = fixed.sum(x)
        assert total.dtype == x.dtype
        assert torch.equal(total, 2 * x)
    assert fixed.sizes == [96, 512 << 10, 512 << 10, 1_200_000 - (1024 << 10), 96]


@pytest.mark.parametrize(("here", "there"), [(True, True), (True, False), (False, True)])
def test_all_ranks_share_memory_or_none(here: bool, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = DoubledSums(False)

    def make(device: torch.device, any_size: bool) -> PeerSums:
        if not here:
            raise RuntimeError("CUDA driver error: invalid argument")
        return made

    monkeypatch.setattr(distributed, "PeerSums", make)
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda able, op: able.mul_(int(there)))
    peers = distributed.peer_sums(torch.device("cpu"), any_size=False)
    assert peers is (made if here and there else None)
