"""The shape of a model's attention, and what follows from it: its weights, its cache, and how ranks share them.

The planner, the cache and the models ask these classes, so that a new kind of attention is one class. Sizes are counts
of values, never bytes. `tp` is the number of tensor-parallel ranks; where a share is computed it must divide `heads`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ziphius.checkpoint.parameters import Matrix, Part


class SharedDimension(NamedTuple):
    """A size of which every rank takes an equal share."""

    name: str
    """In config.json; a product is joined with ` x `."""
    label: str
    """For a person."""
    size: int


class AttentionShape(Protocol):
    """What a kind of attention tells about itself."""

    @property
    def heads(self) -> int:
        """Query heads; every rank has an equal share."""

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""

    @property
    def qk_head_dim(self) -> int:
        """Values of one head's query and of its key."""

    @property
    def rotary_dim(self) -> int:
        """Values of a head that the rotary embedding turns."""

    @property
    def cache_replicated(self) -> bool:
        """Whether every rank keeps the whole cache, however many ranks there are."""

    def cache_values(self, tp: int) -> int:
        """Values that one rank's cache keeps of one token in one layer."""

    def shares_cache(self, tp: int) -> bool:
        """Whether `tp` ranks can share the cache out or replicate it."""

    def sharded_dimensions(self, tp: int) -> list[SharedDimension]:
        """Rows and columns of projections that `tp` ranks share; a format's blocks must not be cut by a share."""

    def matrices(self, hidden: int, layers: int, tp: int) -> Iterator[Matrix]:
        """One rank's attention weights in all `layers`; `hidden` is the residual stream's size."""

    def activation_values(self, tp: int) -> int:
        """Values that one token's attention needs at once on one rank, at most."""

    def latent_values(self, tp: int) -> int:
        """Values that a row needs in addition when it is compared with the cache in latent space."""


@dataclass(frozen=True, slots=True)
class GroupedQueryAttention:
    """Groups of query heads share a key/value head (arXiv:2305.13245).

    Key/value heads are shared out, or replicated where there are more ranks than heads.
    """

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each head of q and k, with one weight for all heads of each."""

    @property
    def qk_head_dim(self) -> int:
        return self.head_dim

    @property
    def rotary_dim(self) -> int:
        return self.head_dim

    @property
    def cache_replicated(self) -> bool:
        return False

    def kv_heads_of_rank(self, tp: int) -> int:
        return max(1, self.kv_heads // tp)

    def cache_values(self, tp: int) -> int:
        return 2 * self.kv_heads_of_rank(tp) * self.head_dim

    def shares_cache(self, tp: int) -> bool:
        return self.kv_heads % tp == 0 or tp % self.kv_heads == 0

    def sharded_dimensions(self, tp: int) -> list[SharedDimension]:
        found = [SharedDimension("num_attention_heads x head_dim", "query rows", self.heads * self.head_dim)]
        if self.kv_heads >= tp:
            rows = self.kv_heads * self.head_dim
            found.append(SharedDimension("num_key_value_heads x head_dim", "key/value rows", rows))
        return found

    def matrices(self, hidden: int, layers: int, tp: int) -> Iterator[Matrix]:
        q_rows, kv_rows = self.heads // tp * self.head_dim, self.kv_heads_of_rank(tp) * self.head_dim
        kv_part: Part = "attention_sharded" if self.kv_heads >= tp else "attention_replicated"
        yield Matrix("attention_sharded", "linear", q_rows, hidden, layers, self.qkv_bias)
        yield Matrix(kv_part, "linear", kv_rows, hidden, 2 * layers, self.qkv_bias)
        yield Matrix("attention_sharded", "linear", hidden, q_rows, layers, self.o_bias)
        if self.qk_norm:
            yield Matrix("norms", "float", 2 * self.head_dim * layers, 1)

    def activation_values(self, tp: int) -> int:
        q, k = self.heads // tp * self.head_dim, self.kv_heads_of_rank(tp) * self.head_dim
        return 2 * q + 2 * k + (q + k if self.qk_norm else 0)

    def latent_values(self, tp: int) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-head latent attention, MLA (DeepSeek-V2, arXiv:2405.04434), under Hugging Face's names.

    The cache keeps one latent and one rotary key of a token, which all heads and therefore all ranks need.
    """

    heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    bias: bool = False
    """Of the two projections into latents, and of the output's."""

    @property
    def kv_heads(self) -> int:
        return self.heads

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values the cache keeps of one token in one layer: the latent and the rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def rotary_dim(self) -> int:
        return self.qk_rope_head_dim

    @property
    def cache_replicated(self) -> bool:
        return True

    def cache_values(self, tp: int) -> int:
        return self.latent_dim

    def shares_cache(self, tp: int) -> bool:
        return True

    def sharded_dimensions(self, tp: int) -> list[SharedDimension]:
        heads, kv_b = self.heads, self.qk_nope_head_dim + self.v_head_dim
        return [
            SharedDimension("num_attention_heads x qk_head_dim", "query rows", heads * self.qk_head_dim),
            SharedDimension("num_attention_heads x (qk_nope_head_dim + v_head_dim)", "latent rows", heads * kv_b),
            SharedDimension("num_attention_heads x v_head_dim", "attention output", heads * self.v_head_dim),
        ]

    def matrices(self, hidden: int, layers: int, tp: int) -> Iterator[Matrix]:
        heads, bias = self.heads // tp, self.bias
        q_input = hidden
        if self.q_lora_rank is not None:
            yield Matrix("attention_replicated", "linear", self.q_lora_rank, hidden, layers, bias)
            yield Matrix("norms", "float", self.q_lora_rank * layers, 1)
            q_input = self.q_lora_rank
        yield Matrix("attention_sharded", "linear", heads * self.qk_head_dim, q_input, layers)
        yield Matrix("attention_replicated", "linear", self.latent_dim, hidden, layers, bias)
        yield Matrix("norms", "float", self.kv_lora_rank * layers, 1)
        kv_b_rows = heads * (self.qk_nope_head_dim + self.v_head_dim)
        yield Matrix("attention_sharded", "latent_up", kv_b_rows, self.kv_lora_rank, layers)
        yield Matrix("attention_sharded", "linear", hidden, heads * self.v_head_dim, layers, bias)

    def activation_values(self, tp: int) -> int:
        return self.heads // tp * (2 * self.qk_head_dim + 2 * self.v_head_dim)

    def latent_values(self, tp: int) -> int:
        return self.heads // tp * 2 * self.latent_dim
