"""AttentionBackend: the interface between a model and the implementations of attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ziphius.attention.batch import ForwardBatch
from ziphius.kv_cache.kv_pool import KVCache, LatentCache
from ziphius.layers.norm import RMSNorm
from ziphius.layers.ops import LayerOps


@dataclass(frozen=True, slots=True)
class ProjectedTokens:
    """One layer's tokens for latent attention, from the projections, with what norms, rotates and expands them."""

    q: Tensor
    """[T, H, nope + rope], not rotated."""
    latent: Tensor
    """[T, lora], not normed."""
    k_pe: Tensor
    """[T, rope], not rotated."""
    norm: RMSNorm
    """The norm of the latent."""
    angles: tuple[Tensor, Tensor]
    """cos and sin, [T, rope / 2] float32."""
    w_uk: Tensor
    """[H, nope, lora]."""
    w_uv: Tensor
    """[H, lora, v]."""


class AttentionBackend(Protocol):
    """Causal attention over a paged cache. T tokens, H query heads and KH key heads of this rank, D head_dim."""

    def prepare(self, batch: ForwardBatch) -> None:
        """Compute what all layers of a step share. Called once a step, before the first layer."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, batch: ForwardBatch, scale: float) -> Tensor:
        """Write k and v at `batch.slots`, then attend. q [T, H, D], k and v [T, KH, D], rotated -> [T, H, D]."""

    def attend_projected(
        self, tokens: ProjectedTokens, cache: LatentCache, batch: ForwardBatch, scale: float, ops: LayerOps
    ) -> Tensor:
        """Multi-head latent attention: norm and rotate, write latents and keys at `batch.slots`, attend -> [T, H, v].

        `tokens` may be overwritten. Decode rows never expand the cache: w_uk is absorbed into the query, w_uv into
        the output.
        """


class TwoStepLatentBackend(ABC):
    """attend_projected in two steps, for backends whose kernels do not do it in one."""

    def attend_projected(
        self,
        tokens: ProjectedTokens,
        cache: LatentCache,
        batch: ForwardBatch,
        scale: float,
        ops: LayerOps,
    ) -> Tensor:
        """See AttentionBackend."""
        rope = tokens.k_pe.shape[1]
        q_nope, q_pe = tokens.q.split_with_sizes([tokens.q.shape[2] - rope, rope], dim=-1)
        q_pe = ops.rotate(q_pe, *tokens.angles, interleaved=True)
        k_pe = ops.rotate(tokens.k_pe.unsqueeze(1), *tokens.angles, interleaved=True).squeeze(1)
        latent = tokens.norm(tokens.latent)
        return self.attend_latent(q_nope, q_pe, latent, k_pe, tokens.w_uk, tokens.w_uv, cache, batch, scale)

    @abstractmethod
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
        """Multi-head latent attention: write latent and k_pe at `batch.slots`, then attend -> [T, H, v].

        q_nope [T, H, nope]; q_pe [T, H, rope], rotated; latent [T, lora], normed; k_pe [T, rope], rotated;
        w_uk [H, nope, lora] and w_uv [H, lora, v]: the two halves of Hugging Face's kv_b_proj.
        """
