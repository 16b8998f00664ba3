"""The incremental detokenizer equals whole decoding for every split of the ids."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ziphius.tokenizer.detokenizer import IncrementalDetokenizer
from ziphius.tokenizer.tokenizer import Tokenizer

TEXT = st.text(max_size=60) | st.sampled_from(["你好，世界", "👩‍👩‍👧 family 🇫🇷", "a\u0301 e\u0301", "  spaces  ", "ﷺ𐍈"])


def push_in_parts(tokenizer: Tokenizer, ids: list[int], cuts: list[int], skip: bool) -> str:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    bounds = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    parts = [detokenizer.push(ids[a:b]) for a, b in itertools.pairwise(bounds)]
    return "".join(parts) + detokenizer.flush()


@pytest.mark.parametrize("name", ["smollm2", "deepseek", "llama2"])
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_split_equals_whole_decoding(request: pytest.FixtureRequest, name: str, data: st.DataObject) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    whole = tokenizer.encode(data.draw(TEXT))
    # ids at random are mostly parts of characters and invalid UTF-8; some are special, some unknown
    noise = st.lists(st.integers(0, tokenizer.vocab_size + 50) | st.integers(95, 260), max_size=12)
    ids = data.draw(noise) + whole + data.draw(noise)
    if data.draw(st.booleans()) and ids:
        ids = ids[: data.draw(st.integers(0, len(ids)))]
    skip = data.draw(st.booleans())
    cuts = data.draw(st.lists(st.integers(0, 1000), max_size=8))
    expected = tokenizer.decode(ids, skip)
    assert push_in_parts(tokenizer, ids, cuts, skip) == expected
    assert push_in_parts(tokenizer, ids, list(range(len(ids))), skip) == expected
    if name != "llama2":  # there the library replaces the whole characters beside a broken one
        known = [i for i in ids if i < tokenizer.vocab_size]
        assert expected == tokenizer._core.decode(known, skip)


def test_an_unfinished_character_is_withheld(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("😀!")
    assert len(ids) > 2
    detokenizer = IncrementalDetokenizer(smollm2)
    parts = [detokenizer.push([i]) for i in ids]
    assert parts == [""] * (len(ids) - 2) + ["😀", "!"]
    assert detokenizer.flush() == ""


def test_flush_tells_of_a_cut_character(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("a😀")
    detokenizer = IncrementalDetokenizer(smollm2)
    assert detokenizer.push(ids[:-1]) == "a"
    assert detokenizer.flush() == "\ufffd"


def test_special_tokens(smollm2: Tokenizer) -> None:
    ids = [*smollm2.encode("Hi"), 2]
    assert IncrementalDetokenizer(smollm2).push(ids) == "Hi"
    assert IncrementalDetokenizer(smollm2, skip_special_tokens=False).push(ids) == "Hi<|im_end|>"


def test_nothing_pushed(smollm2: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(smollm2)
    assert detokenizer.push([]) == ""
    assert detokenizer.flush() == ""


def test_a_leading_space(llama2: Tokenizer) -> None:
    ids = llama2.encode("ab ab", add_special_tokens=False)
    alone, after_a_prompt = IncrementalDetokenizer(llama2), IncrementalDetokenizer(llama2, continues_text=True)
    assert [alone.push([i]) for i in ids] == ["a", "b", " a", "b"]
    assert [after_a_prompt.push([i]) for i in ids] == [" a", "b", " a", "b"]
