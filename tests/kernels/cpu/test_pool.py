"""Threads of the CPU kernels: each task once, phases in order, and an end."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

from ziphius.kernels.cpu.jit import PoolJob
from ziphius.kernels.cpu.memory import ints64
from ziphius.kernels.cpu.pool import Program, ThreadPool
from ziphius.kernels.cpu.sync import next_task


def _count(thread: int, threads: int, sync: int, arguments: int) -> None:
    a = ints64(arguments, 3)
    seen, tasks, before = a[0], a[1], a[2]
    counts = ints64(seen, tasks)
    while True:
        task = next_task(sync, thread, threads, tasks)
        if task < 0:
            return
        # A task that another phase has not finished, or that two threads got, leaves a wrong number.
        counts[task] = before + 1 if counts[task] == before else -1


COUNT = PoolJob(_count)


def new_threads(before: set[threading.Thread]) -> set[threading.Thread]:
    """Threads since `before`: not those of pools that other tests left, which end whenever they are collected."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("ziphius-cpu-")} - before


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_each_task_once_and_phases_in_order(threads: int) -> None:
    pool, program = ThreadPool(threads), Program()
    counts = np.zeros(37, dtype=np.int64)
    phases = [program.add(COUNT, counts.ctypes.data, 37, phase) for phase in range(4)]
    for run in range(50):
        for number, arguments in enumerate(phases):
            arguments[2] = 4 * run + number
        pool.run(program)
        assert (counts == 4 * run + 4).all()
    pool.close()


def test_threads_end_when_told_and_start_again() -> None:
    before = set(threading.enumerate())
    pool, program = ThreadPool(4), Program()
    counts = np.zeros(3, dtype=np.int64)
    arguments = program.add(COUNT, counts.ctypes.data, 3, 0)
    for run in range(3):
        arguments[2] = run
        pool.run(program)
        own = new_threads(before)
        assert len(own) <= 3
        assert (counts == run + 1).all()
        pool.close()
        assert not any(thread.is_alive() for thread in own)
    pool.close()


def test_threads_end_with_the_pool() -> None:
    before = set(threading.enumerate())
    pool, program = ThreadPool(3), Program()
    counts = np.zeros(3, dtype=np.int64)
    program.add(COUNT, counts.ctypes.data, 3, 0)
    pool.run(program)
    own = new_threads(before)
    assert len(own) == 2
    del pool
    gc.collect()
    assert not any(thread.is_alive() for thread in own)


def test_an_empty_program_does_nothing() -> None:
    pool = ThreadPool(2)
    pool.run(Program())
    pool.close()


def test_two_pools_do_not_meet() -> None:
    programs = [Program(), Program()]
    counts = [np.zeros(11, dtype=np.int64) for _ in programs]
    for program, array in zip(programs, counts, strict=True):
        program.add(COUNT, array.ctypes.data, 11, 0)
    pools = [ThreadPool(2), ThreadPool(3)]
    for pool, program in zip(pools, programs, strict=True):
        pool.run(program)
    assert all((array == 1).all() for array in counts)
    for pool in pools:
        pool.close()


def test_no_threads_is_an_error() -> None:
    with pytest.raises(ValueError, match="0"):
        ThreadPool(0)
