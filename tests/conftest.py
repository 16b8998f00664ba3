"""What every folder of tests may use: the real default model, and a thread limit that suits a small machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ziphius.config import DEFAULT_MODEL
from ziphius.kernels.cpu.cache import kernel_cache_folder
from ziphius.models import pull
from ziphius.paths import ziphius_home

# Compiled CPU kernels, for this process and the workers it starts: each test's own home would compile them anew.
_KERNELS = kernel_cache_folder(ziphius_home(os.environ))
if _KERNELS is not None:
    os.environ.setdefault("NUMBA_CACHE_DIR", str(_KERNELS))


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The default model, fetched once into the user's own cache, as `ziphius pull` would."""
    return pull.fetch(DEFAULT_MODEL, ziphius_home(os.environ))
