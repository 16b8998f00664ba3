"""The whole of Ziphius as a user runs it: the `ziphius` command, the real default model, real HTTP clients."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

PATIENCE_S = 120.0


@dataclass(frozen=True)
class Installation:
    """One ZIPHIUS_HOME with the default model in its cache."""

    home: Path
    env: dict[str, str]

    def run(self, *words: str, check: bool = True, **more: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "ziphius", *words]
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
        return httpx.get(f"{self.url}/status", timeout=10).json()

    def tree(self) -> list[psutil.Process]:
        parent = psutil.Process(self.status()["pid"])
        return [parent, *parent.children(recursive=True)]


def alive(process: psutil.Process) -> bool:
    """A zombie whose parent has not asked for it yet has ended."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(holds: Callable[[], bool], what: str, patience_s: float = 30.0) -> None:
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline, f"waited {patience_s:g} s in vain: {what}"
        time.sleep(0.05)


@pytest.fixture
def installation(tmp_path: Path, smollm2_path: Path) -> Iterator[Installation]:
    cache = tmp_path / "cache" / "models"
    cache.mkdir(parents=True)
    (cache / smollm2_path.parent.name).symlink_to(smollm2_path.parent)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("ZIPHIUS_", "XDG_"))}
    env = {**kept, "ZIPHIUS_HOME": str(tmp_path), "NO_COLOR": "1", "COLUMNS": "100"}
    made = Installation(tmp_path, env)
    yield made
    with contextlib.suppress(subprocess.TimeoutExpired):
        made.run("stop", "--all", "--drain-timeout", "0", check=False)
