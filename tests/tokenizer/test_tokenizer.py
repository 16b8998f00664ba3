"""Encoding and decoding by facts: ids that a real server of the same models was seen to use."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Core

from ziphius.errors import CheckpointError, InvalidRequest, UnsupportedModel
from ziphius.tokenizer.files import TokenizerFiles, read_tokenizer_folder
from ziphius.tokenizer.placeholder import placeholder_files
from ziphius.tokenizer.tokenizer import Tokenizer

CHAT_HI = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182]
CHAT_HI += [2, 198, 1, 4093, 198, 6004, 2, 198, 1, 520, 9531, 198]

TEXTS = [
    "The capital of France is",
    "hello world",
    "  two  spaces\tand\ttabs\n\n\nlines  ",
    "你好，世界！深度求索",
    "naïve café, Ελληνικά, русский, עברית, हिन्दी",
    "emoji 😀 👩‍👩‍👧 🇫🇷 end",
    "def f(x):\n    return x ** 2  # 12345 + 0.5\n",
    "a\u0300 combining \u200b zero width \ufeff",
]


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("The capital of France is", [504, 3575, 282, 4649, 314]),
        ("a", [81]),
        (" Paris.\n\nThe answer is:", [7042, 30, 198, 198, 504, 2988, 314, 42]),
    ],
)
def test_smollm2_ids_are_those_of_a_real_server(smollm2: Tokenizer, text: str, ids: list[int]) -> None:
    assert smollm2.encode(text) == ids
    assert smollm2.decode(ids) == text


def test_smollm2_chat_ids_are_those_of_a_real_server(smollm2: Tokenizer) -> None:
    assert smollm2.chat is not None
    prompt = smollm2.chat.render([{"role": "user", "content": "hi"}])
    assert smollm2.encode(prompt, add_special_tokens=False) == CHAT_HI
    question = smollm2.chat.render([{"role": "user", "content": "What is the capital of France?"}])
    assert len(smollm2.encode(question, add_special_tokens=False)) == 37


def test_smollm2_properties(smollm2: Tokenizer) -> None:
    assert smollm2.vocab_size == 49152
    assert smollm2.bos_token_id == 1
    assert smollm2.eos_token_ids == (2,)
    assert smollm2.special_ids == frozenset(range(17))
    assert smollm2.token_text(7042) == " Paris"
    assert smollm2.token_bytes(7042) == b" Paris"
    assert smollm2.token_text(2) == "<|im_end|>"


def test_digits_are_split_one_by_one(smollm2: Tokenizer) -> None:
    assert [smollm2.token_text(i) for i in smollm2.encode("12345")] == list("12345")


@pytest.mark.parametrize("text", TEXTS)
def test_round_trips(smollm2: Tokenizer, deepseek: Tokenizer, text: str) -> None:
    assert smollm2.decode(smollm2.encode(text)) == text
    assert deepseek.decode(deepseek.encode(text)) == text


def test_decode_equals_the_library(smollm2: Tokenizer, deepseek_folder: Path, deepseek: Tokenizer) -> None:
    library = Core.from_file(str(deepseek_folder / "tokenizer.json"))
    for text in TEXTS:
        ids = [100000, *library.encode(text).ids, 100001]
        for skip in (True, False):
            assert deepseek.decode(ids, skip) == library.decode(ids, skip)
            # cut in the middle of characters
            assert deepseek.decode(ids[::-1], skip) == library.decode(ids[::-1], skip)


def test_deepseek_keeps_spaces_and_adds_bos(deepseek: Tokenizer) -> None:
    assert deepseek.encode("hello world") == [100000, 31539, 1843]
    assert deepseek.encode("hello world", add_special_tokens=False) == [31539, 1843]
    assert deepseek.decode([100000, 31539, 1843]) == "hello world"
    assert deepseek.decode([100000, 31539], skip_special_tokens=False) == "<｜begin▁of▁sentence｜>hello"
    assert deepseek.eos_token_ids == (100001,)


def test_bos_is_never_doubled(deepseek: Tokenizer) -> None:
    assert deepseek.chat is not None
    prompt = deepseek.chat.render([{"role": "user", "content": "hi"}])
    assert prompt.startswith("<｜begin▁of▁sentence｜>")
    assert deepseek.encode(prompt).count(100000) == 1
    assert deepseek.encode(prompt) == deepseek.encode(prompt, add_special_tokens=False)


def test_empty_text(smollm2: Tokenizer, deepseek: Tokenizer) -> None:
    assert smollm2.encode("") == []
    assert deepseek.encode("") == [100000]
    assert smollm2.decode([]) == ""


@pytest.mark.parametrize("unknown", [49152, 102399, 2**31, 2**40, -1, -(2**40)])
def test_ids_beyond_the_tokenizer_decode_to_nothing(smollm2: Tokenizer, unknown: int) -> None:
    assert smollm2.decode([504, unknown, 3575]) == "The capital"
    assert smollm2.token_text(unknown) == ""
    assert smollm2.token_bytes(unknown) == b""


def test_lone_surrogates_are_the_callers_fault(smollm2: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        smollm2.encode("broken \ud800 text")


def test_encoding_lets_other_threads_run(smollm2: Tokenizer) -> None:
    encoding = threading.Thread(target=smollm2.encode, args=("hello world " * 100_000,))
    encoding.start()
    turns = 0
    while encoding.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 10


def test_a_text_has_at_least_its_bytes_by_the_longest_piece_tokens(smollm2: Tokenizer, deepseek: Tokenizer) -> None:
    for tokenizer in (smollm2, deepseek):
        for text in (" " * 5000, "-" * 5000, "internationalization " * 500, "漢字かな" * 500):
            assert len(tokenizer.encode(text)) >= len(text.encode()) // tokenizer.longest_piece


def test_byte_fallback_tokenizer(llama2_files: TokenizerFiles) -> None:
    tokenizer = Tokenizer.from_files(llama2_files)
    library = Core.from_str(llama2_files.tokenizer_json)
    ids = tokenizer.encode("ab a é 😀")
    assert ids[0] == 1
    assert tokenizer.decode(ids) == "ab a é 😀" == library.decode(ids)
    assert tokenizer.token_bytes(tokenizer.encode("😀")[-1]) == b"\x80"
    assert tokenizer.token_text(262) == " a"
    # one broken sequence costs one U+FFFD, not the whole characters beside it
    assert tokenizer.decode([3 + 0xC3, 3 + 0xA9, 3 + 0xFF]) == "é\ufffd"


def test_truncation_and_padding_settings_are_ignored(llama2_files: TokenizerFiles) -> None:
    data = json.loads(llama2_files.tokenizer_json)
    data["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {"strategy": {"Fixed": 20}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                       "pad_type_id": 0, "pad_token": "<unk>"}  # fmt: skip
    tokenizer = Tokenizer.from_files(replace(llama2_files, tokenizer_json=json.dumps(data)))
    assert tokenizer.decode(tokenizer.encode("ab ab ab ab")) == "ab ab ab ab"


@pytest.mark.parametrize("broken", ["", "{}", "not json", '{"model": {"type": "Nonsense"}}'])
def test_a_broken_tokenizer_is_a_checkpoint_error(llama2_files: TokenizerFiles, broken: str) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_files(replace(llama2_files, tokenizer_json=broken))


def test_an_unknown_decoder_is_refused_by_name(llama2_files: TokenizerFiles) -> None:
    data = json.loads(llama2_files.tokenizer_json)
    data["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    with pytest.raises(UnsupportedModel, match="WordPiece"):
        Tokenizer.from_files(replace(llama2_files, tokenizer_json=json.dumps(data)))


@pytest.mark.parametrize("vocab_size", [300, 102_400])
def test_a_placeholder_for_models_without_a_tokenizer(vocab_size: int) -> None:
    tokenizer = Tokenizer.from_files(placeholder_files(vocab_size, (7,)))
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_ids) == (vocab_size, None, (7,))
    assert tokenizer.encode("aé 😀\n") == list("aé 😀\n".encode())
    assert tokenizer.decode([*"é".encode(), 299, 10]) == "é<299>\n"
    assert tokenizer.chat is not None
    assert tokenizer.chat.render([{"role": "user", "content": "hi"}]) == "user: hi\nassistant: "


def test_a_placeholder_for_a_tiny_vocabulary() -> None:
    tokenizer = Tokenizer.from_files(placeholder_files(100))
    assert tokenizer.vocab_size == 100
    assert tokenizer.encode("a\x01z") == [97, 1]


# --- what a folder says ---


Folder = Callable[..., Path]


@pytest.fixture
def write_folder(tmp_path: Path, llama2_files: TokenizerFiles) -> Folder:
    """Writes a folder with Llama 2's tokenizer and a tokenizer_config.json of the keywords given."""

    def write(**config: object) -> Path:
        (tmp_path / "tokenizer.json").write_text(llama2_files.tokenizer_json, encoding="utf-8")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return tmp_path

    return write


def files_of(folder: Path, eos_token_ids: tuple[int, ...] = ()) -> TokenizerFiles:
    files = read_tokenizer_folder(folder, eos_token_ids)
    assert files is not None
    return files


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    assert read_tokenizer_folder(tmp_path) is None


def test_special_tokens_as_strings_or_objects(write_folder: Folder) -> None:
    files = files_of(
        write_folder(bos_token="<s>", eos_token={"__type": "AddedToken", "content": "</s>"}, pad_token=None)
    )
    assert (files.bos_token, files.eos_token, files.pad_token) == ("<s>", "</s>", None)
    assert files.eos_token_ids == (2,)


def test_eos_ids_are_joined_without_repeats(write_folder: Folder) -> None:
    folder = write_folder(eos_token="</s>")
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 2, 9]}')
    assert files_of(folder, (9, 5)).eos_token_ids == (9, 5, 7, 2)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"add_bos_token": True}, True),
        ({"add_bos_token": False, "tokenizer_class": "LlamaTokenizerFast"}, False),
        ({"tokenizer_class": "LlamaTokenizerFast"}, True),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, False),
        ({}, False),
    ],
)
def test_whether_bos_is_added(write_folder: Folder, config: dict[str, object], expected: bool) -> None:
    assert files_of(write_folder(bos_token="<s>", **config)).add_bos is expected


def test_a_post_processor_can_say_that_bos_is_added(write_folder: Folder) -> None:
    folder = write_folder(bos_token="<s>", tokenizer_class="PreTrainedTokenizerFast")
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    data["post_processor"] = {"type": "Sequence", "processors": [template]}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    files = files_of(folder)
    assert files.add_bos
    assert Tokenizer.from_files(files).encode("a")[:2] == [1, 262]


def test_chat_template_places(write_folder: Folder) -> None:
    assert files_of(write_folder()).chat_template is None
    assert files_of(write_folder(chat_template="one")).chat_template == "one"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert files_of(write_folder(chat_template=named)).chat_template == "plain"
    (write_folder() / "chat_template.jinja").write_text("file")
    assert files_of(write_folder(chat_template="one")).chat_template == "file"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer_config.json", "nope"),
        ("tokenizer_config.json", '{"bos_token": 3}'),
        ("tokenizer_config.json", '{"chat_template": 3}'),
        ("generation_config.json", '{"eos_token_id": "2"}'),
        ("generation_config.json", "\xff\xfe"),
    ],
)
def test_broken_files_are_named(write_folder: Folder, name: str, content: str) -> None:
    folder = write_folder()
    (folder / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        read_tokenizer_folder(folder)
