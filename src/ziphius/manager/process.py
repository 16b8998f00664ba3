"""Processes: how they are identified, spawned and ended with all their children. No other module sends signals."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from ziphius.errors import InstanceError, StartFailed
from ziphius.launchers.launcher import RUN_ID, Launch

# Waits for a line on stdin and then becomes the command. It ends when stdin closes without a line.
_HELD_BACK = ("/bin/sh", "-c", 'IFS= read -r _ && exec "$@" </dev/null', "ziphius-start")
_POLL_S = 0.1
SETTLE_S = 2.0
"""How long the main process may take to end its last requests after a drain, and its workers after that."""
_KILL_S = 15.0
_CLEANUP_S = 60.0
# Docker's messages. If its daemon cannot be reached, no container was started, or all ended with the daemon.
_NOTHING_LEFT = re.compile(r"No such container|connect to the docker (?:daemon|API)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class StartedProcess:
    """A started process, with what tells it from a later process with its pid, and the mark of its children."""

    pid: int
    identity: str
    run_id: str


def identity(pid: int) -> str | None:
    """What tells this process from every other process that ever has its pid. None when it is gone or a zombie.

    On Linux this is the boot's id with the start time in clock ticks. psutil's creation time is in wall-clock
    seconds and moves when the clock is set, so that a live server would look like another process.
    """
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        created = str(process.create_time())
        with contextlib.suppress(FileNotFoundError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            # The command's name is in brackets and may hold spaces, so the fields are counted after the last bracket.
            created = f"{boot}:{Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
        return created
    except (psutil.NoSuchProcess, ProcessLookupError):
        return None


def alive(target: StartedProcess) -> bool:
    return identity(target.pid) == target.identity


def spawn(launch: Launch, log: Path, run_id: str) -> subprocess.Popen[bytes]:
    """Start `launch` in a session of its own, stdout and stderr appended to `log`. It waits for `hand_over`.

    StartFailed when the program, the log or a file that it needs cannot be opened; then nothing runs.
    """
    held_back = _HELD_BACK if launch.stdin is None else ()
    try:
        prepare(launch)
        with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as output:
            return subprocess.Popen(
                (*held_back, *launch.argv),
                env={**launch.env, **dict.fromkeys(launch.marks, run_id)},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    except OSError as e:
        raise StartFailed(f"cannot start {launch.argv[0]}, logging to {log}: {e.strerror}") from e


def hand_over(process: subprocess.Popen[bytes], launch: Launch) -> None:
    """Give the process what it waits for. If it has died already, whoever watches its exit notices."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
        pipe.write(b"\n" if launch.stdin is None else launch.stdin)


def prepare(launch: Launch) -> None:
    """Make the folders and private files that a process needs."""
    for folder in launch.folders:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for file in launch.files:
        file.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.path.unlink(missing_ok=True)  # an old file might be readable by others
        with open(os.open(file.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as opened:
            opened.write(file.text)


def clean_up(command: tuple[str, ...]) -> None:
    """End what outlives the process tree, by the launch's own command. InstanceError when the command fails."""
    if not command:
        return
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CLEANUP_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise InstanceError(f"{' '.join(command)}: {e}") from e
    if done.returncode and not _NOTHING_LEFT.search(done.stderr):
        raise InstanceError(f"{' '.join(command)}: {done.stderr.strip()}")


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a child that is not on record yet."""
    process.kill()
    process.wait()


def describe_exit(code: int) -> str:
    """A person's words for a child's exit status."""
    if code >= 0:
        return f"it exited with status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = "; if nobody did, the kernel may have run out of memory (see dmesg)" if -code == signal.SIGKILL else ""
    return f"it was ended by {name}{hint}"


def tree(target: StartedProcess) -> list[psutil.Process]:
    """All living processes of this start: descendants, the main process' session, and whatever carries its mark.

    Workers whose parent was killed have a new parent and may have left the session. The mark still finds them.
    """
    found: dict[int, psutil.Process] = {}
    main_alive = alive(target)
    if main_alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            main = psutil.Process(target.pid)
            found = {process.pid: process for process in [main, *main.children(recursive=True)]}
    for process in psutil.process_iter():
        in_session = main_alive and _in_session(process, target)
        if in_session or _carries(process, target.run_id):
            found.setdefault(process.pid, process)
    return [process for process in found.values() if _lives(process)]


def resident_bytes(target: StartedProcess) -> int:
    """Resident memory of the main process and its descendants; pages they share count for each."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        main = psutil.Process(target.pid)
        for process in [main, *main.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                total += process.memory_info().rss
    return total


def end_tree(target: StartedProcess, patience_s: float, on_wait: Callable[[float], None] | None = None) -> None:
    """End every process of this start, and return when none is left. Nothing else is ever signalled.

    TERM to the main process, which drains by itself; after `patience_s` a second TERM (no more waiting), KILL
    for it, and KILL for what is left of its tree. `on_wait` hears the seconds waited. InstanceError when a
    process may not be signalled, or does not die (it hangs in the kernel).
    """
    members = {process.pid: process for process in tree(target)}
    try:
        if (main := members.get(target.pid)) is not None and alive(target):
            _end_main(main, patience_s, on_wait)
        _end_rest(target, members)
    except psutil.AccessDenied as e:
        raise InstanceError(f"not permitted to signal process {e.pid}; it belongs to another user") from e


def _end_main(main: psutil.Process, patience_s: float, on_wait: Callable[[float], None] | None) -> None:
    started = time.monotonic()
    # A process that gets two signals at once may see only one of them.
    for limit_s in (max(patience_s, _POLL_S), SETTLE_S):
        _signal(main, signal.SIGTERM)
        deadline = time.monotonic() + limit_s
        while _lives(main) and time.monotonic() < deadline:
            if on_wait is not None:
                on_wait(time.monotonic() - started)
            time.sleep(_POLL_S)
        if not _lives(main):
            return
    # The children come first: once their parent is gone, only the mark finds those that left the session.
    for process in [*_children(main), main]:
        _signal(process, signal.SIGKILL)


def _end_rest(target: StartedProcess, members: dict[int, psutil.Process]) -> None:
    """Workers end when their parent does. Kill those that do not, and new ones too, until no process is left."""
    settled = time.monotonic() + SETTLE_S
    deadline = settled + _KILL_S
    while True:
        members.update({process.pid: process for process in tree(target)})
        rest = [process for process in members.values() if _lives(process)]
        if not rest:
            return
        now = time.monotonic()
        if now > deadline:
            raise InstanceError(f"even KILL did not end {', '.join(f'process {process.pid}' for process in rest)}")
        if now > settled:
            for process in rest:
                _signal(process, signal.SIGKILL)
        time.sleep(_POLL_S)


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)  # psutil checks the creation time: a reused pid raises NoSuchProcess


def _children(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _carries(process: psutil.Process, run_id: str) -> bool:
    try:
        return process.environ().get(RUN_ID) == run_id
    except (psutil.Error, OSError):
        return False  # it belongs to another user, or has ended meanwhile


def _in_session(process: psutil.Process, target: StartedProcess) -> bool:
    try:
        return os.getsid(process.pid) == target.pid
    except OSError:
        return False


def port_owner(port: int) -> str | None:
    """Who listens on `port`, as `name (pid 123)`; None where this user may not know."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.AccessDenied:
        return None
    for connection in connections:
        listens = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
        if listens and connection.pid is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return None
