from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ziphius.manager import logs


@pytest.mark.parametrize("lines", [0, 1, 2, 5, 100])
@pytest.mark.parametrize(
    "content", ["", "a", "a\n", "a\nb", "a\nb\n", "\n\n\n", "a\n\nb\n\n", "x" * 200_000 + "\ny\n", "é\n" * 90_000]
)
def test_tail_is_the_end_of_the_file(tmp_path: Path, content: str, lines: int) -> None:
    path = tmp_path / "log"
    path.write_text(content)
    assert logs.tail(path, lines) == (content.splitlines()[-lines:] if lines else [])


def test_tail_of_no_file_is_empty(tmp_path: Path) -> None:
    assert logs.tail(tmp_path / "log", 5) == []


def test_tail_survives_what_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"ok\n\xff\xfe\n")
    assert logs.tail(tmp_path / "log", 5) == ["ok", "\ufffd\ufffd"]


def test_follow_goes_on_through_rotation_and_truncation(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("old\nlast\n")
    following = logs.follow(path, 1)
    assert next(following) == "last\n"
    with path.open("a") as file:
        file.write("more\n")
        file.flush()
        assert next(following) == "more\n"
        assert next(following) == ""
        logs.rotate(path)
        file.write("before the end\n")
    path.write_text("new run\n")
    assert next(following) + next(following) == "before the end\nnew run\n"
    path.write_text("cut\n")
    assert "cut\n" in [next(following) for _ in range(3)]


def test_follow_waits_for_a_first_log(tmp_path: Path) -> None:
    path = tmp_path / "log"
    following = logs.follow(path, 5)
    assert next(following) == ""
    path.write_bytes("é".encode()[:1])
    with path.open("ab") as file:
        file.write("é".encode()[1:])
    assert "é" in [next(following) for _ in range(3)]


def test_rotation_keeps_one_run(tmp_path: Path) -> None:
    path = tmp_path / "log"
    logs.rotate(path)
    for run in ("1", "2", "3"):
        logs.rotate(path)
        path.write_text(run)
    assert sorted((p.name, p.read_text()) for p in tmp_path.iterdir()) == [("log", "3"), ("log.1", "2")]


def run_logging(path: Path, code: str) -> None:
    preamble = (
        "import logging; from ziphius import log; log.configure('info'); logger = logging.getLogger('ziphius.x')\n"
    )
    with path.open("w") as file:
        subprocess.run([sys.executable, "-c", preamble + code], stderr=file, check=False)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("logger.error('first'); logger.error('no room: 3 GB'); logger.info('bye')", "no room: 3 GB"),
        ("logger.critical('gone')", "gone"),
        ("try:\n 1/0\nexcept ZeroDivisionError:\n logger.exception('step failed')", "step failed"),
        ("logger.info('fine'); {}['key']", "KeyError: 'key'"),
        ("logger.warning('careful')", None),
        (
            "import faulthandler as f; f.enable(); f._sigsegv()",
            "Fatal Python error: Segmentation fault",
        ),
    ],
)
def test_the_last_error_is_the_reason(tmp_path: Path, code: str, reason: str | None) -> None:
    run_logging(tmp_path / "log", code)
    assert logs.last_error(tmp_path / "log") == reason


def test_the_frontend_is_believed_before_the_ranks(tmp_path: Path) -> None:
    """Ranks that fail together write in any order; only the frontend knows whose failure was the cause."""
    ranks = "".join(f"logging.getLogger('ziphius.engine.worker').error('rank {rank} failed: boom');" for rank in (0, 1))
    frontend = "logging.getLogger('ziphius.frontend.serve').error('rank 1: boom');"
    run_logging(tmp_path / "log", ranks)
    assert logs.last_error(tmp_path / "log") == "rank 1 failed: boom"
    run_logging(tmp_path / "log", frontend + ranks)
    assert logs.last_error(tmp_path / "log") == "rank 1: boom"


def test_logging_to_a_full_disk_raises_nothing() -> None:
    code = (
        "import sys, logging; from ziphius import log; log.configure('info')\n"
        "for i in range(1000): logging.getLogger('ziphius').info('x' * 100)\n"
        "print('alive', flush=True)\n"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=full, check=False)
    assert done.stdout == b"alive\n"
