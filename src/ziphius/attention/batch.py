"""ForwardBatch: one step's integers as tensors, as the model and the attention read them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class ForwardBatch:
    """What one step computes: `num_decodes` sequences of one token each, then prefill chunks of any length.

    A *slot* is `page * page_size + offset`: where the pool keeps one token. Token t belongs to the sequence s with
    `query_starts[s] <= t < query_starts[s + 1]`. A chunk attends to all that its sequence has in the cache.
    """

    input_ids: Tensor
    """[tokens] int64."""
    positions: Tensor
    """[tokens] int64, of each token in its sequence."""
    slots: Tensor
    """[tokens] int64: where each token's keys and values go."""
    num_decodes: int
    """Sequences 0..num_decodes-1 are tokens 0..num_decodes-1."""
    query_starts: list[int]
    """[sequences + 1] token offsets; the last one is the number of tokens."""
    seq_lens: list[int]
    """[sequences] tokens in the cache after this step, those of this step included."""
    seq_lens_device: Tensor
    """[sequences] int32, the same numbers on the device."""
    page_table: Tensor
    """[sequences, max_pages] int32; only the first ceil(seq_len / page_size) entries of a row are valid."""
    page_size: int
    sample_indices: Tensor
    """[n] int64: the tokens whose logits are wanted."""

    @property
    def num_tokens(self) -> int:
        return self.query_starts[-1]

    @property
    def num_seqs(self) -> int:
        return len(self.seq_lens)
