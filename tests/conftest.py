"""What every folder of tests may use, what makes each run of the tests the same, and how processes share them."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pynvml
import pytest
from hypothesis import HealthCheck, settings

from ziphius.checkpoint import pull
from ziphius.config import DEFAULT_MODEL
from ziphius.installation import ziphius_home
from ziphius.kernels.cpu.cache import kernel_cache_folder

# Compiled CPU kernels, for this process and the workers it starts: each test's own home would compile them anew.
_KERNELS = kernel_cache_folder(ziphius_home(os.environ))
if _KERNELS is not None:
    os.environ.setdefault("NUMBA_CACHE_DIR", str(_KERNELS))

# A shell starts what it runs in the background with Ctrl-C ignored, and so would be what the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A proxy is for the package index; the tests' own servers are on this machine.
for _name in ("NO_PROXY", "no_proxy"):
    os.environ[_name] = ",".join(filter(None, (os.environ.get(_name), "127.0.0.1", "localhost", "::1")))


def _has_gpu() -> bool:
    """Whether there is a GPU of NVIDIA's that this process may use; torch would tell, but takes seconds to import."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return False
    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetCount() > 0
    except pynvml.NVMLError:
        return False


# Without a GPU the tests of kernels need Triton's interpreter. Triton reads this when it is imported, and transformers
# imports it too: whichever folder's tests come first.
if not _has_gpu():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Each of several test processes has its part of the cores: what torch starts more threads for waits in a loop, on the
# core that another process needs.
if (_processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _processes)))

# The same examples each time, and no clock: a busy machine is no failure. --hypothesis-profile=default draws new ones.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)  # fmt: skip
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Whatever ran before."""
    random.seed(0)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The default model, fetched once into the user's own cache, as `ziphius pull` would."""
    return pull.fetch(DEFAULT_MODEL, ziphius_home(os.environ))


_MOST_PROCESSES = 8
_MEMORY_OF_A_PROCESS = 3 << 30
"""Bytes, with the servers that its tests start."""
_ONE_AT_A_TIME = ("tests/slow/",)
"""Folders whose files never run beside each other: they share the machine's Apptainer, or start large servers."""
_LONGEST = (
    *("tests/slow/", "tests/kernels/gpu/test_deterministic.py", "tests/end_to_end/", "tests/ranks/"),
    *("tests/kernels/gpu/", "tests/engine/", "tests/manager/"),
)
"""What takes a minute or more. Several processes begin with it, so that none has it left when the others are done."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """What `-n auto`, the default, means: a process for each core.

    For a single file it is only this process, which saves the start of others; and where there is a GPU, because
    servers and kernels that run beside each other would take its memory from each other.
    """
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None  # xdist reads it
    if _has_gpu():
        return 0
    files = {argument.partition("::")[0] for argument in config.args}
    if len(files) == 1 and files.pop().endswith(".py"):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    room = psutil.virtual_memory().available // _MEMORY_OF_A_PROCESS
    processes = min(cores, room, _MOST_PROCESSES)
    return processes if processes > 1 else 0


def _first_of(beginnings: tuple[str, ...], nodeid: str) -> int:
    """The number of the first of `beginnings` with which `nodeid` begins; their count where none is."""
    return next((i for i, beginning in enumerate(beginnings) if nodeid.startswith(beginning)), len(beginnings))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One process alone keeps the slow tests for the end; several begin with what takes longest."""
    if _processes > 1:
        items.sort(key=lambda item: _first_of(_LONGEST, item.nodeid))
    else:
        items.sort(key=lambda item: item.nodeid.startswith("tests/slow/"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of a file run in one process and in their order: they share servers, models and compiled kernels."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            together = _first_of(_ONE_AT_A_TIME, nodeid)
            return (*_ONE_AT_A_TIME, nodeid.partition("::")[0])[together]

    config.option.loadscopereorder = False  # by the number of tests, which says little about their time
    return Scheduling(config, log)
