"""The runner's graph path: padding, pages, last tokens; with real graphs on a GPU, step by step without one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from test_models import V2, V2_LITE
from torch import Tensor

from ziphius.attention.cuda import CudaBackend
from ziphius.distributed import SINGLE
from ziphius.engine.channel import MemoryChannel
from ziphius.engine.cuda_graph import DecodeGraphs, graph_sizes
from ziphius.engine.engine import Engine
from ziphius.engine.model_runner import ModelRunner
from ziphius.engine.row_table import RowTable
from ziphius.engine.sampler import Sampler
from ziphius.kv_cache.kv_pool import KVPool
from ziphius.layers.cuda_ops import CudaOps
from ziphius.layers.cuda_weights import CudaDenseFormat
from ziphius.messages import AddRequest, SamplingParams, StepOutput
from ziphius.models import deepseek_v2
from ziphius.models.config import ModelConfig
from ziphius.models.dummy import fill_dummy
from ziphius.scheduler.scheduler import Scheduler

PAGE, PAGES, ROWS = 4, 30, 4


class UncapturedGraphs(DecodeGraphs):
    """What a graph would replay, done anew each time."""

    def capture(self, sizes: Sequence[int], on_progress: object = None) -> None:
        self._sizes = sorted(sizes)

    def _launch(self, size: int) -> tuple[Tensor, Tensor]:
        batch = self._batch(size)
        self._attention.prepare(batch)
        return self._step(batch)


def answers(config: ModelConfig, device: torch.device, sizes: list[int], deterministic: bool) -> dict[str, list[int]]:
    """Three prompts, one at temperature 1 with a penalty, in a pool that forces preemption; `sizes` of graphs."""
    model = deepseek_v2.DeepseekV2ForCausalLM(
        config, SINGLE, CudaDenseFormat(torch.float32, device, deterministic), torch.float32, device
    )
    fill_dummy(model)
    pool = KVPool(config, PAGES, PAGE, torch.float32, device, SINGLE)
    table = RowTable(ROWS, 16, PAGE, device)
    attention = CudaBackend(device, deterministic)
    graphs = None
    if sizes:
        make = DecodeGraphs if device.type == "cuda" else UncapturedGraphs
        graphs = make(model, pool, attention, table.last_token, 16, max(sizes))
        graphs.capture(sizes)
    sampler = Sampler(ROWS, config.vocab_size, (), device)
    runner = ModelRunner(model, pool, attention, table, sampler, SINGLE, graphs)
    scheduler = Scheduler(
        num_pages=PAGES, page_size=PAGE, max_running_requests=ROWS - 1, chunked_prefill_size=16, context_length=60,
        eos_token_ids=(),
    )  # fmt: skip
    channel = MemoryChannel()
    engine = Engine(scheduler, runner, channel, overlap=True)
    for i, length in enumerate((5, 30, 21)):
        sampling = SamplingParams(max_new_tokens=18, temperature=0.0, seed=7, ignore_eos=True)
        if i == 2:
            sampling = SamplingParams(max_new_tokens=18, temperature=1.0, top_k=8, frequency_penalty=0.5, seed=7)
        ids = [(i * 7 + k * 3) % config.vocab_size for k in range(length)]
        channel.to_engine.append(AddRequest(rid=str(i), prompt_ids=ids, sampling=sampling))
    engine.turn()
    while not engine.idle:
        engine.turn()
    scheduler.check_pages()
    told: dict[str, list[int]] = {}
    for message in channel.from_engine:
        for output in message.outputs if isinstance(message, StepOutput) else ():
            told.setdefault(output.rid, []).extend(output.token_ids)
    return told


@pytest.mark.parametrize("config", [V2, V2_LITE], ids=["v2", "v2-lite"])
def test_graphs_change_no_token(device: torch.device, config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepseek_v2, "make_ops", lambda device, _: CudaOps(device, True))
    without = answers(config, device, [], True)
    assert all(len(ids) == 18 for ids in without.values())
    assert answers(config, device, [1, 4], True) == without


def test_sizes() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(10) == [1, 2, 4, 8, 10]
    assert graph_sizes(48)[-2:] == [40, 48]
