"""SamplingDefaults: the sampling that a checkpoint's authors suggest."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ziphius.errors import ModelError


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Used for requests of OpenAI's API that do not set these values; None where the checkpoint suggests nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def read_sampling_defaults(folder: Path) -> SamplingDefaults:
    """From `folder`/generation_config.json, if there is one. ModelError when it is not a JSON object.

    `do_sample: false` is not read: it is Hugging Face's default, and no advice of the authors. Values that no request
    could ask for are left out.
    """
    path = folder / "generation_config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return SamplingDefaults()
    except OSError as e:
        raise ModelError(f"cannot read {path}: {e.strerror}") from e
    except ValueError as e:
        raise ModelError(f"{path} is not valid JSON: {e}") from e
    if not isinstance(data, dict):
        raise ModelError(f"{path} must hold a JSON object, not {type(data).__name__}")
    top_k = _number(data.get("top_k"), 1, math.inf)
    return SamplingDefaults(
        temperature=_number(data.get("temperature"), 0.0, 1000.0),
        top_p=_number(data.get("top_p"), 1e-9, 1.0),
        top_k=None if top_k is None else int(top_k),
        min_p=_number(data.get("min_p"), 0.0, 1.0),
        repetition_penalty=_number(data.get("repetition_penalty"), 1e-9, 2.0),
    )


def _number(value: Any, low: float, high: float) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number and low <= value <= high else None
