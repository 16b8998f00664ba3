"""An instance folder, a launcher of the stand-in server, and the promise that nothing is left running."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from tests.planner.conftest import host as host
from tests.ports import free_port

from ziphius.config import Resolved, resolve
from ziphius.launchers.launcher import Launch, Launcher
from ziphius.manager import process
from ziphius.manager.instance import Instances, Record
from ziphius.manager.manager import Manager

STAND_IN = Path(__file__).with_name("stand_in_server.py")


@dataclass(frozen=True)
class Bench:
    """What a test works with: managers over one home, each with a launcher of its own habits."""

    home: Path

    def launcher(self, *habits: str) -> Launcher:
        def launch(resolved: Resolved, env: Mapping[str, str]) -> Launch:
            return Launch((sys.executable, str(STAND_IN), *habits), env, msgspec.json.encode(resolved))

        return launch

    def manager(self, *habits: str) -> Manager:
        return Manager(self.home, self.launcher(*habits), os.environ)

    def resolved(self, **flags: Any) -> Resolved:
        port = flags.pop("port", None) or free_port()
        return resolve({"port": port, "drain_timeout": 0.5, **flags}, env={})

    @property
    def instances(self) -> Instances:
        return Instances(self.home)

    def record(self, name: str = "default") -> Record:
        record = self.instances.read(name)
        assert record is not None
        return record

    def pids(self, name: str = "default") -> list[int]:
        """The living processes of the last start."""
        return sorted(p.pid for p in process.tree(self.target(self.record(name))))

    @staticmethod
    def target(record: Record) -> process.StartedProcess:
        return process.StartedProcess(record.pid or 0, record.identity, record.run_id)

    def tampered(self, name: str = "default", **changes: Any) -> None:
        self.instances.write(replace(self.record(name), **changes))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "home")
    yield bench
    for name in bench.instances.names():
        record = bench.instances.read(name)
        assert record is not None
        process.end_tree(bench.target(record), 0)


@pytest.fixture
def quiet() -> Callable[[object], None]:
    return lambda _: None


@pytest.fixture
def stranger() -> Iterator[psutil.Popen]:
    """A process of another program."""
    sleeper = psutil.Popen(["sleep", "600"])
    time.sleep(0.05)  # identities are start times in ticks of 10 ms: nobody else's may be the same
    yield sleeper
    sleeper.kill()
    sleeper.wait()
