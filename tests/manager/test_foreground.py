"""`ziphius serve` with an engine that is a program of its own: it ends with it, and leaves nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

# A server with a worker that has left the session and ignores TERM; it drains for a moment, and says so.
ENGINE = """
import os, signal, sys, time
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
def drain(*_):
    print("drained", flush=True)
    os._exit(0)
signal.signal(signal.SIGTERM, drain)
print("up", os.getpid(), flush=True)
time.sleep(float(sys.argv[1]))
os._exit(7)
"""
RUNNER = """
import os, sys
from ziphius.launchers.launcher import Launch
from ziphius.manager.foreground import run
launch = Launch((sys.executable, "-c", sys.argv[1], sys.argv[2]), dict(os.environ), None)
sys.exit(run(launch, 5.0, follows=sys.argv[4] == "follows"))
"""


@pytest.fixture
def running(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    seconds, role = request.param
    argv = [sys.executable, "-c", RUNNER, ENGINE, str(seconds), str(tmp_path), role]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline().startswith("up")
        yield child
        child.kill()


def left() -> list[psutil.Process]:
    me = psutil.Process()
    found = []
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = each.cmdline()
            if ENGINE in words and RUNNER not in words and each != me and each.status() != psutil.STATUS_ZOMBIE:
                found.append(each)
    return found


@pytest.mark.parametrize("running", [(600, "alone")], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGURG])
def test_a_signal_drains_it_and_ends_its_workers(running: subprocess.Popen[str], number: int) -> None:
    assert len(left()) == 2
    os.kill(running.pid, number)
    assert running.stdout is not None
    assert running.stdout.readline() == "drained\n"
    assert running.wait(60) == 0
    assert left() == []


@pytest.mark.parametrize("running", [(0.5, "alone")], indirect=True)
def test_its_own_end_is_told_and_its_workers_end_too(running: subprocess.Popen[str]) -> None:
    assert running.wait(60) == 7
    assert left() == []


@pytest.mark.parametrize("running", [(600, "follows")], indirect=True)
def test_a_part_of_another_machines_server_leaves_the_drain_to_that_one(running: subprocess.Popen[str]) -> None:
    os.kill(running.pid, signal.SIGURG)
    with pytest.raises(subprocess.TimeoutExpired):
        running.wait(1)
    assert len(left()) == 2
    os.kill(running.pid, signal.SIGTERM)
    assert running.wait(60) == 0
    assert left() == []
