"""Matrix: how many parameters of which kind a rank holds, before a weights format says what they cost in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Part = Literal[
    "routed_experts",
    "shared_experts",
    "attention_sharded",
    "attention_replicated",
    "dense",
    "router",
    "embedding",
    "head",
    "norms",
]
Kind = Literal["linear", "expert", "latent_up", "float", "tied_head"]


@dataclass(frozen=True, slots=True)
class Matrix:
    """Equal parameters of one rank: `copies` matrices [out_features, in_features] that a format treats alike.

    kind `linear`: any projection; `expert`: a routed expert's; `latent_up`: MLA's kv_b; `float`: always in the
    dtype (embedding, router, norms: in_features 1); `tied_head`: no parameter, but int8 holds a copy.
    """

    part: Part
    kind: Kind
    out_features: int
    in_features: int
    copies: int = 1
    bias: bool = False

    @property
    def parameters(self) -> int:
        if self.kind == "tied_head":
            return 0
        return self.copies * self.out_features * (self.in_features + self.bias)
