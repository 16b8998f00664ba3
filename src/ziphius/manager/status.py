"""What an instance is doing, derived from evidence each time. It is never stored."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ziphius.errors import InstanceError
from ziphius.ipc.messages import LoadProgress
from ziphius.manager.client import ServerAnswer, base_url
from ziphius.manager.instance import Instances, Record, State
from ziphius.manager.watch import Watch, WatchOf

if TYPE_CHECKING:
    from ziphius.manager import process

_ASK_S = 3.0
_BIND_S = 15.0
"""A new process may take this long before it listens. An older one that does not listen is unhealthy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceStatus:
    """One instance, as `status --json` prints it. None: not known, or without a meaning in this state."""

    name: str
    state: State
    reason: str | None = None
    """Why it is not simply running."""
    pid: int | None = None
    """Of the main process, while it lives."""
    url: str | None = None
    host: str | None = None
    port: int | None = None
    model: str | None = None
    version: str | None = None
    uptime_s: float | None = None
    running: int | None = None
    queued: int | None = None
    generated_tokens_per_s: float | None = None
    prompt_tokens_per_s: float | None = None
    kv_tokens: int | None = None
    kv_tokens_used: int | None = None
    predicted_kv_tokens: int | None = None
    """What the plan expected of `kv_tokens`."""
    job: str | None = None
    """Slurm's number of the job that it is."""
    memory_bytes: int | None = None
    """Resident memory of the whole process tree."""
    progress: LoadProgress | None = None
    log: str | None = None


def observe(instances: Instances, name: str, watch_of: WatchOf) -> InstanceStatus:
    """STARTING, RUNNING, UNHEALTHY or STOPPING of a live process; STOPPED, FAILED or UNKNOWN otherwise."""
    try:
        record = instances.read(name)
    except InstanceError as e:
        return InstanceStatus(name=name, state=State.UNKNOWN, reason=e.message)
    if record is None:
        return InstanceStatus(name=name, state=State.STOPPED, reason="it was never started")
    config = record.resolved.config
    log = instances.log_path(name)
    known = InstanceStatus(
        name=name,
        state=State.STOPPED,
        host=config.host,
        port=config.port,
        model=config.served_model_name or config.model,
        version=record.version,
        predicted_kv_tokens=record.predicted_kv_tokens,
        log=str(log),
    )
    if record.job is not None:
        return _of_job(replace(known, job=record.job), record, log, watch_of)
    if record.pid is None:
        return known
    if record.elsewhere:
        return replace(known, state=State.UNKNOWN, reason=f"it was started on another machine, {record.hostname}")
    from ziphius.manager import process  # here: one that is stopped has no process to look at

    target = process.StartedProcess(record.pid, record.identity, record.run_id)
    watch = watch_of(record.resolved, log)
    if process.alive(target):
        live = _live(replace(known, pid=record.pid, url=base_url(config.host, config.port)), record, target, watch)
        if live.state is not State.UNHEALTHY or process.alive(target):
            return live
        # It did not answer because it has just died.
    gone = f"process {record.pid} is gone without a word: it was killed, or ended by a reboot"
    return replace(known, state=State.FAILED, reason=watch.last_words() or gone)


def _of_job(known: InstanceStatus, record: Record, log: Path, watch_of: WatchOf) -> InstanceStatus:
    from ziphius.manager import slurm_jobs

    assert record.job is not None
    try:
        job = slurm_jobs.look(record.job)
    except InstanceError as e:
        return replace(known, state=State.UNKNOWN, reason=e.message)
    watch = watch_of(record.resolved, log)
    if job is None:
        gone = f"Slurm does not know job {record.job} any more"
        return replace(known, state=State.FAILED, reason=watch.last_words() or gone)
    if job.over:
        ended = f"job {record.job} is {job.state}, exit code {job.exit_code}"
        if job.state in slurm_jobs.ENDED_WELL:
            return replace(known, state=State.STOPPED, reason=ended)
        # Slurm's reasons (time, memory, a node) count more than what the server wrote when Slurm ended it for them.
        said = watch.last_words() if job.state == "FAILED" else None
        return replace(known, state=State.FAILED, reason=said or ended)
    if job.state in slurm_jobs.WAITING or job.head is None:
        progress = LoadProgress(phase="queued", detail=job.reason)
        return replace(known, state=State.STARTING, progress=progress)
    if job.state == "COMPLETING":
        return replace(known, state=State.STOPPING)
    # The server listens on all addresses of the first node, so that node's name reaches it.
    config = replace(record.resolved.config, host=job.head)
    known = replace(known, url=base_url(job.head, config.port))
    answer = watch_of(replace(record.resolved, config=config), log).ask(_ASK_S)
    return _told(known, answer, max(0.0, time.time() - record.started_at), always_starting=not answer.listening)


def _live(known: InstanceStatus, record: Record, target: process.StartedProcess, watch: Watch) -> InstanceStatus:
    from ziphius.manager import process

    answer = watch.ask(_ASK_S)
    known = replace(known, memory_bytes=process.resident_bytes(target))
    live = _told(known, answer, max(0.0, time.time() - record.started_at))
    if live.state is State.STARTING and answer.status is None and (reason := watch.last_words()) is not None:
        # It does not listen because it has failed, and is about to end.
        return replace(live, state=State.FAILED, reason=reason)
    return live


def _told(known: InstanceStatus, answer: ServerAnswer, age_s: float, always_starting: bool = False) -> InstanceStatus:
    state, reason = (State.STARTING, None) if always_starting else _judged(answer, age_s)
    said = answer.status
    known = replace(known, state=state, reason=reason, uptime_s=age_s)
    if said is None:
        return known
    return replace(
        known,
        model=said.model or known.model,
        uptime_s=age_s if said.uptime_s is None else said.uptime_s,
        running=said.running,
        queued=said.queued,
        generated_tokens_per_s=said.generated_tokens_per_s,
        prompt_tokens_per_s=said.prompt_tokens_per_s,
        kv_tokens=said.kv_tokens,
        kv_tokens_used=said.kv_tokens_used,
        progress=said.progress if state is State.STARTING else None,
    )


def _judged(answer: ServerAnswer, age_s: float) -> tuple[State, str | None]:
    """The state of a live process, from what it answers."""
    said = answer.status
    if said is None:
        starting = not answer.listening and age_s < _BIND_S
        return (State.STARTING, None) if starting else (State.UNHEALTHY, answer.problem)
    if said.state == "ready":
        return (State.RUNNING, None) if answer.healthy else (State.UNHEALTHY, "it says ready, but /health fails")
    known = {"loading": State.STARTING, "draining": State.STOPPING}
    if said.state in known:
        return known[said.state], None
    return State.UNHEALTHY, said.error or f"it says it is {said.state}"
