"""CpuBackend: attention by the CPU kernels for what they support, and by TorchBackend for the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ziphius.attention.backend import TwoStepLatentBackend
from ziphius.attention.batch import ForwardBatch
from ziphius.attention.torch_reference import TorchBackend
from ziphius.kv_cache.kv_pool import KVCache, LatentCache

if TYPE_CHECKING:
    from ziphius.kernels.cpu.paged_attention import PagedAttention


class CpuBackend(TwoStepLatentBackend):
    """The kernels store keys in their own order (kernels/cpu/attention.py), so a cache belongs to one backend."""

    def __init__(self) -> None:
        self._torch = TorchBackend()
        self._prepared: ForwardBatch | None = None
        self._kernels: PagedAttention | None = None
        self._begun: ForwardBatch | None = None

    def prepare(self, batch: ForwardBatch) -> None:
        # Prepare only the implementation that this step needs.
        self._prepared = self._begun = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, batch: ForwardBatch, scale: float) -> Tensor:
        from ziphius.kernels.cpu import paged_attention

        if not paged_attention.takes(cache.k, batch.page_size):
            return self._reference(batch).attend(q, k, v, cache, batch, scale)
        kernels = self._begin(batch)
        kernels.store(k, v, cache.k, cache.v, batch.slots)
        return kernels(q, cache.k, cache.v, scale).to(q.dtype)

    def attend_latent(
        self,
        q_nope: Tensor,
        q_pe: Tensor,
        latent: Tensor,
        k_pe: Tensor,
        w_uk: Tensor,
        w_uv: Tensor,
        cache: LatentCache,
        batch: ForwardBatch,
        scale: float,
    ) -> Tensor:
        reference = self._reference(batch)
        return reference.attend_latent(q_nope, q_pe, latent, k_pe, w_uk, w_uv, cache, batch, scale)

    def _reference(self, batch: ForwardBatch) -> TorchBackend:
        if self._prepared is not batch:
            self._torch.prepare(batch)
            self._prepared = batch
        return self._torch

    def _begin(self, batch: ForwardBatch) -> PagedAttention:
        if self._kernels is None:
            from ziphius.kernels.cpu.paged_attention import PagedAttention
            from ziphius.kernels.cpu.pool import ThreadPool, default_threads

            self._kernels = PagedAttention(ThreadPool(default_threads()))
        if self._begun is not batch:
            lens, starts = batch.seq_lens, batch.query_starts
            self._kernels.begin(batch.page_table, batch.page_size, lens, starts, batch.num_decodes)
            self._begun = batch
        return self._kernels
