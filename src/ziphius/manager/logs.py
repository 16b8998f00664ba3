"""An instance's log file: its end, its growth and its last error; it writes nothing but the rotation."""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ziphius.errors import InstanceError

_ERROR = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (?:error|critical) +(\S+): (.*)")
_OF_A_RANK = "engine."
"""How the sources of a rank's lines begin."""
_FOLLOW_POLL_S = 0.2
_BLOCK = 64 * 1024


def rotate(path: Path) -> None:
    """Keep the last run's log as `.1`, so that the file is the present run's alone."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size:
            os.replace(path, path.with_name(path.name + ".1"))


def tail(path: Path, lines: int) -> list[str]:
    """The last `lines` lines, without reading the whole file. [] when there is none."""
    file = _open(path)
    if file is None:
        return []
    with file:
        _seek_last_lines(file, lines)
        return file.read().decode(errors="replace").splitlines()


def follow(path: Path, lines: int) -> Iterator[str]:
    """The last `lines` lines, then what is appended, for ever; goes on in the new file after a rotation.

    Yields text as it comes, and "" each time that there was nothing new, so that a caller can stop.
    """
    file = _open(path)
    if file is not None:
        _seek_last_lines(file, lines)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    try:
        while True:
            # Asked before the read: what the old file got until the rotation is read below, then nothing comes.
            replaced = file is None or _replaced(path, file)
            text = decoder.decode(file.read()) if file is not None else ""
            yield text
            if replaced and (new := _open(path)) is not None:
                if file is not None:
                    file.close()
                file = new
            elif not text:
                time.sleep(_FOLLOW_POLL_S)
    finally:
        if file is not None:
            file.close()


def last_error(path: Path) -> str | None:
    """Why the run ended, as far as its log says: the last error line, else a crash's last line, else None.

    Several ranks tell their own misfortunes in any order; the frontend, which knows the cause, is believed first.
    """
    lines = [line for line in tail(path, 400) if line.strip()]
    errors = [match for line in lines if (match := _ERROR.match(line))]
    of_frontend = [match for match in errors if not match[1].startswith(_OF_A_RANK)]
    if errors:
        return (of_frontend or errors)[-1][2]
    # Nothing was logged as an error: the interpreter's own last words.
    for line in lines:
        if line.startswith("Fatal Python error:"):
            return line
    return lines[-1] if any(line.startswith("Traceback (") for line in lines) else None


def _open(path: Path) -> BinaryIO | None:
    try:
        return path.open("rb")
    except FileNotFoundError:
        return None
    except OSError as e:
        raise InstanceError(f"cannot read {path}: {e.strerror}") from e


def _seek_last_lines(file: BinaryIO, lines: int) -> None:
    """Stand before the last `lines` lines. The end of the last one may be still to come."""
    position = end = file.seek(0, os.SEEK_END)
    data = b""
    while lines > 0 and position > 0 and data.rstrip(b"\n").count(b"\n") < lines:
        size = min(_BLOCK, position)
        position = file.seek(position - size)
        data = file.read(size) + data
    kept = b"\n".join(data.removesuffix(b"\n").split(b"\n")[-lines:]) if lines > 0 else b""
    file.seek(end - len(kept) - data.endswith(b"\n") * (lines > 0))


def _replaced(path: Path, file: BinaryIO) -> bool:
    """Whether `path` is another file by now, or was cut short."""
    with contextlib.suppress(FileNotFoundError):
        now, ours = path.stat(), os.fstat(file.fileno())
        return (now.st_ino, now.st_dev) != (ours.st_ino, ours.st_dev) or now.st_size < file.tell()
    return False
