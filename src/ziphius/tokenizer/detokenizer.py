"""IncrementalDetokenizer: a stream of token ids into a stream of text; it looks for no stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from ziphius.tokenizer.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """The text of one answer as its tokens come, in time proportional to the new tokens only.

    For any split of ids into pushes, the pieces joined equal `Tokenizer.decode` of all of them.
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
        """The text that `ids` complete. An unfinished UTF-8 sequence is withheld until its rest comes."""
        pieces, skipped = self._pieces, self._skipped
        return self._stripped(self._decoder.decode(b"".join([pieces[i] for i in ids if i not in skipped])))

    def flush(self) -> str:
        """What is still withheld, as U+FFFD; call once, when the answer has ended."""
        return self._stripped(self._decoder.decode(b"", True))

    def _stripped(self, text: str) -> str:
        if not self._strip_space or not text:
            return text
        self._strip_space = False
        return text.removeprefix(" ")
