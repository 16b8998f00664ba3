"""Where compiled kernels are kept between starts; it imports neither numba nor torch."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

_ROOM_BYTES = 64 * 1024 * 1024


def kernel_cache_folder(home: Path) -> Path | None:
    """What NUMBA_CACHE_DIR should be before numba is imported, under Ziphius' home; the folder is made.

    None when it cannot be written to or the disk is all but full: numba would take that for an error, while
    compiling anew works. The folder's name tells the kernels' sources apart: numba looks for changes in the file of
    a function only, not in those of the functions that it calls. Another CPU or version of numba it sees itself.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    folder = home / "cache" / "kernels" / digest.hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "writable").touch()
        return folder if shutil.disk_usage(folder).free > _ROOM_BYTES else None
    except OSError:
        return None
