"""Ziphius' options as SGLang's arguments, and what contradicts."""

from __future__ import annotations

from typing import Any

import pytest

from ziphius.config import resolve
from ziphius.errors import ConfigError
from ziphius.launchers.sglang_settings import Planned, arguments, model_name


def made(planned: Planned | None = None, **flags: Any) -> list[str]:
    words = arguments(resolve({"model": "owner/name", **flags}, env={}), planned or Planned(), "owner/name")
    return list(words)


def value(words: list[str], flag: str) -> str:
    assert words.count(flag) == 1, words
    return words[words.index(flag) + 1]


def test_what_is_always_told() -> None:
    assert made() == [
        "--model-path", "owner/name", "--served-model-name", "owner/name", "--host", "127.0.0.1", "--port", "30000",
        "--max-queued-requests", "512", "--enable-metrics",
    ]  # fmt: skip


def test_each_option_has_its_flag() -> None:
    words = made(
        host="0.0.0.0",
        port=8000,
        served_model_name="x",
        tp=4,
        mem_fraction=0.93,
        context_length=4096,
        chunked_prefill_size=8192,
        page_size=64,
        max_running_requests=128,
        max_queued_requests=7,
        max_total_tokens=9000,
        cuda_graph_max_bs=256,
        prefix_cache=False,
        dtype="bfloat16",
        device="cuda",
        log_level="warning",
        weights_format="fp8",
    )
    told = {
        "--host": "0.0.0.0",
        "--port": "8000",
        "--served-model-name": "x",
        "--tp-size": "4",
        "--mem-fraction-static": "0.93",
        "--context-length": "4096",
        "--chunked-prefill-size": "8192",
        "--page-size": "64",
        "--max-running-requests": "128",
        "--max-queued-requests": "7",
        "--max-total-tokens": "9000",
        "--cuda-graph-max-bs-decode": "256",
        "--dtype": "bfloat16",
        "--device": "cuda",
        "--log-level": "warning",
        "--quantization": "fp8",
    }
    assert {flag: value(words, flag) for flag in told} == told
    assert "--disable-radix-cache" in words


def test_switches_are_told_only_when_they_are_thrown() -> None:
    words = made(cuda_graphs=False, deterministic=True)
    assert words.count("--disable-cuda-graph") == 1
    assert words.count("--enable-deterministic-inference") == 1
    usual = made(cuda_graphs=True, deterministic=False)
    assert not {"--disable-cuda-graph", "--enable-deterministic-inference"} & set(usual)


def test_the_plan_decides_the_fraction_unless_it_was_given() -> None:
    planned = Planned(mem_fraction=0.9, trust_remote_code=True)
    assert value(made(planned), "--mem-fraction-static") == "0.9"
    assert made(planned)[-1] == "--trust-remote-code"
    assert value(made(planned, mem_fraction=0.88), "--mem-fraction-static") == "0.88"


def test_the_api_key_is_no_argument() -> None:
    assert not any("key" in word for word in made(api_key="the-key"))


def test_several_machines() -> None:
    words = made(tp=8, nnodes=2, node_rank=1, dist_init_addr="10.0.0.1:5000")
    assert value(words, "--nnodes") == "2"
    assert value(words, "--node-rank") == "1"
    assert value(words, "--dist-init-addr") == "10.0.0.1:5000"
    with pytest.raises(ConfigError, match="--dist-init-addr"):
        made(tp=8, nnodes=2)
    with pytest.raises(ConfigError, match="cannot be spread evenly over 3 machines"):
        made(tp=4, nnodes=3, dist_init_addr="x:1")
    with pytest.raises(ConfigError, match="--node-rank 2 is not one of 2 machines"):
        made(tp=8, nnodes=2, node_rank=2, dist_init_addr="x:1")
    with pytest.raises(ConfigError, match="--dist-init-addr is for several machines"):
        made(dist_init_addr="x:1")


def test_what_stands_after_the_dashes_comes_last_and_as_it_is() -> None:
    words = made(engine_args="--schedule-policy lpm --json-model-override-args '{\"a\": [1, 2]}'")
    assert words[-4:] == ["--schedule-policy", "lpm", "--json-model-override-args", '{"a": [1, 2]}']


@pytest.mark.parametrize(
    ("extra", "own"),
    [
        ("--port 8000", "--port"),
        ("--port=8000", "--port"),
        ("--tp 4", "--tp"),
        ("--tensor-parallel-size=4", "--tp"),
        ("--mem-fraction-static 0.9", "--mem-fraction"),
        ("--mem-frac 0.9", "--mem-fraction"),
        ("--max_running_requests 5", "--max-running-requests"),
        ("--api-key x", "--api-key"),
        ("--model x", "--model"),
        ("--disable-radix-cache", "--no-prefix-cache"),
        ("--disable-cuda-graph", "--no-cuda-graphs"),
        ("--enable-deterministic-inference", "--deterministic"),
        ("--cuda-graph-max-bs-decode 3", "--cuda-graph-max-bs"),
        ("--node-rank 1", "--node-rank"),
        ("--nccl-init-addr a:1", "--dist-init-addr"),
    ],
)
def test_a_conflict_is_refused_by_name(extra: str, own: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{extra.split()[0].partition('=')[0]} after `--` is Ziphius' {own}:"):
        made(engine_args=extra)


@pytest.mark.parametrize("extra", ["--max-prefill-tokens 5", "--trust-remote-code", "--nccl-port 5", "--log-requests",
                                   "--load-format remote", "--moe-runner-backend triton", "--cuda-graph-max-bs 8",
                                   "--log-level-http warning"])  # fmt: skip
def test_what_is_no_conflict(extra: str) -> None:
    assert made(engine_args=extra)[-len(extra.split()) :] == extra.split()


def test_words_that_do_not_end_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine_args cannot be split into words: No closing quotation: .*--x 'a"):
        made(engine_args="--x 'a")


def test_another_config_file_of_sglangs_is_refused() -> None:
    with pytest.raises(ConfigError, match="--config after"):
        made(engine_args="--config x.yaml")


@pytest.mark.parametrize("flags", [{"max_body_bytes": 5000}, {"load_threads": 8}])
def test_an_option_of_the_native_engine_is_refused(flags: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="option of the native engine"):
        made(**flags)


def test_formats_that_sglang_does_not_make() -> None:
    with pytest.raises(ConfigError, match="quantized already"):
        made(weights_format="int8")
    with pytest.raises(ConfigError, match="contradicts"):
        made(weights_format="bf16", dtype="float16")
    assert value(made(weights_format="bf16", dtype="bfloat16"), "--dtype") == "bfloat16"


def test_names(tmp_path: Any) -> None:
    (tmp_path / "a-model").mkdir()
    assert model_name(str(tmp_path / "a-model" / ".")) == "a-model"
    assert model_name("owner/name") == "owner/name"
