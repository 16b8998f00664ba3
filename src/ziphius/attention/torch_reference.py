"""TorchBackend: attention over the paged cache in plain torch. Faster implementations are tested against it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ziphius.attention.backend import TwoStepLatentBackend
from ziphius.attention.batch import ForwardBatch
from ziphius.kv_cache.kv_pool import KVCache, LatentCache


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One sequence's prefill tokens of this step."""

    start: int
    end: int
    slots: Tensor
    """[seq_len]: the slots of the whole sequence, with this step's tokens."""
    mask: Tensor
    """[1, end - start, seq_len] bool: which tokens each token sees."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """What all layers of one step share."""

    batch: ForwardBatch
    decode_slots: Tensor
    """[num_decodes, longest]; beyond its length a row repeats its own first slot."""
    decode_mask: Tensor
    """[num_decodes, 1, longest] bool."""
    chunks: list[_Chunk]


class TorchBackend(TwoStepLatentBackend):
    """Decode rows in one padded batch, prefill chunks sequence by sequence."""

    def __init__(self) -> None:
        self._plan: _Plan | None = None

    def prepare(self, batch: ForwardBatch) -> None:
        self._plan = _make_plan(batch)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, batch: ForwardBatch, scale: float) -> Tensor:
        plan = self._plan_of(batch)
        cache.k[batch.slots] = k.to(cache.k.dtype)
        cache.v[batch.slots] = v.to(cache.v.dtype)
        out = torch.empty_like(q)
        decodes = batch.num_decodes
        if decodes:
            out[:decodes] = _softmax_attention(
                q[:decodes].unsqueeze(1), cache.k[plan.decode_slots], cache.v[plan.decode_slots],
                plan.decode_mask, scale,
            ).squeeze(1)  # fmt: skip
        for chunk in plan.chunks:
            keys, values = cache.k[chunk.slots].unsqueeze(0), cache.v[chunk.slots].unsqueeze(0)
            rows = q[chunk.start : chunk.end].unsqueeze(0)
            out[chunk.start : chunk.end] = _softmax_attention(rows, keys, values, chunk.mask, scale).squeeze(0)
        return out

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
        plan = self._plan_of(batch)
        cache.latent[batch.slots] = torch.cat((latent, k_pe), dim=-1).to(cache.latent.dtype)
        out = q_nope.new_empty((*q_nope.shape[:2], w_uv.shape[2]))
        decodes = batch.num_decodes
        if decodes:
            rows = cache.latent[plan.decode_slots]
            out[:decodes] = _absorbed_attention(
                q_nope[:decodes], q_pe[:decodes], rows, w_uk, w_uv, plan.decode_mask, scale
            )
        for chunk in plan.chunks:
            rows = cache.latent[chunk.slots]
            q = torch.cat((q_nope[chunk.start : chunk.end], q_pe[chunk.start : chunk.end]), dim=-1)
            out[chunk.start : chunk.end] = _expanded_attention(q, rows, w_uk, w_uv, chunk.mask, scale)
        return out

    def _plan_of(self, batch: ForwardBatch) -> _Plan:
        if self._plan is None or self._plan.batch is not batch:
            raise RuntimeError("prepare(batch) must come before the first layer of a step")
        return self._plan


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """q [B, S, H, D], k and v [B, L, KH, D or Dv], mask [B, S, L] -> [B, S, H, Dv]; H is a multiple of KH."""
    k, v = k.to(q.dtype), v.to(q.dtype)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask.unsqueeze(1), scale=scale,
        enable_gqa=k.shape[2] != q.shape[2],
    )  # fmt: skip
    return out.transpose(1, 2)


def _expanded_attention(q: Tensor, rows: Tensor, w_uk: Tensor, w_uv: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Prefill: every head's keys and values are computed from the latents once, for many queries.

    q [S, H, nope + rope], rows [L, lora + rope] of the cache, mask [1, S, L] -> [S, H, v].
    """
    rows = rows.to(q.dtype)
    latent, k_pe = rows[:, : w_uk.shape[2]], rows[:, w_uk.shape[2] :]
    k_nope = torch.einsum("lc,hnc->lhn", latent, w_uk)
    values = torch.einsum("lc,hcv->lhv", latent, w_uv)
    keys = torch.cat((k_nope, k_pe.unsqueeze(1).expand(-1, q.shape[1], -1)), dim=-1)
    return _softmax_attention(q.unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), mask, scale).squeeze(0)


def _absorbed_attention(
    q_nope: Tensor, q_pe: Tensor, rows: Tensor, w_uk: Tensor, w_uv: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """Decode: q_nope W_uk is compared with the latents themselves, so the cache is read once for all heads.

    (q W_uk) . latent = q . (W_uk latent), and likewise for values: DeepSeek-V2 (arXiv:2405.04434), section 2.1.
    q_nope [B, H, nope], q_pe [B, H, rope], rows [B, L, lora + rope], mask [B, 1, L] -> [B, H, v].
    """
    rows = rows.to(q_nope.dtype)
    latent = rows[..., : w_uk.shape[2]]
    query = torch.cat((torch.einsum("bhn,hnc->bhc", q_nope, w_uk), q_pe), dim=-1)
    scores = torch.matmul(query, rows.transpose(1, 2)).float().mul_(scale).masked_fill_(~mask, float("-inf"))
    mixed = torch.matmul(scores.softmax(dim=-1).to(q_nope.dtype), latent)
    return torch.einsum("bhc,hcv->bhv", mixed, w_uv)


def _make_plan(batch: ForwardBatch) -> _Plan:
    decodes, device = batch.num_decodes, batch.page_table.device
    longest = max(batch.seq_lens[:decodes], default=0)
    index = torch.arange(longest, device=device)
    seen = index.unsqueeze(0) < batch.seq_lens_device[:decodes].unsqueeze(1)
    # Slots after a row's end are not the row's: a NaN there would pass the mask as 0 * NaN.
    index = torch.where(seen, index.unsqueeze(0), 0)
    slots = _slots(batch, torch.arange(decodes, device=device).unsqueeze(1), index)
    chunks = [_make_chunk(batch, seq) for seq in range(decodes, batch.num_seqs)]
    return _Plan(batch, slots, seen.unsqueeze(1), chunks)


def _make_chunk(batch: ForwardBatch, seq: int) -> _Chunk:
    start, end, length = batch.query_starts[seq], batch.query_starts[seq + 1], batch.seq_lens[seq]
    index = torch.arange(length, device=batch.page_table.device)
    mask = index.unsqueeze(0) <= index[length - (end - start) :].unsqueeze(1)
    return _Chunk(start, end, _slots(batch, seq, index), mask.unsqueeze(0))


def _slots(batch: ForwardBatch, seq: Tensor | int, index: Tensor) -> Tensor:
    """The slots of tokens `index` of sequences `seq`, int64."""
    pages = batch.page_table[seq, index // batch.page_size].long()
    return pages * batch.page_size + index % batch.page_size
