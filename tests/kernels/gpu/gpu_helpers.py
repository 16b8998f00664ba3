"""Comparing a kernel with its plain body: by relative error, on poisoned outputs."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
"""Triton's interpreter cannot multiply matrices in bfloat16."""
DTYPES = [torch.float32, HALF]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Norm of the difference over the norm of what is expected; NaN never passes."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    a, e = actual.double(), expected.double()
    error = ((a - e).norm() / e.norm().clamp_min(1e-30)).item()
    assert error < TOLERANCE[actual.dtype], f"relative error {error:.2e}"


def poison_memory(device: torch.device) -> None:
    """Fill freed blocks with NaN, so that what a kernel leaves unwritten shows."""
    blocks = [torch.full((1 << power,), float("nan"), device=device) for power in range(6, 18)]
    del blocks
