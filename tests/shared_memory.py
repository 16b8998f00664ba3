"""Files in shared memory that given processes have made: the folder is the whole machine's, others' come and go."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path

import psutil

FOLDER = Path("/dev/shm")


class SharedMemory:
    """Use as: `look` while the processes live, `left` when they have ended."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}
        """When each process began, by its number."""
        self._used: set[Path] = set()

    def look(self, processes: Iterable[psutil.Process]) -> None:
        """Note what they have open or mapped, and their numbers."""
        if not FOLDER.is_dir():
            return
        for process in processes:
            with contextlib.suppress(psutil.Error):
                self._since[str(process.pid)] = process.create_time()
                paths = [file.path for file in process.open_files()] + [part.path for part in process.memory_maps()]
                self._used |= {path for path in map(Path, paths) if path.parent == FOLDER}

    def left(self) -> list[str]:
        """What is still there of that, and of what is named after the processes (torch_4711_0), since they began."""
        found = {path for path in self._used if path.exists()}
        if FOLDER.is_dir():
            found |= {path for path in FOLDER.iterdir() if self._is_named_after_one(path)}
        return sorted(map(str, found))

    def _is_named_after_one(self, path: Path) -> bool:
        with contextlib.suppress(OSError):  # another program's may be gone by now
            changed = path.stat().st_ctime
            numbers = re.split(r"[^0-9A-Za-z]+", path.name)
            return any(self._since.get(number, changed + 1) <= changed for number in numbers)
        return False
