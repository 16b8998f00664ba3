"""A Llama's layers as one program: what the layers one by one compute, and the same however a token is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ziphius.attention.batch import ForwardBatch
from ziphius.attention.torch_reference import TorchBackend
from ziphius.checkpoint.config import ModelConfig
from ziphius.distributed import SINGLE
from ziphius.kv_cache.kv_pool import KVPool
from ziphius.layers.int8 import Int8Format
from ziphius.layers.select import make_linear_format
from ziphius.layers.weights import LinearFormat
from ziphius.models.llama import LlamaForCausalLM
from ziphius.models.llama_cpu import LlamaOnCpu

CPU = torch.device("cpu")
PAGE = 16
SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {
        "hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6, "num_key_value_heads": 2,
        "head_dim": 32,
    },
    "wide": {
        "hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 1,
        "head_dim": 64,
    },
}  # fmt: skip


def config_of(shape: str, **changes: Any) -> ModelConfig:
    return ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 50,
            "num_hidden_layers": 3,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            **SHAPES[shape],
            **changes,
        }
    )


def model_of(config: ModelConfig, linear_format: LinearFormat) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(config, SINGLE, linear_format, torch.float32, CPU)
    seen: dict[str, Tensor] = {}
    for tensor in model.checkpoint_tensors():
        if tensor.name not in seen:
            scale = 1.0 if "norm" in tensor.name else tensor.shape[-1] ** -0.5
            seen[tensor.name] = torch.randn(tensor.shape) * scale + (1.0 if "norm" in tensor.name else 0.0)
        tensor.load(seen[tensor.name])
    return model


class Runner:
    """A model with a pool; sequences have consecutive pages of their own."""

    def __init__(self, model: LlamaForCausalLM, sequences: int = 4) -> None:
        self.model = model
        self.pages = 10
        self.pool = KVPool(model.config, sequences * self.pages, PAGE, torch.float32, CPU, SINGLE)
        for cache in self.pool.kv:
            cache.k.fill_(torch.nan)
            cache.v.fill_(torch.nan)
        self.attention = TorchBackend()

    def step(self, work: list[tuple[int, int, list[int]]], decodes: int = 0) -> Tensor:
        """(sequence, position, ids) of each; decode rows first -> [tokens, hidden]."""
        ids, positions, slots, starts, lens = [], [], [], [0], []
        for sequence, position, tokens in work:
            ids += tokens
            positions += range(position, position + len(tokens))
            first = sequence * self.pages * PAGE
            slots += range(first + position, first + position + len(tokens))
            starts.append(len(ids))
            lens.append(position + len(tokens))
        table = torch.tensor([[s * self.pages + p for p in range(self.pages)] for s, _, _ in work], dtype=torch.int32)
        batch = ForwardBatch(
            input_ids=torch.tensor(ids),
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            num_decodes=decodes,
            query_starts=starts,
            seq_lens=lens,
            seq_lens_device=torch.tensor(lens, dtype=torch.int32),
            page_table=table,
            page_size=PAGE,
            sample_indices=torch.tensor(starts[1:]) - 1,
        )
        self.attention.prepare(batch)
        return self.model.forward(batch, self.pool, self.attention)


def fast_model(shape: str) -> LlamaForCausalLM:
    return model_of(config_of(shape), make_linear_format("int8", torch.float32, CPU))


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_layers_one_by_one(shape: str) -> None:
    fast, plain = Runner(fast_model(shape)), Runner(model_of(config_of(shape), Int8Format()))
    assert isinstance(fast.model.on_cpu, LlamaOnCpu)
    assert plain.model.on_cpu is None
    ids = torch.randint(50, (140,)).tolist()
    steps: list[tuple[list[tuple[int, int, list[int]]], int]] = [
        ([(0, 0, ids[:70]), (1, 0, ids[70:75])], 0),
        ([(1, 5, [3]), (0, 70, ids[70:90]), (2, 0, ids[:1])], 1),
        ([(0, 90, [1]), (1, 6, [2]), (2, 1, [4])], 3),
    ]
    for work, decodes in steps:
        actual, expected = fast.step(work, decodes), plain.step(work, decodes)
        # A last bit of a float may move an activation by a whole step of its int8: then a token, and what sees it, is
        # a little off.
        assert (actual - expected).abs().max() < 0.03 * expected.abs().max()
        assert (actual - expected).abs()[:5].median() < 1e-5 * expected.abs().max() or decodes
        logits = fast.model.logits(actual)
        assert logits.shape == (actual.shape[0], 50)
        assert (logits - plain.model.logits(expected)).abs().max() < 0.03 * logits.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_token_is_the_same_however_it_is_computed(shape: str) -> None:
    model = fast_model(shape)
    ids = torch.randint(50, (150,)).tolist()
    whole = Runner(model).step([(0, 0, ids)])
    mixed = Runner(model)
    parts = [mixed.step([(0, 0, ids[:21])])]
    mixed.step([(1, 0, ids[40:70])])
    parts.append(mixed.step([(1, 30, [7]), (0, 21, ids[21:130])], 1)[1:])
    for position in range(130, 150):
        row = position - 130
        parts.append(mixed.step([(1, 31 + row, [9]), (0, position, ids[position : position + 1])], 2)[1:])
    assert torch.equal(torch.cat(parts), whole)


def test_a_result_outlives_the_next_step() -> None:
    runner = Runner(fast_model("grouped"))
    first = runner.step([(0, 0, [1, 2, 3])])
    kept = first.clone()
    runner.step([(0, 3, [4])], 1)
    assert torch.equal(first, kept)


def test_layers_run_one_by_one_where_the_tiles_do_not_fit() -> None:
    int8 = make_linear_format("int8", torch.float32, CPU)
    odd = Runner(model_of(config_of("grouped", intermediate_size=100), int8))
    plain = Runner(model_of(config_of("grouped", intermediate_size=100), Int8Format()))
    ids = torch.randint(50, (30,)).tolist()
    actual, expected = odd.step([(0, 0, ids)]), plain.step([(0, 0, ids)])
    assert odd.model.on_cpu is not None
    assert not odd.model.on_cpu.takes(odd.pool)
    assert (actual - expected).abs().max() < 0.03 * expected.abs().max()
    assert model_of(config_of("grouped", mlp_bias=True), int8).on_cpu is None
