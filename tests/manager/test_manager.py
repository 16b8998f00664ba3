"""Start, stop, restart and status against a stand-in server, well-behaved and not."""

from __future__ import annotations

import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from ziphius.config import Resolved
from ziphius.errors import AlreadyRunning, ConfigError, InstanceError, LacksMemory, PortInUse, StartFailed
from ziphius.ipc.messages import LoadProgress
from ziphius.launchers.launcher import Launch
from ziphius.manager import process
from ziphius.manager.client import ServerAnswer
from ziphius.manager.instance import Instances, State
from ziphius.manager.manager import Manager
from ziphius.manager.status import observe
from ziphius.manager.watch import NativeWatch

if TYPE_CHECKING:
    from conftest import Bench

Quiet = Callable[[object], None]


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


class TestStart:
    def test_runs_until_stopped(self, bench: Bench, quiet: Quiet) -> None:
        manager = bench.manager()
        resolved = bench.resolved(model="stand-in", api_key="the-key")
        started = manager.start(resolved, quiet)
        status = started.status
        assert not started.already
        assert status.state is State.RUNNING
        assert status.state.exit_code == 0
        assert status.url == f"http://127.0.0.1:{resolved.config.port}"
        assert (status.model, status.running, status.queued, status.generated_tokens_per_s) == ("stand-in", 2, 1, 12.5)
        assert status.memory_bytes is not None
        assert status.memory_bytes > 1_000_000
        assert status.pid is not None
        assert os.getsid(status.pid) == status.pid
        assert any("listening" in line for line in manager.log_tail("default", 50))

        before = manager.stop("default", None, quiet)
        assert before.pid == status.pid
        assert not psutil.pid_exists(status.pid) or process.identity(status.pid) is None
        after = manager.status("default")
        assert (after.state, after.state.exit_code, after.pid) == (State.STOPPED, 3, None)
        socket.create_server(("127.0.0.1", resolved.config.port)).close()
        assert any("listening" in line for line in manager.log_tail("default", 50))

    def test_the_record_is_private_and_the_key_on_no_command_line(self, bench: Bench, quiet: Quiet) -> None:
        bench.manager().start(bench.resolved(api_key="the-key"), quiet)
        path = bench.instances.folder("default") / "record.json"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert b"the-key" in path.read_bytes()
        for pid in bench.pids():
            assert "the-key" not in " ".join(psutil.Process(pid).cmdline())

    def test_reports_progress_while_it_loads(self, bench: Bench) -> None:
        seen: list[LoadProgress] = []
        bench.manager("--load-seconds", "2").start(bench.resolved(), seen.append)
        assert {p.phase for p in seen} == {"loading"}
        assert [p.done for p in seen] == sorted(p.done for p in seen)

    def test_again_with_the_same_settings_says_so(self, bench: Bench, quiet: Quiet) -> None:
        manager, resolved = bench.manager(), bench.resolved()
        first = manager.start(resolved, quiet)
        second = manager.start(resolved, quiet)
        assert second.already
        assert second.status.pid == first.status.pid

    def test_again_with_other_settings_is_refused(self, bench: Bench, quiet: Quiet) -> None:
        manager = bench.manager()
        pid = manager.start(bench.resolved(), quiet).status.pid
        with pytest.raises(AlreadyRunning, match=rf"runs already.*pid {pid}"):
            manager.start(bench.resolved(model="other"), quiet)
        assert manager.status("default").pid == pid

    def test_two_at_once_start_one(self, bench: Bench, quiet: Quiet) -> None:
        resolved = bench.resolved()
        outcomes: list[object] = []

        def start() -> None:
            try:
                outcomes.append(bench.manager("--load-seconds", "1").start(resolved, quiet))
            except AlreadyRunning as e:
                outcomes.append(e)

        threads = [threading.Thread(target=start) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        refused = [o for o in outcomes if isinstance(o, AlreadyRunning)]
        assert len(refused) == 1
        assert "starting" in refused[0].message
        assert bench.manager().status("default").state is State.RUNNING

    def test_names_side_by_side(self, bench: Bench, quiet: Quiet) -> None:
        manager = bench.manager()
        manager.start(bench.resolved(name="a"), quiet)
        manager.start(bench.resolved(name="b"), quiet)
        manager.stop("a", None, quiet)
        states = [(s.name, s.state) for s in manager.statuses()]
        assert states == [("a", State.STOPPED), ("b", State.RUNNING)]

    @pytest.mark.parametrize("name", ["", "../x", ".hidden", "a/b", "a b", "x" * 65, "-x"])
    def test_a_name_that_is_no_folder_is_refused(self, bench: Bench, quiet: Quiet, name: str) -> None:
        with pytest.raises(ConfigError, match=r"name .*must"):
            bench.manager().start(bench.resolved(name=name), quiet)

    def test_relative_paths_are_kept_absolute(
        self, bench: Bench, quiet: Quiet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "weights").mkdir()
        (tmp_path / "mine.jinja").touch()
        monkeypatch.chdir(tmp_path)
        bench.manager().start(bench.resolved(model="weights", chat_template="mine.jinja"), quiet)
        kept = bench.record().resolved.config
        assert (kept.model, kept.chat_template) == (str(tmp_path / "weights"), str(tmp_path / "mine.jinja"))


class TestStartFails:
    def test_on_a_taken_port_naming_the_process(self, bench: Bench, quiet: Quiet) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(PortInUse, match=rf"port {port} .*pid {os.getpid()}.*--port"):
                bench.manager().start(bench.resolved(port=port), quiet)
        assert bench.manager().status("default").state is State.STOPPED

    def test_on_another_instances_port_naming_it(self, bench: Bench, quiet: Quiet) -> None:
        first = bench.resolved(name="first")
        bench.manager().start(first, quiet)
        with pytest.raises(PortInUse, match="instance first"):
            bench.manager().start(bench.resolved(name="second", port=first.config.port), quiet)

    def test_on_an_address_that_is_not_ours(self, bench: Bench, quiet: Quiet) -> None:
        with pytest.raises(InstanceError, match=r"cannot listen on 192\.0\.2\.1"):
            bench.manager().start(bench.resolved(host="192.0.2.1"), quiet)

    @pytest.mark.parametrize(
        ("habit", "reason"),
        [("error", "99 GB needed"), ("traceback", "RuntimeError: a bug"), ("kill", "SIGKILL.*memory")],
    )
    def test_when_it_dies_while_loading(self, bench: Bench, quiet: Quiet, habit: str, reason: str) -> None:
        manager = bench.manager("--load-seconds", "0.3", "--workers", "1", "--crash", habit)
        resolved = bench.resolved()
        with pytest.raises(StartFailed, match=reason):
            manager.start(resolved, quiet)
        assert bench.pids() == []
        status = manager.status("default")
        assert (status.state, status.state.exit_code) == (State.FAILED, 1)
        assert status.reason
        assert bench.manager().start(resolved, quiet).status.state is State.RUNNING

    def test_when_it_never_becomes_healthy(self, bench: Bench, quiet: Quiet) -> None:
        manager = bench.manager("--load-seconds", "60", "--ignore-term", "--stubborn-workers", "1")
        with pytest.raises(StartFailed, match="not healthy within 1 s"):
            manager.start(bench.resolved(start_timeout=1), quiet)
        assert bench.manager().status("default").state is State.STOPPED
        assert [p for p in psutil.process_iter() if _run_id(p) == bench.record().run_id] == []

    def test_when_it_cannot_be_put_on_record(self, bench: Bench, quiet: Quiet, monkeypatch: pytest.MonkeyPatch) -> None:
        children: list[Any] = []
        spawn = process.spawn
        monkeypatch.setattr(process, "spawn", lambda *a: children.append(spawn(*a)) or children[0])

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(InstanceError, match="No space left"):
            bench.manager().start(bench.resolved(), quiet)
        assert children[0].poll() is not None
        assert list(bench.instances.folder("default").glob("record.json*")) == []

    def test_when_it_is_stopped_meanwhile(self, bench: Bench) -> None:
        manager = bench.manager("--load-seconds", "60")
        stopper = threading.Thread(target=lambda: bench.manager().stop("default", None, lambda _: None))

        def stop_once(_: LoadProgress) -> None:
            if not stopper.ident:
                stopper.start()

        with pytest.raises(StartFailed, match="stopped while it was starting"):
            manager.start(bench.resolved(), stop_once)
        stopper.join()
        assert manager.status("default").state is State.STOPPED


class TestStop:
    def test_of_nothing_says_so(self, bench: Bench, quiet: Quiet) -> None:
        assert bench.manager().stop("default", None, quiet).state is State.STOPPED

    def test_ends_a_tree_that_ignores_term(self, bench: Bench, quiet: Quiet) -> None:
        manager = bench.manager("--ignore-term", "--workers", "2", "--stubborn-workers", "2")
        manager.start(bench.resolved(drain_timeout=0), quiet)
        wait_for(lambda: len(bench.pids()) == 5)
        pids = bench.pids()
        manager.stop("default", None, quiet)
        assert [pid for pid in pids if process.identity(pid) is not None] == []

    def test_waits_for_the_drain(self, bench: Bench, quiet: Quiet) -> None:
        manager = bench.manager("--drain-seconds", "2")
        manager.start(bench.resolved(drain_timeout=30), quiet)
        waits: list[float] = []
        seen: list[State] = []

        def on_wait(seconds: float) -> None:
            waits.append(seconds)
            seen.append(manager.status("default").state)

        manager.stop("default", None, on_wait)
        assert waits == sorted(waits)
        assert State.STOPPING in seen
        assert manager.status("default").state is State.STOPPED

    @pytest.mark.parametrize(("given", "patience"), [(0.0, 0.0), (5.0, 5.0), (None, 32.0), (40.0, 42.0)])
    def test_says_when_less_time_is_given_than_the_server_takes(
        self, bench: Bench, quiet: Quiet, monkeypatch: pytest.MonkeyPatch, given: float | None, patience: float
    ) -> None:
        """Running requests end by themselves at the server's own deadline; before that a second signal ends them."""
        manager = bench.manager()
        manager.start(bench.resolved(drain_timeout=30), quiet)
        taken: list[float] = []
        end_tree = process.end_tree

        def end_now(target: process.StartedProcess, patience_s: float, on_wait: Quiet) -> None:
            taken.append(patience_s)
            end_tree(target, 0, on_wait)

        monkeypatch.setattr(process, "end_tree", end_now)
        manager.stop("default", given, quiet)
        assert taken == [patience]

    def test_while_another_command_is_at_work_names_it(self, bench: Bench, quiet: Quiet) -> None:
        bench.manager().start(bench.resolved(), quiet)
        with bench.instances.lock("default", "restart"):
            other = Instances(bench.home)
            with pytest.raises(InstanceError, match=rf"restart, pid {os.getpid()}"), other.lock("default", "stop", 0.1):
                pass

    def test_of_another_machines_instance_is_refused(self, bench: Bench, quiet: Quiet) -> None:
        manager = bench.manager()
        manager.start(bench.resolved(), quiet)
        here = bench.record().hostname
        bench.tampered(hostname="node7")
        status = manager.status("default")
        assert (status.state, status.state.exit_code) == (State.UNKNOWN, 4)
        with pytest.raises(InstanceError, match="node7"):
            manager.stop("default", None, quiet)
        with pytest.raises(InstanceError, match="cannot tell"):
            manager.start(bench.resolved(), quiet)
        bench.tampered(hostname=here)
        with pytest.raises(InstanceError, match="runs on this machine"):
            manager.forget("default")
        bench.tampered(hostname="node7")
        manager.forget("default")
        assert manager.status("default").state is State.STOPPED


class TestRestart:
    def test_keeps_the_settings_but_those_given(self, bench: Bench, quiet: Quiet) -> None:
        manager = bench.manager()
        first = manager.start(bench.resolved(model="a", api_key="k"), quiet).status
        second = manager.restart("default", {"model": "b", "port": None}, quiet, quiet).status
        assert second.pid != first.pid
        assert (second.model, second.port) == ("b", first.port)
        record = bench.record()
        assert record.resolved.config.api_key == "k"
        assert record.resolved.origins["model"] == "flag"
        assert record.resolved.origins["host"] == "default"

    def test_after_a_stop(self, bench: Bench, quiet: Quiet) -> None:
        manager = bench.manager()
        port = manager.start(bench.resolved(), quiet).status.port
        manager.stop("default", None, quiet)
        assert manager.restart("default", {}, quiet, quiet).status.port == port

    def test_of_what_never_was_is_refused(self, bench: Bench, quiet: Quiet) -> None:
        with pytest.raises(InstanceError, match="use start"):
            bench.manager().restart("default", {}, quiet, quiet)

    def test_with_a_wrong_value_leaves_it_running(self, bench: Bench, quiet: Quiet) -> None:
        manager = bench.manager()
        pid = manager.start(bench.resolved(), quiet).status.pid
        with pytest.raises(ConfigError, match="page_size"):
            manager.restart("default", {"page_size": "0"}, quiet, quiet)
        assert manager.status("default").pid == pid

    def test_that_cannot_start_leaves_it_running(self, bench: Bench, quiet: Quiet) -> None:
        pid = bench.manager().start(bench.resolved(), quiet).status.pid

        def launcher(resolved: Resolved, env: Mapping[str, str]) -> Launch:
            raise ConfigError("7 ranks cannot share this model")

        manager = Manager(bench.home, launcher, os.environ)
        with pytest.raises(ConfigError, match="7 ranks"):
            manager.restart("default", {"tp": "7"}, quiet, quiet)
        with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(PortInUse):
            bench.manager().restart("default", {"port": str(taken.getsockname()[1])}, quiet, quiet)
        assert (manager.status("default").state, manager.status("default").pid) == (State.RUNNING, pid)

    def test_may_need_the_memory_of_what_runs(self, bench: Bench, quiet: Quiet) -> None:
        bench.manager().start(bench.resolved(), quiet)
        launch, notes = bench.launcher(), list[str]()

        def launcher(resolved: Resolved, env: Mapping[str, str]) -> Launch:
            if manager.status("default").state.alive:
                raise LacksMemory("the memory is taken")
            return replace(launch(resolved, env), notes=("planned",))

        manager = Manager(bench.home, launcher, os.environ, notes.append)
        assert manager.restart("default", {}, quiet, quiet).status.state is State.RUNNING
        assert notes == ["planned"]


class TestStatus:
    def test_of_what_never_was(self, bench: Bench) -> None:
        status = bench.manager().status("default")
        assert (status.state, status.state.exit_code) == (State.STOPPED, 3)

    def test_of_a_broken_record(self, bench: Bench, quiet: Quiet) -> None:
        folder = bench.instances.folder("default")
        folder.mkdir(parents=True)
        (folder / "record.json").write_text('{"name": "default"')
        status = bench.manager().status("default")
        assert (status.state, status.state.exit_code) == (State.UNKNOWN, 4)
        with pytest.raises(InstanceError, match="cannot tell"):
            bench.manager().start(bench.resolved(), quiet)
        (folder / "record.json").unlink()

    def test_of_a_sick_server(self, bench: Bench, quiet: Quiet) -> None:
        with pytest.raises(StartFailed):
            bench.manager("--health", "500").start(bench.resolved(start_timeout=1), quiet)
        thread = threading.Thread(target=_start_and_ignore, args=(bench,))
        thread.start()
        wait_for(lambda: bench.manager().status("default").state is State.UNHEALTHY)
        assert bench.manager().status("default").state.exit_code == 4
        bench.manager().stop("default", 0, quiet)
        thread.join()

    def test_a_young_server_that_failed_and_is_about_to_end_is_not_starting(self, bench: Bench, quiet: Quiet) -> None:
        """Its port is closed already, and its process still there."""

        class Closed(NativeWatch):
            def ask(self, timeout_s: float) -> ServerAnswer:
                return ServerAnswer(problem="nothing listens", listening=False)

        bench.manager().start(bench.resolved(), quiet)
        assert observe(bench.instances, "default", Closed).state is State.STARTING
        with bench.instances.log_path("default").open("a") as log:
            log.write("2026-01-01 00:00:00 error   frontend.serve: the engine process 1 was ended by SIGKILL\n")
        status = observe(bench.instances, "default", Closed)
        assert (status.state, status.reason) == (State.FAILED, "the engine process 1 was ended by SIGKILL")

    def test_tells_stopping_by_its_own_end_from_failing(self, bench: Bench, quiet: Quiet) -> None:
        bench.manager().start(bench.resolved(), quiet)
        pid = bench.record().pid
        assert pid is not None
        bench.instances.mark_stopped("default", pid + 1)
        assert bench.record().pid == pid
        bench.instances.mark_stopped("default", pid)
        assert bench.manager().status("default").state is State.STOPPED
        bench.tampered(pid=pid)


def _start_and_ignore(bench: Bench) -> None:
    with pytest.raises(StartFailed):
        bench.manager("--health", "500").start(bench.resolved(), lambda _: None)


def _run_id(candidate: psutil.Process) -> str | None:
    try:
        return candidate.environ().get(process.RUN_ID)
    except (psutil.Error, OSError):
        return None


class TestFaults:
    def test_kill_of_the_main_process(self, bench: Bench, quiet: Quiet) -> None:
        manager = bench.manager("--workers", "1", "--stubborn-workers", "1")
        resolved = bench.resolved()
        pid = manager.start(resolved, quiet).status.pid
        assert pid is not None
        wait_for(lambda: len(bench.pids()) == 3)
        orphans = [p for p in bench.pids() if p != pid]
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: process.identity(pid) is None)
        status = manager.status("default")
        assert (status.state, status.state.exit_code, status.pid) == (State.FAILED, 1, None)
        assert "killed" in (status.reason or "")
        assert manager.start(resolved, quiet).status.state is State.RUNNING
        assert [p for p in orphans if process.identity(p) is not None] == []

    def test_stop_after_a_kill_ends_what_is_left(self, bench: Bench, quiet: Quiet) -> None:
        manager = bench.manager("--stubborn-workers", "2")
        pid = manager.start(bench.resolved(), quiet).status.pid
        assert pid is not None
        wait_for(lambda: len(bench.pids()) == 3)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: process.identity(pid) is None)
        assert manager.stop("default", None, quiet).state is State.FAILED
        assert [p for p in psutil.process_iter() if _run_id(p) == bench.record().run_id] == []
        assert manager.status("default").state is State.STOPPED

    def test_a_stale_pid_of_another_program_is_never_signalled(
        self, bench: Bench, quiet: Quiet, stranger: psutil.Popen
    ) -> None:
        manager, resolved = bench.manager(), bench.resolved()
        manager.start(resolved, quiet)
        manager.stop("default", None, quiet)
        bench.tampered(pid=stranger.pid)
        assert manager.status("default").state is State.FAILED
        assert manager.stop("default", None, quiet).state is State.FAILED
        bench.tampered(pid=stranger.pid)
        assert manager.start(resolved, quiet).status.state is State.RUNNING
        assert stranger.poll() is None

    def test_a_stopped_process_is_ended(self, bench: Bench, quiet: Quiet) -> None:
        manager = bench.manager()
        pid = manager.start(bench.resolved(drain_timeout=0), quiet).status.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        manager.stop("default", None, quiet)
        assert process.identity(pid) is None

    def test_a_full_disk_under_the_log(self, bench: Bench, quiet: Quiet) -> None:
        log = bench.instances.log_path("default")
        log.parent.mkdir(parents=True)
        log.symlink_to("/dev/full")
        manager = bench.manager()
        resolved = bench.resolved()
        assert manager.start(resolved, quiet).status.state is State.RUNNING
        assert log.is_symlink()
        for _ in range(10):  # each request is logged, and no line finds room
            assert manager.status("default").state is State.RUNNING
        manager.stop("default", None, quiet)
        log.unlink()
