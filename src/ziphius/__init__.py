"""The names for use from Python. Each is imported when it is first asked for: `import ziphius` loads no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ziphius.engine.llm import LLM, Completion
    from ziphius.errors import ZiphiusError
    from ziphius.ipc.messages import SamplingParams

__all__ = ["LLM", "Completion", "SamplingParams", "ZiphiusError"]

_MODULES = {
    "LLM": "ziphius.engine.llm",
    "Completion": "ziphius.engine.llm",
    "SamplingParams": "ziphius.ipc.messages",
    "ZiphiusError": "ziphius.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
