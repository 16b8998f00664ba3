"""Jobs of Slurm: submits, looks up and ends them with Slurm's own programs."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ziphius.errors import InstanceError
from ziphius.launchers.slurm import DRAIN_SIGNAL

_ANSWER_S = 30.0
_POLL_S = 0.5
_END_S = 120.0
"""Slurm kills a job that has not ended KillWait seconds (30 by default) after it was told to end."""
_OVER = (
    "COMPLETED",
    "CANCELLED",
    "FAILED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "PREEMPTED",
    "DEADLINE",
)
ENDED_WELL = ("COMPLETED", "CANCELLED")
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """What Slurm says about a job."""

    state: str
    """Slurm's word: PENDING, RUNNING, COMPLETING, CANCELLED and others."""
    reason: str
    head: str | None
    """The first node, where the API is; None before it has nodes."""
    exit_code: str

    @property
    def over(self) -> bool:
        return self.state in _OVER


def submit(script: str, env: Mapping[str, str]) -> str:
    """Submit a job and return its number. InstanceError with Slurm's own words when it refuses."""
    told = _run(["sbatch", "--parsable"], script, env)
    return told.strip().partition(";")[0]


def look(job: str) -> SlurmJob | None:
    """None for a job that Slurm does not know (any more). InstanceError when Slurm does not answer."""
    try:
        told = _run(["scontrol", "show", "job", "--oneliner", job])
    except InstanceError as e:
        if "Invalid job id" in e.message:
            return None
        raise
    fields = dict(re.findall(r"(\w+)=(\S*)", told))
    head = fields.get("BatchHost") or None
    return SlurmJob(fields.get("JobState", "UNKNOWN"), fields.get("Reason", ""), head, fields.get("ExitCode", ""))


def end(job: str, drain_s: float, on_wait: Callable[[float], None] | None = None) -> None:
    """End a job, and return when it is over. Its servers drain for `drain_s`, then Slurm ends it."""
    started = time.monotonic()
    found = look(job)
    if found is not None and found.state == "RUNNING":
        _run(["scancel", f"--signal={DRAIN_SIGNAL}", job])
        _wait(job, started, drain_s + 10, on_wait)
    if (found := look(job)) is not None and not found.over:
        _run(["scancel", job])
        if not _wait(job, started, drain_s + _END_S, on_wait):
            raise InstanceError(f"Slurm has not ended job {job} yet; `scontrol show job {job}` tells more")


def _wait(job: str, started: float, seconds: float, on_wait: Callable[[float], None] | None) -> bool:
    while time.monotonic() < started + seconds:
        found = look(job)
        if found is None or found.over:
            return True
        if on_wait is not None:
            on_wait(time.monotonic() - started)
        time.sleep(_POLL_S)
    return False


def _run(argv: list[str], stdin: str = "", env: Mapping[str, str] | None = None) -> str:
    if shutil.which(argv[0]) is None:
        raise InstanceError(f"{argv[0]} is not here: this machine is none of a Slurm cluster")
    try:
        done = subprocess.run(
            argv, input=stdin, env=None if env is None else dict(env), capture_output=True, text=True,
            timeout=_ANSWER_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as e:
        raise InstanceError(f"{argv[0]} did not answer within {_ANSWER_S:g} s") from e
    if done.returncode:
        raise InstanceError(f"{argv[0]}: {' '.join(done.stderr.split()) or 'it failed without a word'}")
    return done.stdout
