"""Which rank keeps what: shards are compared, and summed, with the whole; no process is started."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ziphius.distributed import SINGLE, ParallelState
from ziphius.errors import ConfigError
from ziphius.layers.context import LayerContext
from ziphius.layers.dense import DenseFormat
from ziphius.layers.int8 import Int8Format
from ziphius.layers.layer import CheckpointTensor
from ziphius.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ParallelLMHead,
    PartlyParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from ziphius.layers.mlp import GatedMLP
from ziphius.layers.ops import TorchOps
from ziphius.layers.weights import LinearFormat

CPU = torch.device("cpu")
HIDDEN = 12


@dataclass(frozen=True, slots=True)
class FakeParallel(ParallelState):
    """A rank without its group: what it would send is kept, and it receives nothing."""

    sent: list[Tensor] = field(default_factory=list)

    def all_reduce(self, x: Tensor) -> Tensor:
        self.sent.append(x)
        return x

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        self.sent.append(x)
        return x


def context(rank: int = 0, size: int = 1, linear_format: LinearFormat | None = None) -> LayerContext:
    parallel = SINGLE if size == 1 else FakeParallel(rank, size)
    return LayerContext(parallel, linear_format or DenseFormat(torch.float32), TorchOps(), torch.float32, CPU)


def fill(tensors: Iterator[CheckpointTensor], seed: int = 0) -> dict[str, Tensor]:
    """Load random whole tensors, the same for every rank -> them by name."""
    whole: dict[str, Tensor] = {}
    for tensor in tensors:
        torch.manual_seed(seed + len(whole))
        whole[tensor.name] = torch.randn(tensor.shape)
        value = whole[tensor.name]
        tensor.load(value if tensor.shard is None else tensor.shard.of(value))
    return whole


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_column_parallel(size: int, bias: bool) -> None:
    x = torch.randn(3, HIDDEN)
    outs = []
    for rank in range(size):
        layer = ColumnParallelLinear(HIDDEN, 8, context(rank, size), bias=bias)
        whole = fill(layer.checkpoint_tensors("p"))
        outs.append(layer(x))
    assert set(whole) == ({"p.weight", "p.bias"} if bias else {"p.weight"})
    torch.testing.assert_close(torch.cat(outs, 1), F.linear(x, whole["p.weight"], whole.get("p.bias")))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_merged_column_parallel_keeps_an_equal_share_of_each(size: int) -> None:
    x = torch.randn(3, HIDDEN)
    gates, ups = [], []
    for rank in range(size):
        layer = MergedColumnParallelLinear(HIDDEN, [8, 16], context(rank, size), bias=True)
        whole = fill(layer.checkpoint_tensors("gate", "up"))
        gate, up = layer(x).split([8 // size, 16 // size], dim=1)
        gates.append(gate)
        ups.append(up)
    torch.testing.assert_close(torch.cat(gates, 1), F.linear(x, whole["gate.weight"], whole["gate.bias"]))
    torch.testing.assert_close(torch.cat(ups, 1), F.linear(x, whole["up.weight"], whole["up.bias"]))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_row_parallel_sums_to_the_whole_and_adds_the_bias_once(size: int) -> None:
    x = torch.randn(3, HIDDEN)
    partial = []
    for rank in range(size):
        layer = RowParallelLinear(HIDDEN, 5, context(rank, size), bias=True)
        whole = fill(layer.checkpoint_tensors("p"))
        assert layer.bias is not None
        partial.append(layer(x.chunk(size, 1)[rank].contiguous()) - layer.bias)
    torch.testing.assert_close(sum(partial) + whole["p.bias"], F.linear(x, whole["p.weight"], whole["p.bias"]))


def test_row_parallel_reduces_unless_told_not_to() -> None:
    for reduce in (True, False):
        parallel = FakeParallel(0, 2)
        where = LayerContext(parallel, DenseFormat(torch.float32), TorchOps(), torch.float32, CPU)
        RowParallelLinear(HIDDEN, 5, where, reduce=reduce)(torch.zeros(1, HIDDEN // 2))
        assert len(parallel.sent) == reduce
    with pytest.raises(ValueError, match="bias"):
        RowParallelLinear(HIDDEN, 5, context(), bias=True, reduce=False)


@pytest.mark.parametrize(("size", "kv_heads"), [(1, 2), (2, 2), (4, 2), (4, 1), (2, 4)])
def test_qkv_gives_each_query_head_its_own_kv_head(size: int, kv_heads: int) -> None:
    heads, dim = 8, 3
    x = torch.randn(5, HIDDEN)
    for rank in range(size):
        layer = QKVParallelLinear(HIDDEN, heads, kv_heads, dim, context(rank, size), bias=True)
        whole = fill(layer.checkpoint_tensors("q", "k", "v"))
        qk, v = layer.split(layer(x))
        q, k = layer.split_qk(qk)
        all_q, all_k, all_v = (
            F.linear(x, whole[f"{n}.weight"], whole[f"{n}.bias"]).view(5, -1, dim) for n in ("q", "k", "v")
        )
        local = heads // size
        for head in range(local):
            global_head = rank * local + head
            kv = head * layer.kv_heads // local
            torch.testing.assert_close(q[:, head], all_q[:, global_head])
            torch.testing.assert_close(k[:, kv], all_k[:, global_head * kv_heads // heads])
            torch.testing.assert_close(v[:, kv], all_v[:, global_head * kv_heads // heads])


def test_replicated_is_whole_on_every_rank() -> None:
    x = torch.randn(3, HIDDEN)
    layer = ReplicatedLinear(HIDDEN, [5, 7], context(1, 2))
    whole = fill(layer.checkpoint_tensors("q_a", "kv_a"))
    expected = torch.cat((x @ whole["q_a.weight"].T, x @ whole["kv_a.weight"].T), 1)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_mlp(size: int) -> None:
    x = torch.randn(3, HIDDEN)
    partial = []
    for rank in range(size):
        layer = GatedMLP(HIDDEN, 16, context(rank, size))
        whole = fill(layer.checkpoint_tensors("mlp"))
        partial.append(layer(x))
    hidden = F.silu(x @ whole["mlp.gate_proj.weight"].T) * (x @ whole["mlp.up_proj.weight"].T)
    torch.testing.assert_close(sum(partial), hidden @ whole["mlp.down_proj.weight"].T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_vocabulary(size: int) -> None:
    ids, hidden = torch.tensor([0, 3, 4, 19, 8]), torch.randn(2, HIDDEN)
    rows, logits = [], []
    for rank in range(size):
        where = context(rank, size)
        embedding = VocabParallelEmbedding(20, HIDDEN, where)
        head = ParallelLMHead(embedding, False, where)
        embed = fill(embedding.checkpoint_tensors("embed"))["embed.weight"]
        head_weight = fill(head.checkpoint_tensors("head"), seed=5)["head.weight"]
        rows.append(embedding(ids))
        logits.append(head(hidden))
    torch.testing.assert_close(sum(rows), embed[ids])
    torch.testing.assert_close(torch.cat(logits, 1), hidden @ head_weight.T)


def test_a_tied_head_shares_the_embedding_where_the_format_allows() -> None:
    for linear_format, copies in ((DenseFormat(torch.float32), 0), (DenseFormat(torch.float16), 1), (Int8Format(), 1)):
        where = context(linear_format=linear_format)
        embedding = VocabParallelEmbedding(20, HIDDEN, where)
        head = ParallelLMHead(embedding, True, where)
        tensors = [*embedding.checkpoint_tensors("embed"), *head.checkpoint_tensors("embed")]
        assert len(tensors) == 1 + copies
        weight = torch.randn(20, HIDDEN)
        for tensor in tensors:
            tensor.load(weight)
        assert embedding.weight.dtype == torch.float32, "the embedding stays float"
        hidden = torch.randn(2, HIDDEN)
        torch.testing.assert_close(head(hidden), hidden @ weight.T, rtol=0.02, atol=0.1 if copies else 1e-5)


def test_what_does_not_divide_is_named() -> None:
    with pytest.raises(ConfigError, match="vocab_size 20 is not a multiple of the tensor-parallel size 3"):
        VocabParallelEmbedding(20, HIDDEN, context(0, 3))
    with pytest.raises(ConfigError, match="num_attention_heads 8"):
        QKVParallelLinear(HIDDEN, 8, 1, 4, context(0, 3))


def test_bytes_count_shared_memory_once() -> None:
    layer = GatedMLP(HIDDEN, 16, context(), bias=True)
    assert layer.nbytes == 4 * (3 * HIDDEN * 16 + 2 * 16 + HIDDEN)
    assert GatedMLP(HIDDEN, 16, context(linear_format=Int8Format())).nbytes == 3 * HIDDEN * 16 + 4 * (2 * 16 + HIDDEN)


class BlockedFormat(DenseFormat):
    """Floats that claim to have one scale for each [4, 6] weights."""

    @property
    def block(self) -> tuple[int, int]:
        return 4, 6


def blocked(rank: int, size: int) -> LayerContext:
    return context(rank, size, BlockedFormat(torch.float32))


def test_a_share_may_not_cut_a_block() -> None:
    for rank in (0, 1):
        with pytest.raises(ConfigError, match="output size 12: a rank's share of 6 is not a multiple of 4") as raised:
            MergedColumnParallelLinear(HIDDEN, [8, 12], blocked(rank, 2))
        assert raised.value.param == "tp"
        with pytest.raises(ConfigError, match="input size 16: a rank's share of 8 is not a multiple of 6"):
            RowParallelLinear(16, 5, blocked(rank, 2))
        with pytest.raises(ConfigError, match="num_attention_heads x head_dim 12: a rank's share of 6"):
            QKVParallelLinear(HIDDEN, 4, 4, 3, blocked(rank, 2))
        with pytest.raises(ConfigError, match="num_key_value_heads x head_dim 4: a rank's share of 2"):
            QKVParallelLinear(HIDDEN, 8, 2, 2, blocked(rank, 2))
        with pytest.raises(ConfigError, match="output size 12: a rank's share of 6"):
            PartlyParallelLinear(HIDDEN, 12, [5], blocked(rank, 2))


def test_whole_blocks_are_shared_and_the_last_block_may_be_short() -> None:
    for rank in (0, 1):
        MergedColumnParallelLinear(HIDDEN, [8, 16], blocked(rank, 2))
        RowParallelLinear(12, 5, blocked(rank, 2))
        QKVParallelLinear(HIDDEN, 8, 4, 2, blocked(rank, 2))
        ReplicatedLinear(HIDDEN, [5, 7], blocked(rank, 2))
        VocabParallelEmbedding(20, HIDDEN, blocked(rank, 4))  # the embedding has no weights format
    RowParallelLinear(16, 5, blocked(0, 1))
    GatedMLP(HIDDEN, 10, blocked(0, 1))
