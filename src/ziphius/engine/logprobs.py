"""Log-probabilities of tokens: tensors on the device, and the messages made of them.

They are those of the model itself: log_softmax of its raw logits, before penalties, logit bias and temperature
(vLLM's default too). So a number says how likely the model found a token, whatever the caller's sampling was,
and it means the same for a prompt's tokens and an answer's. At temperature 1, and at 0, SGLang reports the same; at
other temperatures it divides by the temperature first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ziphius.ipc.messages import TokenLogprob


@dataclass(slots=True)
class LogprobTensors:
    """Log-probabilities at n positions. `top_*` hold the k most likely tokens, best first."""

    chosen: Tensor
    """[n] float32."""
    token_ids: Tensor
    """[n] int64."""
    top_values: Tensor
    """[n, k] float32."""
    top_ids: Tensor
    """[n, k] int64."""

    def to_messages(self, top_counts: list[int]) -> list[TokenLogprob]:
        """One message for each position, with `top_counts[i]` alternatives for position i."""
        chosen, token_ids = self.chosen.tolist(), self.token_ids.tolist()
        values, ids = self.top_values.tolist(), self.top_ids.tolist()
        return [
            TokenLogprob(
                logprob=chosen[i], token_id=token_ids[i], top=list(zip(values[i][:count], ids[i][:count], strict=True))
            )
            for i, count in enumerate(top_counts)
        ]


def compute_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> LogprobTensors:
    """`logits` [n, vocab] float32, raw; `token_ids` [n] int64, the tokens whose probability is wanted."""
    normalizer = torch.logsumexp(logits, dim=-1, keepdim=True)
    chosen = logits.gather(1, token_ids.unsqueeze(1)) - normalizer
    num_top = min(num_top, logits.shape[1])
    if num_top:
        top_values, top_ids = torch.topk(logits, num_top, dim=-1)
        top_values = top_values - normalizer
    else:
        top_values, top_ids = logits.new_zeros((len(logits), 0)), token_ids.new_zeros((len(logits), 0))
    return LogprobTensors(chosen.squeeze(1), token_ids, top_values, top_ids)
