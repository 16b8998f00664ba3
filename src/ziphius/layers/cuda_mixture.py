"""CudaMixture: a whole mixture of experts on a GPU; the expert products themselves are the format's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ziphius.checkpoint.config import MoEConfig
from ziphius.kernels.gpu import activation, routing
from ziphius.kernels.gpu.routing import Routes
from ziphius.kernels.gpu.tuning import ExpertsPlan, GroupedPlan
from ziphius.layers.cuda_kernels import CudaKernels
from ziphius.layers.weights import MixtureWeights, Norm

_ROUTE_AT_ONCE = 20480
"""Up to this many values in all tokens together, one kernel does norm, router and top-k, and reads the router once for
each token."""


class ExpertKernels(Protocol):
    """The expert products of one mixture, in the kernels of a format."""

    @property
    def shared(self) -> int:
        """How many shared experts are computed as further experts, which every token has."""

    def __call__(self, x: Tensor, routes: Routes, residual: Tensor | None, plan: ExpertsPlan) -> Tensor:
        """x [T, hidden], normed -> its experts' weighted sum + residual, [T, hidden]; residual may be overwritten."""


class CudaMixture:
    """A FusedMixture."""

    def __init__(
        self,
        kernels: CudaKernels,
        weights: MixtureWeights,
        moe: MoEConfig,
        *,
        routed: ExpertKernels,
        together: ExpertKernels | None,
    ) -> None:
        """`routed` computes the routed experts alone; `together` the shared ones as well, None where it cannot."""
        self._kernels = kernels
        self._weights = weights
        self._moe = moe
        self._routed = routed
        self._together = together
        self.on_routes: Callable[[Routes], None] | None = None
        """A measurement may set it: it is called with the routes of each step. A replayed graph does not call it."""

    def __call__(self, x: Tensor, norm: Norm, residual: Tensor | None) -> Tensor:
        """See FusedMixture."""
        moe, weights = self._moe, self._weights
        tokens, hidden = x.shape
        top_k = moe.num_experts_per_tok
        plan = self._kernels.tuned.experts(tokens, moe.n_routed_experts, hidden, weights.width, top_k)
        # For prompts the library is faster at shared experts.
        prompt = isinstance(plan, GroupedPlan) and plan.prompt
        experts = self._routed if self._together is None or prompt else self._together
        normed, routes = self._route(x, norm, experts.shared)
        if self.on_routes is not None:
            self.on_routes(routes)
        if not experts.shared and weights.shared_gate_up is not None and weights.shared_down is not None:
            act = activation.silu_and_mul(self._kernels.gpu, weights.shared_gate_up(normed))
            down = weights.shared_down
            residual = down(act) if residual is None else down.onto(act, residual)
        return experts(normed, routes, residual, plan)

    def _route(self, x: Tensor, norm: Norm, shared: int) -> tuple[Tensor, Routes]:
        """norm(x) and its routes; `shared`: how many shared experts each token has among them."""
        kernels, gate, moe = self._kernels, self._weights.gate, self._moe
        if x.numel() <= _ROUTE_AT_ONCE and not kernels.gpu.batch_invariant:
            return routing.route(kernels.gpu, x, norm.weight, norm.eps, gate, moe, shared, kernels.routing)
        normed = norm(x)
        logits = kernels.linear(normed, gate, out_dtype=torch.float32)
        return normed, routing.top_k(kernels.gpu, logits, moe, shared, kernels.routing)
