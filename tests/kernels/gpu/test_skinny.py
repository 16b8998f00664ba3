"""Products of a decode batch against torch's: odd sizes, splits, residuals."""

from __future__ import annotations

import pytest
import torch
from gpu_helpers import DTYPES, HALF, assert_close, poison_memory

from ziphius.kernels.gpu.device import GpuDevice
from ziphius.kernels.gpu.skinny import SkinnyConfig, SplitWorkspace, skinny_linear, skinny_linear_torch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 16, 32), (3, 33, 96), (17, 50, 72), (130, 20, 64)])
@pytest.mark.parametrize("splits", [1, 3])
def test_skinny(device: torch.device, dtype: torch.dtype, tokens: int, rows: int, columns: int, splits: int) -> None:
    x = torch.randn(tokens, columns + 8, dtype=dtype, device=device)[:, :columns]
    weight = torch.randn(rows, columns, dtype=dtype, device=device)
    residual = torch.randn(tokens, rows, dtype=dtype, device=device)
    workspace, config = SplitWorkspace.on(device), SkinnyConfig(16, 32, splits, stages=2)
    poison_memory(device)
    for added in (None, residual):
        actual = skinny_linear(GpuDevice.of(device), x, weight, workspace, config, residual=added)
        assert_close(actual, skinny_linear_torch(x, weight, added))
    assert not workspace.counters.any()


def test_float32_out_of_bf16(device: torch.device) -> None:
    x, weight = (torch.randn(5, 64, dtype=HALF, device=device) for _ in range(2))
    actual = skinny_linear(
        GpuDevice.of(device), x, weight, SplitWorkspace.on(device), SkinnyConfig(16, 32, 2), out_dtype=torch.float32
    )
    assert_close(actual, x.float() @ weight.float().t())


def test_a_row_does_not_depend_on_the_batch(device: torch.device) -> None:
    """With `batch_invariant`, bit for bit."""
    x, weight = torch.randn(20, 96, device=device), torch.randn(40, 96, device=device)
    gpu, config, workspace = (
        GpuDevice.of(device, batch_invariant=True),
        SkinnyConfig(16, 32, 2),
        SplitWorkspace.on(device),
    )
    together = skinny_linear(gpu, x, weight, workspace, config)
    alone = torch.cat([skinny_linear(gpu, x[i : i + 1], weight, workspace, config) for i in (0, 7, 19)])
    assert torch.equal(together[[0, 7, 19]], alone)
