"""The table of weights formats: bytes worked out by hand, what `auto` means, and that each row has its bodies."""

from __future__ import annotations

import importlib
import inspect
from typing import get_args

import pytest
import torch

from ziphius.config import ServeConfig, option_fields
from ziphius.errors import ConfigError
from ziphius.formats import (
    FORMATS,
    Format,
    Use,
    WeightsFormat,
    format_of_dtype,
    native_formats,
    plan_choices,
    planned_formats,
    resolve_formats,
)
from ziphius.layers import select
from ziphius.layers.weights import torch_dtype_of

ROWS = list(FORMATS.values())
BODIES = [(row, body) for row in ROWS for body in (row.plain_body, row.cpu_body, row.gpu_body) if body is not None]


def test_every_format_has_one_row() -> None:
    assert tuple(FORMATS) == get_args(WeightsFormat)
    assert sorted(plan_choices()) == sorted(FORMATS)


@pytest.mark.parametrize(
    ("name", "nbytes"),
    [
        ("fp32", 300 * 257 * 4),
        ("bf16", 300 * 257 * 2),
        ("fp16", 300 * 257 * 2),
        ("int8", 300 * 257 + 300 * 4),  # one scale a row
        ("fp8", 300 * 257 + 3 * 3 * 4),  # blocks of 128 x 128, the last ones short
        ("int4", 300 * 128 + 300 * 3 * 2),  # groups of 128 along a row
    ],
)
def test_bytes_of_a_matrix(name: WeightsFormat, nbytes: int) -> None:
    assert FORMATS[name].matrix_bytes(300, 257) == nbytes


def test_what_a_format_leaves_to_others() -> None:
    def held(name: WeightsFormat) -> dict[str, str | None]:
        stored = {use: FORMATS[name].of(use) for use in get_args(Use)}
        return {use: None if row is None else row.name for use, row in stored.items()}

    assert held("int8") == {"linear": "int8", "expert": "int8", "latent_up": None, "head": "int8"}
    assert held("fp8") == {"linear": "fp8", "expert": "fp8", "latent_up": "fp8", "head": None}
    assert held("int4") == {"linear": "fp8", "expert": "int4", "latent_up": "fp8", "head": None}


def test_shares_may_cut_what_has_no_blocks() -> None:
    blocks = {row.name: row.block for row in ROWS if row.block != (1, 1)}
    assert blocks == {"fp8": (128, 128), "int4": (1, 128)}
    assert all(row.scales is not None and row.scales.unit for row in ROWS if row.block != (1, 1))


def test_where_formats_run() -> None:
    everywhere = {"cuda", "cpu"}
    expected = {
        "fp32": everywhere,
        "bf16": everywhere,
        "fp16": everywhere,
        "int8": {"cpu"},
        "fp8": set(),
        "int4": set(),
    }
    assert {row.name: row.native for row in ROWS} == expected
    assert native_formats() == ("fp32", "bf16", "fp16", "int8")


@pytest.mark.parametrize(("row", "body"), BODIES, ids=[f"{row.name}-{body}" for row, body in BODIES])
def test_a_body_is_a_module_that_makes_the_format(row: Format, body: str) -> None:
    if body == row.gpu_body:
        pytest.importorskip("triton")
    make = importlib.import_module(f"ziphius.layers.{body}").make_format
    assert list(inspect.signature(make).parameters) == ["row", "device", "batch_invariant"]
    if body != row.gpu_body:
        made = make(row, torch.device("cpu"), False)
        assert made.block == row.block
        weight = made.linear(6, 4, torch.device("cpu"))
        assert sum(t.nbytes for t in weight.tensors()) == row.matrix_bytes(6, 4)
        if row.dtype is not None:
            assert {t.dtype for t in weight.tensors()} == {torch_dtype_of(row)}


def test_a_format_without_a_body_is_refused() -> None:
    for name in ("fp8", "int4", "int5"):
        with pytest.raises(ConfigError, match=f"weights_format '{name}' is not one of fp32, bf16, fp16, int8$"):
            select.make_linear_format(name, torch.float32, torch.device("cpu"))


def test_options_and_plans() -> None:
    (option,) = (o for o in option_fields() if o.name == "weights_format")
    assert option.metadata["choices"] == ("auto", "fp32", "bf16", "fp16", "int8", "fp8")
    assert planned_formats("cuda") == ("bf16", "fp8", "int4")
    assert planned_formats("cpu") == ("int8", "bf16", "fp32")
    assert plan_choices() == ("bf16", "fp8", "int4", "int8", "fp16", "fp32")


def test_auto() -> None:
    assert resolve_formats("cpu", "auto", "auto") == ("float32", "int8")
    assert resolve_formats("cpu", "bfloat16", "auto") == ("bfloat16", "bf16")
    assert resolve_formats("cpu", "auto", "fp16") == ("float32", "fp16")
    assert resolve_formats("cuda", "auto", "auto") == ("bfloat16", "bf16")
    assert resolve_formats("cuda", "float32", "auto") == ("float32", "fp32")
    assert resolve_formats("cuda", "auto", "int8") == ("bfloat16", "int8")
    with pytest.raises(ConfigError, match="int5") as raised:
        resolve_formats("cpu", "auto", "int5")
    assert raised.value.param == "weights_format"


def test_the_dtypes_of_the_option_have_a_format() -> None:
    (option,) = (o for o in option_fields() if o.name == "dtype")
    dtypes = [dtype for dtype in option.metadata["choices"] if dtype != "auto"]
    assert [format_of_dtype(dtype) for dtype in dtypes] == ["fp32", "bf16", "fp16"]
    assert ServeConfig().dtype == "auto"
