"""WorkerSpec: what a rank process is told, and the command and environment that start it. It needs no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from ziphius.config import ServeConfig

_CGROUP_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One JSON line on the worker's stdin. The pipe then stays open: its end tells that the parent is gone."""

    config: ServeConfig
    model_path: str
    """A folder in Hugging Face format or a .gguf file; already fetched."""
    address: str
    """The address of rank 0's channel (ziphius.ipc.sockets)."""
    rank: int = 0
    """0 to `config.tp` - 1."""
    device_index: int = 0
    """The index of this rank's GPU among those that CUDA shows."""
    beats: str = ""
    """The address to which the rank sends its beats (ziphius.ipc.sockets); "" when nobody listens."""
    rendezvous: str = ""
    """Where ranks find each other: file:PATH, or tcp://IP:PORT of rank 0's store."""
    batches: str = ""
    """The address at which rank 0 sends its batches."""
    store_fd: int = -1
    """rank 0: an inherited socket that listens on the port of `rendezvous`."""


def encode_spec(spec: WorkerSpec) -> bytes:
    """The line to write to the worker's stdin, with its newline."""
    return msgspec.json.encode(spec) + b"\n"


def decode_spec(line: bytes) -> WorkerSpec:
    """Raises msgspec.ValidationError or msgspec.DecodeError when `line` is no WorkerSpec."""
    return msgspec.json.decode(line, type=WorkerSpec)


def worker_command() -> list[str]:
    return [sys.executable, "-m", "ziphius.engine.worker"]


def available_cores() -> int:
    """CPU cores this process may use: its affinity, cut by a cgroup's quota."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    try:
        quota, period = _CGROUP_CPU_MAX.read_text(encoding="ascii").split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return cores


def cpu_threads(config: ServeConfig) -> int:
    """Threads of one rank: --threads, or the cores, shared out among the ranks of this machine."""
    return max(1, (config.threads or available_cores()) // max(1, config.tp // config.nnodes))


def worker_environment(config: ServeConfig) -> Mapping[str, str]:
    """The variables to add to the environment of a worker. OpenMP and numba read them only when they load.

    OMP_NUM_THREADS, MKL_NUM_THREADS, NUMBA_NUM_THREADS: the rank's threads (see `cpu_threads`).
    OPENBLAS_NUM_THREADS: 1, because numpy's matrix products are not used.
    GOMP_SPINCOUNT, KMP_BLOCKTIME: how long an idle thread spins before it sleeps. Short, because the HTTP process
    shares the cores and waits while an idle thread spins. Not zero, because to wake a thread takes longer than the
    pause between two products of one step.
    MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_: keep freed tensors of up to 32 MiB, 128 MiB in all, for the next
    step: glibc would give those of a step's logits back to the system each time, and clearing new pages costs more
    than computing with them.
    """
    threads = str(cpu_threads(config))
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "NUMBA_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": "1",
        "GOMP_SPINCOUNT": "20000",
        "KMP_BLOCKTIME": "1",
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
    }
