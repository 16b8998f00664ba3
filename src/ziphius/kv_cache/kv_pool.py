"""KVPool: the tensors that keep every request's keys and values, by page. PagePool knows which pages are free."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ziphius.checkpoint.config import LatentAttention, ModelConfig
from ziphius.distributed import ParallelState


@dataclass(frozen=True, slots=True)
class KVCache:
    """One layer's keys and values on this rank."""

    k: Tensor
    """[slots, kv_heads_of_rank, head_dim]; the attention backend decides how the keys are ordered within a page."""
    v: Tensor
    """[slots, kv_heads_of_rank, head_dim]."""


@dataclass(frozen=True, slots=True)
class LatentCache:
    """One layer's latents (MLA); the same on every rank."""

    latent: Tensor
    """[slots, kv_lora_rank + qk_rope_head_dim]: the normed latent, then the rotated shared key."""


class KVPool:
    """`num_pages` pages of `page_size` slots in each layer, and one scratch page after them.

    No request owns the page `scratch_page` (index num_pages): padded rows write there.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        parallel: ParallelState,
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.scratch_page = num_pages
        slots = (num_pages + 1) * page_size
        self.kv: list[KVCache] = []
        """The layers of grouped-query attention; empty for MLA."""
        self.latent: list[LatentCache] = []
        """The layers of MLA; empty for grouped-query attention."""
        for _ in range(config.num_hidden_layers):
            # Zeros, because a masked score times uninitialised NaN would still be NaN.
            if isinstance(config.attention, LatentAttention):
                self.latent.append(LatentCache(_zeros((slots, config.attention.latent_dim), dtype, device)))
            else:
                shape = (slots, parallel.shard_kv_heads(config.num_key_value_heads), config.head_dim)
                k, v = (_zeros(shape, dtype, device) for _ in range(2))
                self.kv.append(KVCache(k, v))

    @property
    def nbytes(self) -> int:
        """Bytes of all layers, the scratch page included."""
        tensors = [t for c in self.kv for t in (c.k, c.v)] + [c.latent for c in self.latent]
        return sum(t.nbytes for t in tensors)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On a CPU the operating system gives the memory when it is first used; torch.zeros writes all."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, prod(shape) * dtype.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
