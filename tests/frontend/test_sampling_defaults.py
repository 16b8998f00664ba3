"""A checkpoint's suggested sampling applies to OpenAI's routes where a request leaves it open, and only there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ziphius.checkpoint.packaged import SMOLLM2
from ziphius.checkpoint.sampling_defaults import SamplingDefaults, read_sampling_defaults
from ziphius.errors import ModelError
from ziphius.frontend.openai_api import chat_sampling
from ziphius.frontend.openai_bodies import ChatBody
from ziphius.frontend.sampling import ModelLimits, SamplingRequest, checked
from ziphius.frontend.sglang_api import sglang_sampling
from ziphius.frontend.sglang_bodies import SglangSampling
from ziphius.tokenizer.files import TokenizerFiles
from ziphius.tokenizer.tokenizer import Tokenizer

LIMITS = ModelLimits(vocab_size=10, context_length=100)
SUGGESTED = SamplingDefaults(temperature=0.3, top_p=0.95, top_k=5, min_p=0.1, repetition_penalty=1.1)
NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@pytest.fixture
def tokenizer() -> Tokenizer:
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    files = TokenizerFiles(
        tokenizer_json=json.dumps({"version": "1.0", "added_tokens": [], "model": model, "decoder": decoder}),
        chat_template=None,
        bos_token=None,
        eos_token=None,
        add_bos=False,
        eos_token_ids=(),
    )
    return Tokenizer.from_files(files)


def values(request: SamplingRequest, tokenizer: Tokenizer) -> list[float]:
    template = checked(request, tokenizer, LIMITS).template
    return [getattr(template, name) for name in NAMES]


def test_what_is_left_open_is_as_suggested(tokenizer: Tokenizer) -> None:
    assert values(chat_sampling(ChatBody(messages=[]), SUGGESTED), tokenizer) == [0.3, 0.95, 5, 0.1, 1.1]
    assert values(chat_sampling(ChatBody(messages=[]), SamplingDefaults()), tokenizer) == [1.0, 1.0, -1, 0.0, 1.0]


def test_the_caller_wins(tokenizer: Tokenizer) -> None:
    body = ChatBody(messages=[], temperature=0.0, top_p=1.0, top_k=-1, min_p=0.0, repetition_penalty=1.0)
    assert values(chat_sampling(body, SUGGESTED), tokenizer) == [0.0, 1.0, -1, 0.0, 1.0]


def test_generate_has_its_own_defaults(tokenizer: Tokenizer) -> None:
    assert values(sglang_sampling(SglangSampling(), False, 0, 0), tokenizer) == [1.0, 1.0, -1, 0.0, 1.0]


def test_generation_config(tmp_path: Path) -> None:
    assert read_sampling_defaults(tmp_path) == SamplingDefaults()
    path = tmp_path / "generation_config.json"
    path.write_text(
        '{"do_sample": true, "temperature": 0.3, "top_p": 0.95, "top_k": 0, "min_p": "x", "eos_token_id": 1}'
    )
    assert read_sampling_defaults(tmp_path) == SamplingDefaults(temperature=0.3, top_p=0.95)
    path.write_text("[]")
    with pytest.raises(ModelError, match=r"generation_config\.json must hold a JSON object"):
        read_sampling_defaults(tmp_path)


def test_the_default_model_comes_with_its_cards_suggestion() -> None:
    assert SMOLLM2.sampling == SamplingDefaults(temperature=0.1, top_p=0.9)
