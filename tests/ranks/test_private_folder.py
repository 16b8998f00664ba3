"""A server's folder: its own while it lives, cleared away by the next one when it was killed."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ziphius.ranks.private_folder import private_folder

HOLD = "from ziphius.ranks.private_folder import private_folder\nprint(private_folder(), flush=True)\ninput()"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def test_it_is_its_owners_only(temporary: Path) -> None:
    folder = private_folder()
    assert folder.parent == temporary
    assert folder.stat().st_mode & 0o777 == 0o700


def test_the_folder_of_a_killed_server_is_cleared_and_a_living_ones_is_not(temporary: Path) -> None:
    def hold() -> tuple[subprocess.Popen[str], Path]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        return process, Path(process.stdout.readline().strip())

    killed, abandoned = hold()
    living, held = hold()
    (abandoned / "engine.sock").touch()
    killed.kill()
    killed.wait(60)
    others = temporary / "ziphius-of-something-else"
    others.mkdir()
    link = temporary / "ziphius-link"
    link.symlink_to(held)
    own = private_folder()
    assert not abandoned.exists()
    assert held.exists()
    assert others.exists()
    assert link.is_symlink()
    assert own.exists()
    for process in (killed, living):
        process.communicate(input="\n" if process is living else None, timeout=60)


def test_its_lock_is_held_before_others_can_see_it(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Path]] = []
    flock = fcntl.flock

    def look(descriptor: int, how: int) -> None:
        seen.append(list(temporary.glob("*/lock")))
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", look)
    folder = private_folder()
    assert seen == [[]]
    assert (folder / "lock").exists()


def test_a_long_path_is_left_for_a_short_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    folder = private_folder()
    assert len(os.fspath(folder)) < 90
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
