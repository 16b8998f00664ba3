"""Logits and greedy text agree with Hugging Face transformers in float32, on random tiny checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_oracle import CPU, VOCAB, Session, Tiny, difference, make_tiny, prompt
from torch import Tensor

from ziphius.attention.backend import ProjectedTokens
from ziphius.attention.torch_reference import TorchBackend
from ziphius.checkpoint.config import ModelConfig, MoEConfig, YarnConfig
from ziphius.checkpoint.gguf import GGUFSource, model_config
from ziphius.checkpoint.gguf_file import GGUFFile
from ziphius.distributed import SINGLE
from ziphius.layers.select import make_ops
from ziphius.models.causal_lm import CausalLM
from ziphius.models.loader import load_model

LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
V2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "q_lora_rank": 40,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 4.0,
    "norm_topk_prob": False,
    "max_position_embeddings": 1280,
}
LITE = {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}


def yarn(mscale: float, mscale_all_dim: float) -> dict[str, Any]:
    return {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "original_max_position_embeddings": 256,
            "beta_fast": 4,
            "beta_slow": 1,
            "mscale": mscale,
            "mscale_all_dim": mscale_all_dim,
        }
    }


CASES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama tied head_dim": LLAMA | {"tie_word_embeddings": True, "head_dim": 16, "num_key_value_heads": 6},
    "llama biases llama3": LLAMA | {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3_ROPE},
    "qwen2 tied": LLAMA | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": LLAMA | {"model_type": "qwen3", "head_dim": 24, "rms_norm_eps": 1e-3},
    "qwen3 biases llama3": LLAMA
    | {"model_type": "qwen3", "attention_bias": True, "head_dim": 8, "rope_parameters": LLAMA3_ROPE},
    "V2": V2 | yarn(0.707, 0.707),
    "V2.5": V2 | yarn(1.0, 1.0),
    "V2-Lite": V2 | LITE | yarn(0.707, 0.707),
    "V2 unequal mscale": V2 | yarn(1.0, 0.5),
    "V2 biases no yarn": V2 | {"attention_bias": True, "first_k_dense_replace": 0, "rms_norm_eps": 1e-2},
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny products are quickest alone; on a busy machine every barrier between threads can cost milliseconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=list(CASES))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"), CASES[request.param])


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> CausalLM:
    return tiny.load()


def test_whole_prefill(tiny: Tiny, model: CausalLM) -> None:
    ids = prompt(100)
    assert difference(Session(model).step(("a", ids))["a"], tiny.logits(ids)) < 1e-5


def test_chunked_prefill_over_a_cached_prefix(tiny: Tiny, model: CausalLM) -> None:
    ids = prompt(100)
    assert difference(Session(model).run("a", ids, [7, 1, 32, 2, 58]), tiny.logits(ids)) < 1e-5


def test_decode_gives_the_same_text_and_logits(tiny: Tiny, model: CausalLM) -> None:
    ids = prompt(21)
    expected = tiny.greedy(ids, 64)
    session = Session(model)
    logits = [session.run("a", ids, [13, 8])[-1]]
    for _ in range(63):
        logits.append(session.step(("a", [int(logits[-1].argmax())]))["a"][-1])
    assert [int(row.argmax()) for row in logits] == expected
    assert len(set(expected)) > 8, "a text that repeats one token tells little"
    assert difference(torch.stack(logits), tiny.logits(ids + expected[:-1])[20:]) < 1e-5


def test_mixed_batches(tiny: Tiny, model: CausalLM) -> None:
    a, b, c, d = (prompt(60, seed) for seed in range(4))
    session = Session(model)
    out: dict[str, list[Tensor]] = {}

    def step(*parts: tuple[str, list[int]]) -> None:
        for name, logits in session.step(*parts).items():
            out.setdefault(name, []).append(logits)

    step(("a", a[:9]), ("b", b[:30]))
    step(("a", a[9:10]), ("b", b[30:31]), ("c", c[:17]))
    step(("b", b[31:32]), ("a", a[10:11]), ("c", c[17:18]), ("d", d[:1]))
    step(("a", a[11:12]), ("c", c[18:19]), ("b", b[32:40]), ("d", d[1:50]))
    for name, ids in {"a": a[:12], "b": b[:40], "c": c[:19], "d": d[:50]}.items():
        assert difference(torch.cat(out[name]), tiny.logits(ids)) < 1e-5, name


def test_an_answer_ignores_rubbish_in_pages_that_are_not_its_own(model: CausalLM) -> None:
    clean, dirty = Session(model), Session(model)
    for cache in dirty.pool.kv:
        cache.k.fill_(float("nan"))
        cache.v.fill_(float("inf"))
    for latents in dirty.pool.latent:
        latents.latent.fill_(float("nan"))
    ids, other = prompt(30), prompt(9, 2)
    for session in (clean, dirty):
        session.step(("b", other[:8]))
    expected, actual = (
        [s.run("a", ids, [11, 18]), s.step(("a", ids[29:]), ("b", other[8:]))["b"]] for s in (clean, dirty)
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def _yarn(config: ModelConfig, **changes: float) -> ModelConfig:
    assert isinstance(config.rope_scaling, YarnConfig)
    return replace(config, rope_scaling=replace(config.rope_scaling, **changes))


def _moe(config: ModelConfig, **changes: Any) -> ModelConfig:
    assert isinstance(config.moe, MoEConfig)
    return replace(config, moe=replace(config.moe, **changes))


WRONG: dict[str, Callable[[ModelConfig], ModelConfig]] = {
    "mscale": lambda c: _yarn(c, mscale=1.0),
    "mscale_all_dim": lambda c: _yarn(c, mscale_all_dim=1.0),
    "both mscales": lambda c: _yarn(c, mscale=1.0, mscale_all_dim=1.0),
    "factor": lambda c: _yarn(c, factor=39.0),
    "original context": lambda c: _yarn(c, original_max_position_embeddings=128),
    "beta_fast": lambda c: _yarn(c, beta_fast=32.0),
    "beta_slow": lambda c: _yarn(c, beta_slow=0.1),
    "no yarn": lambda c: replace(c, rope_scaling=None),
    "rope_theta": lambda c: replace(c, rope_theta=9000.0),
    "rms_norm_eps": lambda c: replace(c, rms_norm_eps=1e-2),
    "routed_scaling_factor": lambda c: _moe(c, routed_scaling_factor=4.1),
    "norm_topk_prob": lambda c: _moe(c, norm_topk_prob=True),
    "topk_method": lambda c: _moe(c, topk_method="greedy"),
    "topk_group": lambda c: _moe(c, topk_group=3),
    "n_group": lambda c: _moe(c, n_group=2, topk_group=1),
    "num_experts_per_tok": lambda c: _moe(c, num_experts_per_tok=2),
}


@pytest.fixture(scope="module")
def v2(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("v2"), CASES["V2"])


@pytest.mark.parametrize("name", list(WRONG))
def test_a_wrong_constant_is_noticed(v2: Tiny, name: str) -> None:
    ids = prompt(100)
    wrong = v2.load(WRONG[name](v2.config))
    assert difference(Session(wrong).step(("a", ids))["a"], v2.logits(ids)) > 1e-3


def test_a_wrong_rotary_layout_is_noticed(v2: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek's rotary pairs are neighbours, not halves as Llama's."""
    ids, model = prompt(100), v2.load()
    assert difference(Session(model).step(("a", ids))["a"], v2.logits(ids)) < 1e-5
    ops = type(make_ops(CPU))
    rotate, used = ops.rotate, []

    def in_halves(self: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        used.append(interleaved)
        return rotate(self, x, cos, sin, interleaved=False)

    monkeypatch.setattr(ops, "rotate", in_halves)
    assert difference(Session(model).step(("a", ids))["a"], v2.logits(ids)) > 1e-3
    assert used
    assert all(used)


def test_the_latents_norms_have_an_epsilon_of_their_own(tmp_path: Path) -> None:
    """As published: 1e-6 whatever rms_norm_eps is. Seen where the latents are small."""
    small = make_tiny(tmp_path, V2 | {"rms_norm_eps": 1e-2})
    with torch.no_grad():
        for name, parameter in small.oracle.named_parameters():
            if name.endswith(("q_a_proj.weight", "kv_a_proj_with_mqa.weight")):
                parameter *= 1e-3
    small.oracle.save_pretrained(tmp_path)
    ids = prompt(30)
    assert difference(Session(small.load()).step(("a", ids))["a"], small.logits(ids)) < 1e-5


@pytest.mark.parametrize("name", ["V2.5", "V2-Lite"])
def test_one_tokens_queries_are_laid_out_as_several_tokens(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU's kernels are compiled by the strides that they see: other code would give other last bits."""
    seen: list[tuple[int, ...]] = []
    attend = TorchBackend.attend_projected

    def watch(self: TorchBackend, tokens: ProjectedTokens, *rest: Any) -> Tensor:
        seen.append(tokens.q.stride())
        return attend(self, tokens, *rest)

    monkeypatch.setattr(TorchBackend, "attend_projected", watch)
    session = Session(make_tiny(tmp_path, CASES[name]).load())
    session.step(("a", prompt(3)))
    session.step(("a", [5]))
    assert len(set(seen)) == 1


# <|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n
FRANCE = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]


def test_smollm2(smollm2_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model_config(GGUFFile.open(smollm2_path))
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings")
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    oracle = LlamaForCausalLM(LlamaConfig(**{n: getattr(config, n) for n in names}, rope_parameters=rope)).eval()
    weights = {name: torch.from_numpy(array) for name, array in GGUFSource.open(smollm2_path).tensors()}
    assert oracle.load_state_dict(weights, strict=False).missing_keys == ["lm_head.weight"]  # Tied.
    with torch.inference_mode():
        options = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        text = oracle.generate(torch.tensor([FRANCE]), **options)[0].tolist()
        expected = oracle(torch.tensor([text[:-1]])).logits[0]

    session = Session(load_model(config, GGUFSource.open(smollm2_path), SINGLE, "fp32", torch.float32, CPU), 16)
    parts = [session.run("a", FRANCE, [5, 1, 10])]
    while len(parts) < 64:
        parts.append(session.step(("a", [int(parts[-1][-1].argmax())]))["a"])
    logits = torch.cat(parts)
    assert difference(logits, expected) < 1e-4
    assert [int(row.argmax()) for row in logits[len(FRANCE) - 1 :]] == text[len(FRANCE) :]
