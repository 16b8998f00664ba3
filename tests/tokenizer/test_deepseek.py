"""DeepSeek-V2's real tokenizer and V2.5's prompt formats: golden ids, exact prompts, every split of a broken answer."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from ziphius.errors import UnsupportedField
from ziphius.tokenizer.detokenizer import IncrementalDetokenizer
from ziphius.tokenizer.fim import fim_prompt
from ziphius.tokenizer.pieces import byte_characters
from ziphius.tokenizer.tokenizer import Tokenizer

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"

GOLDEN: dict[str, list[int]] = {
    "hello world": [31539, 1843],
    "The capital of France is Paris.": [549, 6077, 280, 7239, 317, 8913, 13],
    "don't DON'T we're": [10314, 6, 83, 58861, 6, 51, 395, 6, 248],
    "你好，世界！深度求索是一家公司。": [84313, 19304, 4997, 2160, 26069, 2989, 8640, 52087, 2814, 398],
    "def f(x):\n    return x ** 2  # 12345 + 0.5\n": [
        *(1558, 267, 7, 87, 1780, 185, 300, 972, 1376, 9217, 207, 17, 207, 1501, 207, 16, 17, 18, 19, 20, 919, 207),
        *(15, 13, 20, 185),
    ],
    "#include <stdio.h>\nint main(void) { return 0; }": [
        *(2, 5301, 459, 62673, 13, 71, 29, 185, 572, 1969, 7, 4570, 8, 509, 972, 207, 15, 26, 615),
    ],
    "emoji 😀 👩‍👩‍👧 🇫🇷 end": [
        *(39349, 12833, 89662, 59948, 102, 350, 222, 10044, 226, 102, 350, 222, 10044, 226, 100, 12356, 216, 104),
        *(10044, 216, 115, 1225),
    ],
    "  two  spaces\tand\ttabs\n\n\nlines  ": [207, 984, 207, 9577, 46204, 184, 20526, 185, 185, 185, 8731, 243],
    "    \n\t \r\n": [251, 185, 11969, 188, 185],
    "1234567890 3.14159": [16, 17, 18, 19, 20, 21, 22, 23, 24, 15, 207, 18, 13, 16, 19, 16, 20, 24],
    "naïve café Ελληνικά русский": [
        *(2490, 2865, 313, 26506, 587, 7558, 230, 19236, 19236, 93467, 53382, 30791, 15734, 368, 1960, 954),
    ],
    f"{BOS}User: hi\n\nAssistant:": [100000, 5726, 25, 2868, 185, 185, 77398, 25],
}


@pytest.mark.parametrize("text", list(GOLDEN))
def test_golden_ids(deepseek: Tokenizer, text: str) -> None:
    assert deepseek.encode(text, add_special_tokens=False) == GOLDEN[text]
    assert deepseek.encode(text) == [100000] * (not text.startswith(BOS)) + GOLDEN[text]
    assert deepseek.decode(GOLDEN[text], skip_special_tokens=False) == text


class PlainBPE:
    """What tokenizer.json says, in plain Python: the splits in turn, then byte pairs joined in the merges' order."""

    def __init__(self, data: dict[str, Any]) -> None:
        steps = data["pre_tokenizer"]["pretokenizers"]
        self.splits = [re.compile(step["pattern"]["Regex"]) for step in steps if step["type"] == "Split"]
        assert [step["type"] for step in steps] == ["Split"] * len(self.splits) + ["Digits", "ByteLevel"]
        self.splits.append(re.compile(r"\d"))
        self.vocabulary: dict[str, int] = data["model"]["vocab"]
        pairs = (tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in data["model"]["merges"])
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self.characters = {byte: character for character, byte in byte_characters().items()}

    def encode(self, text: str) -> list[int]:
        words = [text]
        for split in self.splits:
            words = [part for word in words for part in isolated(split, word)]
        return [self.vocabulary[token] for word in words for token in self.merged(word)]

    def merged(self, word: str) -> list[str]:
        parts = [self.characters[byte] for byte in word.encode()]
        while True:
            rank, at = min(((self.ranks.get(pair, 10**9), i) for i, pair in enumerate(itertools.pairwise(parts))),
                           default=(10**9, 0))  # fmt: skip
            if rank == 10**9:
                return parts
            parts[at : at + 2] = [parts[at] + parts[at + 1]]


def isolated(split: re.Pattern[str], word: str) -> Iterator[str]:
    """`word` cut before and after each match."""
    end = 0
    for match in split.finditer(word):
        yield from (part for part in (word[end : match.start()], match[0]) if part)
        end = match.end()
    if word[end:]:
        yield word[end:]


@pytest.fixture(scope="session")
def plain(deepseek_folder: Path) -> PlainBPE:
    return PlainBPE(json.loads((deepseek_folder / "tokenizer.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("text", [text for text in GOLDEN if not text.startswith(BOS)])
def test_the_golden_ids_are_what_the_file_says(plain: PlainBPE, text: str) -> None:
    assert plain.encode(text) == GOLDEN[text]


@settings(deadline=None, max_examples=100)
@given(text=st.text(st.sampled_from("aZé λя的深！，。 \t\n\r.,!'\"(){}0129_-😀👩\u200d🇫̈"), max_size=40))
def test_any_text_is_encoded_as_the_file_says(deepseek: Tokenizer, plain: PlainBPE, text: str) -> None:
    ids = deepseek.encode(text, add_special_tokens=False)
    assert ids == plain.encode(text)
    assert deepseek.decode(ids) == text


# --- what streams ---


def every_split(ids: list[int]) -> Iterator[list[list[int]]]:
    for cuts in itertools.product([False, True], repeat=len(ids) - 1):
        bounds = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(ids)]
        yield [ids[a:b] for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize(
    "change",
    [
        lambda ids: ids,
        lambda ids: ids[:-1],  # ends within a character
        lambda ids: ids[1:],  # starts within one
        lambda ids: ids[::-1],  # bytes in no order
        lambda ids: ids[:3] + ids[4:],  # one byte lost
        lambda ids: [*ids[:4], 100001, *ids[4:]],  # a special token within a character
        lambda ids: [*ids[:4], 102399, *ids[4:]],  # an id that no token has
    ],
)
def test_every_split_of_a_broken_answer(deepseek: Tokenizer, change: Any) -> None:
    ids = change(deepseek.encode("👩‍👧 好!🇫", add_special_tokens=False))
    assert 10 <= len(ids) <= 16
    for skip in (True, False):
        expected = deepseek.decode(ids, skip)
        for parts in every_split(ids):
            stream = IncrementalDetokenizer(deepseek, skip)
            assert "".join([stream.push(part) for part in parts]) + stream.flush() == expected


# --- V2.5's prompts ---


def message(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(name: str, arguments: str) -> dict[str, Any]:
    return {"id": "0", "type": "function", "function": {"name": name, "arguments": arguments}}


CALLS = message("assistant", None, tool_calls=[call("weather", '{"city": "Köln"}'), call("time", "{}")])
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "one": ([message("user", "Hi")], "<｜User｜>Hi<｜Assistant｜>"),
    "system": ([message("system", "Be brief."), message("user", "Hi")], "Be brief.<｜User｜>Hi<｜Assistant｜>"),
    "turns": (
        [message("user", "Hi"), message("assistant", "Hello! "), message("user", "  Bye\n")],
        f"<｜User｜>Hi<｜Assistant｜>Hello! {EOS}<｜User｜>  Bye\n<｜Assistant｜>",
    ),
    "two systems": (
        [message("system", "first"), message("user", "a"), message("system", "last")],
        "last<｜User｜>a<｜Assistant｜>",
    ),
    "calls": (
        [message("user", "Warm?"), CALLS, message("tool", "20"), message("tool", "noon"), message("assistant", "Yes")],
        "<｜User｜>Warm?<｜Assistant｜><｜tool▁calls▁begin｜>"
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"city": "Köln"}\n```<｜tool▁call▁end｜>\n'
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n```json\n{}\n```<｜tool▁call▁end｜>"
        f"<｜tool▁calls▁end｜>{EOS}"
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>20<｜tool▁output▁end｜>\n"
        f"<｜tool▁output▁begin｜>noon<｜tool▁output▁end｜><｜tool▁outputs▁end｜>Yes{EOS}<｜Assistant｜>",
    ),
    "outputs": (
        [message("user", "Warm?"), message("tool", "20")],
        "<｜User｜>Warm?<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>20<｜tool▁output▁end｜><｜tool▁outputs▁end｜>",
    ),
}


@pytest.mark.parametrize("name", list(CONVERSATIONS))
def test_v25_prompts(v25: Tokenizer, name: str) -> None:
    messages, expected = CONVERSATIONS[name]
    assert v25.chat is not None
    assert v25.chat.render(messages) == BOS + expected


@pytest.mark.parametrize("name", list(CONVERSATIONS))
@pytest.mark.parametrize("generation_prompt", [True, False])
def test_v25_prompts_equal_transformers(v25_folder: Path, v25: Tokenizer, name: str, generation_prompt: bool) -> None:
    template = json.loads((v25_folder / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    messages, _ = CONVERSATIONS[name]
    (expected,), _ = render_jinja_template([messages], chat_template=template, bos_token=BOS, eos_token=EOS,
                                           add_generation_prompt=generation_prompt)  # fmt: skip
    assert v25.chat is not None
    assert v25.chat.render(messages, generation_prompt) == expected


def test_v25_tokens_are_single_ids(v25: Tokenizer, deepseek: Tokenizer) -> None:
    assert v25.chat is not None
    prompt = v25.chat.render(CONVERSATIONS["turns"][0])
    ids = v25.encode(prompt, add_special_tokens=False)
    assert [i for i in ids if i >= 100000] == [100000, 100005, 100006, 100001, 100005, 100006]
    words = [deepseek.encode(text, add_special_tokens=False) for text in ("Hi", "Hello! ", "  Bye\n")]
    assert [i for i in ids if i < 100000] == [i for word in words for i in word]
    assert v25.encode(prompt) == ids
    assert v25.decode(ids, skip_special_tokens=False) == prompt
    assert len(deepseek.encode(prompt)) > len(ids)


def test_fim_prompt(v25: Tokenizer) -> None:
    prompt = fim_prompt(v25, "def f(x):\n    return ", "\n\nprint(f(1))")
    assert prompt == "<｜fim▁begin｜>def f(x):\n    return <｜fim▁hole｜>\n\nprint(f(1))<｜fim▁end｜>"
    ids = v25.encode(prompt)
    assert ids[:2] == [100000, 100003]
    assert (ids.count(100002), ids[-1]) == (1, 100004)
    assert fim_prompt(v25, "", "") == "<｜fim▁begin｜><｜fim▁hole｜><｜fim▁end｜>"


def test_no_fim_without_its_tokens(deepseek: Tokenizer, smollm2: Tokenizer) -> None:
    for tokenizer in (deepseek, smollm2):
        with pytest.raises(UnsupportedField, match="filling in the middle") as caught:
            fim_prompt(tokenizer, "a", "b")
        assert caught.value.param == "suffix"
