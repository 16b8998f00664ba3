"""ARCHITECTURES: every architecture that this engine has, one row each: its config, its model and its GGUF.

A new architecture is a parser here in `checkpoint/`, a class in `models/` (or one that is there) and a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ziphius.checkpoint.decoder import DecoderShape
from ziphius.checkpoint.deepseek_v2 import parse_deepseek_v2
from ziphius.checkpoint.keys import Keys
from ziphius.checkpoint.llama import parse_llama
from ziphius.checkpoint.qwen import parse_qwen2, parse_qwen3
from ziphius.errors import UnsupportedModel


@dataclass(frozen=True, slots=True)
class GGUFLayout:
    """How llama.cpp's converter writes the architecture."""

    name: str
    """`general.architecture`, and the prefix of its keys."""
    rotary_pairs: bool = False
    """The rows of each head of q and k are reordered from halves [x0 .. xd/2, y0 .. yd/2] to pairs [x0, y0, ..]."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """One row. The model is named as text, so that nothing here imports torch."""

    name: str
    """In config.json's `architectures`."""
    model_type: str
    """Where config.json does not give one."""
    parse: Callable[[Keys], DecoderShape]
    """Reads what differs between architectures; UnsupportedModel or ModelError name the key at fault."""
    model: str
    """`module:class` of the CausalLM."""
    gguf: GGUFLayout | None = None
    """None: GGUF files of it cannot be read."""
    yarn: bool = False
    """Whether the model scales its softmax as YaRN asks."""
    remote_code: bool = False
    """Whether its checkpoints bring modeling code of their own, which other engines run only with consent."""


ARCHITECTURES = (
    Architecture("LlamaForCausalLM", "llama", parse_llama, "ziphius.models.llama:LlamaForCausalLM",
                 GGUFLayout("llama", rotary_pairs=True)),
    Architecture("DeepseekV2ForCausalLM", "deepseek_v2", parse_deepseek_v2,
                 "ziphius.models.deepseek_v2:DeepseekV2ForCausalLM", yarn=True, remote_code=True),
    Architecture("Qwen2ForCausalLM", "qwen2", parse_qwen2, "ziphius.models.llama:LlamaForCausalLM",
                 GGUFLayout("qwen2")),
    Architecture("Qwen3ForCausalLM", "qwen3", parse_qwen3, "ziphius.models.qwen:Qwen3ForCausalLM",
                 GGUFLayout("qwen3")),
)  # fmt: skip


def architecture_of(name: str) -> Architecture:
    """The row of a name in config.json. UnsupportedModel when there is none."""
    for row in ARCHITECTURES:
        if row.name == name:
            return row
    *names, last = (row.name for row in ARCHITECTURES)
    raise UnsupportedModel(f"architecture {name} is not supported; this engine has {', '.join(names)} and {last}")


def gguf_architecture(name: str) -> tuple[Architecture, GGUFLayout]:
    """The row of a GGUF's `general.architecture`. UnsupportedModel when there is none."""
    for row in ARCHITECTURES:
        if row.gguf is not None and row.gguf.name == name:
            return row, row.gguf
    known = ", ".join(row.gguf.name for row in ARCHITECTURES if row.gguf is not None)
    raise UnsupportedModel(f"the GGUF architecture {name!r} is not supported (only {known})")


def names_with_yarn() -> str:
    """The architectures whose models know YaRN, for a message."""
    return " and ".join(row.name for row in ARCHITECTURES if row.yarn)
