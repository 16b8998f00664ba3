"""GGUF files: the real one against transformers, small ones written here against what went in, broken ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from ziphius.checkpoint.checkpoint import open_checkpoint
from ziphius.checkpoint.config import GroupedQueryAttention
from ziphius.checkpoint.gguf import GGUFSource, model_config
from ziphius.checkpoint.gguf_file import GGUFFile
from ziphius.checkpoint.gguf_tokenizer import tokenizer_files
from ziphius.errors import CheckpointError, ModelError, UnsupportedModel
from ziphius.tokenizer.tokenizer import Tokenizer

Q8_0 = gguf.GGMLQuantizationType.Q8_0
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 64, 4, 2, 16, 96
TOKENS = ["<|end|>", "<|start|>", "<tool>", "a", "b", "Ġ", "Ġa", "1", "2"]

Change = Callable[[gguf.GGUFWriter], None]


def llama_permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k (convert_hf_to_gguf.py, LlamaModel.permute)."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def weights() -> dict[str, np.ndarray]:
    """One layer at random, under Hugging Face's names."""
    random = np.random.default_rng(0)
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (len(TOKENS), HIDDEN),
        "model.norm.weight": (HIDDEN,),
        layer + "input_layernorm.weight": (HIDDEN,),
        layer + "self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
        layer + "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        layer + "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        layer + "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
        layer + "post_attention_layernorm.weight": (HIDDEN,),
        layer + "mlp.gate_proj.weight": (FFN, HIDDEN),
        layer + "mlp.up_proj.weight": (FFN, HIDDEN),
        layer + "mlp.down_proj.weight": (HIDDEN, FFN),
    }
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
    "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
    "model.layers.0.self_attn.k_proj.weight": "blk.0.attn_k.weight",
    "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
    "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    "model.layers.0.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
    "model.layers.0.mlp.up_proj.weight": "blk.0.ffn_up.weight",
    "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
}


def write_gguf(path: Path, change: Change | None = None, architecture: str = "llama", pre: str = "smollm") -> Path:
    """A tiny model, its q projection in Q8_0 and the rest in float32; `change` adds or overwrites."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 4, 1, 1, 1, 1, 1, 1])
    writer.add_token_merges(["Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_eot_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages[0].content }}")
    for name, array in weights().items():
        if "q_proj" in name:
            writer.add_tensor(GGUF_NAMES[name], quantize(llama_permute(array, HEADS), Q8_0), raw_dtype=Q8_0)
        else:
            writer.add_tensor(GGUF_NAMES[name], llama_permute(array, KV_HEADS) if "k_proj" in name else array)
    if change is not None:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_tiny_weights_come_back(tmp_path: Path) -> None:
    source = GGUFSource.open(write_gguf(tmp_path / "tiny.gguf"))
    found = dict(source.tensors())
    expected = weights()
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == np.float32
        assert found[name].flags.c_contiguous
        assert found[name].flags.writeable
        if "q_proj" in name:
            array = dequantize(quantize(array, Q8_0), Q8_0)
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    stored = source.stored()
    assert {name: tensor.shape for name, tensor in stored.items()} == {n: array.shape for n, array in found.items()}
    assert sum(tensor.nbytes() for tensor in stored.values()) == sum(array.nbytes for array in found.values())


@pytest.mark.parametrize("type_name", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_every_plain_type_is_dequantized(tmp_path: Path, type_name: str) -> None:
    kind = gguf.GGMLQuantizationType[type_name]
    array = weights()["model.layers.0.mlp.up_proj.weight"]
    stored = quantize(array, kind)
    path = write_gguf(tmp_path / "t.gguf", lambda w: w.add_tensor("blk.0.ffn_up.bias", stored, raw_dtype=kind))
    found = dict(GGUFSource.open(path).tensors())["model.layers.0.mlp.up_proj.bias"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, dequantize(stored, kind))
    np.testing.assert_allclose(found, array, atol=0.5)


def test_tiny_config_and_tokenizer(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "tiny-model.gguf")), tmp_path)
    config = checkpoint.config
    assert (checkpoint.format, checkpoint.name, checkpoint.path) == ("gguf", "tiny-model", tmp_path / "tiny-model.gguf")
    assert (config.vocab_size, config.num_hidden_layers, config.head_dim) == (len(TOKENS), 1, HEAD_DIM)
    assert (config.num_attention_heads, config.num_key_value_heads) == (HEADS, KV_HEADS)
    assert config.rope_theta == 5000.0
    assert config.tie_word_embeddings
    assert config.eos_token_ids == (0, 2)
    assert checkpoint.tokenizer is not None
    assert (checkpoint.tokenizer.bos_token, checkpoint.tokenizer.eos_token) == ("<|start|>", "<|end|>")
    tokenizer = Tokenizer.from_files(checkpoint.tokenizer)
    assert tokenizer.encode("a a12<tool>b") == [1, 3, 6, 7, 8, 2, 4]
    assert tokenizer.decode([1, 3, 6, 7, 2, 0]) == "a a1<tool>"
    assert tokenizer.eos_token_ids == (0, 2)


def test_an_untied_head_and_biases(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("output.weight", np.ones((len(TOKENS), HIDDEN), np.float32))
        writer.add_tensor("blk.0.attn_q.bias", llama_permute(np.arange(HEADS * HEAD_DIM, dtype=np.float32), HEADS))

    source = GGUFSource.open(write_gguf(tmp_path / "m.gguf", change))
    found = dict(source.tensors())
    assert found["lm_head.weight"].shape == (len(TOKENS), HIDDEN)
    np.testing.assert_array_equal(found["model.layers.0.self_attn.q_proj.bias"], np.arange(HEADS * HEAD_DIM))
    config = model_config(GGUFFile.open(tmp_path / "m.gguf"))
    assert not config.tie_word_embeddings
    assert config.attention == GroupedQueryAttention(HEADS, KV_HEADS, HEAD_DIM, qkv_bias=True, o_bias=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.add_expert_count(8), "experts"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "rotary"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, np.float32)), "rotary"),
        (lambda w: w.add_rope_dimension_count(8), "rotary"),
    ],
)
def test_unsupported_models(tmp_path: Path, change: Change, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        open_checkpoint(str(write_gguf(tmp_path / "m.gguf", change)), tmp_path)


def test_unsupported_architecture_and_pre_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="gemma"):
        open_checkpoint(str(write_gguf(tmp_path / "a.gguf", architecture="gemma")), tmp_path)
    with pytest.raises(UnsupportedModel, match="tekken"):
        open_checkpoint(str(write_gguf(tmp_path / "b.gguf", pre="tekken")), tmp_path)


def test_a_tensor_that_belongs_nowhere(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", lambda w: w.add_tensor("blk.0.mystery.weight", np.ones(8, np.float32)))
    with pytest.raises(CheckpointError, match=r"blk\.0\.mystery\.weight"):
        list(GGUFSource.open(path).tensors())


# --- broken files ---


class TinyFile:
    """A whole file's bytes; not shown when a test fails."""

    def __init__(self, content: bytes) -> None:
        self.content = content


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyFile:
    return TinyFile(write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf").read_bytes())


@pytest.mark.parametrize("content", [b"", b"G", b"GGUF", b"GGUF\x03\0\0\0", b"not a gguf file at all", b"\0" * 4096])
def test_garbage(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        open_checkpoint(str(path), tmp_path)


def test_other_versions(tmp_path: Path, tiny: TinyFile) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny.content[:4] + (1).to_bytes(4, "little") + tiny.content[8:])
    with pytest.raises(UnsupportedModel, match="version 1"):
        open_checkpoint(str(path), tmp_path)


def test_every_truncation_is_noticed(tmp_path: Path, tiny: TinyFile) -> None:
    path = tmp_path / "m.gguf"
    for length in [*range(0, 3000, 97), len(tiny.content) // 2, len(tiny.content) - 64]:
        path.write_bytes(tiny.content[:length])
        with pytest.raises(CheckpointError):
            open_checkpoint(str(path), tmp_path)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 2500), value=st.binary(min_size=1, max_size=8))
def test_a_damaged_header_gives_a_model_error_or_a_model(tmp_path: Path, tiny: TinyFile, at: int, value: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny.content[:at] + value + tiny.content[at + len(value) :])
    try:
        checkpoint = open_checkpoint(str(path), tmp_path)
        assert checkpoint.tokenizer is not None
        Tokenizer.from_files(checkpoint.tokenizer)
        list(GGUFSource.open(path).tensors())
    except ModelError:
        pass


def test_a_file_cut_while_it_is_read(tmp_path: Path, tiny: TinyFile) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    source = GGUFSource.open(path)
    path.write_bytes(tiny.content[: len(tiny.content) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        list(source.tensors())


# --- the real file ---


def test_smollm2_config(smollm2_path: Path) -> None:
    config = model_config(GGUFFile.open(smollm2_path))
    assert config.architecture == "LlamaForCausalLM"
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (576, 30, 1536)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert (config.vocab_size, config.max_position_embeddings) == (49152, 8192)
    assert config.rope_theta == 100000.0
    assert config.rope_scaling is None
    assert config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))


def test_smollm2_answers_in_transformers(smollm2_path: Path) -> None:
    """The tensors, their names and the order of q's and k's rows are right if the oracle makes sense of them."""
    file = GGUFFile.open(smollm2_path)
    config = model_config(file)
    tokenizer = Tokenizer.from_files(tokenizer_files(file))
    shape = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        bos_token_id=config.bos_token_id,
        eos_token_id=list(config.eos_token_ids),
        pad_token_id=2,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(shape)
    state = {name: torch.from_numpy(array) for name, array in GGUFSource(file, config).tensors()}
    missing = model.load_state_dict(state, strict=False, assign=True)
    assert missing.unexpected_keys == []
    assert missing.missing_keys == ["lm_head.weight"]
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=shape)
    assert tokenizer.chat is not None
    prompt = tokenizer.chat.render([{"role": "user", "content": "What is the capital of France?"}])
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
    with torch.inference_mode():
        answer = model.eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    assert tokenizer.decode(answer[0, ids.shape[1] :].tolist()) == "The capital of France is Paris."
    assert answer[0, -1] == 2
