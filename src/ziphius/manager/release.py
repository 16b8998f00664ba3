"""What a server held besides its processes: memory of GPUs and its port. A stop waits until both are free.

The driver frees memory some time after a process was killed. A start before that would find the GPU full.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ziphius.errors import InstanceError
from ziphius.manager.client import reachable
from ziphius.planner.hardware import Host

_GPU_S = 60.0
_PORT_S = 5.0
_POLL_S = 0.2
_SLACK = 0.9
"""This share of what the processes held must become free. Other processes may have taken some meanwhile."""

Probe = Callable[[], Host]


@dataclass(frozen=True, slots=True)
class HeldMemory:
    """Memory of one GPU that the processes of one server hold."""

    gpu: int
    pids: frozenset[int]
    used_mib: int
    free_mib: int
    """Free at that time."""


def held_memory(pids: Iterable[int], probe: Probe) -> tuple[HeldMemory, ...]:
    """What these processes hold of each GPU now; () without GPUs, or when the driver does not tell."""
    ours = frozenset(pids)
    found = []
    for gpu in probe().gpus:
        mine = [process for process in gpu.processes if process.pid in ours]
        if mine:
            used = sum(process.used_mib or 0 for process in mine)
            found.append(HeldMemory(gpu.index, frozenset(p.pid for p in mine), used, gpu.memory_free_mib))
    return tuple(found)


def wait_for_memory(held: tuple[HeldMemory, ...], probe: Probe, timeout_s: float = _GPU_S) -> None:
    """Return when the memory is free again. InstanceError, with the numbers, when it is not within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while held:
        gpus = {gpu.index: gpu for gpu in probe().gpus}
        missing = []
        for each in held:
            gpu = gpus.get(each.gpu)
            if gpu is None:
                continue
            listed = {process.pid for process in gpu.processes} & each.pids
            back = gpu.memory_free_mib - each.free_mib
            if listed or back < each.used_mib * _SLACK:
                missing.append(f"GPU {each.gpu}: {max(0, back)} of {each.used_mib} MiB are back")
        if not missing:
            return
        if time.monotonic() > deadline:
            raise InstanceError(f"the processes are gone, but not their memory: {'; '.join(missing)}")
        time.sleep(_POLL_S)


def wait_for_port(host: str, port: int, timeout_s: float = _PORT_S) -> None:
    """Return when nothing answers on the port, or after `timeout_s`: by then another program answers."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            with contextlib.closing(socket.create_connection((reachable(host), port), timeout=1.0)):
                time.sleep(_POLL_S)
        except OSError:
            return
