"""The inputs of latent attention: norm, rotary embedding, cache write, and queries in the latent space.

Two kernels: for decoding (all of it) and for prompts (all but the last)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ziphius.kernels.gpu.device import GpuDevice, allow_next, wait_for_previous
from ziphius.kernels.gpu.norm import rms_norm_torch


@dataclass(frozen=True, slots=True)
class NewTokens:
    """The latent side of a step's tokens, as the projection gave it."""

    latent: Tensor
    """[T, lora], not normed; rows may be strided."""
    k_pe: Tensor
    """[T, rope], not rotated; the same strides as `latent`."""
    norm_weight: Tensor
    """[lora]."""
    eps: float
    cos: Tensor
    """[T, rope / 2] float32."""
    sin: Tensor
    slots: Tensor
    """[T] int64: where each goes in the cache."""


@triton.jit
def _rotate(x, cos, sin, HEADS: tl.constexpr, HALF: tl.constexpr):
    """x [HEADS, 2 HALF], rotated pair by pair (2i, 2i + 1); cos and sin [1, HALF] -> float32."""
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (HEADS, HALF, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), (HEADS, 2 * HALF))


@triton.jit
def _write_token(t, latent, k_pe, norm_weight, cos, sin, slots, cache, rows, stride_kv, eps, LORA: tl.constexpr,
                 ROPE: tl.constexpr, COPY: tl.constexpr):  # fmt: skip
    """Token t's normed latent and rotated key: cache[slots[t]], and rows[t] where COPY. cos and sin [1, ROPE / 2]."""
    slot = tl.load(slots + t).to(tl.int64)
    c, r = tl.arange(0, LORA), tl.arange(0, ROPE)
    value = tl.load(latent + t * stride_kv + c).to(tl.float32)
    root = tl.rsqrt(tl.sum(value * value, axis=0) / LORA + eps)
    value = (value * root).to(latent.dtype.element_ty).to(tl.float32) * tl.load(norm_weight + c).to(tl.float32)
    key = _rotate(tl.load(k_pe + t * stride_kv + r[None, :]), cos, sin, 1, ROPE // 2)
    at = cache + slot * (LORA + ROPE)
    tl.store(at + c, value.to(cache.dtype.element_ty))
    tl.store(at + LORA + r[None, :], key.to(cache.dtype.element_ty))
    if COPY:
        at = rows + t * (LORA + ROPE)
        tl.store(at + c, value.to(cache.dtype.element_ty))
        tl.store(at + LORA + r[None, :], key.to(cache.dtype.element_ty))


@triton.jit
def _rotate_queries(q, to, cos, sin, t, stride_q, stride_to, HEADS: tl.constexpr, NOPE: tl.constexpr,
                    ROPE: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """Write token t's rotated q_pe to `to` [HEADS, ROPE] with row stride `stride_to`."""
    h, r = tl.arange(0, BLOCK_H), tl.arange(0, ROPE)
    mine = (h < HEADS)[:, None]
    x = tl.load(q + t * stride_q + (h * (NOPE + ROPE) + NOPE)[:, None] + r[None, :], mask=mine, other=0.0)
    x = _rotate(x, cos, sin, BLOCK_H, ROPE // 2)
    tl.store(to + h[:, None] * stride_to + r[None, :], x.to(q.dtype.element_ty), mask=mine)


@triton.jit(do_not_specialize=["tokens"])
def _decode_inputs_kernel(q, latent, k_pe, w_uk, norm_weight, cos, sin, slots, q_out, cache, tokens, stride_q,
                          stride_kv, eps, HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr,
                          LORA: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
                          PDL: tl.constexpr):  # fmt: skip
    """q_out[t, h] = (q_nope w_uk[h], rotated q_pe), and the new token into the cache.

    The first programs take (head, latent block, token block) of the product, the last `tokens` one token each.
    """
    allow_next(PDL)
    BLOCKS: tl.constexpr = LORA // BLOCK_C
    program = tl.program_id(0)
    products = tl.num_programs(0) - tokens
    if program < products:
        h = program // BLOCKS % HEADS
        c = program % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
        t = program // (BLOCKS * HEADS) * BLOCK_T + tl.arange(0, BLOCK_T)
        n = tl.arange(0, NOPE)
        w = tl.load(w_uk + (h * NOPE + n)[:, None] * LORA + c[None, :])
        wait_for_previous(PDL)
        q_at = q + tl.minimum(t, tokens - 1).to(tl.int64)[:, None] * stride_q + h * (NOPE + ROPE) + n[None, :]
        value = tl.dot(tl.load(q_at), w, input_precision="ieee")
        at = q_out + (t.to(tl.int64)[:, None] * HEADS + h) * (LORA + ROPE) + c[None, :]
        tl.store(at, value.to(q_out.dtype.element_ty), mask=(t < tokens)[:, None])
    else:
        wait_for_previous(PDL)
        token = (program - products).to(tl.int64)
        turn = token * (ROPE // 2) + tl.arange(0, ROPE // 2)[None, :]
        c_turn, s_turn = tl.load(cos + turn), tl.load(sin + turn)
        _write_token(token, latent, k_pe, norm_weight, c_turn, s_turn, slots, cache, cache, stride_kv, eps, LORA, ROPE,
                     False)  # fmt: skip
        _rotate_queries(q, q_out + token * HEADS * (LORA + ROPE) + LORA, c_turn, s_turn, token, stride_q, LORA + ROPE,
                        HEADS, NOPE, ROPE, BLOCK_H)  # fmt: skip


# A step's chunks come after its decode rows: `slots` begins at every second place only where 16 bytes do.
@triton.jit(do_not_specialize_on_alignment=["slots"])
def _prompt_inputs_kernel(q, latent, k_pe, norm_weight, cos, sin, slots, cache, rows, stride_q, stride_kv, eps,
                          HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, LORA: tl.constexpr,
                          BLOCK_H: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Program t: rotate token t's q_pe in place, norm and rotate its latent row into the cache and into rows[t]."""
    allow_next(PDL)
    t = tl.program_id(0).to(tl.int64)
    wait_for_previous(PDL)
    turn = t * (ROPE // 2) + tl.arange(0, ROPE // 2)[None, :]
    c_turn, s_turn = tl.load(cos + turn), tl.load(sin + turn)
    _write_token(t, latent, k_pe, norm_weight, c_turn, s_turn, slots, cache, rows, stride_kv, eps, LORA, ROPE, True)
    _rotate_queries(q, q + t * stride_q + NOPE, c_turn, s_turn, t, stride_q, NOPE + ROPE, HEADS, NOPE, ROPE, BLOCK_H)


def decode_inputs(gpu: GpuDevice, q: Tensor, new: NewTokens, w_uk: Tensor, cache: Tensor) -> Tensor:
    """q [T, H, nope + rope], not rotated, rows may be strided; w_uk [H, nope, lora]; cache [slots, lora + rope].

    Writes the new tokens into the cache -> queries [T, H, lora + rope] to compare with cache rows.
    """
    tokens, heads = q.shape[:2]
    nope, lora = w_uk.shape[1:]
    rope = new.k_pe.shape[1]
    out = torch.empty((tokens, heads, lora + rope), dtype=q.dtype, device=q.device)
    block_t = 16 if gpu.batch_invariant else max(16, min(64, triton.next_power_of_2(tokens)))
    block_c = min(lora, 128)
    products = heads * (lora // block_c) * triton.cdiv(tokens, block_t)
    _decode_inputs_kernel[(products + tokens,)](
        q, new.latent, new.k_pe, w_uk, new.norm_weight, new.cos, new.sin, new.slots, out, cache, tokens, q.stride(0),
        new.latent.stride(0), new.eps, HEADS=heads, NOPE=nope, ROPE=rope, LORA=lora, BLOCK_T=block_t, BLOCK_C=block_c,
        BLOCK_H=triton.next_power_of_2(heads), num_warps=4, **gpu.overlap,
    )  # fmt: skip
    return out


def prompt_inputs(gpu: GpuDevice, q: Tensor, new: NewTokens, nope: int, cache: Tensor) -> Tensor:
    """As decode_inputs, but q_pe is rotated in place and the queries stay out of the latent space.

    -> the new tokens' rows [T, lora + rope], as the cache has them.
    """
    tokens, heads = q.shape[:2]
    lora, rope = new.latent.shape[1], new.k_pe.shape[1]
    rows = torch.empty((tokens, lora + rope), dtype=cache.dtype, device=q.device)
    _prompt_inputs_kernel[(tokens,)](
        q, new.latent, new.k_pe, new.norm_weight, new.cos, new.sin, new.slots, cache, rows, q.stride(0),
        new.latent.stride(0), new.eps, HEADS=heads, NOPE=nope, ROPE=rope, LORA=lora,
        BLOCK_H=triton.next_power_of_2(heads), num_warps=4, **gpu.overlap,
    )  # fmt: skip
    return rows


def rotate_pairs_torch(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, rope], pairs (2i, 2i + 1); cos and sin [T, rope / 2]."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)


def prompt_inputs_torch(q: Tensor, new: NewTokens, nope: int, cache: Tensor) -> Tensor:
    """`prompt_inputs` in plain torch."""
    q[..., nope:] = rotate_pairs_torch(q[..., nope:], new.cos, new.sin)
    latent = rms_norm_torch(new.latent, new.norm_weight, new.eps)
    k_pe = rotate_pairs_torch(new.k_pe.unsqueeze(1), new.cos, new.sin).squeeze(1)
    rows = torch.cat((latent, k_pe), dim=1).to(cache.dtype)
    cache[new.slots] = rows
    return rows


def decode_inputs_torch(q: Tensor, new: NewTokens, w_uk: Tensor, cache: Tensor) -> Tensor:
    """`decode_inputs` in plain torch."""
    nope = w_uk.shape[1]
    q = q.clone()
    prompt_inputs_torch(q, new, nope, cache)
    return torch.cat((torch.einsum("thn,hnc->thc", q[..., :nope], w_uk), q[..., nope:]), dim=-1)
