"""The published V2-family configs, scaled down, against transformers; YaRN beyond the original 4096 positions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_oracle import CPU, VOCAB, Session, Tiny, difference, make_tiny, prompt

from ziphius import LLM
from ziphius.checkpoint.config import ModelConfig, YarnConfig
from ziphius.errors import ContextLengthExceeded
from ziphius.ipc.messages import SamplingParams
from ziphius.layers.rotary import RotaryEmbedding


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny products are quickest alone; on a busy machine every barrier between threads can cost milliseconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def yarn(mscale: float) -> dict[str, Any]:
    """As published, in transformers 4's words, which the checkpoints use."""
    return {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale,
    }


PUBLISHED: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "attention_bias": False,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 163840,
    "moe_layer_freq": 1,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_experts_per_tok": 6,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
}
GROUPED = {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0}
GREEDY = {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 16,
    "moe_intermediate_size": 24,
}
"""What is scaled down; all else is as published."""
FAMILY: dict[str, dict[str, Any]] = {
    "V2": PUBLISHED | SMALL | GROUPED | {"rope_scaling": yarn(0.707)},
    "V2-Lite": PUBLISHED | SMALL | GREEDY | {"rope_scaling": yarn(0.707), "q_lora_rank": None},
    "Coder-V2": PUBLISHED | SMALL | GROUPED | {"rope_scaling": yarn(1.0)},
    "Coder-V2-Lite": PUBLISHED | SMALL | GREEDY | {"rope_scaling": yarn(0.707), "q_lora_rank": None, "n_group": 1},
    "V2.5": PUBLISHED | SMALL | GROUPED | {"rope_scaling": yarn(1.0)},
}


@pytest.fixture(scope="module", params=list(FAMILY))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """With config.json as it is published, not as transformers 5 writes it."""
    settings = FAMILY[request.param]
    tiny = make_tiny(tmp_path_factory.mktemp("v2"), {k: v for k, v in settings.items() if k != "architectures"})
    (tiny.folder / "config.json").write_text(json.dumps(settings))
    return tiny


def test_logits(model: Tiny) -> None:
    ids = prompt(120)
    loaded = model.load()
    assert difference(Session(loaded).step(("a", ids))["a"], model.logits(ids)) < 1e-5
    assert difference(Session(loaded).run("a", ids, [50, 1, 1, 60, 8]), model.logits(ids)) < 1e-5


def test_greedy_text(model: Tiny) -> None:
    ids = prompt(30)
    session = Session(model.load())
    logits = session.step(("a", ids))["a"][-1]
    text = []
    for _ in range(24):
        text.append(int(logits.argmax()))
        logits = session.step(("a", text[-1:]))["a"][-1]
    assert text == model.greedy(ids, 24)


def test_the_configs_say_what_is_published() -> None:
    folder = Path(__file__).parents[1] / "planner" / "data"
    for name, file in (("V2.5", "deepseek-v2.5-1210.json"), ("V2-Lite", "deepseek-v2-lite.json")):
        published = json.loads((folder / file).read_text())
        ours = FAMILY[name]
        differing = {key for key in ours if ours[key] != published.get(key)}
        assert differing <= set(SMALL), name


POSITIONS = [0, 1, 4095, 4096, 4097, 5000, 16383, 40960, 100_000, 163_839]


@pytest.mark.parametrize("mscale", [0.707, 1.0])
def test_angles_beyond_the_original_context(mscale: float) -> None:
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2RotaryEmbedding

    settings = {k: v for k, v in FAMILY["V2"].items() if k != "architectures"}
    settings |= {"rope_scaling": yarn(mscale), "qk_rope_head_dim": 64}
    oracle = DeepseekV2RotaryEmbedding(DeepseekV2Config(**settings))
    expected = torch.view_as_real(oracle(torch.zeros(1), torch.tensor([POSITIONS]))[0])
    scaling = ModelConfig.from_hf(settings | {"architectures": ["DeepseekV2ForCausalLM"]}).rope_scaling
    assert isinstance(scaling, YarnConfig)
    cos, sin = RotaryEmbedding(64, 10000.0, scaling, CPU)(torch.tensor(POSITIONS))
    # An angle of 160,000 radians has steps of 1/64 in float32, so all must be computed alike
    torch.testing.assert_close(torch.stack((cos, sin), -1), expected, rtol=0, atol=1e-6)


def test_logits_beyond_the_original_context(tmp_path: Path) -> None:
    """A prompt of 4,600 tokens and an answer after it; with plain angles past 4096 the logits are others."""
    small = {"num_hidden_layers": 1, "first_k_dense_replace": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    tiny = make_tiny(tmp_path, {k: v for k, v in FAMILY["V2.5"].items() if k != "architectures"} | small)
    ids = prompt(4600)
    expected = tiny.logits(ids)
    for config, right in ((tiny.config, True), (ModelConfig.from_hf(without_yarn(tiny)), False)):
        session = Session(tiny.load(config), page_size=64)
        logits = session.run("a", ids, [2048, 2048, 500, 1, 1, 2])
        found = difference(logits[4096:], expected[4096:])
        assert found < 1e-5 if right else found > 1e-2


def without_yarn(tiny: Tiny) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((tiny.folder / "config.json").read_text())
    return {k: v for k, v in data.items() if k not in ("rope_scaling", "rope_parameters")}


def test_a_prompt_at_the_context_limit(tmp_path: Path) -> None:
    """The longest prompt, beyond the original 4096 positions, gets its one token; one more is refused."""
    tiny = make_tiny(tmp_path, {k: v for k, v in FAMILY["V2.5"].items() if k != "architectures"})
    limit = 4200
    options = {"context_length": limit, "max_total_tokens": 2 * limit, "dtype": "float32", "weights_format": "fp32"}
    llm = LLM(str(tiny.folder), threads=1, **options)
    greedy = SamplingParams(max_new_tokens=50, temperature=0.0, seed=0, ignore_eos=True)
    ids = prompt(limit - 1)
    (answer,) = llm.generate([ids], greedy)
    assert (answer.token_ids, answer.finish_reason) == (tiny.greedy(ids, 1), "length")
    with pytest.raises(ContextLengthExceeded, match="4200 tokens"):
        llm.generate([[*ids, 1]], greedy)
