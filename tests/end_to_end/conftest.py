"""The whole of Ziphius as a user runs it: the `ziphius` command, the real default model, real HTTP clients."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest
from tests.ports import free_port

PATIENCE_S = 120.0


@dataclass(frozen=True)
class Installation:
    """One ZIPHIUS_HOME with the default model in its cache."""

    home: Path
    env: dict[str, str]
    command: tuple[str, ...] = (sys.executable, "-m", "ziphius")

    def run(self, *words: str, check: bool = True, **more: str) -> subprocess.CompletedProcess[str]:
        argv = [*self.command, *words]
        done = subprocess.run(argv, env={**self.env, **more}, capture_output=True, text=True, timeout=PATIENCE_S)
        assert not check or done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, *words: str) -> Server:
        port = free_port()
        self.run("start", "--port", str(port), *words)
        return Server(self, port)


@dataclass(frozen=True)
class Server:
    installation: Installation
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def status(self, name: str = "default") -> dict[str, Any]:
        return json.loads(self.installation.run("status", "--json", "--name", name, check=False).stdout)

    def live(self) -> dict[str, Any]:
        """The server's own word."""
        return httpx.get(f"{self.url}/status", timeout=60).json()

    def tree(self) -> list[psutil.Process]:
        parent = psutil.Process(self.status()["pid"])
        return [parent, *parent.children(recursive=True)]


def alive(process: psutil.Process) -> bool:
    """A zombie whose parent has not asked for it yet has ended."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(holds: Callable[[], bool], what: str, patience_s: float = 60.0) -> None:
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline, f"waited {patience_s:g} s in vain: {what}"
        time.sleep(0.05)


def clean_environment(home: Path) -> dict[str, str]:
    """This process' environment without settings of Ziphius or of the hub; everything is kept under `home`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("ZIPHIUS_", "XDG_", "HF_"))}
    return {**kept, "ZIPHIUS_HOME": str(home), "HF_HOME": str(home / "hf"), "NO_COLOR": "1", "COLUMNS": "100"}


@contextlib.contextmanager
def stopped_afterwards(made: Installation) -> Iterator[Installation]:
    yield made
    with contextlib.suppress(subprocess.TimeoutExpired):
        made.run("stop", "--all", "--drain-timeout", "0", check=False)


@pytest.fixture
def installation(tmp_path: Path, smollm2_path: Path) -> Iterator[Installation]:
    cache = tmp_path / "cache" / "models"
    cache.mkdir(parents=True)
    (cache / smollm2_path.parent.name).symlink_to(smollm2_path.parent)
    with stopped_afterwards(Installation(tmp_path, clean_environment(tmp_path))) as made:
        yield made
