"""Instances that are jobs of Slurm: submits one, and says what it is doing. `Manager.stop` ends one."""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ziphius.config import Resolved
from ziphius.errors import AlreadyRunning, InstanceError
from ziphius.installation import package_version
from ziphius.launchers.slurm import Allocation, batch_script
from ziphius.manager import logs, slurm_jobs
from ziphius.manager.instance import Instances, Record
from ziphius.manager.status import InstanceStatus, observe
from ziphius.manager.watch import watch_of


class SlurmInstances:
    """Every node must see the folder `home`, as is usual on a cluster."""

    def __init__(self, home: Path, env: Mapping[str, str]) -> None:
        self._instances = Instances(home)
        self._env = env

    def script(self, resolved: Resolved, allocation: Allocation) -> str:
        return batch_script(resolved, allocation, self._instances.folder(resolved.config.name), self._env)

    def submit(self, resolved: Resolved, allocation: Allocation) -> InstanceStatus:
        """Submit a job and return its status. After AlreadyRunning or another InstanceError nothing was submitted."""
        name = resolved.config.name
        with self._instances.lock(name, "slurm"):
            before = observe(self._instances, name, watch_of)
            if before.state.alive:
                raise AlreadyRunning(f"instance {name} runs already: it is {before.state}; see status")
            _make_way(self._instances.log_path(name))
            env = {k: v for k, v in self._env.items() if not k.startswith("ZIPHIUS_")}
            if resolved.config.api_key is not None:
                env["ZIPHIUS_API_KEY"] = resolved.config.api_key
            job = slurm_jobs.submit(self.script(resolved, allocation), env)
            record = Record(
                name=name,
                resolved=resolved,
                pid=None,
                identity="",
                run_id=uuid.uuid4().hex,
                hostname=socket.gethostname(),
                argv=(),
                started_at=time.time(),
                version=package_version(),
                job=job,
            )
            try:
                self._instances.write(record)
            except InstanceError:
                slurm_jobs.end(job, 0)
                raise
        return replace(observe(self._instances, name, watch_of), job=job)


def _make_way(log: Path) -> None:
    """The first node's log is the instance's. Those of the last run are kept, as .1."""
    for old in (log, *log.parent.glob("node-*.log")):
        if not old.is_symlink():
            logs.rotate(old)
    log.unlink(missing_ok=True)
    log.symlink_to("node-0.log")
