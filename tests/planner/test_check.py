"""The plan inside `start`, and predicted against measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from ziphius.config import ServeConfig
from ziphius.engine.precision import resolve_precision
from ziphius.errors import ConfigError, DoesNotFit
from ziphius.models.config import ModelConfig
from ziphius.planner.check import Prediction, check_start, compare, formats_of, predict, request_of
from ziphius.planner.hardware import Host, times
from ziphius.planner.memory import weight_bytes

GetHost = Callable[[str], Host]


def test_what_fits_is_predicted(v2_lite: ModelConfig, host: GetHost) -> None:
    plan = check_start(ServeConfig(model="/models/V2-Lite"), v2_lite, host("1xh200"), torch_cuda=True)
    expected = predict(plan)
    assert expected.weight_bytes == weight_bytes(v2_lite, 1, "bf16").total
    assert expected.kv_bytes_per_token == 27 * 576 * 2
    assert expected.kv_tokens > 3_000_000
    assert plan.model.name == "V2-Lite"


def test_auto_means_what_it_means_to_the_engine(v2_lite: ModelConfig, host: GetHost) -> None:
    assert request_of(ServeConfig(), host("1xh200"), torch_cuda=True).device == "cuda"
    assert request_of(ServeConfig(), host("1xh200"), torch_cuda=False).device == "cpu"
    assert request_of(ServeConfig(device="cpu"), host("1xh200"), torch_cuda=True).device == "cpu"
    plan = check_start(ServeConfig(model="m"), v2_lite, host("1xh200"), torch_cuda=False)
    assert plan.recommendation is not None
    assert plan.recommendation.weights_format == "int8"


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("weights_format", ["auto", "fp32", "bf16", "fp16", "int8"])
def test_formats_are_the_engines(dtype: str, weights_format: str) -> None:
    config = ServeConfig(device="cpu", dtype=dtype, weights_format=weights_format)
    precision = resolve_precision(config)
    assert formats_of(config, "cpu") == (precision.dtype_name, precision.weights_format)


def test_formats_on_a_gpu() -> None:
    assert formats_of(ServeConfig(), "cuda") == ("bfloat16", "bf16")
    assert formats_of(ServeConfig(dtype="float16"), "cuda") == ("float16", "fp16")


def test_what_does_not_fit_is_refused_with_numbers_and_changes(v25: ModelConfig, host: GetHost) -> None:
    with pytest.raises(DoesNotFit) as raised:
        check_start(ServeConfig(model="deepseek-ai/V2.5"), v25, host("1xh200"), torch_cuda=True)
    message = raised.value.message
    assert message.startswith("V2.5 does not fit here (native, TP 1, bf16): needs 439.10 GiB")
    assert "139.09 GiB are free on the GPU" in message
    assert "; fewer bits: native, TP 1, int4" in message
    assert "; more GPUs: 3 more GPUs" in message


def test_a_context_that_does_not_fit_is_refused(v2_lite: ModelConfig, host: GetHost) -> None:
    small = ServeConfig(model="m", context_length=163_840, mem_fraction=0.23)
    with pytest.raises(DoesNotFit, match="shorter context: --context-length"):
        check_start(small, v2_lite, host("1xh200"), torch_cuda=True)
    # Who names no context gets the longest that fits, as from the engine.
    assert check_start(replace(small, context_length=None), v2_lite, host("1xh200"), torch_cuda=True).fits


def test_a_size_that_does_not_divide_is_the_settings_fault(v25: ModelConfig, host: GetHost) -> None:
    with pytest.raises(ConfigError, match="heads 128 = 3 x 42 \\+ 2") as raised:
        check_start(ServeConfig(model="m", tp=3), v25, host("1xh200"), torch_cuda=True)
    assert raised.value.param == "tp"


def test_several_machines_are_taken_to_be_alike(v25: ModelConfig, host: GetHost) -> None:
    four = ServeConfig(model="m", tp=4, nnodes=4, dist_init_addr="a:1")
    plan = check_start(four, v25, host("1xh200"), torch_cuda=True)
    assert predict(plan).weight_bytes == weight_bytes(v25, 4, "bf16").total
    with pytest.raises(DoesNotFit, match="4 GPUs are needed, 1 is there"):
        check_start(replace(four, nnodes=1, dist_init_addr=None), v25, host("1xh200"), torch_cuda=True)
    one, two = times(host("1xh200"), 1), times(host("1xh200"), 2)
    assert [gpu.index for gpu in two.gpus] == [0, 1]
    assert one.memory_available_mib is None or two.memory_available_mib == 2 * one.memory_available_mib


def test_predicted_against_measured() -> None:
    expected = Prediction(weight_bytes=100 << 30, kv_tokens=100_000, kv_bytes_per_token=1)
    (weights, weights_off), (tokens, tokens_off) = compare(expected, 102 << 30, 96_000)
    assert weights == "weights: predicted 100.00 GiB, measured 102.00 GiB (+2.0%)"
    assert not weights_off
    assert tokens == "KV tokens: predicted 100,000, measured 96,000 (-4.0%), which is more than 3% off"
    assert tokens_off
