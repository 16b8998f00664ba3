"""The plan before a start of the native engine: refused, predicted or forced, on recorded machines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from ziphius.config import Resolved, resolve
from ziphius.errors import ConfigError, DoesNotFit, LacksMemory, ModelError, ModelNotFound
from ziphius.launchers import engines
from ziphius.launchers.engines import engine_launcher, native_in_foreground
from ziphius.launchers.native_plan import NativeStartPlan, plan_native
from ziphius.planner.hardware import Host, parse_gpus, read_host

DATA = Path(__file__).parents[1] / "planner" / "data"


def asked(tmp_path: Path, model: str = "deepseek-v2.5-1210", **flags: Any) -> Resolved:
    (tmp_path / "config.json").write_text((DATA / f"{model}.json").read_text())
    return resolve({"model": str(tmp_path), **flags}, env={})


def planned(made: Resolved, host: Host, force: bool = False) -> NativeStartPlan:
    return plan_native(made, {}, force=force, probe=lambda: host, torch_cuda=True)


def test_what_fits_is_predicted(tmp_path: Path) -> None:
    start_plan = planned(asked(tmp_path, tp=4), read_host(DATA / "host-4xh200.json"))
    assert start_plan.predicted_kv_tokens is not None
    assert 360_000 < start_plan.predicted_kv_tokens < 380_000
    assert start_plan.gpus == ()
    (note,) = start_plan.notes
    assert note.startswith("planned: 110.75 GiB of weights")


def test_what_does_not_fit_is_refused_unless_forced(tmp_path: Path) -> None:
    made, host = asked(tmp_path, tp=2), read_host(DATA / "host-2xh200.json")
    with pytest.raises(LacksMemory, match=r"needs 220.20 GiB for weights.*--force starts it all the same"):
        planned(made, host)
    forced = planned(made, host, force=True)
    assert forced.predicted_kv_tokens is None
    assert "started although" in forced.notes[0]


def test_settings_that_cannot_work_are_refused_unless_forced(tmp_path: Path) -> None:
    made = asked(tmp_path, tp=3)
    with pytest.raises(ConfigError, match="vocabulary 102,400 = 3 x 34,133"):
        planned(made, parse_gpus("4xH200"))
    assert "vocabulary" in planned(made, parse_gpus("4xH200"), force=True).notes[0]


def test_a_config_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    made = asked(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["MixtralForCausalLM"]}')
    with pytest.raises(ModelError, match="MixtralForCausalLM"):
        planned(made, parse_gpus("4xH200"))


def test_what_is_not_here_yet_is_left_to_the_server(tmp_path: Path) -> None:
    made = resolve({"model": "somebody/something"}, env={})
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    assert plan_native(made, environment, force=False, probe=lambda: parse_gpus("H200")) == NativeStartPlan()


def test_what_no_server_could_fetch_is_refused_unless_forced(tmp_path: Path) -> None:
    made = resolve({"model": str(tmp_path / "missing")}, env={})
    with pytest.raises(ModelNotFound, match=r"no model .*missing"):
        plan_native(made, {}, force=False, probe=lambda: parse_gpus("H200"))
    assert "no model" in plan_native(made, {}, force=True, probe=lambda: parse_gpus("H200")).notes[0]


def test_a_gpu_that_is_not_there_needs_no_model_to_be_refused(tmp_path: Path) -> None:
    made = resolve({"model": "somebody/something", "device": "cuda"}, env={})
    with pytest.raises(ConfigError, match="use --device cpu"):
        plan_native(made, {"HF_HOME": str(tmp_path)}, force=False, probe=Host)


def test_serve_is_planned_like_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "probe_host", lambda: read_host(DATA / "host-2xh200.json"))
    with pytest.raises(DoesNotFit, match="--force starts it all the same"):
        native_in_foreground(asked(tmp_path, tp=2, device="cuda"), {}, force=False)
    with pytest.raises(ConfigError, match="--image is for --engine sglang"):
        native_in_foreground(asked(tmp_path, image="x.sif"), {}, force=False)
    lite = asked(tmp_path, "deepseek-v2-lite", tp=2, device="cuda", cuda_graph_max_bs=8)
    assert native_in_foreground(lite, {}, force=False).predicted_kv_tokens is not None


def test_serve_on_a_later_machine_leaves_the_plan_to_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "probe_host", lambda: pytest.fail("it was probed"))
    other = asked(tmp_path, tp=2, nnodes=2, node_rank=1, dist_init_addr="127.0.0.1:1")
    assert native_in_foreground(other, {}, force=False) == NativeStartPlan()


def test_a_busy_first_gpu_is_left_out(tmp_path: Path) -> None:
    first, *others = parse_gpus("4xH200").gpus
    host = Host(gpus=(replace(first, memory_free_mib=1000), *others))
    made = asked(tmp_path, "deepseek-v2-lite", tp=2, device="cuda")
    assert planned(made, host).gpus == (1, 2)
    assert planned(made, host).environment == {"CUDA_VISIBLE_DEVICES": "1,2", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    launch = engine_launcher(show_for=host)(made, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"})
    assert (launch.env["CUDA_VISIBLE_DEVICES"], launch.env["CUDA_DEVICE_ORDER"]) == ("1,2", "PCI_BUS_ID")
    assert "GPU 1, 2" in launch.notes[1]
    by_uuid = engine_launcher(show_for=host)(made, {"CUDA_VISIBLE_DEVICES": "GPU-0a,GPU-0b"})
    assert by_uuid.env["CUDA_VISIBLE_DEVICES"] == "GPU-0a,GPU-0b"
    idle = engine_launcher(show_for=parse_gpus("4xH200"))(made, {})
    assert "CUDA_VISIBLE_DEVICES" not in idle.env
