"""Managers of instances whose engine is `sglang`, with a stand-in where no real one is; nothing is left running."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.ports import free_port

from ziphius.config import Resolved, resolve
from ziphius.launchers.engines import engine_launcher
from ziphius.manager import process
from ziphius.manager.instance import Instances, Record
from ziphius.manager.manager import Manager

STAND_IN = Path(__file__).with_name("stand_in")
KEPT = ("PATH", "HOME", "LANG", "TMPDIR", "APPTAINER_CACHEDIR", "APPTAINER_CONFIGDIR", "APPTAINER_TMPDIR")


@dataclass(frozen=True)
class SglangBench:
    """What a test works with. `env` is the caller's environment."""

    home: Path
    model: Path
    env: dict[str, str]
    also: list[Record] = field(default_factory=list)

    def manager(self, *, force: bool = True) -> Manager:
        return Manager(self.home, engine_launcher(force=force), self.env)

    def resolved(self, *arguments: str, **flags: Any) -> Resolved:
        """`arguments`: what would stand after `--`."""
        given: dict[str, Any] = {
            "engine": "sglang",
            "runtime": "local",
            "python": sys.executable,
            "device": "cpu",
            "model": str(self.model),
            "port": free_port(),
            "drain_timeout": 0.5,
            "engine_args": shlex.join(arguments) or None,
        }
        chosen = {**given, **flags}
        if chosen["runtime"] != "local":
            chosen["python"] = None
        return resolve(chosen, env={})

    def record(self, name: str = "default") -> Record:
        record = Instances(self.home).read(name)
        assert record is not None
        return record

    def pids(self, name: str = "default") -> list[int]:
        return sorted(p.pid for p in process.tree(target(self.record(name))))


def target(record: Record) -> process.StartedProcess:
    return process.StartedProcess(record.pid or 0, record.identity, record.run_id)


def make_bench(folder: Path, env: Mapping[str, str]) -> Iterator[SglangBench]:
    home = folder / "home"
    model = folder / "a-model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "unheard-of"}')
    bench = SglangBench(home, model, {**env, "ZIPHIUS_HOME": str(home)})
    yield bench
    for name in Instances(home).names():
        process.end_tree(target(bench.record(name)), process.SETTLE_S)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[SglangBench]:
    env = {name: os.environ[name] for name in KEPT if name in os.environ}
    yield from make_bench(tmp_path, {**env, "PYTHONPATH": str(STAND_IN)})
