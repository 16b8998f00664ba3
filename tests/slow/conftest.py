"""Real Apptainer and real SGLang, found or installed by the project's own scripts; where that cannot be, the reason.

ZIPHIUS_TEST_APPTAINER names a folder that scripts/install_apptainer.sh has filled (or may fill); without it one on the
PATH is taken, else one is installed into the user's cache. In CI (the variable CI is set) a skip for it is a failure.

ZIPHIUS_TEST_SGLANG_PYTHON names a Python that has SGLang; without it the one in the user's cache is taken. As it takes
1.7 GB, it is installed there in CI only. Where it cannot be, its tests are skipped with the reason, in CI too.

ZIPHIUS_TEST_SLURM: as ZIPHIUS_TEST_APPTAINER, for scripts/install_slurm.sh; its tests are skipped with the reason too.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
LAUNCHERS = Path(__file__).parents[1] / "launchers"
_INSTALL_S = 240
_INSTALL_SGLANG_S = 420


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


def cache_folder(name: str) -> str:
    """Where a program that tests need is installed, once for all runs."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return str(Path(cache) / "ziphius-tests" / name)


def why_not_installed(script: str, folder: str, seconds: float = _INSTALL_S) -> str | None:
    """Run one of the project's scripts: None when `folder` has the program, else the reason."""
    argv = [str(SCRIPTS / script), folder]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                          start_new_session=True) as running:  # fmt: skip
        try:
            said = running.communicate(timeout=seconds)[1]
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            return f"{script} took more than {seconds:g} s"
    return None if running.returncode == 0 else said.strip()[-400:] or f"{script} failed without a word"


@pytest.fixture(scope="session")
def sglang_python() -> str:
    """A Python of this machine that has real SGLang."""
    named = os.environ.get("ZIPHIUS_TEST_SGLANG_PYTHON")
    if named:
        return named
    folder = cache_folder("sglang-cpu")
    if not (os.environ.get("CI") or Path(folder, ".sglang-version").exists()):
        pytest.skip(f"SGLang is not here: `scripts/install_sglang_cpu.sh {folder}` installs it, 1.7 GB")
    reason = why_not_installed("install_sglang_cpu.sh", folder, _INSTALL_SGLANG_S)
    if reason is not None:
        pytest.skip(f"SGLang cannot be installed here: {reason}")
    return f"{folder}/bin/python"


@pytest.fixture(scope="session")
def installed_slurm() -> str:
    """The folder that has Slurm's programs."""
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons are run as root")
    prefix = os.environ.get("ZIPHIUS_TEST_SLURM") or cache_folder("slurm")
    reason = why_not_installed("install_slurm.sh", prefix)
    if reason is not None:
        pytest.skip(f"Slurm cannot be installed here: {reason}")
    return prefix


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
        prefix = cache_folder("apptainer")
    if prefix is not None:
        reason = why_not_installed("install_apptainer.sh", prefix)
        if reason is not None:
            unavailable(f"Apptainer cannot be installed here: {reason}")
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
