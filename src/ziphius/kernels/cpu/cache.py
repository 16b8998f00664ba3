"""Where compiled kernels are kept between starts. It is used before numba is imported, and imports no torch."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

_ROOM_BYTES = 64 * 1024 * 1024


def kernel_cache_folder(home: Path) -> Path | None:
    """What NUMBA_CACHE_DIR should be before numba is imported, under Ziphius' home; the folder is made.

    None when the folder cannot be written to or the disk is nearly full: numba would raise an error, but it can still
    compile again at each start. The folder's name depends on the kernels' sources, because numba looks for changes only
    in the file of a function, not in the files of the functions that it calls. It does notice another CPU or version.
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
