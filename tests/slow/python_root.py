"""A root folder with this machine's Python and what it needs, to build an image from without a network."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

_LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip",
             "__pycache__", "lib2to3", "pydoc_data", "config-*")  # fmt: skip


def make_root(root: Path, of: Path = Path(sys.executable), programs: tuple[str, ...] = ()) -> Path:
    """A root with the Python `of`, in the place where it is here, and with `programs` of this machine."""
    python = of.resolve()
    words = "import sys, sysconfig; print('python%d.%d' % sys.version_info[:2]); print(sysconfig.get_path('stdlib'))"
    told = subprocess.run([str(python), "-I", "-c", words], capture_output=True, text=True, check=True).stdout.split()
    version, library = told[0], Path(told[1]).resolve()
    _copy(python, root)
    shutil.copytree(library, root / str(library).lstrip("/"), ignore=shutil.ignore_patterns(*_LEFT_OUT), symlinks=True)
    # Debian keeps compiled parts and pure ones together; a build of one's own may not.
    for part in (*sorted((library / "lib-dynload").glob("*.so")), python):
        for needed in _libraries(part):
            _copy(needed, root)
    for folder in ("proc", "sys", "dev", "tmp", "root", "var/tmp", "usr/bin", "bin"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "etc").mkdir(exist_ok=True)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    for name in ("python3", version):
        link = root / "usr/bin" / name
        if not link.exists():
            link.symlink_to(python)
    shell = Path("/bin/sh").resolve()
    others = [Path(found) for found in map(shutil.which, programs) if found is not None]
    for needed in (shell, *others, *_libraries(shell, *others)):
        _copy(needed, root)
    if not (root / "bin/sh").exists():
        (root / "bin/sh").symlink_to(shell)
    return root


def add_libraries(root: Path, folder: Path) -> None:
    """What the compiled modules under `folder`, a part of `root`, need of this machine's libraries."""
    found = [path for path in folder.rglob("*.so*") if path.is_file() and not path.is_symlink()]
    for start in range(0, len(found), 100):
        for needed in _libraries(*found[start : start + 100]):
            if not str(needed).startswith(str(root)):
                _copy(needed, root)


def point_to_interpreter(environment: Path, python: Path) -> None:
    """Let the virtual environment `environment`, a copy, run `python` itself, by whatever links it was made."""
    link = environment / "bin" / "python3"
    link.unlink()
    link.symlink_to(python.resolve())


def _copy(path: Path, root: Path) -> None:
    """As it is called, links followed: the dynamic linker looks libraries up by the name that `ldd` tells."""
    target = root / str(path).lstrip("/")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path.resolve(), target)


def _libraries(*programs: Path) -> list[Path]:
    done = subprocess.run(["ldd", *map(str, programs)], capture_output=True, text=True, check=False)
    found = dict.fromkeys(re.findall(r"^\s+(?:\S+ => )?(/[^\s()]+\.so[^\s()]*) \(", done.stdout, re.MULTILINE))
    return [Path(path) for path in found if Path(path).exists()]
