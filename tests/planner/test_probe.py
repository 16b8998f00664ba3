"""Asking NVML and the kernel, with stand-ins for both."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ziphius.planner import probe
from ziphius.planner.probe import group_memory, own_groups, probe_host

MIB = 1 << 20


class StandInError(Exception):
    pass


class StandInNvml:
    """The functions of pynvml that a probe calls, over plain values."""

    NVMLError = StandInError
    NVML_DEVICE_MIG_ENABLE = 1
    NVML_NVLINK_MAX_LINKS = 18
    NVML_FEATURE_ENABLED = 1

    def __init__(self, devices: list[dict[str, Any]], broken: str = "") -> None:
        self.devices = devices
        self.broken = broken
        self.open = 0

    def nvmlInit(self) -> None:
        if self.broken:
            raise StandInError(self.broken)
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.159.04"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 13_000

    def nvmlDeviceGetCount(self) -> int:
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        return self.devices[index]

    def nvmlDeviceGetName(self, handle: dict[str, Any]) -> str:
        return str(handle["name"])

    def nvmlDeviceGetCudaComputeCapability(self, handle: dict[str, Any]) -> tuple[int, int]:
        return handle.get("capability", (9, 0))

    def nvmlDeviceGetMemoryInfo(self, handle: dict[str, Any]) -> SimpleNamespace:
        return SimpleNamespace(total=handle["total"] * MIB, free=handle["free"] * MIB)

    def nvmlDeviceGetMigMode(self, handle: dict[str, Any]) -> tuple[int, int]:
        if "slices" not in handle:
            raise StandInError("Not Supported")
        return 1, 1

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: dict[str, Any]) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: dict[str, Any], index: int) -> dict[str, Any]:
        if index >= len(handle["slices"]):
            raise StandInError("Not Found")
        return dict(handle["slices"][index])

    def nvmlDeviceGetNvLinkState(self, handle: dict[str, Any], link: int) -> int:
        if not handle.get("nvlink"):
            raise StandInError("Not Supported")
        return 1 if link == handle["nvlink"] else 0

    def nvmlDeviceGetComputeRunningProcesses(self, handle: dict[str, Any]) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in handle.get("processes", [])]


def h200(**changes: Any) -> dict[str, Any]:
    return {"name": "NVIDIA H200", "total": 143_771, "free": 143_155, **changes}


@pytest.fixture(autouse=True)
def every_gpu_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_gpus_with_their_memory_links_and_owners() -> None:
    nvml = StandInNvml([h200(nvlink=2), h200(free=30_000, processes=[(2**22 + 1, 113_000 * MIB), (1, None)])])
    host = probe_host(nvml)
    assert nvml.open == 0
    assert (host.driver_version, host.cuda_version, host.origin) == ("580.159.04", "13.0", "probed")
    first, second = host.gpus
    assert (first.memory_total_mib, first.memory_free_mib, first.nvlink) == (143_771, 143_155, True)
    assert not second.nvlink
    assert [(p.pid, p.used_mib) for p in second.processes] == [(2**22 + 1, 113_000), (1, None)]
    # No such process here: it may live in another container.
    assert second.processes[0].name == "unknown"


def test_mig_slices_stand_for_their_card() -> None:
    slices = [{"total": 40_448, "free": 40_320}, {"total": 20_096, "free": 20_034}]
    host = probe_host(StandInNvml([{**h200(), "slices": slices}]))
    assert [(g.memory_total_mib, g.mig, g.index, g.name) for g in host.gpus] == [
        (40_448, True, 0, "NVIDIA H200"),
        (20_096, True, 0, "NVIDIA H200"),
    ]


@pytest.mark.parametrize(("visible", "indexes"), [("1", [1]), ("2,0", [0, 2]), ("", []), ("GPU-5bf0", [0, 1, 2])])
def test_cuda_visible_devices(monkeypatch: pytest.MonkeyPatch, visible: str, indexes: list[int]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [g.index for g in probe_host(StandInNvml([h200(), h200(), h200()])).gpus] == indexes


def test_without_a_driver_there_is_no_gpu_and_nothing_to_explain(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(probe, "_NVIDIA_DEVICE", tmp_path / "none")
    host = probe_host(StandInNvml([], broken="NVML Shared Library Not Found"))
    assert (host.gpus, host.gpu_error) == ((), None)
    assert host.memory_available_mib


def test_a_driver_that_refuses_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(probe, "_NVIDIA_DEVICE", tmp_path)
    assert probe_host(StandInNvml([], broken="Driver/library version mismatch")).gpu_error


def test_a_gpu_that_fell_off_is_told() -> None:
    class Lost(StandInNvml):
        def nvmlDeviceGetMemoryInfo(self, handle: dict[str, Any]) -> SimpleNamespace:
            raise StandInError("GPU is lost")

    nvml = Lost([h200()])
    assert probe_host(nvml).gpu_error == "GPU is lost"
    assert nvml.open == 0


def test_this_machine_has_memory() -> None:
    host = probe_host()
    assert host.memory_total_mib
    assert host.memory_available_mib
    assert host.memory_available_mib <= host.memory_total_mib


def write_group(folder: Path, limit: str, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(limit + "\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\nactive_file 7\n")


def test_a_control_groups_limit_less_what_cannot_be_given_back(tmp_path: Path) -> None:
    write_group(tmp_path, "1000", 600, 200)
    assert group_memory(tmp_path) == (1000, 400)
    write_group(tmp_path, "max", 600, 200)
    assert group_memory(tmp_path) == (None, 0)
    assert group_memory(tmp_path / "none") == (None, 0)


def test_version_1_groups(tmp_path: Path) -> None:
    (tmp_path / "memory.limit_in_bytes").write_text("9223372036854771712")
    (tmp_path / "memory.usage_in_bytes").write_text("600")
    (tmp_path / "memory.stat").write_text("total_inactive_file 100\n")
    assert group_memory(tmp_path) == (None, 0)
    (tmp_path / "memory.limit_in_bytes").write_text("1000")
    assert group_memory(tmp_path) == (1000, 500)


def test_a_jobs_limit_sits_on_a_parent_group(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("0::/slurm/job_7/step_0\n")
    groups = own_groups(tmp_path / "fs", membership)
    assert tmp_path / "fs" / "slurm" / "job_7" in groups
    assert tmp_path / "fs" / "slurm" / "job_7" / "step_0" in groups
    assert tmp_path / "fs" in groups
    membership.write_text("4:cpu:/x\n9:memory:/docker/abc\n")
    assert tmp_path / "fs" / "memory" / "docker" / "abc" in own_groups(tmp_path / "fs", membership)


def test_available_memory_obeys_a_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_group(tmp_path, str(300 * MIB), 100 * MIB, 0)
    monkeypatch.setattr(probe, "_CGROUPS", tmp_path)
    assert probe.available_memory() == 200 * MIB
    host = probe_host(StandInNvml([]))
    assert (host.memory_total_mib, host.memory_available_mib) == (300, 200)
