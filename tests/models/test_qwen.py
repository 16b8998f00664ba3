"""Qwen2 and Qwen3: from GGUF and on the CPU's kernels against transformers, the tokenizer against Hugging Face's."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf.constants import MODEL_ARCH
from hf_oracle import CPU, VOCAB, Session, Tiny, difference, make_tiny, prompt
from hypothesis import given, settings
from hypothesis import strategies as st

from ziphius.attention.select import make_backend
from ziphius.checkpoint.gguf import GGUFSource, model_config
from ziphius.checkpoint.gguf_file import GGUFFile
from ziphius.checkpoint.gguf_tokenizer import tokenizer_files
from ziphius.checkpoint.safetensors_source import SafetensorsSource
from ziphius.distributed import SINGLE
from ziphius.kernels.cpu import paged_attention
from ziphius.models.loader import load_model
from ziphius.tokenizer.tokenizer import Tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
SHAPES = {
    "qwen2": {
        **SIZES,
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    },
    "qwen3": {**SIZES, "model_type": "qwen3", "head_dim": 32},
}
SPECIAL = ["<|endoftext|>", "<|im_end|>"]
TEXT = "The quick brown fox's 12 tails don't   wag; it'll sit.\r\n\n  Ünïcöde 東京 été 1234!?\n\tend"


def byte_level_vocabulary() -> tuple[list[str], list[str]]:
    """(tokens, merges): the 256 bytes, what a few merges make of them, and the special tokens at the end."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = sorted(ByteLevel.alphabet())
    merges = ["t h", "Ġ t", "Ġt h", "Ġ q", "1 2", "' s", "Ġ Ġ", "Ċ Ċ", "Ã ©", "' l", "'l l", "o u", "Ġ f", "i t", "3 4"]
    return [*tokens, *(merge.replace(" ", "") for merge in merges), *SPECIAL], merges


def write_gguf(path: Path, tiny: Tiny, architecture: MODEL_ARCH) -> Path:
    """As llama.cpp's converter writes it: rows of q and k in Hugging Face's order, names by its own table."""
    config = tiny.oracle.config
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if architecture == MODEL_ARCH.QWEN3:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in tiny.oracle.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        writer.add_tensor(stored, tensor.numpy())
    add_tokenizer(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokens, merges = byte_level_vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - len(SPECIAL)) + [3] * len(SPECIAL))
    writer.add_token_merges(merges)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_pad_token_id(len(tokens) - 2)
    writer.add_add_bos_token(False)


@pytest.fixture(scope="module", params=list(SHAPES))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp(request.param), SHAPES[request.param])


def test_logits_are_those_of_transformers(tiny: Tiny, tmp_path: Path) -> None:
    architecture = MODEL_ARCH[tiny.oracle.config.model_type.upper()]
    path = write_gguf(tmp_path / "m.gguf", tiny, architecture)
    config = model_config(GGUFFile.open(path))
    assert config.attention == tiny.config.attention
    model = load_model(config, GGUFSource.open(path), SINGLE, "fp32", torch.float32, CPU)
    ids = prompt(40)
    assert difference(Session(model).run("a", ids, [17, 22, 1]), tiny.logits(ids)) < 1e-5


def test_the_cpus_attention_kernels_take_what_a_qwen_gives_them(tiny: Tiny) -> None:
    """Its queries and keys lie in memory otherwise than a Llama's: each is the result of a norm."""
    ids = prompt(40)
    session = Session(tiny.load(), page_size=16, backend=make_backend(CPU))
    assert paged_attention.takes(session.pool.kv[0].k, 16)
    assert difference(session.run("a", ids, [17, 1, 21, 1]), tiny.logits(ids)) < 1e-5


def test_int8_weights_run_without_a_llamas_program(tiny: Tiny) -> None:
    """Biases and norms of heads are not in it."""
    model = load_model(tiny.config, SafetensorsSource(tiny.folder), SINGLE, "int8", torch.float32, CPU)
    assert not model.own_threads
    ids = prompt(40)
    error = Session(model).run("a", ids, [17, 22, 1]) - tiny.logits(ids)
    assert error.norm() < 0.1 * tiny.logits(ids).norm()


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """(ours from a GGUF, Hugging Face's from the same vocabulary)."""
    from transformers import Qwen2Tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "m.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    add_tokenizer(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    ours = Tokenizer.from_files(tokenizer_files(GGUFFile.open(path)))
    tokens, merges = byte_level_vocabulary()
    vocabulary = dict(zip(tokens, itertools.count(), strict=False))
    pairs: list[Any] = [tuple(merge.split(" ")) for merge in merges]
    theirs = Qwen2Tokenizer(vocab=vocabulary, merges=pairs, eos_token=SPECIAL[1], pad_token=SPECIAL[0])
    return ours, theirs


def test_the_tokenizer_is_hugging_faces(tokenizers: tuple[Tokenizer, Any]) -> None:
    ours, theirs = tokenizers
    text = f"{TEXT}<|im_end|> <|endoftext|>it e\u0301t\u00e9"
    expected = theirs.encode(text)
    assert ours.encode(text) == expected
    assert len(expected) < len(text.encode()), "merges must have taken part"
    assert ours.decode(ours.encode(TEXT)) == TEXT


PIECES = ["'s", "'LL", "12", "th", " the", "\r\n", "\n", "  ", "\t", "é", "e\u0301", "東", "!", ";", "\u2028", "\u00a0"]


@settings(deadline=None, max_examples=300)
@given(text=st.lists(st.sampled_from(PIECES) | st.characters(codec="utf-8"), max_size=12).map("".join))
def test_any_text_is_cut_alike(tokenizers: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = tokenizers
    assert ours.encode(text) == theirs.encode(text)
