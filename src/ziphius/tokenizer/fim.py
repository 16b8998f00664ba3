"""fim_prompt: the prompt that asks a model for the text between a prefix and a suffix."""

from __future__ import annotations

from ziphius.errors import UnsupportedField
from ziphius.tokenizer.tokenizer import Tokenizer

_BEGIN, _HOLE, _END = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"


def fim_prompt(tokenizer: Tokenizer, prefix: str, suffix: str) -> str:
    """DeepSeek's fill-in-the-middle prompt (V2.5, Coder-V2), to be encoded like plain text, with BOS in front.

    UnsupportedField (param `suffix`) when the tokenizer lacks one of the three tokens: the model never learnt it.
    """
    if not all(tokenizer.has_token(token) for token in (_BEGIN, _HOLE, _END)):
        raise UnsupportedField("this model has no tokens for filling in the middle", param="suffix")
    return f"{_BEGIN}{prefix}{_HOLE}{suffix}{_END}"
