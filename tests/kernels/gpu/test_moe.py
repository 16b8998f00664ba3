"""Routing and experts against their plain bodies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu_helpers import DTYPES, assert_close, poison_memory
from torch import Tensor

from ziphius.checkpoint.config import MoEConfig
from ziphius.kernels.gpu.device import GpuDevice
from ziphius.kernels.gpu.experts import (
    ExpertMatrices,
    GroupedConfig,
    experts_torch,
    grouped_experts,
    pair_experts,
    prompt_experts,
)
from ziphius.kernels.gpu.routing import ExpertBlocks, Routes, RouteWorkspace, align, route, route_torch, top_k

GREEDY = MoEConfig(
    n_routed_experts=12,
    num_experts_per_tok=3,
    moe_intermediate_size=24,
    n_shared_experts=2,
    first_k_dense_replace=0,
    moe_layer_freq=1,
    topk_method="greedy",
    n_group=1,
    topk_group=1,
    norm_topk_prob=False,
    routed_scaling_factor=16.0,
)
GROUPED = replace(GREEDY, topk_method="group_limited_greedy", n_group=4, topk_group=2)
RENORMALISED = replace(GROUPED, norm_topk_prob=True)


def same_routes(actual: Routes, expected: Routes) -> None:
    assert torch.equal(actual.ids.cpu(), expected.ids.cpu())
    torch.testing.assert_close(actual.weights, expected.weights)


@pytest.mark.parametrize("moe", [GREEDY, GROUPED, RENORMALISED])
@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("tokens", [1, 5])
def test_route(device: torch.device, moe: MoEConfig, shared: int, tokens: int) -> None:
    x, gate = torch.randn(tokens, 72, device=device), torch.randn(moe.n_routed_experts, 72, device=device)
    weight, workspace = torch.randn(72, device=device), RouteWorkspace.on(device)
    workspace.counts.fill_(5)
    normed, routes = route(GpuDevice.of(device), x, weight, 1e-6, gate, moe, shared, workspace)
    expected_normed, expected = route_torch(x, weight, 1e-6, gate, moe, shared)
    assert_close(normed, expected_normed)
    same_routes(routes, expected)
    assert not workspace.arrivals.any()
    assert not workspace.counts[: moe.n_routed_experts + shared].any()
    logits = expected_normed.float() @ gate.float().t()
    same_routes(top_k(GpuDevice.of(device), logits, moe, shared, workspace), expected)


@pytest.mark.parametrize(("pairs", "experts", "block"), [((1, 3), 8, 4), ((40, 4), 14, 4), ((700, 2), 5, 16)])
def test_align(device: torch.device, pairs: tuple[int, int], experts: int, block: int) -> None:
    ids = torch.randint(0, experts, pairs, dtype=torch.int32, device=device)
    routes, workspace = Routes(ids, torch.empty(pairs, device=device)), RouteWorkspace.on(device)
    blocks = align(GpuDevice.of(device), routes, experts, block, workspace)
    flat, seen = ids.flatten().tolist(), []
    order = blocks.pairs.view(-1, block).tolist()
    for expert, members in zip(blocks.experts.tolist(), order, strict=True):
        real = [pair for pair in members if pair < len(flat)]
        assert all(flat[pair] == expert for pair in real)
        assert real or expert == -1
        seen += real
    assert sorted(seen) == list(range(len(flat)))


def make_matrices(device: torch.device, dtype: torch.dtype, shared: bool) -> ExpertMatrices:
    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, device=device) * 0.2).to(dtype)

    if not shared:
        return ExpertMatrices(draw(12, 48, 72), draw(12, 72, 24))
    return ExpertMatrices(draw(12, 48, 72), draw(12, 72, 24), draw(96, 72), draw(72, 48))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [True, False])
def test_experts(device: torch.device, dtype: torch.dtype, shared: bool) -> None:
    matrices = make_matrices(device, dtype, shared)
    x = torch.randn(6, 72, device=device).to(dtype)
    residual = torch.randn(6, 72, device=device).to(dtype)
    ids = torch.stack([torch.randperm(12)[:3] for _ in range(6)]).to(device, torch.int32)
    weights = torch.rand(6, 3, device=device)
    if shared:
        extra = torch.tensor([12, 13], dtype=torch.int32, device=device).expand(6, 2)
        ids, weights = torch.cat((ids, extra), 1).contiguous(), torch.cat((weights, torch.ones_like(extra)), 1)
    routes = Routes(ids, weights.float().contiguous())
    gpu = GpuDevice.of(device)
    expected = experts_torch(x, routes, matrices, residual)
    poison_memory(device)
    assert_close(pair_experts(gpu, x, routes, matrices, residual), expected)
    blocks = align(gpu, routes, 14 if shared else 12, 16, RouteWorkspace.on(device))
    first = GroupedConfig(16, 32, stages=2)
    assert_close(
        grouped_experts(gpu, x, routes, blocks, matrices, residual, first, replace(first, block_n=32)), expected
    )
    assert_close(
        grouped_experts(gpu, x, routes, blocks, matrices, None, first, first), experts_torch(x, routes, matrices, None)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tiles", [1, 2])
def test_experts_of_a_prompt(device: torch.device, dtype: torch.dtype, tiles: int) -> None:
    """Several blocks of an expert, widths that blocks do not divide, and experts that nobody chose."""
    matrices = make_matrices(device, dtype, shared=False)
    x, residual = (torch.randn(40, 72, device=device).to(dtype) for _ in range(2))
    ids = torch.stack([torch.randperm(9)[:3] for _ in range(40)]).to(device, torch.int32)
    routes, gpu = Routes(ids, torch.rand(40, 3, device=device)), GpuDevice.of(device)
    expected = experts_torch(x, routes, matrices, residual)
    blocks = align(gpu, routes, 12, 16, RouteWorkspace.on(device))
    poison_memory(device)
    first, second = GroupedConfig(16, 32, stages=2), GroupedConfig(32, 16, stages=2, tiles=tiles)
    assert_close(prompt_experts(gpu, x, routes, blocks, matrices, residual, first, second), expected)


def test_unused_blocks_cost_nothing_and_change_nothing(device: torch.device) -> None:
    matrices = make_matrices(device, torch.float32, False)
    x, routes = torch.randn(2, 72, device=device), Routes(
        torch.tensor([[3, 5, 1], [3, 0, 5]], dtype=torch.int32, device=device), torch.rand(2, 3, device=device)
    )  # fmt: skip
    gpu, config = GpuDevice.of(device), GroupedConfig(16, 32, stages=2)
    blocks = align(gpu, routes, 12, 16, RouteWorkspace.on(device))
    more = ExpertBlocks(
        torch.cat((blocks.pairs, torch.full((32,), 6, dtype=torch.int32, device=device))),
        torch.cat((blocks.experts, torch.full((2,), -1, dtype=torch.int32, device=device))),
        16,
    )
    outs = [grouped_experts(gpu, x, routes, b, matrices, None, config, config) for b in (blocks, more)]
    assert torch.equal(*outs)
