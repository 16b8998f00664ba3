"""Tokenizer: it turns text into token ids and back, and never imports transformers.

transformers 5 is not used on purpose: it swaps the pre-tokenizer of DeepSeek's tokenizer and loses its spaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from tokenizers import Tokenizer as Core

from ziphius.errors import CheckpointError, InvalidRequest
from ziphius.tokenizer.chat import ChatTemplate
from ziphius.tokenizer.files import TokenizerFiles
from ziphius.tokenizer.pieces import PieceTable


class Tokenizer:
    """One model's tokenizer. Safe to use from several threads.

    `vocab_size` is the highest known id plus one; a model's own vocabulary may be larger (it is often
    padded). Ids that only the model knows decode to the empty text.
    """

    def __init__(self, core: Core, files: TokenizerFiles) -> None:
        """Use `from_files`."""
        self._core = core
        added = core.get_added_tokens_decoder()
        self.vocab_size: int = max([core.get_vocab_size() - 1, *added]) + 1
        self.bos_token_id: int | None = None if files.bos_token is None else core.token_to_id(files.bos_token)
        self.eos_token_ids: tuple[int, ...] = files.eos_token_ids
        self.special_ids: frozenset[int] = frozenset(i for i, token in added.items() if token.special)
        self.pieces = PieceTable(core)
        self.chat: ChatTemplate | None = ChatTemplate.from_files(files)
        self._add_bos = files.add_bos and self.bos_token_id is not None

    @classmethod
    def from_files(cls, files: TokenizerFiles) -> Tokenizer:
        """CheckpointError when tokenizer.json or the chat template is broken; UnsupportedModel for its decoder."""
        try:
            core = Core.from_str(files.tokenizer_json)
        except Exception as e:  # the library raises plain Exception for whatever it cannot parse
            raise CheckpointError(f"tokenizer.json is not usable: {e}") from e
        core.no_truncation()
        core.no_padding()
        return cls(core, files)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. A special token written out in the text becomes that token.

        With `add_special_tokens`, BOS comes first if the checkpoint says so, but never twice: a text that
        starts with it keeps one. Encode a rendered chat template without. InvalidRequest for lone surrogates.
        """
        try:
            # A batch of one: unlike `encode` it lets other threads run meanwhile, and it computes no offsets
            ids: list[int] = self._core.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except TypeError as e:
            raise InvalidRequest("the text holds half of a surrogate pair, which is not valid Unicode") from e
        if add_special_tokens and self._add_bos and ids[:1] != [self.bos_token_id]:
            assert self.bos_token_id is not None
            ids.insert(0, self.bos_token_id)
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD, and unknown ids become nothing.

        Equal to the `tokenizers` library, except that a run of byte-fallback tokens with a broken
        sequence in it keeps its whole characters (the library replaces every byte of the run).
        """
        skipped = self.special_ids if skip_special_tokens else frozenset()
        text = b"".join([self.pieces[i] for i in ids if i not in skipped]).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.pieces.strips_leading_space else text

    @cached_property
    def longest_piece(self) -> int:
        """How many bytes the longest token has. A text has at least (its bytes / this number) tokens."""
        return max(len(self.pieces[token_id]) for token_id in range(self.vocab_size))

    def has_token(self, text: str) -> bool:
        """Whether `text` as a whole is one token."""
        return self._core.token_to_id(text) is not None

    def token_text(self, token_id: int) -> str:
        """What one token shows as (U+FFFD for a part of a character), special tokens included; "" if unknown."""
        return self.pieces[token_id].decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, special tokens included; b"" if unknown."""
        return self.pieces[token_id]
