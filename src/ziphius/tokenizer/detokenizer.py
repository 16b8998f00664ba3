"""IncrementalDetokenizer: it turns a stream of token ids into a stream of text."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from ziphius.tokenizer.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """The text of one answer while its tokens arrive. Each push takes time proportional to the new tokens only.

    However the ids are split into pushes, the joined pieces equal `Tokenizer.decode` of all of them.
    `continues_text`: the ids follow a prompt, so a leading space is the text's own and stays (it matters
    for Llama 2's kind of tokenizer, whose `decode` takes one away).
    """

    __slots__ = ("_decoder", "_pieces", "_skipped", "_strip_space")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, continues_text: bool = False) -> None:
        self._pieces = tokenizer.pieces
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_space = tokenizer.pieces.strips_leading_space and not continues_text

    def push(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete. An unfinished UTF-8 sequence is held back until it is complete."""
        pieces, skipped = self._pieces, self._skipped
        return self._stripped(self._decoder.decode(b"".join([pieces[i] for i in ids if i not in skipped])))

    def flush(self) -> str:
        """What is still held back, as U+FFFD. Call it once, when the answer has ended."""
        return self._stripped(self._decoder.decode(b"", True))

    def _stripped(self, text: str) -> str:
        if not self._strip_space or not text:
            return text
        self._strip_space = False
        return text.removeprefix(" ")
