"""What the tests take for a process' own shared memory: its files, and nobody else's."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tests.shared_memory import FOLDER, SharedMemory

# It maps one file, holds another open, and names a third after itself.
MAKER = """
import mmap, os, sys
mapped, held, folder = sys.argv[1:]
with open(mapped, "wb+") as file:
    file.truncate(4096)
    memory = mmap.mmap(file.fileno(), 4096)
file = open(held, "w")
print(os.path.join(folder, f"made-by_{os.getpid()}_x"), flush=True)
open(os.path.join(folder, f"made-by_{os.getpid()}_x"), "w").close()
print("there", flush=True)
sys.stdin.read()
"""

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="there is no /dev/shm here")


@pytest.fixture
def names() -> Iterator[list[Path]]:
    made = [FOLDER / f"test-{uuid.uuid4().hex}-{kind}" for kind in ("mapped", "held", "foreign")]
    yield made
    for path in made:
        path.unlink(missing_ok=True)


def test_files_of_a_process_are_told_from_others(names: list[Path]) -> None:
    mapped, held, foreign = names
    argv = [sys.executable, "-c", MAKER, str(mapped), str(held), str(FOLDER)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as maker:
        assert maker.stdout is not None
        named = Path(maker.stdout.readline().strip())
        names.append(named)
        assert maker.stdout.readline() == "there\n"
        foreign.touch()
        shared = SharedMemory()
        shared.look([psutil.Process(maker.pid)])
    assert shared.left() == sorted(map(str, (mapped, held, named)))
    for path in (mapped, held, named):
        path.unlink()
    assert shared.left() == []
