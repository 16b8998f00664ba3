"""select_experts: which experts DeepSeek-V2's router chooses, in plain torch.

DeepSeek-V2 (arXiv:2405.04434), as DeepSeek's published modeling_deepseek.py computes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ziphius.checkpoint.config import MoEConfig


def select_experts(logits: Tensor, moe: MoEConfig) -> tuple[Tensor, Tensor]:
    """Router logits [T, experts] -> (weights [T, k] float32, expert ids [T, k] int64).

    Scores are a softmax over all experts. `group_limited_greedy` keeps the experts of the `topk_group` groups whose
    best expert scores highest. Chosen scores are renormalised to sum 1 (`norm_topk_prob`), *or else* multiplied by
    routed_scaling_factor: never both, in the published model. transformers 5 ignores norm_topk_prob.
    """
    scores = logits.float().softmax(dim=-1)
    if moe.topk_method == "group_limited_greedy":
        groups = scores.view(scores.shape[0], moe.n_group, -1)
        best = groups.amax(dim=-1).topk(moe.topk_group, dim=-1).indices
        kept = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(1, best, True)
        scores = groups.masked_fill(~kept.unsqueeze(-1), 0.0).flatten(1)
    weights, ids = scores.topk(moe.num_experts_per_tok, dim=-1)
    if moe.norm_topk_prob and moe.num_experts_per_tok > 1:
        return weights / (weights.sum(dim=-1, keepdim=True) + 1e-20), ids
    return weights * moe.routed_scaling_factor, ids
