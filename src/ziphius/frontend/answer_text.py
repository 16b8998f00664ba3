"""The stages that make an answer's text: detokenize, find stop strings, parse.

    token ids -> IncrementalDetokenizer -> StopMatcher -> Parser -> Delta -> an API's format

A parser for tool calls or for reasoning is one class with `push` and `end`. It sorts the text that it gets into the
fields of a Delta, and the formats read these. A request names its parser in `GenerateRequest.make_parser`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ziphius.frontend.sampling import TextOptions
from ziphius.frontend.stop_strings import StopMatcher
from ziphius.ipc.messages import TokenLogprob
from ziphius.tokenizer.detokenizer import IncrementalDetokenizer
from ziphius.tokenizer.tokenizer import Tokenizer


@dataclass(slots=True)
class Delta:
    """What is new in an answer since its format last asked."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]


class Parser(Protocol):
    """Sorts one answer's text into a Delta's fields. It may hold text back until it knows what the text is."""

    def push(self, text: str, delta: Delta) -> None:
        """The answer goes on with `text`, which belongs to no stop string."""
        ...

    def end(self, delta: Delta) -> None:
        """The answer's text has ended: nothing may be held back any longer. Nothing is called after it."""
        ...


class PlainText:
    """The parser of answers that are text and nothing else."""

    __slots__ = ()

    def push(self, text: str, delta: Delta) -> None:
        delta.text += text

    def end(self, delta: Delta) -> None:
        pass


MakeParser = Callable[[], Parser]
"""Each sequence has a parser of its own."""


class AnswerText:
    """The text of one answer, through all stages."""

    __slots__ = ("_detokenizer", "_keeps_stops", "_matcher", "_min_tokens", "_parser", "has_stops")

    def __init__(self, tokenizer: Tokenizer, options: TextOptions, min_tokens: int, parser: Parser) -> None:
        """Stop strings count once the answer has `min_tokens` tokens."""
        self._detokenizer = IncrementalDetokenizer(tokenizer, options.skip_special_tokens, continues_text=True)
        self._matcher = StopMatcher(options.stops) if options.stops else None
        self._keeps_stops = options.no_stop_trim
        self._min_tokens = min_tokens
        self._parser = parser
        self.has_stops = self._matcher is not None
        """Whether a `push` can end the answer: then push one token at a time."""

    def push(self, ids: Sequence[int], num_tokens: int, delta: Delta) -> str | None:
        """Add the text of `ids`, up to the answer's token number `num_tokens`, to `delta`.

        The stop string that ended the answer, if one did; nothing may be pushed after it.
        """
        text = self._detokenizer.push(ids)
        if self._matcher is None or num_tokens < self._min_tokens:
            self._parser.push(text, delta)
            return None
        return self._look_for_stops(self._matcher, text, delta)

    def end(self, num_tokens: int, delta: Delta) -> str | None:
        """The answer has ended: bring out what is withheld, an unfinished character as U+FFFD.

        The stop string in what was withheld, if there is one. Call it once, and not after `push` found one.
        """
        text = self._detokenizer.flush()
        matcher = self._matcher
        if matcher is not None and num_tokens >= self._min_tokens:
            matched = self._look_for_stops(matcher, text, delta)
            if matched is not None:
                return matched
            text = ""
        if matcher is not None:
            text += matcher.flush()
        self._parser.push(text, delta)
        self._parser.end(delta)
        return None

    def _look_for_stops(self, matcher: StopMatcher, text: str, delta: Delta) -> str | None:
        scan = matcher.push(text)
        if scan.matched is None:
            self._parser.push(scan.text, delta)
            return None
        self._parser.push(scan.text + scan.matched if self._keeps_stops else scan.text, delta)
        self._parser.end(delta)
        return scan.matched
