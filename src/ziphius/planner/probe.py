"""probe_host: this machine's GPUs as NVML reports them, and its main memory as the kernel does."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
from msgspec.structs import replace

from ziphius.planner.hardware import Gpu, GpuProcess, Host
from ziphius.planner.memory import MIB

_CGROUPS = Path("/sys/fs/cgroup")
_NVIDIA_DEVICE = Path("/proc/driver/nvidia/version")


def probe_host(nvml: Any = None) -> Host:
    """This machine now. Without a driver, or where the driver fails, a host without GPUs whose gpu_error may say why.

    `nvml`: the pynvml module, or a stand-in with its functions.
    """
    limits = [limit for limit, _ in map(group_memory, own_groups(_CGROUPS)) if limit is not None]
    host = Host(
        origin="probed",
        cpu_name=_cpu_name(),
        cpu_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        memory_total_mib=min([psutil.virtual_memory().total, *limits]) // MIB,
        memory_available_mib=available_memory() // MIB,
    )
    return _with_gpus(host, nvml)


def available_memory() -> int:
    """Bytes of main memory that processes may still allocate: the kernel's estimate, or a container's limit if less."""
    available = int(psutil.virtual_memory().available)
    rooms = [limit - used for limit, used in map(group_memory, own_groups(_CGROUPS)) if limit is not None]
    return max(0, min([available, *rooms]))


def own_groups(root: Path, membership: Path = Path("/proc/self/cgroup")) -> list[Path]:
    """The control groups that this process belongs to, its own and all above it: each of them may have a limit."""
    folders = [root, root / "memory"]
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return folders
    for line in lines:
        number, controllers, path = line.split(":", 2)
        top = root if number == "0" else root / "memory"
        if number == "0" or "memory" in controllers.split(","):
            parts = [part for part in path.split("/") if part and part != ".."]
            folders += [top.joinpath(*parts[:n]) for n in range(1, len(parts) + 1)]
    return folders


def group_memory(folder: Path) -> tuple[int | None, int]:
    """(limit or None, bytes used that the kernel cannot take back) of one control group, version 2 or 1.

    The kernel counts page cache as used, but gives it back when memory is short, so it is subtracted here.
    """
    for limit_file, used_file, cache_key in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit = int((folder / limit_file).read_text(encoding="ascii"))
            used = int((folder / used_file).read_text(encoding="ascii"))
            stat = (folder / "memory.stat").read_text(encoding="ascii")
        except (OSError, ValueError):  # no such file, or "max"
            continue
        if limit >= 1 << 60:  # in version 1 this means that there is no limit
            continue
        cached = sum(int(line.split()[1]) for line in stat.splitlines() if line.startswith(cache_key + " "))
        return limit, max(0, used - cached)
    return None, 0


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    except OSError:
        pass
    return "CPU"


def _with_gpus(host: Host, nvml: Any) -> Host:
    if nvml is None:
        try:
            nvml = import_module("pynvml")
        except ImportError as e:
            return replace(host, gpu_error=f"nvidia-ml-py is not installed: {e}")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as e:
        # Without a driver there is nothing to explain. With a driver, the error says why it refused.
        return replace(host, gpu_error=str(e)) if _NVIDIA_DEVICE.exists() else host
    try:
        gpus: list[Gpu] = []
        for i in range(nvml.nvmlDeviceGetCount()):
            gpus.extend(_device(nvml, nvml.nvmlDeviceGetHandleByIndex(i), i))
        return replace(
            host,
            gpus=_visible(tuple(gpus), os.environ.get("CUDA_VISIBLE_DEVICES")),
            driver_version=_text(nvml.nvmlSystemGetDriverVersion()),
            cuda_version=_cuda_version(nvml),
        )
    except nvml.NVMLError as e:
        return replace(host, gpu_error=str(e))
    finally:
        nvml.nvmlShutdown()


def _visible(gpus: tuple[Gpu, ...], visible: str | None) -> tuple[Gpu, ...]:
    """The GPUs whose numbers CUDA_VISIBLE_DEVICES names; all of them where it names GPUs by UUID."""
    if visible is None or not all(part.strip().isdigit() for part in visible.split(",") if part.strip()):
        return gpus
    wanted = {int(part) for part in visible.split(",") if part.strip()}
    return tuple(g for g in gpus if g.index in wanted)


def _device(nvml: Any, handle: Any, index: int) -> list[Gpu]:
    """The GPU, or its MIG slices where MIG is on."""
    name = _text(nvml.nvmlDeviceGetName(handle))
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    if _mig_enabled(nvml, handle):
        slices = []
        for i in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
            try:
                slices.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, i))
            except nvml.NVMLError:  # an unused place
                continue
        return [_gpu(nvml, s, index, name, (major, minor), mig=True) for s in slices]
    return [_gpu(nvml, handle, index, name, (major, minor), mig=False)]


def _gpu(nvml: Any, handle: Any, index: int, name: str, capability: tuple[int, int], *, mig: bool) -> Gpu:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return Gpu(
        index=index,
        name=name,
        memory_total_mib=int(memory.total) // MIB,
        memory_free_mib=int(memory.free) // MIB,
        compute_capability=capability,
        nvlink=False if mig else _has_nvlink(nvml, handle),
        mig=mig,
        processes=_processes(nvml, handle),
    )


def _mig_enabled(nvml: Any, handle: Any) -> bool:
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError:  # cards without MIG
        return False
    return bool(current == nvml.NVML_DEVICE_MIG_ENABLE)


def _has_nvlink(nvml: Any, handle: Any) -> bool:
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            if nvml.nvmlDeviceGetNvLinkState(handle, link) == nvml.NVML_FEATURE_ENABLED:
                return True
        except nvml.NVMLError:  # no such link
            return False
    return False


def _processes(nvml: Any, handle: Any) -> tuple[GpuProcess, ...]:
    try:
        running = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except nvml.NVMLError:
        return ()
    return tuple(
        GpuProcess(pid=p.pid, name=_process_name(p.pid), used_mib=p.usedGpuMemory and int(p.usedGpuMemory) // MIB)
        for p in running
    )


def _process_name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:  # another container's, or gone
        return "unknown"


def _cuda_version(nvml: Any) -> str:
    number = int(nvml.nvmlSystemGetCudaDriverVersion_v2())
    return f"{number // 1000}.{number % 1000 // 10}"


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
