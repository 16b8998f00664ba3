"""Norms, SwiGLU, rotary, argmax and the single-vector product against their plain bodies."""

from __future__ import annotations

import pytest
import torch
from gpu_helpers import DTYPES, assert_close, poison_memory

from ziphius.kernels.gpu import activation, argmax, gemv, norm, rotary
from ziphius.kernels.gpu.device import GpuDevice
from ziphius.layers.ops import TorchOps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 64), (3, 40), (5, 129)])
def test_norms(device: torch.device, dtype: torch.dtype, rows: int, size: int) -> None:
    gpu = GpuDevice.of(device)
    wide = torch.randn(rows, size + 8, dtype=dtype, device=device)
    x, weight = wide[:, 3 : 3 + size], torch.randn(size, dtype=dtype, device=device)
    residual = torch.randn(rows, size, dtype=dtype, device=device)
    poison_memory(device)
    assert_close(norm.rms_norm(gpu, x, weight, 1e-6), norm.rms_norm_torch(x, weight, 1e-6))
    expected_sum = x + residual
    normed, total = norm.add_rms_norm(gpu, x, residual.clone(), weight, 1e-6)
    assert_close(total, expected_sum)
    assert_close(normed, norm.rms_norm_torch(expected_sum, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul(device: torch.device, dtype: torch.dtype) -> None:
    gate_up = torch.randn(3, 2 * 37, dtype=dtype, device=device)
    assert_close(activation.silu_and_mul(GpuDevice.of(device), gate_up), activation.silu_and_mul_torch(gate_up))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("heads", [1, 5, 20])
def test_rotate(device: torch.device, heads: int, interleaved: bool) -> None:
    wide = torch.randn(3, heads * 16, device=device)
    x = wide.view(3, heads, 16)[..., 4:]
    cos, sin = torch.randn(3, 6, device=device), torch.randn(3, 6, device=device)
    expected, untouched = TorchOps().rotate(x.clone(), cos, sin, interleaved), wide.view(3, heads, 16)[..., :4].clone()
    assert_close(rotary.rotate(GpuDevice.of(device), x, cos, sin, interleaved), expected)
    assert torch.equal(wide.view(3, heads, 16)[..., :4], untouched)


@pytest.mark.parametrize("vocab", [7, 64, 100])
def test_argmax(device: torch.device, vocab: int) -> None:
    logits = torch.randn(4, vocab, device=device)
    logits[1, 2] = logits[1, 5] = 9.0
    logits[2] = float("nan")
    tokens, last = (torch.full((n,), -7, dtype=torch.int64, device=device) for n in (4, 9))
    rows = torch.tensor([8, 0, 3, 5], dtype=torch.int32, device=device)
    argmax.argmax_into(GpuDevice.of(device), logits, tokens, rows, last)
    assert tokens[[0, 1, 3]].tolist() == [int(logits[0].argmax()), 2, int(logits[3].argmax())]
    assert 0 <= int(tokens[2]) < vocab
    assert last[rows.long()].tolist() == tokens.tolist()
    assert last[[1, 2, 4, 6, 7]].tolist() == [-7] * 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(9, 64), (33, 48), (5, 160), (7, 72)])
@pytest.mark.parametrize("fused", [False, True])
def test_gemv(device: torch.device, dtype: torch.dtype, rows: int, columns: int, fused: bool) -> None:
    x, weight = (
        torch.randn(1, columns, dtype=dtype, device=device),
        torch.randn(rows, columns, dtype=dtype, device=device),
    )
    given = {
        "norm": (torch.randn(columns, dtype=dtype, device=device), 1e-6),
        "residual": torch.randn(1, rows, dtype=dtype, device=device),
    }
    given = given if fused else {}
    poison_memory(device)
    assert_close(gemv.gemv(GpuDevice.of(device), x, weight, **given), gemv.gemv_torch(x, weight, **given))
