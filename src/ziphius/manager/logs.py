"""An instance's log file: its last lines, its growth, its last error, and its rotation."""

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
"""The names of a rank's loggers begin so."""
_FOLLOW_POLL_S = 0.2
_BLOCK = 64 * 1024


def rotate(path: Path) -> None:
    """Keep the last run's log as `.1`, so that the file holds only the present run."""
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
    """The last `lines` lines, then what is appended, for ever. After a rotation it continues in the new file.

    Yields text as it comes, and "" each time that there was nothing new, so that a caller can stop.
    """
    file = _open(path)
    if file is not None:
        _seek_last_lines(file, lines)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    try:
        while True:
            # Look before the read: whatever was written to the old file before its rotation is then read below.
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

    Several ranks report their errors in any order. The frontend knows the cause, so its last error counts first.
    """
    lines = [line for line in tail(path, 400) if line.strip()]
    errors = [match for line in lines if (match := _ERROR.match(line))]
    of_frontend = [match for match in errors if not match[1].startswith(_OF_A_RANK)]
    if errors:
        return (of_frontend or errors)[-1][2]
    # Nothing was logged as an error. The interpreter may have written why it ended.
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
    """Seek to the start of the last `lines` lines. The last line may be incomplete."""
    position = end = file.seek(0, os.SEEK_END)
    data = b""
    while lines > 0 and position > 0 and data.rstrip(b"\n").count(b"\n") < lines:
        size = min(_BLOCK, position)
        position = file.seek(position - size)
        data = file.read(size) + data
    kept = b"\n".join(data.removesuffix(b"\n").split(b"\n")[-lines:]) if lines > 0 else b""
    file.seek(end - len(kept) - data.endswith(b"\n") * (lines > 0))


def _replaced(path: Path, file: BinaryIO) -> bool:
    """Whether `path` has become another file, or was truncated."""
    with contextlib.suppress(FileNotFoundError):
        now, ours = path.stat(), os.fstat(file.fileno())
        return (now.st_ino, now.st_dev) != (ours.st_ino, ours.st_dev) or now.st_size < file.tell()
    return False
