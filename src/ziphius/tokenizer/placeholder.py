"""placeholder_files: a tokenizer for models that have none, so that random weights can be served."""

from __future__ import annotations

import json
from typing import Any

from ziphius.tokenizer.files import TokenizerFiles
from ziphius.tokenizer.pieces import byte_characters

_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "


def placeholder_files(vocab_size: int, eos_token_ids: tuple[int, ...] = ()) -> TokenizerFiles:
    """Ids 0 to 255 are the bytes of UTF-8; a further id N shows as <N>. Texts are as long as their bytes."""
    by_byte = {byte: character for character, byte in byte_characters().items()}
    vocabulary = {by_byte[i] if i < 256 else f"<{i}>": i for i in range(vocab_size)}
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": split,
        "post_processor": None,
        "decoder": split,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    return TokenizerFiles(json.dumps(tokenizer), _TEMPLATE, None, None, False, eos_token_ids)
