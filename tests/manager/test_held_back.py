"""A program that reads no stdin is held back until it is on record."""

from __future__ import annotations

import os
import time
from pathlib import Path

from ziphius.launchers.launcher import Launch, PrivateFile
from ziphius.manager import process


def launch(tmp_path: Path) -> Launch:
    script = 'touch "$1"; read -r line && touch "$1.read"; exec sleep 60'
    argv = ("/bin/sh", "-c", script, "x", str(tmp_path / "ran"))
    file = PrivateFile(tmp_path / "folder" / "secret", "s", "a secret")
    return Launch(argv, {"PATH": os.environ["PATH"]}, None, files=(file,), folders=(tmp_path / "made" / "deep",))


def test_it_runs_in_its_own_place_once_it_was_handed_over(tmp_path: Path) -> None:
    made = launch(tmp_path)
    child = process.spawn(made, tmp_path / "log", "run")
    identity = process.identity(child.pid)
    time.sleep(0.2)
    assert not (tmp_path / "ran").exists()
    assert (tmp_path / "folder" / "secret").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "made" / "deep").is_dir()
    process.hand_over(child, made)
    deadline = time.monotonic() + 60
    while not (tmp_path / "ran").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert process.identity(child.pid) == identity
    assert not (tmp_path / "ran.read").exists()  # what was written was for the gate
    process.kill(child)


def test_it_never_runs_when_its_starter_died_first(tmp_path: Path) -> None:
    child = process.spawn(launch(tmp_path), tmp_path / "log", "run")
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait(60) != 0
    assert not (tmp_path / "ran").exists()


def test_what_outlives_the_tree_is_ended_by_its_own_command(tmp_path: Path) -> None:
    process.clean_up(())
    process.clean_up(("/bin/sh", "-c", f"touch {tmp_path}/cleaned"))
    assert (tmp_path / "cleaned").exists()
