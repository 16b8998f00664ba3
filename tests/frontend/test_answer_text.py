"""The stages of an answer's text: what a parser gets, in which order, and what it makes of it."""

from __future__ import annotations

import pytest
import server_fakes as fakes

from ziphius.frontend.answer_text import AnswerText, Delta
from ziphius.frontend.sampling import TextOptions
from ziphius.tokenizer.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_files(fakes.tokenizer_files())


class Shouting:
    """Writes each word in capitals once it is whole, and notes what it was told."""

    def __init__(self):
        self.held = ""
        self.told = []

    def push(self, text, delta):
        self.told.append(text)
        words = (self.held + text).split(" ")
        self.held = words.pop()
        delta.text += "".join(word.upper() + " " for word in words)

    def end(self, delta):
        self.told.append(None)
        delta.text += self.held.upper()


def run(reply, options=TextOptions(), min_tokens=0):
    """(text, the stop string, what the parser was told) of `reply`, one byte a token."""
    parser, delta = Shouting(), Delta("", [], [])
    answer = AnswerText(TOKENIZER, options, min_tokens, parser)
    for n, byte in enumerate(reply, 1):
        matched = answer.push((byte,), n, delta)
        if matched is not None:
            return delta.text, matched, parser.told
    matched = answer.end(len(reply), delta)
    return delta.text, matched, parser.told


def test_a_parser_gets_the_text_in_pieces_and_then_its_end():
    text, matched, told = run(b"ab c")
    assert (text, matched) == ("AB C", None)
    assert "".join(told[:-1]) == "ab c"
    assert told.count(None) == 1
    assert told[-1] is None


def test_a_parser_never_sees_a_stop_string_or_a_part_of_one():
    text, matched, told = run(b"go on END. more", TextOptions(stops=("END.",)))
    assert (text, matched) == ("GO ON ", "END.")
    assert told[-1] is None
    assert "".join(told[:-1]) == "go on "


def test_a_parser_sees_the_stop_string_that_is_to_stay():
    text, matched, _ = run(b"go END.", TextOptions(stops=("END.",), no_stop_trim=True))
    assert (text, matched) == ("GO END.", "END.")


@pytest.mark.parametrize(("reply", "held"), [(b"go EN", "EN"), ("go €".encode()[:-1], "\ufffd")])
def test_what_is_withheld_reaches_the_parser_before_the_end(reply, held):
    text, matched, told = run(reply, TextOptions(stops=("END.",)))
    assert (text, matched) == ("GO " + held, None)
    assert told[-1] is None
    assert "".join(told[:-1]) == "go " + held


def test_stop_strings_pass_before_the_shortest_answer():
    text, matched, _ = run(b"a.b.c", TextOptions(stops=(".",)), min_tokens=3)
    assert (text, matched) == ("A.B", ".")
