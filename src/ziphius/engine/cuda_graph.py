"""DecodeGraphs: decode steps, captured once for each batch size and then replayed.

One replay is a whole step: the integers of the step are unpacked, the model runs, the best token of each row
is chosen and stored where the next step reads it. So the host may launch step n + 1 before it has seen the result of
step n, with one copy and one launch. A batch between two sizes is padded. The extra rows repeat the first row, so that
no expert runs only for them. They write into the scratch page, and their tokens go to the padding row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ziphius.attention.backend import AttentionBackend
from ziphius.attention.batch import ForwardBatch
from ziphius.engine.row_table import DecodePlan
from ziphius.kernels.gpu.argmax import argmax_into
from ziphius.kernels.gpu.decode_batch import HEADER, DecodeTensors, pack, unpack
from ziphius.kernels.gpu.device import GpuDevice
from ziphius.kv_cache.kv_pool import KVPool
from ziphius.models.causal_lm import CausalLM

_STAGES = 4
"""Pinned buffers that are used in turn. With one step in flight, a buffer's copy is done long before its next turn."""


@dataclass(frozen=True, slots=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    logits: Tensor
    """[size, vocab] float32, overwritten by every replay of any graph."""
    tokens: Tensor
    """[size] int64, likewise."""


@dataclass(frozen=True, slots=True)
class DecodeOutput:
    """The results for one step's rows. They are valid until the next replay."""

    logits: Tensor
    """[n, vocab] float32."""
    tokens: Tensor
    """[n] int64: the best of each row; rows' last tokens are set to them."""


def graph_sizes(largest: int) -> list[int]:
    """Batch sizes to capture, up to `largest`. They are close together where padding would cost most."""
    sizes = [1, 2, 4, *range(8, 33, 4), *range(40, 65, 8), *range(80, 257, 16), *range(288, 1 << 16, 32)]
    return [size for size in sizes if size < largest] + [largest]


class DecodeGraphs:
    """Graphs of one model and pool on one device. `last_token` is the row table's; its last row is for padding.

    A subclass may override `capture` (which must set `sizes`), `launch` and `replay`.
    """

    def __init__(
        self,
        model: CausalLM,
        pool: KVPool,
        attention: AttentionBackend,
        last_token: Tensor,
        max_pages: int,
        largest: int,
    ) -> None:
        device = last_token.device
        self._model = model
        self._pool = pool
        self._attention = attention
        self._last_token = last_token
        self._gpu = GpuDevice.of(device)
        self._graphs: dict[int, _Graph] = {}
        self.sizes: list[int] = []
        """The batch sizes that have a graph, ascending."""
        length = HEADER + largest * (3 + max_pages)
        self._packed = torch.zeros(length, dtype=torch.int32, device=device)
        pinned = device.type == "cuda"
        self._staging = [torch.zeros(length, dtype=torch.int32, pin_memory=pinned) for _ in range(_STAGES)]
        self._turn = 0
        self._tensors = DecodeTensors.empty(largest, max_pages, device)
        # Shared by all graphs. With its own in each graph they would take 300 MB for 128 rows, and 7 GB for 1024 rows.
        self._logits = torch.empty((largest, model.config.vocab_size), dtype=torch.float32, device=device)

    @torch.inference_mode()
    def capture(self, sizes: Sequence[int], on_progress: Callable[[int, int], None] | None = None) -> None:
        """Capture graphs for `sizes`, the largest first, so that the smaller ones reuse its memory."""
        # A row that belongs to no request: all that it writes goes into the scratch page and the padding row.
        scratch = self._pool.scratch_page
        row = len(self._last_token) - 1
        harmless = np.array([1, 1, row, 0, scratch * self._pool.page_size, scratch], dtype=np.int32)
        self._packed[: len(harmless)].copy_(torch.from_numpy(harmless))
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        memory = torch.cuda.graph_pool_handle()
        for done, size in enumerate(sorted(sizes, reverse=True)):
            batch = self._batch(size)
            self._attention.prepare(batch)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._step(batch)  # This compiles kernels and lets libraries allocate their workspaces.
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # What other threads do meanwhile (NCCL's watchdog queries its events) is not captured.
            with torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
                logits, tokens = self._step(batch)
            self._graphs[size] = _Graph(graph, logits, tokens)
            if on_progress is not None:
                on_progress(done + 1, len(sizes))
        self.sizes = sorted(self._graphs)

    def release(self) -> None:
        """Destroy the graphs after the last replay has ended. No graph is used any more.

        NCCL ends a communicator only when no graph that was captured with it is left, and waits for that for ever
        (pytorch/pytorch#115388).
        """
        if self._graphs:
            torch.cuda.synchronize(self._last_token.device)
        for each in self._graphs.values():
            each.graph.reset()
        self._graphs.clear()
        self.sizes = []

    def takes(self, count: int) -> bool:
        """Whether there is a graph for `count` rows."""
        return bool(self.sizes) and count <= self.sizes[-1]

    @torch.inference_mode()
    def replay(self, plan: DecodePlan) -> DecodeOutput:
        """Launch one step."""
        count = len(plan.rows)
        packed = pack(plan.rows, plan.positions, plan.slots, plan.pages)
        staging = self._staging[self._turn]
        self._turn = (self._turn + 1) % _STAGES
        staging.numpy()[: len(packed)] = packed
        self._packed[: len(packed)].copy_(staging[: len(packed)], non_blocking=True)
        output = self.launch(next(size for size in self.sizes if size >= count))
        return DecodeOutput(output.logits[:count], output.tokens[:count])

    def launch(self, size: int) -> DecodeOutput:
        """Replay the graph of `size` rows for the step whose integers `replay` has put on the device."""
        graph = self._graphs[size]
        graph.graph.replay()
        return DecodeOutput(graph.logits, graph.tokens)

    def compute(self, size: int) -> DecodeOutput:
        """What `launch` does, operation by operation and without a graph: for subclasses where nothing is captured."""
        batch = self._batch(size)
        self._attention.prepare(batch)
        return DecodeOutput(*self._step(batch))

    def _step(self, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        tensors = self._tensors.first(batch.num_decodes)
        padding = len(self._last_token) - 1
        unpack(self._packed, self._last_token, tensors, self._pool.scratch_page * self._pool.page_size, padding)
        hidden = self._model.forward(batch, self._pool, self._attention)
        logits = self._model.logits(hidden, self._logits[: batch.num_decodes])
        tokens = torch.empty(batch.num_decodes, dtype=torch.int64, device=logits.device)
        argmax_into(self._gpu, logits, tokens, tensors.rows, self._last_token)
        return logits, tokens

    def _batch(self, size: int) -> ForwardBatch:
        tensors = self._tensors.first(size)
        longest = tensors.page_table.shape[1] * self._pool.page_size
        return ForwardBatch(
            input_ids=tensors.input_ids,
            positions=tensors.positions,
            slots=tensors.slots,
            num_decodes=size,
            query_starts=list(range(size + 1)),
            seq_lens=[longest] * size,
            seq_lens_device=tensors.seq_lens,
            page_table=tensors.page_table,
            page_size=self._pool.page_size,
            sample_indices=torch.arange(size),
        )
