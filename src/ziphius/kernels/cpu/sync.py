"""How the threads of one kernel work together: a barrier, shares of the work, and the next job.

`sync` is the address of `sync_words` int32, each used word on a cache line of its own. Waiting spins first, because
the others are usually microseconds away, then yields the core, then sleeps: on a busy machine the
awaited thread may itself be waiting for this core.
"""

from __future__ import annotations

import platform
import sys
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types

from ziphius.kernels.cpu.jit import PoolJob, instruction, kernel
from ziphius.kernels.cpu.memory import ints64

_LINE = 64
_ARRIVED = 0
_GENERATION = 1 * _LINE
_SLEEPERS = 2 * _LINE
_POSTED = 3 * _LINE
_POST_SLEEPERS = 4 * _LINE
_POST = 5 * _LINE
_CURSORS = 6 * _LINE

_SPINS = 500
"""How many pauses, of about 10 ns each, come before a waiting thread yields the core."""
_BARRIER_YIELDS = 800
_POST_YIELDS = 100
"""How many times it yields, about 250 ns each on an idle machine, before it sleeps. To wake a thread takes tens of
microseconds, and more on a virtual machine: too much for a barrier. Between jobs others may need the core."""

_FUTEX_CALLS = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221, "s390x": 238}
_FUTEX = _FUTEX_CALLS.get(platform.machine(), 0) if sys.platform == "linux" else 0
_WAIT_PRIVATE = 128
_WAKE_PRIVATE = 129
_EVERYBODY = 2**31 - 1

_syscall: Any = types.ExternalFunction("syscall", types.int64(*[types.int64] * 7))
_yield: Any = types.ExternalFunction("sched_yield", types.int32())


def sync_words(threads: int) -> int:
    """int32 words that `threads` threads need."""
    return (_CURSORS + threads * _LINE) // 4


_WORD = ir.IntType(32)


@instruction(types.int32, types.intp)
def _load(context: Any, builder: Any, address: Any) -> Any:
    return builder.load_atomic(builder.inttoptr(address, _WORD.as_pointer()), "seq_cst", 4)


@instruction(types.void, types.intp, types.int32)
def _store(context: Any, builder: Any, address: Any, value: Any) -> None:
    builder.store_atomic(value, builder.inttoptr(address, _WORD.as_pointer()), "seq_cst", 4)


@instruction(types.int32, types.intp, types.int32)
def _fetch_add(context: Any, builder: Any, address: Any, value: Any) -> Any:
    """Add to a word atomically. Returns its value before the addition."""
    return builder.atomic_rmw("add", builder.inttoptr(address, _WORD.as_pointer()), value, "seq_cst")


@instruction(types.void)
def _pause(context: Any, builder: Any) -> None:
    """Tell the core that this is a waiting loop."""
    name = {"x86_64": "llvm.x86.sse2.pause"}.get(platform.machine())
    if name is not None:
        module = builder.module
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(module.globals.get(name) or ir.Function(module, kind, name), [])


@instruction(types.void, *[types.intp] * 5)
def _call(context: Any, builder: Any, function: Any, thread: Any, threads: Any, sync: Any, arguments: Any) -> None:
    """Call the PoolJob at the address `function`."""
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 4)
    builder.call(builder.inttoptr(function, kind.as_pointer()), [thread, threads, sync, arguments])


@kernel
def _wait_while(word: int, value: int, sleepers: int, yields: int) -> None:
    """Return once the word at `word` is no longer `value`."""
    for _ in range(_SPINS):
        if _load(word) != value:
            return
        _pause()
    for _ in range(yields):
        if _load(word) != value:
            return
        _yield()
    _fetch_add(sleepers, 1)
    while _load(word) == value:
        if _FUTEX:
            _syscall(_FUTEX, word, _WAIT_PRIVATE, value, 0, 0, 0)
        else:
            _yield()
    _fetch_add(sleepers, -1)


@kernel
def _wake(word: int, sleepers: int) -> None:
    if _FUTEX and _load(sleepers) > 0:
        _syscall(_FUTEX, word, _WAKE_PRIVATE, _EVERYBODY, 0, 0, 0)


@kernel
def barrier(sync: int, threads: int) -> None:
    """Wait for all threads. What each wrote before, all can read after. The shares of the work begin again."""
    if threads == 1:
        _store(sync + _CURSORS, 0)
        return
    generation = int(_load(sync + _GENERATION))
    if _fetch_add(sync + _ARRIVED, 1) == threads - 1:
        for thread in range(threads):
            _store(sync + _CURSORS + thread * _LINE, 0)
        _store(sync + _ARRIVED, 0)
        _fetch_add(sync + _GENERATION, 1)
        _wake(sync + _GENERATION, sync + _SLEEPERS)
    else:
        _wait_while(sync + _GENERATION, generation, sync + _SLEEPERS, int(_BARRIER_YIELDS))


@kernel
def next_task(sync: int, thread: int, threads: int, tasks: int) -> int:
    """A task of 0..tasks-1 that no thread has taken yet, or -1. A thread's own share comes first, then the others'.

    Between two barriers all threads must ask for the same number of tasks.
    """
    for i in range(threads):
        owner = (thread + i) % threads
        first = tasks * owner // threads
        count = tasks * (owner + 1) // threads - first
        taken = _fetch_add(sync + _CURSORS + owner * _LINE, 1)
        if taken < count:
            return int(first + taken)
    return -1


@kernel
def lead(sync: int, threads: int, job: int, arguments: int) -> None:
    """Post `job` (its address; 0: the others return from `follow`), take part in it, wait until all are done."""
    post = ints64(sync + _POST, 2)
    post[0] = job
    post[1] = arguments
    _fetch_add(sync + _POSTED, 1)
    _wake(sync + _POSTED, sync + _POST_SLEEPERS)
    if job != 0:
        _call(job, 0, threads, sync, arguments)
        barrier(sync, threads)


@kernel
def follow(sync: int, thread: int, threads: int) -> None:
    """Take part in every job that is posted from the first one on, until one is 0."""
    posted = np.int32(0)
    post = ints64(sync + _POST, 2)
    while True:
        _wait_while(sync + _POSTED, int(posted), sync + _POST_SLEEPERS, int(_POST_YIELDS))
        posted = np.int32(posted + 1)
        if post[0] == 0:
            return
        _call(post[0], thread, threads, sync, post[1])
        barrier(sync, threads)


@kernel
def rows_of_task(rows: int) -> int:
    """How many rows one task takes when work is done row by row."""
    return 1 if rows <= 64 else 8


def _run_program(thread: int, threads: int, sync: int, arguments: int) -> None:
    count = ints64(arguments, 1)[0]
    steps = ints64(arguments + 8, 2 * count)
    for i in range(count):
        if i > 0:
            barrier(sync, threads)
        _call(steps[2 * i], thread, threads, sync, steps[2 * i + 1])


RUN_PROGRAM = PoolJob(_run_program)
"""Jobs one after another, a barrier between them. Arguments: their number, then (job, its arguments) of each."""
