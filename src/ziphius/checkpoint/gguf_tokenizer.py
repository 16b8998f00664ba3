"""A GGUF's vocabulary as TokenizerFiles."""

from __future__ import annotations

import json
from typing import Any

from ziphius.checkpoint.gguf_file import GGUFFile
from ziphius.errors import CheckpointError, UnsupportedModel
from ziphius.tokenizer.files import TokenizerFiles

_CONTROL, _USER_DEFINED = 3, 4
"""llama.cpp's token types (llama.h, enum llama_token_type)."""

_ONE_DIGIT_AT_A_TIME = ("smollm", "starcoder", "refact", "command-r")
_PLAIN_GPT2 = ("gpt-2", "gpt2")
_QWEN2 = ("qwen2",)
"""tokenizer.ggml.pre, as llama.cpp names pre-tokenizers (llama-vocab.cpp)."""

_QWEN2_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Qwen2's tokenizer.json cuts a text before it looks for pairs; Qwen2.5's and Qwen3's are the same."""


def tokenizer_files(file: GGUFFile) -> TokenizerFiles:
    """The same tokenizer that the original Hugging Face checkpoint has, built from vocabulary and merges.

    UnsupportedModel for anything but byte-level BPE with a known pre-tokenizer.
    """
    kind = file.text("tokenizer.ggml.model")
    if kind != "gpt2":
        raise UnsupportedModel(f"{file.path}: the tokenizer model {kind!r} is not supported (only gpt2)")
    tokens = file.texts("tokenizer.ggml.tokens")
    return TokenizerFiles(
        tokenizer_json=json.dumps(_tokenizer_json(file, tokens), ensure_ascii=False),
        chat_template=file.text("tokenizer.chat_template") if "tokenizer.chat_template" in file else None,
        bos_token=_token(file, tokens, "bos"),
        eos_token=_token(file, tokens, "eos"),
        add_bos=file.flag("tokenizer.ggml.add_bos_token", False),
        eos_token_ids=eos_token_ids(file),
        unk_token=_token(file, tokens, "unknown"),
        pad_token=_token(file, tokens, "padding"),
    )


def eos_token_ids(file: GGUFFile) -> tuple[int, ...]:
    """The ends of a text, of a turn and of a message, as far as the file gives them."""
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    return tuple(dict.fromkeys(file.integer(key) for key in keys if key in file))


def _token(file: GGUFFile, tokens: list[str], name: str) -> str | None:
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in file:
        return None
    token_id = file.integer(key)
    if token_id >= len(tokens):
        raise CheckpointError(f"{file.path}: {key} is {token_id}, but the vocabulary has {len(tokens)} tokens")
    return tokens[token_id]


def _tokenizer_json(file: GGUFFile, tokens: list[str]) -> dict[str, Any]:
    types = file.integers("tokenizer.ggml.token_type")
    if len(types) != len(tokens):
        raise CheckpointError(f"{file.path}: {len(types)} token types for {len(tokens)} tokens")
    merges = [merge.split(" ", 1) for merge in file.texts("tokenizer.ggml.merges")]
    pre_tokenizer = file.text("tokenizer.ggml.pre", "gpt-2")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token_id,
                "content": tokens[token_id],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind == _CONTROL,
            }
            for token_id, kind in enumerate(types)
            if kind in (_CONTROL, _USER_DEFINED)
        ],
        # Qwen's tokenizer composes accents first; llama.cpp's vocabulary does not say so.
        "normalizer": {"type": "NFC"} if pre_tokenizer in _QWEN2 else None,
        "pre_tokenizer": _pre_tokenizer(file, pre_tokenizer),
        "post_processor": None,
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    """Bytes as printable characters; with `use_regex` the text is cut as GPT-2 cuts it."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _pre_tokenizer(file: GGUFFile, name: str) -> dict[str, Any]:
    if name in _PLAIN_GPT2:
        return _byte_level(use_regex=True)
    if name in _ONE_DIGIT_AT_A_TIME:
        return _in_turn({"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True))
    if name in _QWEN2:
        pieces = {"type": "Split", "pattern": {"Regex": _QWEN2_PIECES}, "behavior": "Isolated", "invert": False}
        return _in_turn(pieces, _byte_level(use_regex=False))
    known = ", ".join(_PLAIN_GPT2 + _ONE_DIGIT_AT_A_TIME + _QWEN2)
    raise UnsupportedModel(f"{file.path}: the pre-tokenizer {name!r} is not supported (only {known})")


def _in_turn(*pre_tokenizers: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(pre_tokenizers)}
