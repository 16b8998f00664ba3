"""ThreadPool: threads that run jobs together; and Program, a list of jobs. The jobs themselves split the work."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ziphius.kernels.cpu.jit import PoolJob
from ziphius.kernels.cpu.memory import aligned_bytes
from ziphius.kernels.cpu.sync import RUN_PROGRAM, follow, lead, sync_words


class Program:
    """Jobs with their arguments, to be run one after another with a barrier between them.

    Arguments are numbers: sizes, and addresses of what the program's owner keeps alive. What changes from run to run
    is reached through an address.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[PoolJob, NDArray[np.int64]]] = []
        self._block: NDArray[np.int64] | None = None

    def add(self, job: PoolJob, *arguments: int) -> NDArray[np.int64]:
        """Append; returns the arguments, which may be changed between runs."""
        block = np.array(arguments, dtype=np.int64)
        self._steps.append((job, block))
        self._block = None
        return block

    @property
    def address(self) -> int:
        """Of RUN_PROGRAM's arguments. Compiles what is not compiled yet."""
        if self._block is None:
            values = [len(self._steps)]
            for job, block in self._steps:
                values += [job.address, block.ctypes.data]
            self._block = np.array(values, dtype=np.int64)
        return self._block.ctypes.data


class ThreadPool:
    """`threads` threads, the caller being the first.

    This is not OpenMP, whose idle threads spin for milliseconds on the cores that the HTTP process needs, and whose
    parallel regions cost more than a small product. These threads sleep between jobs and never need the interpreter's
    lock. Only one thread at a time may call `run`. The threads end with the pool.
    """

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise ValueError(f"a pool needs at least one thread, not {threads}")
        self.threads = threads
        self._memory = aligned_bytes(4 * sync_words(threads))
        self._sync = self._memory.data_ptr()
        self._close: weakref.finalize[..., ThreadPool] | None = None

    def run(self, program: Program) -> None:
        """Run `program` on every thread; return when all have finished it."""
        address = program.address
        if self.threads > 1 and self._close is None:
            self._start()
        lead(self._sync, self.threads, RUN_PROGRAM.address, address)

    def close(self) -> None:
        """End the threads. A later `run` starts new ones."""
        if self._close is not None:
            self._close()
            self._close = None

    def _start(self) -> None:
        self._memory.zero_()
        workers = []
        for thread in range(1, self.threads):
            # Daemons: a process must be able to end while they sleep.
            worker = threading.Thread(
                target=follow, args=(self._sync, thread, self.threads), name=f"ziphius-cpu-{thread}", daemon=True
            )
            worker.start()
            workers.append(worker)
        self._close = weakref.finalize(self, _end, self._memory, self.threads, workers)


def _end(memory: Tensor, threads: int, workers: list[threading.Thread]) -> None:
    # This keeps the memory alive: the threads read it until they have ended.
    lead(memory.data_ptr(), threads, 0, 0)
    for worker in workers:
        worker.join()


def default_threads() -> int:
    """As many threads as torch uses: OMP_NUM_THREADS, or the number of cores."""
    return torch.get_num_threads()
