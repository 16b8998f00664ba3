"""GatedMLP: the SwiGLU of a dense layer or of shared experts (arXiv:2002.05202)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ziphius.layers.context import LayerContext
from ziphius.layers.layer import CheckpointTensor, Layer
from ziphius.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from ziphius.layers.weights import Norm


class GatedMLP(Layer):
    """down(silu(gate(x)) * up(x)). Each rank has an equal share of the width."""

    def __init__(
        self, hidden_size: int, width: int, context: LayerContext, *, bias: bool = False, reduce: bool = True
    ) -> None:
        """`reduce` False leaves the sum over ranks to the caller."""
        self._ops = context.ops
        self.gate_up_proj = MergedColumnParallelLinear(hidden_size, [width, width], context, bias=bias)
        self.down_proj = RowParallelLinear(width, hidden_size, context, bias=bias, reduce=reduce)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        return self.down_proj(self.activations(x))

    def activations(self, x: Tensor) -> Tensor:
        """silu(gate(x)) * up(x): [T, hidden] -> [T, width of this rank]."""
        return self._ops.silu_and_mul(self.gate_up_proj(x))

    def onto(self, x: Tensor, norm: Norm) -> Tensor:
        """x + self(norm(x))."""
        return self.down_proj.onto(self._ops.silu_and_mul(self.gate_up_proj.after_norm(x, norm)), x)

    def checkpoint_tensors(self, name: str) -> Iterator[CheckpointTensor]:
        yield from self.gate_up_proj.checkpoint_tensors(f"{name}.gate_proj", f"{name}.up_proj")
        yield from self.down_proj.checkpoint_tensors(f"{name}.down_proj")
