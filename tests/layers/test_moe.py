"""Who is chosen and with what weight, by the published formulas; and the experts' weighted sum."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ziphius.checkpoint.config import MoEConfig
from ziphius.distributed import ParallelState
from ziphius.errors import ConfigError
from ziphius.kernels.routing_reference import select_experts
from ziphius.layers.context import LayerContext
from ziphius.layers.dense import DenseFormat
from ziphius.layers.int8 import Int8Format
from ziphius.layers.moe import MixtureOfExperts, RoutedExperts
from ziphius.layers.norm import RMSNorm
from ziphius.layers.ops import TorchOps
from ziphius.layers.weights import FusedMixture, LinearFormat, MixtureWeights, Norm

GREEDY = MoEConfig(
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=16,
    n_shared_experts=0,
    first_k_dense_replace=0,
    moe_layer_freq=1,
    topk_method="greedy",
    n_group=1,
    topk_group=1,
    norm_topk_prob=False,
    routed_scaling_factor=16.0,
)
GROUPED = replace(GREEDY, topk_method="group_limited_greedy", n_group=4, topk_group=2)
# Groups of two. The best experts are 0, 2, 6 and 1, but group 3 (6 and 7) scores lower than groups 0 and 1.
LOGITS = torch.tensor([[5.0, 3.0, 4.8, -1.0, 0.0, 0.1, 4.0, 2.0]])


def test_greedy_takes_the_best_and_scales_them() -> None:
    weights, ids = select_experts(LOGITS, GREEDY)
    assert ids.tolist() == [[0, 2, 6]]
    torch.testing.assert_close(weights, 16.0 * LOGITS.softmax(-1)[:, [0, 2, 6]])


def test_group_limited_greedy_takes_the_best_of_the_best_groups() -> None:
    weights, ids = select_experts(LOGITS, GROUPED)
    assert ids.tolist() == [[0, 2, 1]]
    torch.testing.assert_close(weights, 16.0 * LOGITS.softmax(-1)[:, [0, 2, 1]])


def test_a_group_scores_as_its_best_expert_not_as_its_sum() -> None:
    logits = torch.tensor([[5.0, -9.0, 4.9, 4.9, 4.5, 4.4, 4.8, -9.0]])
    _, ids = select_experts(logits, replace(GROUPED, topk_group=1, num_experts_per_tok=2))
    assert ids.tolist() == [[0, 1]]


@pytest.mark.parametrize("moe", [GREEDY, GROUPED])
def test_renormalised_weights_are_not_scaled(moe: MoEConfig) -> None:
    """modeling_deepseek.py: norm_topk_prob divides by the sum, or else the factor multiplies; never both."""
    weights, ids = select_experts(LOGITS, replace(moe, norm_topk_prob=True))
    scores = LOGITS.softmax(-1).gather(1, ids)
    torch.testing.assert_close(weights, scores / scores.sum())


def test_a_single_expert_is_scaled_and_never_renormalised() -> None:
    weights, _ = select_experts(LOGITS, replace(GREEDY, norm_topk_prob=True, num_experts_per_tok=1))
    torch.testing.assert_close(weights, 16.0 * LOGITS.softmax(-1)[:, :1])


def make_experts(
    rank: int = 0, size: int = 1, linear_format: LinearFormat | None = None
) -> tuple[RoutedExperts, dict[str, Tensor]]:
    where = LayerContext(
        ParallelState(rank, size), linear_format or DenseFormat(torch.float32), TorchOps(), torch.float32,
        torch.device("cpu"),
    )  # fmt: skip
    experts, whole = RoutedExperts(12, GREEDY, where), {}
    torch.manual_seed(0)
    for tensor in experts.checkpoint_tensors("experts"):
        whole[tensor.name] = torch.randn(tensor.shape)
        assert tensor.shard is not None
        tensor.load(tensor.shard.of(whole[tensor.name]))
    return experts, whole


def expected_sum(whole: dict[str, Tensor], x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for token in range(x.shape[0]):
        for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
            gate, up, down = (whole[f"experts.{expert}.{n}_proj.weight"] for n in ("gate", "up", "down"))
            out[token] += weight * (down @ (F.silu(gate @ x[token]) * (up @ x[token])))
    return out


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_sum_over_experts_and_ranks(size: int) -> None:
    torch.manual_seed(1)
    x, weights = torch.randn(6, 12), torch.rand(6, 3)
    ids = torch.tensor([[0, 5, 2], [5, 0, 1], [5, 2, 0], [7, 5, 0], [2, 0, 5], [0, 2, 7]])
    parts = []
    for rank in range(size):
        experts, whole = make_experts(rank, size)
        parts.append(experts(x, weights, ids))
    torch.testing.assert_close(sum(parts), expected_sum(whole, x, weights, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("linear_format", [DenseFormat(torch.float32), Int8Format()])
def test_a_token_does_not_depend_on_the_rest_of_the_batch(linear_format: LinearFormat) -> None:
    torch.manual_seed(1)
    experts, _ = make_experts(linear_format=linear_format)
    x, weights, ids = torch.randn(4, 12), torch.rand(4, 3), torch.rand(4, 8).topk(3).indices
    together = experts(x, weights, ids)
    for t in range(4):
        alone = experts(x[t : t + 1], weights[t : t + 1], ids[t : t + 1])
        torch.testing.assert_close(alone, together[t : t + 1], rtol=1e-5, atol=1e-5)


def test_only_experts_that_are_hit_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, _ = make_experts()
    used: list[int] = []
    apply = experts.down.apply
    monkeypatch.setattr(experts.down, "apply", lambda expert, x: used.append(expert) or apply(expert, x))
    experts(torch.randn(2, 12), torch.rand(2, 3), torch.tensor([[6, 1, 3], [3, 1, 6]]))
    assert used == [1, 3, 6]


class GroupsOfFour(DenseFormat):
    """Floats that claim to have one scale for each 4 weights of a routed expert along the input."""

    @property
    def expert_block(self) -> tuple[int, int]:
        return 1, 4


def test_a_share_of_an_expert_may_not_cut_a_group() -> None:
    grouped = GroupsOfFour(torch.float32)
    make_experts(1, 4, grouped)
    with pytest.raises(ConfigError, match="moe_intermediate_size 16: a rank's share of 2 is not a multiple of 4"):
        make_experts(1, 8, grouped)


SHARED = replace(GREEDY, n_shared_experts=2)


class FusingFormat(DenseFormat):
    """Offers a fused mixture that computes in float64, and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(torch.float32)

    def mixture(self, weights: MixtureWeights, moe: MoEConfig) -> FusedMixture | None:
        def dense(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
            gate, up = (x @ gate_up.double().T).chunk(2, dim=-1)
            return (F.silu(gate) * up) @ down.double().T

        def compute(x: Tensor, norm: Norm, residual: Tensor | None) -> Tensor:
            normed = norm(x).double()
            shares, ids = select_experts(normed @ weights.gate.double().T, moe)
            experts = [dense(normed, g, d) for g, d in zip(weights.gate_up.weight, weights.down.weight, strict=True)]
            out = dense(normed, weights.shared_gate_up.weight, weights.shared_down.weight)
            for k in range(moe.num_experts_per_tok):
                chosen = torch.stack(experts, 1)[torch.arange(x.shape[0]), ids[:, k]]
                out = out + shares[:, k, None].double() * chosen
            assert weights.down.weight.shape[2] == weights.width
            return out.float() if residual is None else residual + out.float()

        return compute


def make_mixture(linear_format: LinearFormat, rank: int = 0, size: int = 1) -> tuple[MixtureOfExperts, RMSNorm]:
    where = LayerContext(
        AloneOfMany(rank, size), linear_format, TorchOps(), torch.float32, torch.device("cpu")
    )  # fmt: skip
    mixture, norm = MixtureOfExperts(12, SHARED, where), RMSNorm(12, 1e-6, where)
    torch.manual_seed(0)
    norm.weight.normal_()
    for tensor in mixture.checkpoint_tensors("mlp"):
        whole = torch.randn(tensor.shape)
        tensor.load(whole if tensor.shard is None else tensor.shard.of(whole))
    return mixture, norm


class AloneOfMany(ParallelState):
    """One rank of several, whose sums stay its own part."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("size", [1, 2])
def test_a_formats_fused_mixture_is_used_and_means_the_same(size: int) -> None:
    x = torch.randn(5, 12)
    plain, fused = torch.zeros_like(x), torch.zeros_like(x)
    for rank in range(size):
        layer, norm = make_mixture(DenseFormat(torch.float32), rank, size)
        plain += layer(norm(x))
        layer, norm = make_mixture(FusingFormat(), rank, size)
        fused += layer.onto(x.clone(), norm)
    torch.testing.assert_close(fused, x + plain, rtol=1e-4, atol=1e-3)


def test_a_mixture_takes_its_gate_and_experts_from_the_checkpoint() -> None:
    mixture, _ = make_mixture(DenseFormat(torch.float32))
    names = {tensor.name: tensor.shape for tensor in mixture.checkpoint_tensors("mlp")}
    assert names["mlp.gate.weight"] == (8, 12)
    assert names["mlp.experts.7.down_proj.weight"] == (12, 16)
    assert names["mlp.shared_experts.up_proj.weight"] == (32, 12)
    assert len(names) == 1 + 8 * 3 + 3
    bare = MixtureOfExperts(
        12, GREEDY, LayerContext(ParallelState(), Int8Format(), TorchOps(), torch.float32, torch.device("cpu"))
    )
    assert bare.shared_experts is None
