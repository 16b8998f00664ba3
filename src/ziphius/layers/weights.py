"""LinearWeight, ExpertWeights and LinearFormat: what a weights format must offer. Each format has a file of its own.

A new format is a row in `formats`, a file here with these classes and `make_format`, and its kernels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ziphius.checkpoint.config import MoEConfig
from ziphius.formats import Format
from ziphius.layers.layer import CheckpointTensor, Layer, Shard


class Norm(Protocol):
    """An RMSNorm as a weight sees it: a kernel takes weight and eps, everything else calls it."""

    @property
    def weight(self) -> Tensor:
        """[in]."""

    @property
    def eps(self) -> float:
        """Added to the mean square."""

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, in], normalised."""


@dataclass(frozen=True, slots=True)
class MatrixPart:
    """A matrix of the checkpoint that becomes rows of a weight. Merged projections have several parts."""

    shape: tuple[int, int]
    """[out, in] of the whole matrix in the checkpoint."""
    shard: Shard | None
    """What this rank keeps of it."""
    start: int
    """The first row of the weight that it fills."""

    @property
    def rows(self) -> int:
        """Rows of the weight that it fills."""
        return self.shard.length if self.shard is not None and self.shard.dim == 0 else self.shape[0]


class LinearWeight(Layer, ABC):
    """One matrix [out, in] of this rank, in some format."""

    def __init__(self, out_features: int, in_features: int) -> None:
        self.out_features = out_features
        self.in_features = in_features

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out], in x's type."""

    def after_norm(self, x: Tensor, norm: Norm) -> Tensor:
        """self(norm(x)). A format may do both in one kernel."""
        return self(norm(x))

    def onto(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + self(x), [T, out]; `residual` may be overwritten. A format may do both in one kernel."""
        return residual + self(x)

    @abstractmethod
    def load_rows(self, start: int, rows: Tensor) -> None:
        """Convert `rows` [n, in], any float type, and keep them from row `start` on."""

    @abstractmethod
    def fill_random(self, std: float, generator: torch.Generator) -> None:
        """Random values of standard deviation `std` in place of a checkpoint's."""

    def checkpoint_tensors(self, name: str, part: MatrixPart) -> Iterator[CheckpointTensor]:
        """The tensors of the checkpoint that fill `part`; also scales, for a format whose checkpoints have them."""
        start = part.start
        yield CheckpointTensor(f"{name}.weight", part.shape, part.shard, lambda t: self.load_rows(start, t))


class ExpertWeights(Layer, ABC):
    """The same matrix [out, in] of every expert, stacked, so that a fused kernel can take all of them."""

    @abstractmethod
    def apply(self, expert: int, x: Tensor) -> Tensor:
        """x [T, in] through one expert -> [T, out], in x's type."""

    @abstractmethod
    def load_rows(self, expert: int, start: int, rows: Tensor) -> None:
        """Convert `rows` [n, in], any float type, and keep them from row `start` of `expert` on."""

    @abstractmethod
    def fill_random(self, std: float, generator: torch.Generator) -> None:
        """Random values of standard deviation `std` in place of a checkpoint's."""

    def checkpoint_tensors(self, name: str, expert: int, part: MatrixPart) -> Iterator[CheckpointTensor]:
        """The tensors of the checkpoint that fill `part` of one expert."""
        start = part.start
        yield CheckpointTensor(f"{name}.weight", part.shape, part.shard, lambda t: self.load_rows(expert, start, t))


class LatentWeights(Layer):
    """MLA's kv_b_proj of this rank's heads H, cut into a key half and a value half, which decoding absorbs."""

    def __init__(self, sizes: LatentSizes, dtype: torch.dtype, device: torch.device) -> None:
        self.w_uk = torch.empty((sizes.heads, sizes.nope, sizes.lora), dtype=dtype, device=device)
        """[H, nope, lora]."""
        self.w_uv = torch.empty((sizes.heads, sizes.lora, sizes.value), dtype=dtype, device=device)
        """[H, lora, v]."""

    def checkpoint_tensors(self, name: str, part: MatrixPart) -> Iterator[CheckpointTensor]:
        """The checkpoint's tensors that fill both halves; also scales, for a format whose checkpoints have them."""
        yield CheckpointTensor(f"{name}.weight", part.shape, part.shard, self._load)

    def _load(self, weight: Tensor) -> None:
        """`weight` [H * (nope + v), lora]: for each head the rows of its keys, then those of its values."""
        heads, nope = self.w_uk.shape[:2]
        by_head = weight.view(heads, -1, weight.shape[1])
        self.w_uk.copy_(by_head[:, :nope])
        self.w_uv.copy_(by_head[:, nope:].transpose(1, 2))


@dataclass(frozen=True, slots=True)
class LatentSizes:
    """Sizes of LatentWeights."""

    heads: int
    """Of this rank."""
    nope: int
    """A head's key values that are not rotated."""
    value: int
    """A head's values."""
    lora: int
    """Of the latent."""


@dataclass(frozen=True, slots=True)
class MixtureWeights:
    """All weights of one mixture of experts on this rank."""

    gate: Tensor
    """[experts, hidden], in the activations' type."""
    gate_up: ExpertWeights
    """[experts, 2I, hidden]: gate rows, then up rows."""
    down: ExpertWeights
    """[experts, hidden, I]."""
    shared_gate_up: LinearWeight | None
    """[2SI, hidden], of S shared experts in one MLP; None without shared experts."""
    shared_down: LinearWeight | None
    """[hidden, SI]."""
    width: int
    """I: of a routed expert on this rank."""


class FusedMixture(Protocol):
    """A whole mixture of experts in a format's own kernels: gate, routed and shared experts."""

    def __call__(self, x: Tensor, norm: Norm, residual: Tensor | None) -> Tensor:
        """This rank's part of the mixture for norm(x), + residual where one is given; x, residual, result [T, hidden].

        `residual` may be overwritten, also where it is x itself.
        """


class LinearFormat(ABC):
    """Makes the weights of a model's linear layers."""

    @property
    def batch_invariant(self) -> bool:
        """Whether results must not depend, in any bit, on what else is in the batch: --deterministic asks for that."""
        return False

    @property
    def block(self) -> tuple[int, int]:
        """[out, in] weights of a linear layer that a rank's share must not cut; (1, 1) where it may cut anywhere."""
        return 1, 1

    @property
    def expert_block(self) -> tuple[int, int]:
        """As `block`, of routed experts."""
        return self.block

    @abstractmethod
    def linear(self, out_features: int, in_features: int, device: torch.device) -> LinearWeight:
        """An uninitialised weight."""

    @abstractmethod
    def experts(self, experts: int, out_features: int, in_features: int, device: torch.device) -> ExpertWeights:
        """Uninitialised weights of all experts."""

    def head(self, vocab: int, hidden: int, dtype: torch.dtype, device: torch.device) -> LinearWeight:
        """An uninitialised head over this rank's share of the vocabulary; `dtype` is the activations'."""
        return self.linear(vocab, hidden, device)

    def tied(self, embedding: Tensor) -> LinearWeight | None:
        """A head that reads the embedding's own memory [vocab, hidden]; None when this format needs a copy."""
        return None

    def latent(self, sizes: LatentSizes, dtype: torch.dtype, device: torch.device) -> LatentWeights:
        """Uninitialised halves of kv_b_proj; `dtype` is the activations'."""
        return LatentWeights(sizes, dtype, device)

    def mixture(self, weights: MixtureWeights, moe: MoEConfig) -> FusedMixture | None:
        """Kernels for a whole mixture of experts; None: it is computed layer by layer, which defines the result."""
        return None


def torch_dtype(name: str) -> torch.dtype:
    """float32, bfloat16 or float16 as torch's type."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def torch_dtype_of(row: Format) -> torch.dtype:
    """The type that a float format holds weights in."""
    assert row.dtype is not None, f"{row.name} is no float format"
    return torch_dtype(row.dtype)
