"""PieceTable: the bytes that each token stands for, by the rules of the tokenizer's own decoder.

Three decoders of the `tokenizers` library cover the supported models:
- ByteLevel (GPT-2, Llama 3, SmolLM2, DeepSeek): each character of a token stands for one byte;
- Replace + ByteFallback + Fuse + Strip (Llama 2 and its kin): "▁" is a space and <0x0A> a byte;
- Metaspace: "▁" is a space.
So a text is the UTF-8 decoding of its tokens' bytes, and a stream can be decoded token by token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import Tokenizer as Core

from ziphius.errors import UnsupportedModel

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_characters() -> dict[str, int]:
    """GPT-2's printable character for each of the 256 bytes, the other way round (Radford et al. 2019, encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in printable}
    table.update({chr(256 + n): b for n, b in enumerate(others)})
    return table


class PieceTable(dict[int, bytes]):
    """Token id -> bytes, computed when first asked for. An id that the tokenizer does not know has no bytes.

    `strips_leading_space`: the decoder removes the one space that the encoder put in front of a text.
    UnsupportedModel for a decoder that is none of the three.
    """

    def __init__(self, core: Core) -> None:
        super().__init__()
        self._core = core
        self._to_bytes, self.strips_leading_space = _conversion(json.loads(core.to_str())["decoder"])

    def __missing__(self, token_id: int) -> bytes:
        # id_to_token takes an unsigned 32-bit number and raises for anything else
        token = self._core.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        piece = b"" if token is None else self._to_bytes(token)
        self[token_id] = piece
        return piece


def _conversion(decoder: Any) -> tuple[Callable[[str], bytes], bool]:
    """How a token becomes bytes, and whether a text loses one leading space."""
    steps = _steps(decoder)
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level(), False
    if kinds == ["Metaspace"]:
        return _replaced({steps[0]["replacement"]: " "}, False), steps[0].get("prepend_scheme") != "never"
    if kinds and set(kinds) <= {"Replace", "ByteFallback", "Strip"}:
        replacements = {s["pattern"]["String"]: s["content"] for s in steps if s["type"] == "Replace"}
        strips = any(s["type"] == "Strip" and s["content"] == " " and s["start"] for s in steps)
        return _replaced(replacements, "ByteFallback" in kinds), strips
    raise UnsupportedModel(f"tokenizer.json: the decoder {' + '.join(map(str, kinds)) or 'null'} is not supported")


def _steps(decoder: Any) -> list[Mapping[str, Any]]:
    if not isinstance(decoder, Mapping):
        return []
    steps = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    return [step for step in steps if step.get("type") != "Fuse"]


def _byte_level() -> Callable[[str], bytes]:
    table = byte_characters()

    def to_bytes(token: str) -> bytes:
        try:
            return bytes([table[c] for c in token])
        except KeyError:
            # An added token such as <｜User｜>: its characters stand for themselves
            return token.encode("utf-8")

    return to_bytes


def _replaced(replacements: Mapping[str, str], byte_fallback: bool) -> Callable[[str], bytes]:
    def to_bytes(token: str) -> bytes:
        for old, new in replacements.items():
            token = token.replace(old, new)
        raw = _BYTE_TOKEN.fullmatch(token) if byte_fallback else None
        return bytes([int(raw[1], 16)]) if raw else token.encode("utf-8")

    return to_bytes
