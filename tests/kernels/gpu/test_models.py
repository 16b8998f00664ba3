"""Whole small models on the GPU kernels against the same models in plain torch: prompts, chunks, mixed steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ziphius.attention.batch import ForwardBatch
from ziphius.attention.cuda import CudaBackend
from ziphius.attention.torch_reference import TorchBackend
from ziphius.checkpoint.config import GroupedQueryAttention, LatentAttention, ModelConfig, MoEConfig, YarnConfig
from ziphius.distributed import SINGLE
from ziphius.kv_cache.kv_pool import KVPool
from ziphius.layers.cuda_dense import CudaDenseFormat
from ziphius.layers.cuda_ops import CudaOps
from ziphius.layers.dense import DenseFormat
from ziphius.layers.ops import TorchOps
from ziphius.models import deepseek_v2, llama, qwen
from ziphius.models.dummy import fill_dummy

PAGE = 4
V2 = ModelConfig(
    architecture="DeepseekV2ForCausalLM",
    model_type="deepseek_v2",
    vocab_size=64,
    hidden_size=48,
    num_hidden_layers=2,
    intermediate_size=40,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    rope_scaling=YarnConfig(40.0, 32, 32.0, 1.0, 0.707, 0.707),
    max_position_embeddings=1280,
    tie_word_embeddings=False,
    mlp_bias=False,
    bos_token_id=1,
    eos_token_ids=(2,),
    torch_dtype="float32",
    attention=LatentAttention(4, 40, 32, 16, 8, 16),
    moe=MoEConfig(8, 3, 24, 2, 1, 1, "group_limited_greedy", 4, 2, False, 1.5),
)
V2_LITE = replace(
    V2, attention=replace(V2.attention, q_lora_rank=None), moe=replace(V2.moe, topk_method="greedy", n_group=1)
)
LLAMA = replace(
    V2, architecture="LlamaForCausalLM", model_type="llama", attention=GroupedQueryAttention(4, 2, 12), moe=None,
    rope_scaling=None,
)  # fmt: skip
QWEN3 = replace(LLAMA, architecture="Qwen3ForCausalLM", attention=GroupedQueryAttention(4, 2, 20, qk_norm=True))
CLASSES = {
    "DeepseekV2ForCausalLM": deepseek_v2.DeepseekV2ForCausalLM,
    "LlamaForCausalLM": llama.LlamaForCausalLM,
    "Qwen3ForCausalLM": qwen.Qwen3ForCausalLM,
}
# (tokens in the cache before, tokens of this step) of each sequence, step by step; single tokens come first.
STEPS = [
    [(0, 9), (0, 5)],
    [(9, 1), (5, 17)],
    [(10, 1), (22, 1), (0, 3)],
    [(11, 1), (23, 1), (3, 1)],
    [(12, 1)],
]


def make_batch(step: list[tuple[int, int]], ids: Tensor, device: torch.device) -> ForwardBatch:
    """Sequence s owns the pages s, 3 + s, 6 + s, ...: scattered, and the same in every step."""
    table = torch.tensor([[3 * page + s for page in range(12)] for s in range(len(step))], dtype=torch.int32)
    slots, positions, starts = [], [], [0]
    for s, (before, count) in enumerate(step):
        at = torch.arange(before, before + count)
        positions.append(at)
        slots.append(table[s, at // PAGE].long() * PAGE + at % PAGE)
        starts.append(starts[-1] + count)
    lens = [before + count for before, count in step]
    return ForwardBatch(
        input_ids=ids[: starts[-1]],
        positions=torch.cat(positions).to(device),
        slots=torch.cat(slots).to(device),
        num_decodes=sum(before > 0 and count == 1 for before, count in step),
        query_starts=starts,
        seq_lens=lens,
        seq_lens_device=torch.tensor(lens, dtype=torch.int32, device=device),
        page_table=table.to(device),
        page_size=PAGE,
        sample_indices=torch.tensor([0]),
    )


def run(model, attention, config: ModelConfig, device: torch.device, steps=STEPS) -> list[Tensor]:  # type: ignore[no-untyped-def]
    torch.manual_seed(1)
    pool = KVPool(config, 40, PAGE, torch.float32, device, SINGLE)
    outs = []
    with torch.inference_mode():
        for step in steps:
            batch = make_batch(step, torch.randint(0, 64, (64,), device=device), device)
            attention.prepare(batch)
            outs.append(model.logits(model.forward(batch, pool, attention)))
    return outs


@pytest.mark.parametrize("config", [V2, V2_LITE, LLAMA, QWEN3], ids=["v2", "v2-lite", "llama", "qwen3"])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_logits(
    device: torch.device, config: ModelConfig, batch_invariant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = deepseek_v2 if config.moe else llama
    make = CLASSES[config.architecture]
    monkeypatch.setattr(module, "make_ops", lambda *_: TorchOps())
    reference = make(config, SINGLE, DenseFormat(torch.float32), torch.float32, device)
    monkeypatch.setattr(module, "make_ops", lambda device, _: CudaOps(device, batch_invariant))
    weights = CudaDenseFormat(torch.float32, device, batch_invariant)
    model = make(config, SINGLE, weights, torch.float32, device)
    for one in (reference, model):
        fill_dummy(one)
    expected = run(reference, TorchBackend(), config, device)
    actual = run(model, CudaBackend(device, batch_invariant), config, device)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4)
