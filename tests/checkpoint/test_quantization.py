"""What a config says about weights that are quantized already: kept with the model's config, refused only by a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ziphius.checkpoint.config import ModelConfig
from ziphius.checkpoint.quantization import Quantization, require_known
from ziphius.errors import ModelError, UnsupportedModel

LLAMA = Path(__file__).parents[1] / "planner" / "data" / "llama-3-8b.json"


def quantized(folder: Path, quantization: dict[str, Any] | None) -> Quantization | None:
    values = json.loads(LLAMA.read_text())
    if quantization is not None:
        values["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(values))
    return ModelConfig.from_folder(folder).quantization


def test_floats_have_none(tmp_path: Path) -> None:
    assert quantized(tmp_path, None) is None
    require_known(None, tmp_path)


@pytest.mark.parametrize(("block", "blocks"), [({}, False), ({"weight_block_size": [128, 128]}, True)])
def test_fp8_is_known(tmp_path: Path, block: dict[str, Any], blocks: bool) -> None:
    found = quantized(tmp_path, {"quant_method": "fp8", **block})
    assert found == Quantization("fp8", "fp8", blocks)
    require_known(found, tmp_path)


@pytest.mark.parametrize(
    ("quantization", "error", "told"),
    [
        ({"quant_method": "awq", "bits": 4}, UnsupportedModel, "has quant_method awq, whose sizes are not known here"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, UnsupportedModel, r"has weight_block_size \[64, 64\]"),
        ({"bits": 4}, ModelError, "quantization_config has no quant_method$"),
    ],
)
def test_what_is_not_known_is_read_and_refused_only_on_request(
    tmp_path: Path, quantization: dict[str, Any], error: type[ModelError], told: str
) -> None:
    """A checkpoint of another quantization can still be fetched, for SGLang."""
    found = quantized(tmp_path, quantization)
    assert found is not None
    assert found.weights_format is None
    with pytest.raises(error, match=f"c.json: .*{told}"):
        require_known(found, tmp_path / "c.json")
