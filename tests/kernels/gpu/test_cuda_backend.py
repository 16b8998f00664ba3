"""CudaBackend where memory would not hold all keys, or all splits' sums, at once: cut in parts, it finds the same."""

from __future__ import annotations

import pytest
import torch
from test_models import make_batch

from ziphius.attention import cuda
from ziphius.attention.backend import ProjectedTokens
from ziphius.attention.cuda import CudaBackend
from ziphius.kv_cache.kv_pool import KVCache, LatentCache
from ziphius.layers.context import LayerContext
from ziphius.layers.norm import RMSNorm
from ziphius.layers.ops import TorchOps

# One token and two chunks, the second without a prefix; three chunks.
STEPS = [[(9, 1), (5, 6), (0, 3)], [(0, 3), (5, 6), (2, 2)]]
HEADS, NOPE, ROPE, LORA, VALUE = 2, 16, 8, 32, 16


def drawn(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device)


def latent_attention(step: list[tuple[int, int]], device: torch.device, batch_invariant: bool) -> torch.Tensor:
    torch.manual_seed(3)
    batch = make_batch(step, torch.zeros(64, dtype=torch.long, device=device), device)
    count = batch.num_tokens
    context = LayerContext(None, None, TorchOps(), torch.float32, device)  # type: ignore[arg-type]
    norm = RMSNorm(LORA, 1e-6, context)
    norm.weight.fill_(1.0)
    angles = (drawn(device, count, ROPE // 2), drawn(device, count, ROPE // 2))
    latent, k_pe = drawn(device, count, LORA + ROPE).split_with_sizes([LORA, ROPE], dim=-1)
    tokens = ProjectedTokens(
        drawn(device, count, HEADS, NOPE + ROPE), latent, k_pe, norm, angles, drawn(device, HEADS, NOPE, LORA),
        drawn(device, HEADS, LORA, VALUE),
    )  # fmt: skip
    backend = CudaBackend(device, batch_invariant)
    backend.prepare(batch)
    return backend.attend_projected(tokens, LatentCache(drawn(device, 160, LORA + ROPE)), batch, 0.2, TorchOps())


def grouped_attention(step: list[tuple[int, int]], device: torch.device, batch_invariant: bool) -> torch.Tensor:
    torch.manual_seed(3)
    batch = make_batch(step, torch.zeros(64, dtype=torch.long, device=device), device)
    q, k, v = (drawn(device, batch.num_tokens, heads, 16) for heads in (4, 2, 2))
    backend = CudaBackend(device, batch_invariant)
    backend.prepare(batch)
    return backend.attend(q, k, v, KVCache(drawn(device, 160, 2, 16), drawn(device, 160, 2, 16)), batch, 0.2)


@pytest.mark.parametrize("attention", [latent_attention, grouped_attention])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_in_parts(attention, step, batch_invariant: bool, device: torch.device, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    whole = attention(step, device, batch_invariant)
    launches = []
    for name in ("make_tiles", "combine", "combine_values"):
        launch = getattr(cuda, name)
        monkeypatch.setattr(cuda, name, lambda *args, launch=launch, name=name: launches.append(name) or launch(*args))
    monkeypatch.setattr(cuda, "_KEYS_AT_ONCE", 10)
    monkeypatch.setattr(cuda, "_PARTS_BYTES", 4 * 4 * 32 * 2)
    in_parts = attention(step, device, batch_invariant)
    assert len(launches) >= 2
    assert whole.isfinite().all()
    torch.testing.assert_close(in_parts, whole, rtol=1e-4, atol=1e-4)
