"""RankBuilder: builds what one rank needs around a model: pool, row table, sampler, attention, graphs and runner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from ziphius.attention.backend import AttentionBackend
from ziphius.attention.select import make_backend
from ziphius.distributed import SINGLE, ParallelState
from ziphius.engine.model_runner import ModelRunner
from ziphius.engine.out_of_memory import out_of_memory_explained
from ziphius.engine.row_table import RowTable
from ziphius.engine.sampler import Sampler
from ziphius.kv_cache.kv_pool import KVPool
from ziphius.models.causal_lm import CausalLM

if TYPE_CHECKING:
    from ziphius.engine.cuda_graph import DecodeGraphs

G = TypeVar("G", bound="DecodeGraphs")


@dataclass(frozen=True, slots=True)
class RankSizes:
    """How much one rank holds and computes at a time."""

    num_pages: int
    """Pages of the KV cache."""
    page_size: int
    """Tokens of a page."""
    context_length: int
    """Most tokens of a request, prompt and answer together."""
    max_requests: int
    """Most requests that run at a time."""

    @property
    def rows(self) -> int:
        """Rows of the row table and of the sampler: one more than requests, for padding."""
        return self.max_requests + 1

    @property
    def max_pages(self) -> int:
        """Columns of a page table."""
        return -(-self.context_length // self.page_size) + 1


class RankBuilder:
    """The parts of one rank around `model`. All runners made here share them, so only one may run at a time."""

    def __init__(
        self,
        model: CausalLM,
        sizes: RankSizes,
        dtype: torch.dtype,
        device: torch.device,
        parallel: ParallelState = SINGLE,
        *,
        batch_invariant: bool = False,
        attention: AttentionBackend | None = None,
    ) -> None:
        """`dtype` is that of the KV cache. `attention` replaces the backend that the device gets by default.

        DoesNotFit when memory runs out while the KV cache is made.
        """
        self.model = model
        self._sizes = sizes
        self._parallel = parallel
        with out_of_memory_explained("the KV cache was made"):
            self._pool = KVPool(model.config, sizes.num_pages, sizes.page_size, dtype, device, parallel)
        self._table = RowTable(sizes.rows, sizes.max_pages, sizes.page_size, device)
        self._sampler = Sampler(sizes.rows, model.config.vocab_size, model.config.eos_token_ids, device)
        self._attention = make_backend(device, batch_invariant) if attention is None else attention

    def capture(
        self,
        make: Callable[[CausalLM, KVPool, AttentionBackend, Tensor, int, int], G],
        batch_sizes: Sequence[int],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> G:
        """Capture graphs for decode steps of `batch_sizes` rows. A runner uses them when they are given to `runner`.

        `make` is DecodeGraphs or a subclass. `on_progress` is called with (graphs captured, graphs in all) after each
        graph. DoesNotFit when memory runs out while they are captured.
        """
        last_token = self._table.last_token
        graphs = make(self.model, self._pool, self._attention, last_token, self._sizes.max_pages, max(batch_sizes))
        with out_of_memory_explained("CUDA graphs were captured"):
            graphs.capture(batch_sizes, on_progress)
        return graphs

    def runner(self, graphs: DecodeGraphs | None = None) -> ModelRunner:
        """A runner that replays `graphs` for the decode steps they take; other steps run operation by operation."""
        return ModelRunner(self.model, self._pool, self._attention, self._table, self._sampler, self._parallel, graphs)
