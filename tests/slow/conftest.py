"""Real Apptainer and real SGLang, found or installed by the project's own scripts; where that cannot be, the reason.

ZIPHIUS_TEST_APPTAINER names a folder that scripts/install_apptainer.sh has filled (or may fill); without it one on the
PATH is taken, else one is installed into the user's cache. ZIPHIUS_TEST_SGLANG_PYTHON names a Python that has
SGLang (scripts/install_sglang_cpu.sh makes one). In CI (the variable CI is set) a skip for Apptainer is a failure.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
LAUNCHERS = Path(__file__).parents[1] / "launchers"
_INSTALL_S = 240


def load(path: Path) -> ModuleType:
    name = f"slow_tests_{path.stem}"  # in nobody's way
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(600))


def unavailable(reason: str) -> None:
    """A skip; in CI, where this is what is to be tested, a failure."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def apptainer_env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which `apptainer` is a real one that runs, with caches of its own."""
    own = tmp_path_factory.mktemp("apptainer")
    env = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    for name in ("CONFIGDIR", "CACHEDIR", "TMPDIR"):
        (own / name).mkdir()
        env[f"APPTAINER_{name}"] = str(own / name)
    prefix = os.environ.get("ZIPHIUS_TEST_APPTAINER")
    if prefix is None and shutil.which("apptainer") is None:
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        prefix = str(Path(cache) / "ziphius-tests" / "apptainer")
    if prefix is not None:
        done = subprocess.run([str(SCRIPTS / "install_apptainer.sh"), prefix], capture_output=True, text=True,
                              timeout=_INSTALL_S, check=False)  # fmt: skip
        if done.returncode:
            unavailable(f"Apptainer cannot be installed here: {done.stderr.strip()[-400:]}")
        env["PATH"] = f"{prefix}/bin:{env['PATH']}"
    return env


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root folder with Python and the stand-in for SGLang, for images."""
    make_root = load(Path(__file__).with_name("python_root.py")).make_root
    made: Path = make_root(tmp_path_factory.mktemp("root"))
    site = next(made.glob("**/lib-dynload")).parent / "site-packages"
    shutil.copytree(LAUNCHERS / "stand_in", site, ignore=shutil.ignore_patterns("__pycache__"))
    return made


@pytest.fixture(scope="session")
def image(apptainer_env: dict[str, str], root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`root` as a SIF, built by `ziphius image build`; it has been run once."""
    path = tmp_path_factory.mktemp("image") / "sglang.sif"
    argv = [sys.executable, "-m", "ziphius", "image", "build", "--from", str(root), "--out", str(path)]
    built = subprocess.run(argv, env=apptainer_env, capture_output=True, text=True, timeout=300, check=False)
    assert built.returncode == 0, built.stderr
    probe = ["apptainer", "exec", "--pid", str(path), "python3", "-c", "print(1)"]
    done = subprocess.run(probe, env=apptainer_env, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        unavailable(f"Apptainer cannot run here: {done.stderr.strip().splitlines()[-1]}")
    return path


@pytest.fixture
def plain_bench(tmp_path: Path) -> Iterator[object]:
    """As in tests/launchers, with an empty environment."""
    yield from load(LAUNCHERS / "conftest.py").make_bench(tmp_path, {})


@pytest.fixture
def bench(tmp_path: Path, apptainer_env: dict[str, str]) -> Iterator[object]:
    """As in tests/launchers, with Apptainer in the environment."""
    yield from load(LAUNCHERS / "conftest.py").make_bench(tmp_path, apptainer_env)
