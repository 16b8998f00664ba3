"""Whether this machine is ready to serve: the facts about it, and findings with remedies."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ziphius.checkpoint.hub_cache import hub_cache, hub_home
from ziphius.launchers.software import Package, TorchBuild, apptainer_version, packages, torch_build
from ziphius.planner.evaluate import LEAST_CAPABILITY
from ziphius.planner.hardware import Gpu, Host, describe
from ziphius.planner.memory import GIB, MIB, gib

FindingStatus = Literal["ok", "warning", "problem"]
LEAST_PYTHON = (3, 11)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `remedy` is what to do, for all but `ok`."""

    name: str
    status: FindingStatus
    detail: str
    remedy: str | None = None


@dataclass(frozen=True, slots=True)
class Disk:
    label: str
    path: str
    free_bytes: int | None
    """None where the folder cannot be reached."""
    writable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The facts about a machine that `judge` needs."""

    host: Host
    torch: TorchBuild | None
    python: tuple[int, int]
    packages: tuple[Package, ...]
    shm_bytes: int | None
    open_files: int
    """Soft limit; -1 for none, here and below."""
    locked_memory: int
    disks: tuple[Disk, ...]
    hub_token: str | None
    """Where a token was found; never the token."""
    address: str
    port_error: str | None
    apptainer: str | None


def collect(host: Host, env: Mapping[str, str], home: Path, address: tuple[str, int]) -> Facts:
    """The facts of this machine. `home`: where Ziphius keeps its state; `address`: what a server would bind."""
    return Facts(
        host=host,
        torch=torch_build(),
        python=sys.version_info[:2],
        packages=packages(),
        shm_bytes=_free(Path("/dev/shm"))[0],
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        locked_memory=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        disks=(_disk("cache and logs", home), _disk("hub cache", hub_cache(env)), _disk("temporary files", _tmp(env))),
        hub_token=_token_place(env),
        address=f"{address[0]}:{address[1]}",
        port_error=_port_error(*address),
        apptainer=apptainer_version(),
    )


def _tmp(env: Mapping[str, str]) -> Path:
    return Path(env.get("TMPDIR") or "/tmp")


def _disk(label: str, path: Path) -> Disk:
    free, there = _free(path)
    return Disk(label, str(path), free, there is not None and os.access(there, os.W_OK | os.X_OK))


def _free(path: Path) -> tuple[int | None, Path | None]:
    """(bytes free, the nearest folder that exists): the folder itself may not exist yet."""
    for folder in (path, *path.parents):
        try:
            return shutil.disk_usage(folder).free, folder
        except OSError:
            continue
    return None, None


def _token_place(env: Mapping[str, str]) -> str | None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if env.get(name):
            return name
    path = Path(env.get("HF_TOKEN_PATH") or hub_home(env) / "token")
    return str(path) if path.is_file() else None


def _port_error(host: str, port: int) -> str | None:
    try:
        family, kind, number, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, number) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
    except OSError as e:
        return e.strerror or str(e)
    return None


def judge(facts: Facts) -> tuple[Finding, ...]:
    """Every finding, good or bad, in the order in which a start would meet them."""
    return (
        *_software(facts),
        *_gpus(facts),
        *_memory(facts),
        *(_judged_disk(disk) for disk in facts.disks),
        _token(facts.hub_token),
        _port(facts),
        _apptainer(facts.apptainer),
    )


def _software(facts: Facts) -> Iterable[Finding]:
    version = ".".join(map(str, facts.python))
    if facts.python < LEAST_PYTHON:
        yield Finding("Python", "problem", version, "install Python 3.11 or newer and make the environment again")
    else:
        yield Finding("Python", "ok", version)
    broken = [p for p in facts.packages if not p.satisfied]
    if broken:
        wrong = ", ".join(f"{p.name}{p.wanted} ({p.installed or 'not installed'})" for p in broken)
        yield Finding("packages", "problem", wrong, "install them: pip install -e . in the project's folder")
    else:
        yield Finding("packages", "ok", f"{len(facts.packages)} requirements are met")


def _gpus(facts: Facts) -> Iterable[Finding]:
    host, torch = facts.host, facts.torch
    if host.gpu_error is not None:
        yield Finding("GPUs", "problem", host.gpu_error,
                      "see what nvidia-smi says; after a driver update, restart the machine")  # fmt: skip
        return
    if not host.gpus:
        yield Finding("GPUs", "ok", "none: the native engine computes on the CPU")
        return
    yield Finding("GPUs", "ok", describe(host))
    yield _driver(host, torch)
    for gpu in host.gpus:
        yield from _gpu(gpu)
    if len(host.gpus) > 1 and not any(g.mig for g in host.gpus) and not all(g.nvlink for g in host.gpus):
        yield Finding("NVLink", "warning", "not between all GPUs",
                      "tensor parallel works over PCIe, but each token waits for it")  # fmt: skip


def _driver(host: Host, torch: TorchBuild | None) -> Finding:
    detail = f"driver {host.driver_version}, CUDA up to {host.cuda_version}"
    if torch is None:
        return Finding(
            "CUDA", "problem", f"{detail}; torch is not installed", "pip install -e . in the project's folder"
        )
    if torch.cuda is None:
        return Finding("CUDA", "problem", f"{detail}; torch {torch.version} has no CUDA",
                       "install a torch built for CUDA, or use --device cpu")  # fmt: skip
    detail += f"; torch {torch.version} for CUDA {torch.cuda}"
    # Within one major version the driver runs newer minor ones (CUDA's minor version compatibility).
    if host.cuda_version and int(host.cuda_version.split(".")[0]) < int(torch.cuda.split(".")[0]):
        remedy = f"update the driver to one for CUDA {torch.cuda}, or install a torch for CUDA {host.cuda_version}"
        return Finding("CUDA", "problem", detail, remedy)
    return Finding("CUDA", "ok", detail)


def _gpu(gpu: Gpu) -> Iterable[Finding]:
    name = f"GPU {gpu.index}" + (" (MIG slice)" if gpu.mig else "")
    has = ".".join(map(str, gpu.compute_capability))
    if gpu.compute_capability < LEAST_CAPABILITY:
        yield Finding(name, "problem", f"compute capability {has}", "8.0 (A100) or newer is needed")
        return
    free = f"compute capability {has}, {gib(gpu.memory_free_mib * MIB)} of {gib(gpu.memory_total_mib * MIB)} free"
    if gpu.memory_free_mib < 0.9 * gpu.memory_total_mib:
        who = ", ".join(f"{p.name} (pid {p.pid})" for p in gpu.processes) or "no process that the driver names"
        yield Finding(name, "warning", f"{free}; held by {who}",
                      "end what holds it, or leave this GPU out with CUDA_VISIBLE_DEVICES")  # fmt: skip
    else:
        yield Finding(name, "ok", free)


def _memory(facts: Facts) -> Iterable[Finding]:
    available = (facts.host.memory_available_mib or 0) * MIB
    if available < 2 * GIB:
        yield Finding("memory", "warning", f"{gib(available)} available", "free some, or serve a smaller model")
    else:
        yield Finding("memory", "ok", f"{gib(available)} available")
    yield _shm(facts.shm_bytes, len(facts.host.gpus))
    if 0 <= facts.open_files < 4096:
        status: FindingStatus = "problem" if facts.open_files < 1024 else "warning"
        yield Finding("open files", status, f"at most {facts.open_files}",
                      "ulimit -n 65536: each client and each shard takes one")  # fmt: skip
    else:
        yield Finding("open files", "ok", "no limit" if facts.open_files < 0 else f"at most {facts.open_files}")
    if len(facts.host.gpus) > 1 and 0 <= facts.locked_memory < 64 * MIB:
        yield Finding("locked memory", "warning", f"at most {facts.locked_memory // 1024} KiB",
                      "ulimit -l unlimited: NCCL over InfiniBand needs it")  # fmt: skip


def _shm(size: int | None, gpus: int) -> Finding:
    if size is None:
        return Finding("/dev/shm", "problem" if gpus > 1 else "warning", "not there", "mount a tmpfs of 1 GiB or more")
    remedy = "give it 1 GiB or more (docker: --shm-size=16g): ranks crash with a bus error when it is full"
    if gpus > 1 and size < GIB:
        return Finding("/dev/shm", "problem", f"{gib(size)} free", remedy)
    if size < 64 * MIB:
        return Finding("/dev/shm", "warning", f"{gib(size)} free", remedy)
    return Finding("/dev/shm", "ok", f"{gib(size)} free")


def _judged_disk(disk: Disk) -> Finding:
    name, where = f"disk: {disk.label}", disk.path
    move = {"hub cache": "HF_HOME", "temporary files": "TMPDIR"}.get(disk.label, "ZIPHIUS_HOME")
    if disk.free_bytes is None or not disk.writable:
        return Finding(name, "problem", f"{where} cannot be written", f"make it writable, or move it with {move}")
    told = f"{gib(disk.free_bytes)} free in {where}"
    if disk.free_bytes < GIB // 4:
        return Finding(name, "problem", told, f"free some, or move it with {move}")
    if disk.free_bytes < 5 * GIB:
        return Finding(name, "warning", told, f"enough for logs, not for large models; move it with {move}")
    return Finding(name, "ok", told)


def _token(place: str | None) -> Finding:
    if place is None:
        return Finding("hub token", "warning", "none", "only gated models need one: set HF_TOKEN")
    return Finding("hub token", "ok", f"from {place}")


def _port(facts: Facts) -> Finding:
    if facts.port_error is None:
        return Finding("port", "ok", f"{facts.address} is free")
    return Finding("port", "warning", f"{facts.address}: {facts.port_error}",
                   "`ziphius status` tells whether it is a server of yours; --port takes another")  # fmt: skip


def _apptainer(version: str | None) -> Finding:
    if version is None:
        return Finding("apptainer", "ok", "not installed; only SGLang in an image needs it")
    return Finding("apptainer", "ok", version)
