"""Findings and remedies, from facts made up and from this machine."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ziphius.launchers.software import Package, TorchBuild, packages, parse_torch_version, torch_build
from ziphius.manager.doctor import Disk, Facts, Finding, collect, judge
from ziphius.planner.hardware import Host
from ziphius.planner.memory import GIB, MIB

GetHost = Callable[[str], Host]


@pytest.fixture
def healthy(host: GetHost) -> Facts:
    return Facts(
        host=host("4xh200"),
        torch=TorchBuild("2.13.0", "13.0"),
        python=(3, 12),
        packages=(Package("torch", "==2.13.0", "2.13.0+cu130"), Package("rich", ">=13", "14.1")),
        shm_bytes=64 * GIB,
        open_files=65_536,
        locked_memory=-1,
        disks=(Disk("cache and logs", "/home/a", 900 * GIB, True),),
        hub_token="HF_TOKEN",
        address="127.0.0.1:30000",
        port_error=None,
        apptainer="1.4.5",
    )


def troubles(facts: Facts) -> dict[str, Finding]:
    return {f.name: f for f in judge(facts) if f.status != "ok"}


def test_nothing_to_say_about_a_healthy_machine(healthy: Facts) -> None:
    assert troubles(healthy) == {}
    names = [f.name for f in judge(healthy)]
    assert {"Python", "packages", "GPUs", "CUDA", "GPU 0", "memory", "/dev/shm", "open files", "hub token", "port",
            "apptainer"} <= set(names)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "name", "status", "told"),
    [
        ({"python": (3, 10)}, "Python", "problem", "3.11"),
        ({"packages": (Package("rich", ">=13", None),)}, "packages", "problem", "pip install"),
        ({"packages": (Package("rich", ">=13", "12.0"),)}, "packages", "problem", "pip install"),
        ({"torch": None}, "CUDA", "problem", "pip install"),
        ({"torch": TorchBuild("2.13.0+cpu", None)}, "CUDA", "problem", "--device cpu"),
        ({"torch": TorchBuild("2.20.0", "14.1")}, "CUDA", "problem", "driver"),
        ({"shm_bytes": 64 * MIB}, "/dev/shm", "problem", "--shm-size"),
        ({"shm_bytes": None}, "/dev/shm", "problem", "tmpfs"),
        ({"open_files": 256}, "open files", "problem", "ulimit -n"),
        ({"open_files": 1024}, "open files", "warning", "ulimit -n"),
        ({"locked_memory": 64 * 1024}, "locked memory", "warning", "ulimit -l"),
        ({"disks": (Disk("hub cache", "/c", 1000, True),)}, "disk: hub cache", "problem", "HF_HOME"),
        ({"disks": (Disk("hub cache", "/c", GIB, True),)}, "disk: hub cache", "warning", "HF_HOME"),
        ({"disks": (Disk("temporary files", "/t", None, False),)}, "disk: temporary files", "problem", "TMPDIR"),
        ({"disks": (Disk("cache and logs", "/l", 9 * GIB, False),)}, "disk: cache and logs", "problem", "ZIPHIUS_HOME"),
        ({"hub_token": None}, "hub token", "warning", "HF_TOKEN"),
        ({"port_error": "Address already in use"}, "port", "warning", "--port"),
    ],
)
def test_each_trouble_has_a_remedy(
    healthy: Facts, change: dict[str, object], name: str, status: str, told: str
) -> None:
    found = troubles(replace(healthy, **change))  # type: ignore[arg-type]
    assert set(found) == {name}
    assert found[name].status == status
    assert told in (found[name].remedy or "")


def test_gpus_in_trouble(healthy: Facts, host: GetHost) -> None:
    busy = troubles(replace(healthy, host=host("busy")))
    assert set(busy) == {"GPU 2"}
    assert "python3 (pid 411)" in busy["GPU 2"].detail
    mixed = troubles(replace(healthy, host=host("mixed")))
    assert mixed["GPU 3"].status == "problem"
    assert "7.5" in mixed["GPU 3"].detail
    assert mixed["NVLink"].status == "warning"
    broken = troubles(replace(healthy, host=host("no-gpu")))
    assert broken["GPUs"].status == "problem"


def test_a_machine_without_gpus_is_well(healthy: Facts, host: GetHost) -> None:
    small = replace(healthy, host=host("cpu-only"), torch=TorchBuild("2.13.0+cpu", None), shm_bytes=GIB // 2)
    assert troubles(small) == {}


def test_an_older_driver_of_the_same_major_version_is_fine(healthy: Facts) -> None:
    assert troubles(replace(healthy, torch=TorchBuild("2.13.0", "13.2"))) == {}


def test_facts_of_this_machine(tmp_path: Path) -> None:
    token = tmp_path / "hf" / "token"
    token.parent.mkdir()
    token.write_text("hf_secret")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        facts = collect(Host(), {"HF_HOME": str(token.parent)}, tmp_path / "new", taken.getsockname())
        assert facts.port_error is not None
    assert facts.hub_token == str(token)
    assert "hf_secret" not in repr(judge(facts))
    assert all(disk.free_bytes for disk in facts.disks)
    assert all(disk.writable for disk in facts.disks)
    assert not (tmp_path / "new").exists()
    assert collect(Host(), {"HF_TOKEN": "hf_x", "HOME": "/"}, tmp_path, ("127.0.0.1", 0)).hub_token == "HF_TOKEN"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    facts = collect(Host(), {"TMPDIR": str(tmp_path / "file")}, tmp_path, ("127.0.0.1", 0))
    assert not facts.disks[2].writable


def test_torch_is_read_from_its_files() -> None:
    with_cuda = "__version__ = '2.13.0+cu130'\ndebug = False\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n"
    assert parse_torch_version(with_cuda) == TorchBuild("2.13.0+cu130", "13.0")
    assert parse_torch_version(with_cuda.replace("'13.0'", "None")) == TorchBuild("2.13.0+cu130", None)
    assert parse_torch_version("") is None
    assert torch_build() is not None


def test_requirements() -> None:
    found = {p.name: p for p in packages(["rich>=1", "rich>=999", "no-such-package>=1", "tomli>=1; extra == 'test'"])}
    assert set(found) == {"rich", "no-such-package"}
    assert not found["rich"].satisfied
    assert not found["no-such-package"].satisfied
    assert all(p.satisfied for p in packages())
