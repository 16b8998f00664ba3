"""The engine's processes as the frontend sees them: spawned with a spec, watched and ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping

import psutil

from ziphius.ranks.spec import WorkerSpec, encode_spec, worker_command, worker_environment

_PATIENCE_S = 5.0


class EngineProcess:
    """One rank's process. It ends when its stdin is closed, so it cannot outlive this process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        """Use `spawn`."""
        self._process = process

    @classmethod
    async def spawn(cls, spec: WorkerSpec, environment: Mapping[str, str]) -> EngineProcess:
        """Start a rank, whose output goes where this process' output goes. OSError when it cannot be started."""
        process = await asyncio.create_subprocess_exec(
            *worker_command(),
            stdin=asyncio.subprocess.PIPE,
            env={**environment, **worker_environment(spec.config)},
            pass_fds=[] if spec.store_fd < 0 else [spec.store_fd],
        )
        worker = cls(process)
        assert process.stdin is not None
        process.stdin.write(encode_spec(spec))
        with contextlib.suppress(ConnectionError):  # it has died already: `wait` tells how
            await process.stdin.drain()
        return worker

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> tuple[int, str]:
        """Wait until it has ended. Returns (exit code, below 0 for a signal; a description in words)."""
        code = await self._process.wait()
        return code, describe_exit(self.pid, code)

    async def stop(self) -> None:
        """Wait until it has ended. If it does not end in time, its stdin is closed, and then it is killed."""
        assert self._process.stdin is not None
        if await self._ended():
            return
        self._process.stdin.close()
        if not await self._ended():
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def _ended(self) -> bool:
        """Wait a few seconds. Returns whether it has ended."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), _PATIENCE_S)
            return True
        return False


def describe_exit(pid: int, returncode: int) -> str:
    """A description for a person. `returncode` is negative for a signal."""
    if returncode >= 0:
        return f"the engine process {pid} ended with exit code {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    hint = "; the kernel does that when memory runs out" if -returncode == signal.SIGKILL else ""
    return f"the engine process {pid} was ended by {name}{hint}"


def kill_children() -> None:
    """Kill every process below this one, so that nothing is left running, whatever started it."""
    for child in psutil.Process(os.getpid()).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
