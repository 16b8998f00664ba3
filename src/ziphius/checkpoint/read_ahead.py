"""read_ahead: several threads read pieces of files before they are asked for.

They make large positioned reads in the files' order. The files are not mapped into memory: on a network file system a
map is slow, because it is read page by page.
"""

from __future__ import annotations

import mmap
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ziphius.errors import CheckpointError

RUN_BYTES = 256 << 20
"""The bytes of a file that one thread reads before it looks for the next part to read."""
_MOST_AT_ONCE = 64 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """Some bytes of a file."""

    name: str
    path: Path
    offset: int
    nbytes: int


def read_ahead(pieces: Sequence[Piece], threads: int, budget: int) -> Iterator[tuple[Piece, Tensor]]:
    """(piece, its bytes [nbytes] uint8) of every piece, in about their order.

    The pieces that have been read and not been taken are at most `budget` bytes, or one piece; a piece counts as taken
    when the next one is asked for. CheckpointError names a file that ends early or cannot be read.
    """
    reader = _Reader(_runs(pieces), budget)
    workers = [threading.Thread(target=reader.work, name="read-ahead", daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    left = len(pieces)
    try:
        while left:
            piece, box = reader.take()
            # Popped, so that only the caller holds the tensor while the generator waits
            yield piece, box.pop()
            reader.release(piece.nbytes)
            left -= 1
    finally:
        reader.close()
        for worker in workers:
            worker.join()


def _runs(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Groups of pieces that are neighbours in one file."""
    run: list[Piece] = []
    for piece in pieces:
        if run and (piece.path != run[0].path or piece.offset + piece.nbytes - run[0].offset > RUN_BYTES):
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


class _Reader:
    """The queue of what was read, the budget, and the parts that are still to be read; shared by the threads."""

    def __init__(self, runs: Iterator[list[Piece]], budget: int) -> None:
        self._runs = runs
        self._budget = budget
        self._used = 0
        self._closed = False
        self._changed = threading.Condition()
        self._read: queue.SimpleQueue[tuple[Piece, list[Tensor]] | BaseException] = queue.SimpleQueue()

    def work(self) -> None:
        try:
            while (run := self._next_run()) is not None:
                self._read_run(run)
        except BaseException as e:  # noqa: BLE001 - raised again where the pieces are taken
            self._read.put(e)

    def take(self) -> tuple[Piece, list[Tensor]]:
        found = self._read.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def release(self, nbytes: int) -> None:
        with self._changed:
            self._used -= nbytes
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _next_run(self) -> list[Piece] | None:
        with self._changed:
            return None if self._closed else next(self._runs, None)

    def _reserve(self, nbytes: int) -> bool:
        """Wait until the budget has room; False when the reader was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._used or self._used + nbytes <= self._budget)
            self._used += nbytes
            return not self._closed

    def _read_run(self, run: Sequence[Piece]) -> None:
        path = run[0].path
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
                for piece in run:
                    if not self._reserve(piece.nbytes):
                        return
                    self._read.put((piece, [_read(descriptor, piece)]))
            finally:
                os.close(descriptor)
        except OSError as e:
            raise CheckpointError(f"cannot read {path}: {e.strerror}") from e


def _read(descriptor: int, piece: Piece) -> Tensor:
    if not piece.nbytes:
        return torch.empty(0, dtype=torch.uint8)
    # An anonymous map goes back to the system with the tensor; malloc would keep the memory in each thread's arena.
    buffer = torch.frombuffer(mmap.mmap(-1, piece.nbytes), dtype=torch.uint8)
    view = buffer.numpy().data
    done = 0
    while done < piece.nbytes:
        count = os.preadv(descriptor, [view[done : done + _MOST_AT_ONCE]], piece.offset + done)
        if count == 0:
            raise CheckpointError(f"{piece.path} is truncated: it ends within {piece.name}")
        done += count
    return buffer
