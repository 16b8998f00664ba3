"""The plan before a start: on GPUs a fraction and a prediction, on a CPU whether the weights fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ziphius.config import Resolved, resolve
from ziphius.errors import DoesNotFit, LacksMemory
from ziphius.launchers.sglang_plan import SglangStartPlan, plan_start
from ziphius.planner.hardware import Host, parse_gpus, read_host

DATA = Path(__file__).parents[1] / "planner" / "data"


def asked(tmp_path: Path, model: str = "deepseek-v2.5-1210", **flags: Any) -> Resolved:
    (tmp_path / "config.json").write_text((DATA / f"{model}.json").read_text())
    return resolve({"engine": "sglang", "model": str(tmp_path), **flags}, env={})


def planned(made: Resolved, host: Host, force: bool = False) -> SglangStartPlan:
    return plan_start(made, {}, force=force, probe=lambda: host)


def test_on_recorded_h200(tmp_path: Path) -> None:
    start_plan = planned(asked(tmp_path, tp=4), read_host(DATA / "host-4xh200.json"))
    assert start_plan.gpus
    assert start_plan.planned.trust_remote_code
    assert start_plan.planned.mem_fraction == pytest.approx(0.90, abs=0.02)
    assert start_plan.predicted_kv_tokens is not None
    assert start_plan.notes[0].startswith("planned:")


def test_a_fraction_that_was_asked_for_gives_its_prediction(tmp_path: Path) -> None:
    host = parse_gpus("4xH200")
    tokens = [planned(asked(tmp_path, tp=4, mem_fraction=f), host).predicted_kv_tokens or 0 for f in (0.9, 0.93)]
    assert tokens[0] < tokens[1]


def test_a_llama_needs_no_code_of_others(tmp_path: Path) -> None:
    assert not planned(asked(tmp_path, "llama-3-8b"), parse_gpus("H100")).planned.trust_remote_code


def test_on_a_cpu_the_weights_must_fit_and_nothing_is_predicted(tmp_path: Path) -> None:
    made = asked(tmp_path, "llama-3-8b", device="cpu", context_length=4096)
    start_plan = planned(made, Host(memory_available_mib=64 * 1024))
    assert not start_plan.gpus
    assert (start_plan.predicted_kv_tokens, start_plan.planned.mem_fraction) == (None, None)
    with pytest.raises(LacksMemory, match="--force"):
        planned(made, Host(memory_available_mib=8 * 1024))
    assert "although" in planned(made, Host(memory_available_mib=8 * 1024), force=True).notes[0]
    with pytest.raises(DoesNotFit):
        planned(asked(tmp_path, "llama-3-8b", device="cpu", dtype="float32"), Host(memory_available_mib=24 * 1024))


def test_more_gpus_than_there_are_is_no_matter_of_memory(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match="8 GPUs are needed, 4 are there") as raised:
        planned(asked(tmp_path, tp=8), parse_gpus("4xH200"))
    assert not isinstance(raised.value, LacksMemory)
