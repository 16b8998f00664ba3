"""Loading: every tensor to its place, in any format and on any rank; what does not match is named."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ziphius.attention.batch import ForwardBatch
from ziphius.attention.torch_reference import TorchBackend
from ziphius.checkpoint.config import ModelConfig
from ziphius.checkpoint.weight_source import Rows, StoredTensor
from ziphius.distributed import SINGLE, ParallelState
from ziphius.errors import CheckpointError, ConfigError
from ziphius.ipc.messages import LoadProgress
from ziphius.kv_cache.kv_pool import KVPool
from ziphius.layers.dense import DenseFormat
from ziphius.layers.layer import Layer
from ziphius.models.causal_lm import CausalLM, make_model
from ziphius.models.deepseek_v2 import DeepseekV2ForCausalLM
from ziphius.models.llama import LlamaForCausalLM
from ziphius.models.loader import load_model, make_dummy
from ziphius.planner.memory import weight_bytes

CPU = torch.device("cpu")
COMMON: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
}
LLAMA = COMMON | {"architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2}
V2 = COMMON | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 2.0,
}
CONFIGS = {
    "llama": ModelConfig.from_hf(LLAMA),
    "llama tied": ModelConfig.from_hf(LLAMA | {"tie_word_embeddings": True}),
    "llama biases": ModelConfig.from_hf(LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "V2": ModelConfig.from_hf(V2),
    "V2 biases": ModelConfig.from_hf(V2 | {"attention_bias": True}),
    "V2-Lite": ModelConfig.from_hf(V2 | {"q_lora_rank": None, "topk_method": "greedy"}),
}


@dataclass
class Source:
    """Tensors in memory, as numpy arrays or tensors."""

    data: dict[str, Tensor]
    as_numpy: bool = False

    def stored(self) -> dict[str, StoredTensor]:
        return {
            name: StoredTensor(tuple(t.shape), t.itemsize, f"file {i % 2}")
            for i, (name, t) in enumerate(self.data.items())
        }

    def part(self, name: str, rows: Mapping[str, Rows | None] | None) -> Tensor:
        part = None if rows is None else rows[name]
        return self.data[name] if part is None else self.data[name][slice(*part)]

    def tensors(self, rows: Mapping[str, Rows | None] | None = None) -> Iterator[tuple[str, Tensor | NDArray[Any]]]:
        for name in self.data if rows is None else rows:
            tensor = self.part(name, rows)
            yield name, tensor.numpy() if self.as_numpy else tensor.clone()


def make_source(config: ModelConfig) -> Source:
    """Random weights of the whole model."""
    model = make_model(config, SINGLE, DenseFormat(torch.float32), torch.float32, CPU)
    generator = torch.Generator().manual_seed(0)
    data = {}
    for t in model.checkpoint_tensors():
        data[t.name] = torch.randn(t.shape, generator=generator) * 0.2 + ("norm" in t.name)
    return Source(data)


def load(
    config: ModelConfig, source: Source, weights_format: str = "fp32", parallel: ParallelState = SINGLE
) -> CausalLM:
    return load_model(config, source, parallel, weights_format, torch.float32, CPU)


def run(model: CausalLM, parallel: ParallelState = SINGLE) -> Tensor:
    """Logits [tokens, vocab] of one prompt, its last token as a decode step."""
    ids = torch.tensor([3, 1, 39, 22, 5, 17, 8])
    pool, backend = KVPool(model.config, 2, 4, torch.float32, CPU, parallel), TorchBackend()
    logits = []
    for start, end in ((0, 6), (6, 7)):
        batch = ForwardBatch(
            input_ids=ids[start:end],
            positions=torch.arange(start, end),
            slots=torch.arange(start, end),
            num_decodes=int(start > 0),
            query_starts=[0, end - start],
            seq_lens=[end],
            seq_lens_device=torch.tensor([end], dtype=torch.int32),
            page_table=torch.tensor([[0, 1]], dtype=torch.int32),
            page_size=4,
            sample_indices=torch.tensor([0]),
        )
        with torch.inference_mode():
            backend.prepare(batch)
            logits.append(model.logits(model.forward(batch, pool, backend)))
    return torch.cat(logits)


@dataclass(frozen=True, slots=True)
class ThreadGroup(ParallelState):
    """A rank of a group of threads, so that a whole model runs on two ranks in one process."""

    barrier: Any = None
    slots: Any = None

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self.slots[self.rank] = x
        self.barrier.wait(timeout=60)
        everyone = list(self.slots)
        self.barrier.wait(timeout=60)
        return everyone

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange(x)).sum(0)

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        return torch.cat(self._exchange(x), dim)


def run_on_ranks(config: ModelConfig, source: Source, size: int) -> list[Tensor]:
    barrier, slots = threading.Barrier(size), [None] * size
    groups = [ThreadGroup(rank, size, barrier=barrier, slots=slots) for rank in range(size)]
    models = [load(config, source, parallel=group) for group in groups]
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, models, groups))


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_compute_the_model(name: str, size: int) -> None:
    config = CONFIGS[name]
    source = make_source(config)
    expected = run(load(config, source))
    for logits in run_on_ranks(config, source, size):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_numpy_arrays_and_tensors_load_alike(name: str) -> None:
    config = CONFIGS[name]
    source = make_source(config)
    expected = run(load(config, source))
    source.as_numpy = True
    assert torch.equal(run(load(config, source)), expected)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_int8_is_near_float(name: str) -> None:
    config = CONFIGS[name]
    source = make_source(config)
    expected, actual = run(load(config, source)), run(load(config, source, "int8"))
    # Random experts are near ties: rounding may choose another one
    assert 1e-6 < (actual - expected).abs().max() / expected.abs().max() < (0.1 if config.moe is None else 0.2)


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("weights_format", ["fp32", "int8"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_ranks_bytes_are_the_planners(name: str, weights_format: Any, size: int) -> None:
    config = CONFIGS[name]
    model = load(config, make_source(config), weights_format, ParallelState(size - 1, size))
    assert model.nbytes == weight_bytes(config, size, weights_format, float_bytes=4).total


@pytest.mark.parametrize("name", ["llama", "llama tied", "V2"])
@pytest.mark.parametrize("weights_format", ["fp32", "bf16", "int8"])
def test_dummy_weights(name: str, weights_format: str) -> None:
    """Two ranks draw alike, and the logits are numbers that tell tokens apart, of one size in every format."""
    first, second, one = (
        make_dummy(CONFIGS[name], parallel, weights_format, torch.float32, CPU)
        for parallel in (ParallelState(0, 2), ParallelState(1, 2), SINGLE)
    )
    assert isinstance(first, Layer)
    assert isinstance(second, Layer)
    assert all(torch.equal(a, b) for a, b in zip(first.tensors(), second.tensors(), strict=True))
    logits = run(one)
    assert logits.isfinite().all()
    plain = run(make_dummy(CONFIGS[name], SINGLE, "fp32", torch.float32, CPU))
    assert 0.5 < logits.std() / plain.std() < 2


def test_int8_keeps_what_must_stay_float() -> None:
    llama = load(CONFIGS["llama tied"], make_source(CONFIGS["llama tied"]), "int8")
    assert isinstance(llama, LlamaForCausalLM)
    assert llama.embed_tokens.weight.dtype == llama.norm.weight.dtype == torch.float32
    assert llama.lm_head.weight.nbytes < llama.embed_tokens.weight.nbytes / 2
    deepseek = load(CONFIGS["V2"], make_source(CONFIGS["V2"]), "int8")
    assert isinstance(deepseek, DeepseekV2ForCausalLM)
    kv_b = deepseek.layers[0].self_attn.kv_b_proj
    assert kv_b.w_uk.dtype == kv_b.w_uv.dtype == torch.float32


def test_16_bit_weights_under_float32_activations() -> None:
    config = CONFIGS["llama"]
    source = make_source(config)
    expected, actual = run(load(config, source)), run(load(config, source, "bf16"))
    assert 1e-6 < (actual - expected).abs().max() / expected.abs().max() < 0.1


def test_missing_and_left_over_tensors_are_named() -> None:
    source = make_source(CONFIGS["V2"])
    del source.data["model.layers.1.mlp.experts.3.up_proj.weight"]
    del source.data["model.norm.weight"]
    source.data["model.layers.61.embed_tokens.weight"] = torch.zeros(3)
    expected = (
        r"2 tensors missing: model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight, model\.norm\.weight; "
        r"1 tensor left over: model\.layers\.61\.embed_tokens\.weight$"
    )
    with pytest.raises(CheckpointError, match=expected):
        load(CONFIGS["V2"], source)


def test_a_message_names_a_few_of_many() -> None:
    with pytest.raises(CheckpointError, match=r"tensors missing: model\.embed_tokens\.weight, .*, \.\.\.$"):
        load(CONFIGS["V2"], Source({}))


def test_wrong_shapes_are_named_with_both() -> None:
    source = make_source(CONFIGS["V2"])
    names = ["model.layers.0.self_attn.q_b_proj.weight", "model.layers.1.mlp.gate.weight"]
    shapes = [list(source.data[name].shape) for name in names]
    files = [source.stored()[name].file for name in names]
    for name in names:
        source.data[name] = source.data[name].T.contiguous()
    with pytest.raises(CheckpointError) as error:
        load(CONFIGS["V2"], source)
    told = [
        f"{name} ({shape[::-1]} in {file}, this config needs {shape})"
        for name, shape, file in zip(names, shapes, files, strict=True)
    ]
    assert error.value.message.endswith("2 tensors of another shape: " + ", ".join(told))


def test_nothing_is_read_of_a_checkpoint_that_does_not_match() -> None:
    class Unread(Source):
        def tensors(self, rows: Mapping[str, Rows | None] | None = None) -> Iterator[tuple[str, Tensor]]:
            raise AssertionError("read")

    source = Unread(make_source(CONFIGS["V2"]).data)
    del source.data["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"1 tensor missing: model\.norm\.weight$"):
        load(CONFIGS["V2"], source)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_rank_reads_its_own_rows_only(name: str) -> None:
    """Where the ranks share by rows; a share by columns needs the whole matrix."""
    asked: dict[str, Rows | None] = {}

    class Asked(Source):
        def tensors(self, rows: Mapping[str, Rows | None] | None = None) -> Iterator[tuple[str, Any]]:
            asked.update(rows or {})
            return super().tensors(rows)

    load(CONFIGS[name], Asked(make_source(CONFIGS[name]).data), parallel=ParallelState(1, 2))
    assert asked["model.embed_tokens.weight"] == (20, 40)
    assert asked["model.layers.0.mlp.up_proj.weight"] == (24, 48)
    assert asked["model.layers.0.self_attn.o_proj.weight"] is None
    assert asked["model.norm.weight"] is None
    if "V2" in name:
        assert asked["model.layers.1.mlp.experts.3.gate_proj.weight"] == (8, 16)
        assert asked["model.layers.1.self_attn.kv_b_proj.weight"] == (32, 64)
        assert asked["model.layers.1.self_attn.kv_a_proj_with_mqa.weight"] is None


def test_a_tensor_given_twice() -> None:
    class Twice(Source):
        def tensors(self, rows: Mapping[str, Rows | None] | None = None) -> Iterator[tuple[str, Any]]:
            yield from super().tensors(rows)
            yield "model.norm.weight", torch.zeros(32)

    with pytest.raises(CheckpointError, match=r"model\.norm\.weight twice"):
        load(CONFIGS["llama"], Twice(make_source(CONFIGS["llama"]).data))


def test_buffers_that_models_recompute_and_a_tied_head_are_passed_over() -> None:
    source = make_source(CONFIGS["llama tied"])
    source.data["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    source.data["lm_head.weight"] = torch.zeros(40, 32)
    load(CONFIGS["llama tied"], source)
    source = make_source(CONFIGS["llama"])
    assert "lm_head.weight" in source.data


def test_a_size_that_does_not_divide_is_named() -> None:
    with pytest.raises(ConfigError, match="tensor-parallel size 3"):
        load(CONFIGS["llama"], make_source(CONFIGS["llama"]), parallel=ParallelState(0, 3))


def test_one_tensor_at_a_time_is_in_memory() -> None:
    alive = 0

    class Counting(Source):
        def tensors(self, rows: Mapping[str, Rows | None] | None = None) -> Iterator[tuple[str, Any]]:
            nonlocal alive
            for name in self.data:
                assert alive == 0, "the tensor before is still held"
                array = self.part(name, rows).numpy().copy()
                alive += 1
                weakref.finalize(array, died)
                yield name, array
                del array

    def died() -> None:
        nonlocal alive
        alive -= 1

    load(CONFIGS["V2"], Counting(make_source(CONFIGS["V2"]).data), "int8")
    assert alive == 0


def test_a_tensor_that_never_comes() -> None:
    class Lost(Source):
        def tensors(self, rows: Mapping[str, Rows | None] | None = None) -> Iterator[tuple[str, Any]]:
            return itertools.islice(super().tensors(rows), 3)

    with pytest.raises(CheckpointError, match="did not yield"):
        load(CONFIGS["llama"], Lost(make_source(CONFIGS["llama"]).data))


def test_progress_is_in_bytes_and_files() -> None:
    source = make_source(CONFIGS["llama"])
    seen: list[tuple[int, int]] = []
    messages: list[LoadProgress] = []
    load_model(CONFIGS["llama"], source, ParallelState(0, 2), "fp32", torch.float32, CPU,
               lambda done, total: seen.append((done, total)), report=messages.append)  # fmt: skip
    total = sum(t.nbytes for t in source.data.values())
    assert [(m.done, m.total) for m in messages] == seen
    assert seen[-1][0] == seen[-1][1] < total
    assert [m.phase for m in messages] == ["loading"] * len(source.data)
    assert messages[0].detail.startswith("0 of 2 files")
    assert messages[-1].detail.startswith("2 of 2 files")
    assert {m.unit for m in messages} == {"bytes"}
