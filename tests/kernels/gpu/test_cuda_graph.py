"""The runner's graph path: padding, pages, last tokens; with real graphs on a GPU, step by step without one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from gpu_engine import Settings, UncapturedGraphs, answers
from test_models import V2, V2_LITE

from ziphius.checkpoint.config import ModelConfig
from ziphius.distributed import SINGLE
from ziphius.engine.cuda_graph import graph_sizes
from ziphius.ipc.messages import AddRequest, SamplingParams
from ziphius.layers.cuda_dense import CudaDenseFormat
from ziphius.layers.cuda_mixture import CudaMixture
from ziphius.layers.cuda_ops import CudaOps
from ziphius.layers.moe import MixtureOfExperts
from ziphius.models import deepseek_v2
from ziphius.models.dummy import fill_dummy

TOKENS = 5


def requests(vocab_size: int) -> list[AddRequest]:
    """Three prompts, one at temperature 1 with a penalty."""
    made = []
    for i, length in enumerate((5, 11, 10)):
        sampling = SamplingParams(max_new_tokens=TOKENS, temperature=0.0, seed=7, ignore_eos=True)
        if i == 2:
            sampling = SamplingParams(
                max_new_tokens=TOKENS, temperature=1.0, top_k=8, frequency_penalty=0.5, seed=7, ignore_eos=True
            )
        ids = [(i * 7 + k * 3) % vocab_size for k in range(length)]
        made.append(AddRequest(rid=str(i), prompt_ids=ids, sampling=sampling))
    return made


@pytest.mark.parametrize("config", [V2, V2_LITE], ids=["v2", "v2-lite"])
def test_graphs_change_no_token(device: torch.device, config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a pool that forces preemption."""
    monkeypatch.setattr(deepseek_v2, "make_ops", CudaOps)
    weights = CudaDenseFormat(torch.float32, device, batch_invariant=True)
    model = deepseek_v2.DeepseekV2ForCausalLM(config, SINGLE, weights, torch.float32, device)
    fill_dummy(model)
    wanted = requests(config.vocab_size)
    without = answers(model, torch.float32, device, True, Settings(chunk=8), wanted)
    tight = Settings(pages=9, chunk=8, reserved_tokens=0, graph_sizes=(1, 4))
    replayed = answers(model, torch.float32, device, True, tight, wanted)
    assert any(answer.preemptions for answer in replayed.values())
    assert all(len(answer.token_ids) == TOKENS for answer in without.values())
    assert {rid: answer.token_ids for rid, answer in replayed.items()} == {
        rid: answer.token_ids for rid, answer in without.items()
    }


def test_sizes() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(10) == [1, 2, 4, 8, 10]
    assert graph_sizes(48)[-2:] == [40, 48]


def test_released_graphs_take_no_step(device: torch.device) -> None:
    model = SimpleNamespace(config=V2)
    graphs = UncapturedGraphs(model, None, None, torch.zeros(5, dtype=torch.int64, device=device), 4, 4)  # type: ignore[arg-type]
    graphs.capture([1, 4])
    assert graphs.takes(3)
    graphs.release()
    assert not graphs.takes(1)


def test_an_observer_gets_the_routes_of_each_step(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepseek_v2, "make_ops", CudaOps)
    model = deepseek_v2.DeepseekV2ForCausalLM(V2, SINGLE, CudaDenseFormat(torch.float32, device), torch.float32, device)
    fill_dummy(model)
    mixtures = [layer.mlp.fused for layer in model.layers if isinstance(layer.mlp, MixtureOfExperts)]
    seen: list[torch.Tensor] = []
    for mixture in mixtures:
        assert isinstance(mixture, CudaMixture)
        mixture.on_routes = lambda routes: seen.append(routes.ids.cpu())
    answers(model, torch.float32, device, False, Settings(), requests(V2.vocab_size)[:1])
    assert [len(ids) for ids in seen] == [5] + [1] * (TOKENS - 1)
    top_k, experts = V2.moe.num_experts_per_tok, V2.moe.n_routed_experts
    for ids in seen:
        assert int(ids[:, :top_k].max()) < experts
        assert all(len(set(row)) == top_k for row in ids[:, :top_k].tolist())
