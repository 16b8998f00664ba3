"""The use cases that change instances: start, stop, restart, forget. Only `process` sends signals."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ziphius.config import Resolved, ServeConfig, override
from ziphius.errors import AlreadyRunning, InstanceError, LacksMemory, PortInUse, StartFailed
from ziphius.installation import package_version
from ziphius.ipc.messages import LoadProgress
from ziphius.launchers.launcher import Launcher
from ziphius.manager import logs, process, release, slurm_jobs
from ziphius.manager.client import ServerAnswer
from ziphius.manager.instance import Record, State
from ziphius.manager.observer import Observer
from ziphius.manager.status import InstanceStatus
from ziphius.manager.watch import Watch, WatchOf, watch_of

_POLL_S = 0.2
_ASK_TIMEOUT_S = 2.0
_STOP_S = 90.0
"""A stop takes less time than this after the processes have ended, while it waits for the GPUs' memory and the port."""


@dataclass(frozen=True, slots=True)
class Started:
    """A successful start. `already`: the instance ran with the same settings, so nothing was started."""

    status: InstanceStatus
    already: bool


OnProgress = Callable[[LoadProgress], None]
OnWait = Callable[[float], None]
"""Called with the seconds that a stop has waited."""
OnNote = Callable[[str], None]
"""Called with each note of a launcher."""


class Manager(Observer):
    """Starts and stops the instances of one home folder. `launcher` says which command an instance is."""

    def __init__(
        self,
        home: Path,
        launcher: Launcher,
        env: Mapping[str, str],
        on_note: OnNote = lambda _line: None,
        watch_of: WatchOf = watch_of,
    ) -> None:
        super().__init__(home, watch_of)
        self._launcher = launcher
        self._env = env
        self._on_note = on_note

    def start(self, resolved: Resolved, on_progress: OnProgress) -> Started:
        """Start an instance and wait until it is healthy.

        AlreadyRunning, PortInUse, StartFailed (its message is the reason) or another InstanceError: then
        nothing that this call started is left running. The same holds when the wait is interrupted.
        """
        resolved = _with_absolute_paths(resolved)
        name = resolved.config.name
        with self._instances.lock(name, "start"):
            status = self.status(name)
            if status.state is State.RUNNING and self._same_config(resolved):
                return Started(status, already=True)
            child, record = self._launch(resolved)
        self._wait_until_healthy(child, record, on_progress)
        return Started(self.status(name), already=False)

    def stop(self, name: str, drain_s: float | None, on_wait: OnWait) -> InstanceStatus:
        """End an instance's whole process tree. Returns the status from before, when no process of it is left.

        `drain_s` (default: the instance's own) is how long running requests may go on. InstanceError when
        the instance runs on another machine, or a process cannot be ended.
        """
        with self._instances.lock(name, "stop"):
            return self._stop(name, drain_s, on_wait)

    def restart(self, name: str, flags: Mapping[str, Any], on_wait: OnWait, on_progress: OnProgress) -> Started:
        """Stop, then start with the settings on record and `flags` on top. InstanceError without a record.

        A restart that is known to fail is refused before anything is stopped.
        """
        with self._instances.lock(name, "restart"):
            record = self._instances.read(name)
            if record is None:
                raise InstanceError(f"no instance {name} was ever started here; use start")
            resolved = _with_absolute_paths(override(record.resolved, flags))
            self._look_ahead(resolved, record.resolved.config)
            self._stop(name, None, on_wait)
            child, record = self._launch(resolved)
        self._wait_until_healthy(child, record, on_progress)
        return Started(self.status(name), already=False)

    def forget(self, name: str) -> None:
        """Record that an instance does not run, without a signal: for an instance whose machine is gone."""
        with self._instances.lock(name, "stop"):
            record = self._instances.read(name)
            if record is not None and not record.elsewhere and self.status(name).state.alive:
                raise InstanceError(f"instance {name} runs on this machine; stop it without --forget")
            if record is not None:
                self._instances.write(replace(record, pid=None, job=None))

    def _same_config(self, resolved: Resolved) -> bool:
        record = self._instances.read(resolved.config.name)
        return record is not None and record.resolved.config == resolved.config

    def _launch(self, resolved: Resolved) -> tuple[subprocess.Popen[bytes], Record]:
        """The part of a start that needs the lock, which the caller holds."""
        config = resolved.config
        self._refuse_live(config.name)
        self._end_leftovers(config.name)
        self._refuse_taken_port(config)
        launch = self._launcher(resolved, self._env)
        for line in launch.notes:
            self._on_note(line)
        log = self.log_path(config.name)
        logs.rotate(log)
        run_id = uuid.uuid4().hex
        child = process.spawn(launch, log, run_id)
        try:
            record = Record(
                name=config.name,
                resolved=resolved,
                pid=child.pid,
                identity=process.identity(child.pid) or "",
                run_id=run_id,
                hostname=socket.gethostname(),
                argv=launch.argv,
                started_at=time.time(),
                version=package_version(),
                cleanup=launch.cleanup,
                predicted_kv_tokens=launch.predicted_kv_tokens,
            )
            self._instances.write(record)
            # The process learns only now what to do, so that a server without a record cannot be left behind.
            process.hand_over(child, launch)
        except BaseException:
            process.kill(child)
            raise
        return child, record

    def _look_ahead(self, resolved: Resolved, before: ServeConfig) -> None:
        """Refuse an impossible launch while the server with the settings `before` still has its memory and its port."""
        with contextlib.suppress(LacksMemory):  # the old server's memory may suffice: the launch plans again
            self._launcher(resolved, self._env)
        if resolved.config.port != before.port:
            self._refuse_taken_port(resolved.config)

    def _refuse_live(self, name: str) -> None:
        status = self.status(name)
        if status.state is State.UNKNOWN:
            raise InstanceError(f"cannot tell whether instance {name} runs: {status.reason}")
        if status.state is State.RUNNING:
            raise AlreadyRunning(
                f"instance {name} runs already, with other settings, at {status.url} (pid {status.pid}); "
                "change it with restart, or start a second one with another --name and --port"
            )
        if status.state.alive:
            raise AlreadyRunning(f"instance {name} runs already: it is {status.state} (pid {status.pid}); see status")

    def _end_leftovers(self, name: str) -> None:
        """Workers that outlived a killed main process would keep their memory."""
        record = self._instances.read(name)
        if record is not None and record.pid is not None:
            self._end(record, process.SETTLE_S)

    def _refuse_taken_port(self, config: ServeConfig) -> None:
        from ziphius.frontend.listener import bind  # here: it is slow to import, and only a start needs it

        try:
            bind(config.host, config.port).close()
        except PortInUse as e:
            owner = self._instance_on(config.port) or process.port_owner(config.port) or "another program"
            text = f"port {config.port} on {config.host} is taken by {owner}; choose another with --port"
            raise PortInUse(text, param="port") from e

    def _instance_on(self, port: int) -> str | None:
        for name in self._instances.names():
            status = self.status(name)
            if status.state.alive and status.port == port:
                return f"instance {name} (pid {status.pid})"
        return None

    def _wait_until_healthy(self, child: subprocess.Popen[bytes], record: Record, on_progress: OnProgress) -> None:
        config = record.resolved.config
        watch = self._watch(record)
        deadline = time.monotonic() + config.start_timeout
        try:
            while time.monotonic() < deadline:
                if child.poll() is not None:
                    raise self._died(record, child.returncode)
                answer = watch.ask(_ASK_TIMEOUT_S)
                if answer.healthy:
                    return
                if answer.status is not None and answer.status.progress is not None:
                    on_progress(answer.status.progress)
                time.sleep(_POLL_S)
            raise StartFailed(f"it was not healthy within {config.start_timeout:g} s" + _said(answer))
        except BaseException:
            self._undo(child, record)
            raise

    def _died(self, record: Record, code: int) -> StartFailed:
        # If a stop ended it, the stop holds the lock until it has changed the record.
        with self._instances.lock(record.name, "start", _STOP_S):
            now = self._instances.read(record.name)
        if now is None or now.pid != record.pid:
            return StartFailed("it was stopped while it was starting")
        return StartFailed(self._watch(record).last_words() or process.describe_exit(code))

    def _watch(self, record: Record) -> Watch:
        return self._watch_of(record.resolved, self.log_path(record.name))

    def _undo(self, child: subprocess.Popen[bytes], record: Record) -> None:
        """Leave nothing running. A child that died by itself stays on record, so that its status says why it failed."""
        died = child.poll() is not None
        self._end(record, process.SETTLE_S)
        child.wait()
        if not died:
            with self._instances.lock(record.name, "start"):
                self._instances.mark_stopped(record.name, child.pid)

    def _end(self, record: Record, patience_s: float, on_wait: OnWait | None = None) -> None:
        """End all that a start has started, and wait until the GPUs' memory and the port are free."""
        from ziphius.planner.probe import probe_host  # here: `status` does without it

        target = _target(record)
        held = release.held_memory((member.pid for member in process.tree(target)), probe_host)
        process.end_tree(target, patience_s, on_wait)
        process.clean_up(record.cleanup)
        config = record.resolved.config
        release.wait_for_memory(held, probe_host)
        release.wait_for_port(config.host, config.port)

    def _stop(self, name: str, drain_s: float | None, on_wait: OnWait) -> InstanceStatus:
        before = self.status(name)
        record = self._instances.read(name)
        if record is not None and record.job is not None:
            drain = record.resolved.config.drain_timeout if drain_s is None else drain_s
            slurm_jobs.end(record.job, drain, on_wait)
            self._instances.write(replace(record, job=None))
            return before
        if record is None or record.pid is None:
            return before
        if record.elsewhere:
            raise InstanceError(
                f"instance {name} was started on {record.hostname}: stop it there (or, if that machine is gone, "
                "drop its record with stop --forget)"
            )
        drain = record.resolved.config.drain_timeout if drain_s is None else drain_s
        # A second signal cuts the server's own drain time short. An idle server ends by itself, and needs none.
        cut_short = drain < record.resolved.config.drain_timeout and (before.running or before.queued)
        self._end(record, drain if cut_short else drain + process.SETTLE_S, on_wait)
        self._instances.write(replace(record, pid=None))
        return before


def _target(record: Record) -> process.StartedProcess:
    assert record.pid is not None
    return process.StartedProcess(record.pid, record.identity, record.run_id)


def _said(answer: ServerAnswer) -> str:
    return f": {answer.problem}" if answer.problem else ""


def _with_absolute_paths(resolved: Resolved) -> Resolved:
    """Make relative paths absolute, also a local model's: a restart from another folder must find them."""
    from ziphius.checkpoint.locate import local_path
    from ziphius.launchers.engines import with_absolute_paths  # here: `status` does without these

    resolved = with_absolute_paths(resolved)
    path = local_path(resolved.config.model)
    return resolved if path is None else replace(resolved, config=replace(resolved.config, model=str(path)))
