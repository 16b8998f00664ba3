"""A real Slurm of one node on this machine: submit, status, logs and the end of a job whose server is a stand-in."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from tests.ports import free_port

from ziphius.errors import AlreadyRunning, InstanceError
from ziphius.launchers.slurm import Allocation, for_job
from ziphius.manager import slurm_jobs
from ziphius.manager.instance import State
from ziphius.manager.slurm import SlurmInstances

if TYPE_CHECKING:
    from conftest import SglangBench

STAND_IN = Path(__file__).parents[1] / "launchers" / "stand_in"
_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmdPort={slurmd}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
PluginDir={plugins}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=3
NodeName={host} NodeAddr=127.0.0.1 CPUs=1 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def quiet(_: object) -> None:
    pass


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def servers(bench: SglangBench) -> list[int]:
    """The processes that serve this test's model, workers that ignore all signals among them."""
    found = []
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(bench.model) in " ".join(each.cmdline()) and each.pid != os.getpid():
                found.append(each.pid)
    return found


def end_daemons(folder: Path) -> None:
    for name in ("slurmctld", "slurmd", "munged"):
        with contextlib.suppress(OSError, ValueError, psutil.NoSuchProcess):
            daemon = psutil.Process(int((folder / f"{name}.pid").read_text()))
            daemon.terminate()
            daemon.wait(10)


@pytest.fixture(scope="module")
def slurm(installed_slurm: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands talk to a cluster of this machine alone."""
    prefix = installed_slurm
    plugins = Path(Path(prefix, ".installed").read_text().strip())
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(64))
    (folder / "munge.key").chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    conf = _CONF.format(folder=folder, plugins=plugins, host=host, ctld=free_port(), slurmd=free_port())
    (folder / "slurm.conf").write_text(conf)
    env = {
        **{name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ},
        "PATH": f"{prefix}/usr/bin:{prefix}/usr/sbin:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": f"{plugins}:{plugins.parent}",
        "SLURM_CONF": str(folder / "slurm.conf"),
    }
    munge = [f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid",
             f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"]  # fmt: skip
    try:
        subprocess.run(["munged", "--force", *munge], env=env, check=True, timeout=120)
        wait_until((folder / "munge.socket").exists)
        subprocess.run(["slurmctld", "-c"], env=env, check=True, timeout=120)
        subprocess.run(["slurmd", "-d", f"{prefix}/usr/sbin/slurmstepd"], env=env, check=True, timeout=120)

        def idle() -> bool:
            told = subprocess.run(["sinfo", "-h", "-o", "%T"], env=env, capture_output=True, text=True, check=False)
            return told.stdout.strip() == "idle"

        wait_until(idle)
        yield env
    finally:
        with contextlib.suppress(OSError):
            subprocess.run(["scancel", "--user", "root"], env=env, timeout=30, check=False)
        end_daemons(folder)


@pytest.fixture
def here(slurm: dict[str, str], plain_bench: SglangBench, monkeypatch: pytest.MonkeyPatch) -> SglangBench:
    """The manager's own process talks to Slurm too."""
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    plain_bench.env.update({**slurm, "PYTHONPATH": str(STAND_IN)})
    return plain_bench


def test_a_job_is_an_instance(here: SglangBench) -> None:
    instances = SlurmInstances(here.home, here.env)
    manager = here.manager()
    allocation = Allocation(time_limit="10")
    resolved = for_job(here.resolved("--stand-in-workers", "1", api_key="the-key", drain_timeout=2), allocation)
    assert "the-key" not in instances.script(resolved, allocation)

    status = instances.submit(resolved, allocation)
    assert status.job
    assert status.state in (State.STARTING, State.RUNNING)
    wait_until(lambda: manager.status("default").state is State.RUNNING)
    running = manager.status("default")
    assert (running.kv_tokens, running.job, running.pid) == (5000, status.job, None)
    assert running.url == f"http://{socket.gethostname().partition('.')[0]}:{resolved.config.port}"
    assert manager.address("default").api_key == "the-key"
    with pytest.raises(AlreadyRunning):
        instances.submit(resolved, allocation)
    argv = ["scontrol", "show", "job", status.job]
    told = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert "Requeue=0" in told
    assert "the-key" not in told

    assert len(servers(here)) >= 3  # ziphius serve, the server and its worker
    manager.stop("default", None, quiet)
    assert servers(here) == []
    assert manager.status("default").state is State.STOPPED
    found = slurm_jobs.look(status.job)
    assert found is None or found.over
    assert any("SIGTERM received" in line for line in manager.log_tail("default", 100))
    socket.create_server(("127.0.0.1", resolved.config.port)).close()


def test_a_job_that_waits_and_is_stopped_before_it_ran(here: SglangBench) -> None:
    instances, manager = SlurmInstances(here.home, here.env), here.manager()
    allocation = Allocation(more=("--comment=it's one", "--begin", "now+1hour"))
    instances.submit(for_job(here.resolved(), allocation), allocation)
    status = manager.status("default")
    assert status.state is State.STARTING
    assert status.progress is not None
    assert (status.progress.phase, status.progress.detail) in (("queued", "BeginTime"), ("queued", "None"))
    manager.stop("default", None, quiet)
    assert manager.status("default").state is State.STOPPED


def test_a_job_that_fails_is_explained(here: SglangBench) -> None:
    instances, manager = SlurmInstances(here.home, here.env), here.manager()
    allocation, later = Allocation(), Allocation(more=("--begin=now+1hour",))
    instances.submit(for_job(here.resolved("--stand-in-fail", "memory"), allocation), allocation)
    wait_until(lambda: manager.status("default").state is State.FAILED)
    assert "Raise --mem-fraction" in (manager.status("default").reason or "")
    instances.submit(for_job(here.resolved(), later), later)
    assert "memory" in (here.home / "instances/default/node-0.log.1").read_text()
    assert manager.log_tail("default", 100) == []
    manager.stop("default", None, quiet)


def test_a_refusal_is_told_in_slurms_words(here: SglangBench) -> None:
    instances = SlurmInstances(here.home, here.env)
    allocation = Allocation(partition="nowhere")
    with pytest.raises(InstanceError, match=r"sbatch: .*partition"):
        instances.submit(for_job(here.resolved(), allocation), allocation)
    assert here.manager().status("default").state is State.STOPPED
