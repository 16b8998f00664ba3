"""Builds an Apptainer image of SGLang, completely or not at all. The command comes from `launchers.image`."""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import msgspec

from ziphius.errors import ConfigError, ImageError
from ziphius.ipc.messages import LoadProgress
from ziphius.launchers import image, registry
from ziphius.launchers.apptainer import require_program
from ziphius.launchers.image import ImageRecord
from ziphius.launchers.launcher import RUN_ID
from ziphius.manager import process

_POLL_S = 0.2
_VERSION_S = 120.0
_UNPACKED = 2.5
"""An image's unpacked size over that of its compressed layers, about."""
_SPARE = 1 << 30

OnProgress = Callable[[LoadProgress], None]


def build(source: str, target: Path, env: Mapping[str, str], on_progress: OnProgress, *, replace: bool) -> ImageRecord:
    """Build the image `target` and its record. After a ConfigError or ImageError nothing new has that name.

    `replace`: whether an image that is there may be replaced; it stays as it is until the new one is whole.
    """
    source = image.checked_source(source)
    program = require_program(env)
    if target.exists() and not replace:
        raise ConfigError(f"{target} is there already: --force replaces it, or name another with --out", param="out")
    remote = registry.find_remote(source) if source.startswith("docker://") else None
    _check_disk(source, target, env, remote)
    exact = source if remote is None else registry.pinned(source, remote.digest)
    # In the same folder, so that the last step is a rename. Hidden, because it is no image yet.
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with _unpacking_folder(env) as folder:
            command = image.build_command(program, exact, partial)
            _run(command, partial, {**env, "APPTAINER_TMPDIR": folder}, on_progress)
        record = ImageRecord(
            source=source,
            digest=None if remote is None else remote.digest,
            sglang_version=_sglang_version(program, partial, env),
            built_at=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            apptainer_version=_output((program, "--version"), env).strip().rpartition(" ")[2],
            size_bytes=partial.stat().st_size,
        )
        put_image(partial, target, record)
    except OSError as e:
        raise ImageError(f"cannot write {e.filename or target}: {e.strerror}") from e
    finally:
        partial.unlink(missing_ok=True)
    return record


def _check_disk(source: str, target: Path, env: Mapping[str, str], remote: registry.RemoteImage | None) -> None:
    """ImageError, with the numbers, when a disk is too small for the image, or to unpack it."""
    size = image.source_bytes(source) if remote is None else remote.size_bytes
    if size is None:
        return
    compressed = remote is not None or source.startswith("docker-archive:")
    unpacked = int(size * _UNPACKED) if compressed else size
    if not target.parent.is_dir():
        raise ImageError(f"there is no folder {target.parent} to put the image into")
    for folder, needed, what in (
        (target.parent, min(size, unpacked) + _SPARE, "the image"),
        (_temporary(env), unpacked + _SPARE, "unpacking (APPTAINER_TMPDIR names another folder)"),
    ):
        with contextlib.suppress(OSError):  # Apptainer makes a folder that does not exist, or reports it
            free = shutil.disk_usage(folder).free
            if free < needed:
                raise ImageError(f"{folder} has {free / 1e9:.1f} GB free, and {what} needs about {needed / 1e9:.1f} GB")


def _temporary(env: Mapping[str, str]) -> Path:
    return Path(env.get("APPTAINER_TMPDIR") or env.get("TMPDIR") or "/tmp")


def _unpacking_folder(env: Mapping[str, str]) -> tempfile.TemporaryDirectory[str]:
    """A temporary folder for this build alone: Apptainer leaves an unpacked image there when it is killed."""
    place = _temporary(env)
    place.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix="ziphius-image-", dir=place, ignore_cleanup_errors=True)


def _run(command: tuple[str, ...], partial: Path, env: Mapping[str, str], on_progress: OnProgress) -> None:
    """Run Apptainer's build until it ends. ImageError with its reason. An interruption ends all its processes."""
    run_id = uuid.uuid4().hex
    with subprocess.Popen(
        command, env={**env, RUN_ID: run_id}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as child:
        lines: list[str] = []
        assert child.stdout is not None
        stream = child.stdout
        reader = threading.Thread(target=_read, args=(stream, lines), daemon=True)
        reader.start()
        try:
            while child.poll() is None:
                _tell(lines, partial, on_progress)
                time.sleep(_POLL_S)
        except BaseException:
            process.end_tree(
                process.StartedProcess(child.pid, process.identity(child.pid) or "", run_id), process.SETTLE_S
            )
            raise
        reader.join()
    if child.returncode:
        raise ImageError(f"the image could not be built: {image.build_trouble(chr(10).join(lines))}")


def _read(stream: IO[bytes], lines: list[str]) -> None:
    for line in stream:
        lines.append(line.decode(errors="replace"))


def _tell(lines: list[str], partial: Path, on_progress: OnProgress) -> None:
    phases = [phase for phase in map(image.build_phase, lines[:]) if phase is not None]
    phase = phases[-1] if phases else "building"
    size = partial.stat().st_size if partial.exists() else 0
    if phase == "fetching":
        count = sum("Copying blob" in line for line in lines[:])
        on_progress(LoadProgress(phase=phase, done=count, total=0, unit="layers"))
    else:
        on_progress(LoadProgress(phase=phase, done=size, unit="bytes"))


def _sglang_version(program: str, built: Path, env: Mapping[str, str]) -> str | None:
    # Without the home of the user who builds: root's home would hide what an image keeps in /root.
    inside = (
        program,
        "exec",
        "--cleanenv",
        "--no-mount",
        "home,cwd",
        str(built),
        "python3",
        "-I",
        "-c",
        image.VERSION_PROGRAM,
    )
    try:
        return _output(inside, env).strip() or None
    except ImageError:
        return None


def _output(command: tuple[str, ...], env: Mapping[str, str]) -> str:
    try:
        return subprocess.run(
            command, env=dict(env), capture_output=True, text=True, timeout=_VERSION_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as e:
        raise ImageError(f"{' '.join(command[:2])} failed: {e}") from e


def put_image(partial: Path, target: Path, record: ImageRecord) -> None:
    """Move the image `partial` to `target`, with `record` beside it."""
    beside = image.record_path(target)
    temporary = beside.with_name(f".{beside.name}.{os.getpid()}")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")
    os.replace(partial, target)
    os.replace(temporary, beside)
