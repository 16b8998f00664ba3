"""What every folder of tests may use: the real default model; and what makes each run of the tests the same."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

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

# A proxy is for the package index; the tests' own servers are on this machine.
for _name in ("NO_PROXY", "no_proxy"):
    os.environ[_name] = ",".join(filter(None, (os.environ.get(_name), "127.0.0.1", "localhost", "::1")))

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
