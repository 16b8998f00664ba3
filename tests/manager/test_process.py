from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ziphius.errors import InstanceError, StartFailed
from ziphius.launchers.launcher import Launch
from ziphius.manager import process


def test_identity_tells_two_processes_of_one_number_apart(stranger: psutil.Popen) -> None:
    first = process.identity(stranger.pid)
    assert first is not None
    assert first == process.identity(stranger.pid)
    assert first != process.identity(os.getpid())
    assert not process.alive(process.StartedProcess(stranger.pid, "another boot:17", "run"))


def test_the_dead_and_zombies_have_no_identity() -> None:
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process.identity(child.pid) is None
    child.wait()
    assert process.identity(child.pid) is None


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StartFailed, match=r"no-such-program.*No such file"):
        process.spawn(Launch(("no-such-program",), {}, b""), tmp_path / "log", "run")


def test_spawn_hands_over_and_logs(tmp_path: Path) -> None:
    code = "import os, sys; print(sys.stdin.read(), os.environ['ZIPHIUS_RUN_ID'], file=sys.stderr)"
    launch = Launch((sys.executable, "-c", code), dict(os.environ), b"the config")
    child = process.spawn(launch, tmp_path / "log", "run-1")
    process.hand_over(child, launch)
    assert child.wait(timeout=60) == 0
    assert (tmp_path / "log").read_text() == "the config run-1\n"


def test_hand_over_to_the_dead_raises_nothing(tmp_path: Path) -> None:
    launch = Launch(("true",), dict(os.environ), b"x" * 1_000_000)
    child = process.spawn(launch, tmp_path / "log", "run")
    child.wait()
    process.hand_over(child, launch)


def test_a_tree_has_those_that_left_the_session_and_lost_their_parent(tmp_path: Path) -> None:
    """The main process starts a child in a new session and dies; the mark in its environment finds it."""
    code = "import subprocess; subprocess.Popen(['sleep', '600'], start_new_session=True)"
    launch = Launch((sys.executable, "-c", code), dict(os.environ), b"")
    child = process.spawn(launch, tmp_path / "log", "run-2")
    target = process.StartedProcess(child.pid, process.identity(child.pid) or "", "run-2")
    process.hand_over(child, launch)
    child.wait(timeout=60)
    (orphan,) = process.tree(target)
    assert orphan.name() == "sleep"
    process.end_tree(target, 0)
    assert process.tree(target) == []


def test_a_tree_has_those_of_the_session_without_the_mark(tmp_path: Path) -> None:
    """A child with an empty environment whose own parent has died."""
    code = (
        "import subprocess, sys, time\n"
        'inner = \'import subprocess; subprocess.Popen(["/bin/sleep", "600"], env={})\'\n'
        "subprocess.run([sys.executable, '-c', inner])\n"
        "print('there', flush=True); time.sleep(600)"
    )
    launch = Launch((sys.executable, "-c", code), dict(os.environ), b"")
    child = process.spawn(launch, tmp_path / "log", "run-3")
    target = process.StartedProcess(child.pid, process.identity(child.pid) or "", "run-3")
    deadline = time.monotonic() + 60
    while "there" not in (tmp_path / "log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert sorted(p.name() for p in process.tree(target))[-1] == "sleep"
    assert process.resident_bytes(target) > 0
    process.end_tree(target, 0)
    assert process.tree(target) == []
    child.wait()


def test_a_second_signal_says_that_the_wait_is_over(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time\n"
        "asked = []\n"
        "def end(*_):\n"
        "    asked.append(1)\n"
        "    print('asked', flush=True)\n"
        "    if len(asked) == 2: sys.exit()\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print('there', flush=True)\n"
        "while True: time.sleep(600)"
    )
    launch = Launch((sys.executable, "-c", code), dict(os.environ), b"")
    child = process.spawn(launch, tmp_path / "log", "run-4")
    target = process.StartedProcess(child.pid, process.identity(child.pid) or "", "run-4")
    process.hand_over(child, launch)
    deadline = time.monotonic() + 60
    while "there" not in (tmp_path / "log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)

    def heard(_: float) -> None:
        while "asked" not in (tmp_path / "log").read_text():  # two signals that come together are one
            assert time.monotonic() < deadline
            time.sleep(0.01)

    process.end_tree(target, 0, heard)
    assert child.wait(timeout=60) == 0
    assert (tmp_path / "log").read_text().splitlines() == ["there", "asked", "asked"]


def test_who_listens_on_a_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"pid {os.getpid()}" in (process.port_owner(port) or "")
    assert f"pid {os.getpid()}" not in (process.port_owner(port) or "")  # it may be another's by now


def test_exits_in_words() -> None:
    assert process.describe_exit(3) == "it exited with status 3"
    assert "SIGSEGV" in process.describe_exit(-signal.SIGSEGV)
    assert "out of memory" in process.describe_exit(-signal.SIGKILL)
    assert "signal 63" in process.describe_exit(-63)


@pytest.mark.parametrize(
    ("said", "nothing_left"),
    [
        ("Error: No such container: ziphius-default", True),
        ("Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?", True),
        ("failed to connect to the docker API at unix:///var/run/docker.sock", True),
        ("Error response from daemon: container is locked", False),
    ],
)
def test_a_clean_up_with_nothing_left_to_do_is_no_error(said: str, nothing_left: bool) -> None:
    command = ("/bin/sh", "-c", f"echo '{said}' >&2; exit 1")
    with contextlib.nullcontext() if nothing_left else pytest.raises(InstanceError, match=said):
        process.clean_up(command)
