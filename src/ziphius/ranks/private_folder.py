"""A server's own folder for its sockets: made at its start, and removed when it has ended.

A server that was killed cannot remove its folder, so the next server of the same user does. A lock tells which folders
are in use: the kernel releases it when its process ends in any way.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "ziphius-"
_LOCK = "lock"
_SOCKET_PATH_LIMIT = 90
"""Unix socket paths end near 107 bytes."""


def private_folder() -> Path:
    """A new folder that only this user can enter, with a path short enough for a socket. It is this process' own.

    Remove it with everything in it. Folders of servers that were killed are removed here.
    """
    parent = Path(tempfile.gettempdir())
    if len(str(parent)) + len(_PREFIX) + 8 > _SOCKET_PATH_LIMIT:
        parent = Path("/tmp")
    _remove_abandoned(parent)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    new = folder / f"{_LOCK}.new"
    _lock(new)  # never closed: the lock ends with the process
    new.rename(folder / _LOCK)  # locked before others can find the folder and think that it is abandoned
    return folder


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            # A folder without a lock file is not ours, or is being made at this moment.
            own = folder.lstat().st_uid == os.getuid() and not folder.is_symlink()
            if not own or not (folder / _LOCK).exists():
                continue
            descriptor = _lock(folder / _LOCK)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)


def _lock(path: Path) -> int:
    """Lock the file and return it open; closing it releases the lock. OSError when another process has locked it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
