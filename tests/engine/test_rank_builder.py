"""A rank that is put together around a model without a checkpoint: its runners share it, its graphs are given to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from ziphius.checkpoint.config import ModelConfig
from ziphius.distributed import SINGLE
from ziphius.engine.channel import MemoryChannel
from ziphius.engine.engine import Engine
from ziphius.engine.rank_builder import RankBuilder, RankSizes
from ziphius.errors import DoesNotFit
from ziphius.ipc.messages import ScheduledBatch, StepOutput
from ziphius.layers.layer import Layer
from ziphius.models.loader import make_dummy
from ziphius.scheduler.scheduler import Scheduler

CPU = torch.device("cpu")
SIZES = RankSizes(num_pages=20, page_size=4, context_length=50, max_requests=3)
CONFIG = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
)


class NoGraphs:
    """Stands for captured graphs: notes what it was made of, and takes no step."""

    fails = False

    def __init__(self, *parts: Any) -> None:
        self.parts = parts
        self.captured: list[int] = []

    def capture(self, sizes: Sequence[int], on_progress: Any) -> None:
        if self.fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.captured = list(sizes)
        on_progress(len(sizes), len(sizes))

    def takes(self, count: int) -> bool:
        return False


class FailingGraphs(NoGraphs):
    fails = True


@pytest.fixture
def builder() -> RankBuilder:
    model = make_dummy(CONFIG, SINGLE, "fp32", torch.float32, CPU)
    assert isinstance(model, Layer)
    for tensor in model.tensors():
        tensor.mul_(10.0 if tensor.dim() > 1 else 1.0)  # so large that a token depends on all before it
    return RankBuilder(model, SIZES, torch.float32, CPU)


def answer(runner: Any, add: Any) -> list[int]:
    """12 greedy tokens."""
    scheduler = Scheduler(
        num_pages=SIZES.num_pages, page_size=SIZES.page_size, max_running_requests=SIZES.max_requests,
        chunked_prefill_size=64, context_length=SIZES.context_length, eos_token_ids=(), prefix_cache=False,
    )  # fmt: skip
    channel = MemoryChannel()
    channel.to_engine.append(add("a", [1, 2, 3, 4, 5], max_new_tokens=12))
    engine = Engine(scheduler, runner, channel)
    engine.turn()
    while not engine.idle:
        engine.turn()
    told = [message for message in channel.from_engine if isinstance(message, StepOutput)]
    return [i for message in told for output in message.outputs for i in output.token_ids]


def test_sizes() -> None:
    assert SIZES.rows == 4
    assert SIZES.max_pages == 14


def test_runners_share_one_rank(builder: RankBuilder, add: Any) -> None:
    """Steps of one request by two runners in turn are the steps of one."""
    runners = [builder.runner(), builder.runner()]

    class InTurn:
        def run(self, batch: ScheduledBatch) -> Any:
            runners.reverse()
            return runners[0].run(batch)

    wanted = answer(runners[0], add)
    assert len(wanted) == 12
    assert len(set(wanted)) > 3
    assert answer(InTurn(), add) == wanted


def test_graphs_are_made_of_the_ranks_parts(builder: RankBuilder) -> None:
    seen: list[tuple[int, int]] = []
    graphs = builder.capture(NoGraphs, [1, 3, 2], lambda *progress: seen.append(progress))  # type: ignore[type-var]
    model, pool, _, last_token, max_pages, largest = graphs.parts
    assert model is builder.model
    assert pool.scratch_page == SIZES.num_pages
    assert (len(last_token), max_pages, largest) == (SIZES.rows, SIZES.max_pages, 3)
    assert graphs.captured == [1, 3, 2]
    assert seen == [(3, 3)]


def test_running_out_of_memory_while_capturing_says_what_to_do(builder: RankBuilder) -> None:
    with pytest.raises(DoesNotFit, match=r"while CUDA graphs were captured.*--max-running-requests"):
        builder.capture(FailingGraphs, [1])  # type: ignore[type-var]
