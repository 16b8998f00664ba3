"""Ports for the servers that tests start: no two test processes of a machine are given the same one."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Below the ports that Linux gives to whoever asks for any port (from 32768 on): those go to the clients of every
# process, so one of them may be taken between the moment a test chooses it and the moment its server binds it.
_FIRST, _END, _BLOCK = 20_000, 32_000, 200
_CLAIMS = Path(tempfile.gettempdir()) / f"ports-of-ziphius-tests-{os.getuid()}"


def free_port() -> int:
    """A port which nobody listens on, and which no other process of tests will choose while this one lives."""
    return next(_PORTS)


def _ports() -> Iterator[int]:
    """The free ports of one block, again and again; the block belongs to this process until it ends."""
    _CLAIMS.mkdir(exist_ok=True)
    blocks = list(range(_FIRST, _END, _BLOCK))
    # Not the generator that the tests seed: it would try the blocks in the same order in every process.
    random.SystemRandom().shuffle(blocks)
    for first in blocks:
        with (_CLAIMS / str(first)).open("w") as claim:
            try:
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            while True:
                yield from filter(_is_free, range(first, first + _BLOCK))
    raise RuntimeError(f"all blocks of ports are taken: see the locks in {_CLAIMS}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


_PORTS = _ports()
