"""The plan inside `start`: what a config asks of a host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from ziphius.checkpoint.config import ModelConfig
from ziphius.checkpoint.quantization import Quantization
from ziphius.config import ServeConfig
from ziphius.engine.precision import resolve_precision
from ziphius.errors import ConfigError, DoesNotFit, LacksMemory
from ziphius.formats import resolve_formats
from ziphius.planner.admission import admit_on_host, request_on_host
from ziphius.planner.find_model import ModelSource
from ziphius.planner.hardware import Host, times
from ziphius.planner.memory import weight_bytes

GetHost = Callable[[str], Host]
MakeSource = Callable[..., ModelSource]


def test_what_fits_is_predicted(v2_lite: ModelConfig, source: MakeSource, host: GetHost) -> None:
    plan = admit_on_host(ServeConfig(), source(v2_lite, name="V2-Lite"), host("1xh200"), torch_cuda=True)
    expected = plan.shown
    assert expected is not None
    assert expected.weights == weight_bytes(v2_lite, 1, "bf16")
    assert expected.kv_bytes_per_token == 27 * 576 * 2
    assert expected.kv_tokens > 3_000_000
    assert plan.model.name == "V2-Lite"


def test_auto_means_what_it_means_to_the_engine(v2_lite: ModelConfig, source: MakeSource, host: GetHost) -> None:
    lite = source(v2_lite)
    assert request_on_host(ServeConfig(), host("1xh200"), lite, torch_cuda=True).device == "cuda"
    assert request_on_host(ServeConfig(), host("1xh200"), lite, torch_cuda=False).device == "cpu"
    assert request_on_host(ServeConfig(device="cpu"), host("1xh200"), lite, torch_cuda=True).device == "cpu"
    plan = admit_on_host(ServeConfig(model="m"), source(v2_lite), host("1xh200"), torch_cuda=False)
    assert plan.recommendation is not None
    assert plan.recommendation.weights_format == "int8"


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("weights_format", ["auto", "fp32", "bf16", "fp16", "int8"])
def test_formats_are_the_engines(dtype: str, weights_format: str) -> None:
    config = ServeConfig(device="cpu", dtype=dtype, weights_format=weights_format)
    precision = resolve_precision(config)
    assert resolve_formats("cpu", config.dtype, config.weights_format) == (
        precision.dtype_name,
        precision.weights_format,
    )


def test_formats_on_a_gpu() -> None:
    assert resolve_formats("cuda", "auto", "auto") == ("bfloat16", "bf16")
    assert resolve_formats("cuda", "float16", "auto") == ("float16", "fp16")


def test_what_only_a_gpu_can_is_refused_on_a_cpu(v2_lite: ModelConfig, source: MakeSource, host: GetHost) -> None:
    lite = source(v2_lite)
    for device in ("cpu", "auto"):
        config = ServeConfig(deterministic=True, device=device)
        with pytest.raises(ConfigError, match=r"^deterministic is for a GPU") as planned:
            admit_on_host(config, lite, host("1xh200"), torch_cuda=False)
        assert planned.value.param == "deterministic"
    with pytest.raises(ConfigError, match=r"^deterministic is for a GPU") as resolved:
        resolve_precision(ServeConfig(deterministic=True, device="cpu"))
    assert resolved.value.param == "deterministic"
    assert admit_on_host(ServeConfig(deterministic=True), lite, host("1xh200"), torch_cuda=True).shown is not None


@pytest.mark.parametrize("options", [{"weights_format": "int8"}, {"dtype": "float32", "weights_format": "bf16"}])
def test_deterministic_needs_weights_in_the_dtype(
    v2_lite: ModelConfig, source: MakeSource, host: GetHost, options: dict[str, str]
) -> None:
    config = ServeConfig(deterministic=True, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"weights_format {options['weights_format']} beside dtype"):
        admit_on_host(config, source(v2_lite), host("1xh200"), torch_cuda=True)


def test_what_does_not_fit_is_refused_with_numbers_and_changes(
    v25: ModelConfig, source: MakeSource, host: GetHost
) -> None:
    with pytest.raises(LacksMemory) as raised:
        admit_on_host(ServeConfig(), source(v25, name="V2.5"), host("1xh200"), torch_cuda=True)
    message = raised.value.message
    assert message.startswith("V2.5 does not fit here (native, TP 1, bf16): needs 439.10 GiB")
    assert "139.09 GiB are free on the GPU" in message
    assert "; fewer bits: native, TP 1, int4" in message
    assert "; more GPUs: 3 more GPUs" in message


def test_a_context_that_does_not_fit_is_refused(v2_lite: ModelConfig, source: MakeSource, host: GetHost) -> None:
    small = ServeConfig(model="m", context_length=163_840, mem_fraction=0.23)
    with pytest.raises(DoesNotFit, match="shorter context: --context-length"):
        admit_on_host(small, source(v2_lite), host("1xh200"), torch_cuda=True)
    # Who names no context gets the longest that fits, as from the engine.
    assert admit_on_host(replace(small, context_length=None), source(v2_lite), host("1xh200"), torch_cuda=True).fits


def test_a_cache_larger_than_memory_is_refused(v2_lite: ModelConfig, source: MakeSource, host: GetHost) -> None:
    huge = ServeConfig(max_total_tokens=10**11)
    with pytest.raises(DoesNotFit, match="lower --max-total-tokens to"):
        admit_on_host(huge, source(v2_lite), host("1xh200"), torch_cuda=True)
    with pytest.raises(DoesNotFit, match="lower --max-total-tokens to"):
        admit_on_host(huge, source(v2_lite), host("cpu-only"), torch_cuda=False)


def test_a_size_that_does_not_divide_is_the_settings_fault(v25: ModelConfig, source: MakeSource, host: GetHost) -> None:
    with pytest.raises(ConfigError, match="heads 128 = 3 x 42 \\+ 2") as raised:
        admit_on_host(ServeConfig(model="m", tp=3), source(v25), host("1xh200"), torch_cuda=True)
    assert raised.value.param == "tp"


def test_several_machines_are_taken_to_be_alike(v25: ModelConfig, source: MakeSource, host: GetHost) -> None:
    four = ServeConfig(model="m", tp=4, nnodes=4, dist_init_addr="a:1")
    plan = admit_on_host(four, source(v25), host("1xh200"), torch_cuda=True)
    assert plan.shown is not None
    assert plan.shown.weights == weight_bytes(v25, 4, "bf16")
    with pytest.raises(DoesNotFit, match="4 GPUs are needed, 1 is there") as raised:
        admit_on_host(replace(four, nnodes=1, dist_init_addr=None), source(v25), host("1xh200"), torch_cuda=True)
    assert not isinstance(raised.value, LacksMemory)  # no memory that is freed brings a GPU
    one, two = times(host("1xh200"), 1), times(host("1xh200"), 2)
    assert [gpu.index for gpu in two.gpus] == [0, 1]
    assert one.memory_available_mib is None or two.memory_available_mib == 2 * one.memory_available_mib


def test_what_the_engine_does_not_run_is_refused(v2_lite: ModelConfig, source: MakeSource, host: GetHost) -> None:
    int8 = ServeConfig(weights_format="int8")
    with pytest.raises(DoesNotFit, match="int8 is for CPUs in this version"):
        admit_on_host(int8, source(v2_lite), host("1xh200"), torch_cuda=True)
    assert admit_on_host(int8, source(v2_lite), host("cpu-only"), torch_cuda=False).fits
    stored = source(v2_lite, quantization=Quantization("fp8", "fp8", blocks=True))
    with pytest.raises(DoesNotFit, match="checkpoints quantized with fp8 are planned"):
        admit_on_host(ServeConfig(), stored, host("1xh200"), torch_cuda=True)


def test_a_gpu_that_is_not_there_is_the_settings_fault(v2_lite: ModelConfig, source: MakeSource, host: GetHost) -> None:
    with pytest.raises(ConfigError, match=r"no GPU here: .*mismatch; use --device cpu") as raised:
        admit_on_host(ServeConfig(device="cuda"), source(v2_lite), host("no-gpu"), torch_cuda=False)
    assert raised.value.param == "device"
