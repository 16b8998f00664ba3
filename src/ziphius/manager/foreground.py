"""Runs an engine that is a separate program in the foreground, without a record; none of its processes is left."""

from __future__ import annotations

import os
import signal
import subprocess
import uuid

from ziphius.errors import StartFailed
from ziphius.launchers import slurm
from ziphius.launchers.launcher import Launch
from ziphius.manager import process

DRAIN_SIGNAL = signal.Signals[f"SIG{slurm.DRAIN_SIGNAL}"]
_POLL_S = 0.2


def drain_on_signal() -> None:
    """For a process that handles SIGTERM itself."""
    signal.signal(DRAIN_SIGNAL, lambda *_: os.kill(os.getpid(), signal.SIGTERM))


def run(launch: Launch, drain_s: float, *, follows: bool = False) -> int:
    """Run it until it ends, and return its exit status. SIGTERM, SIGINT and DRAIN_SIGNAL let it finish its requests.

    `follows`: it is a part of another machine's server and ends after that server. It ignores DRAIN_SIGNAL, which
    goes to all machines, because the server needs this part to finish its requests.
    StartFailed when it cannot be started. Afterwards none of its processes is left, in any case.
    """
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, *(() if follows else (DRAIN_SIGNAL,))):
        signal.signal(number, lambda number, _: asked.append(number))
    run_id = uuid.uuid4().hex
    try:
        process.prepare(launch)
        child = subprocess.Popen(
            launch.argv,
            env={**launch.env, **dict.fromkeys(launch.marks, run_id)},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as e:
        raise StartFailed(f"cannot start {launch.argv[0]}: {e.strerror}") from e
    target = process.StartedProcess(child.pid, process.identity(child.pid) or "", run_id)
    try:
        while child.poll() is None and not asked:
            try:
                child.wait(_POLL_S)
            except subprocess.TimeoutExpired:
                continue
    finally:
        process.end_tree(target, process.SETTLE_S + (drain_s if asked else 0))
        process.clean_up(launch.cleanup)
    code = child.wait()
    return 0 if asked else code if code >= 0 else 128 - code
