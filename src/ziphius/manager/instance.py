"""The record of each instance, and the states of an instance.

One folder per name: `record.json` (who was started, how), `server.log` and `server.log.1`, `lock`.
A record with a pid says that this process should be running. A record without one says that it was stopped on purpose.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import msgspec

from ziphius.config import Resolved
from ziphius.errors import ConfigError, InstanceError
from ziphius.installation import instances_folder

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LOCK_POLL_S = 0.05


class State(StrEnum):
    """STARTING -> RUNNING <-> UNHEALTHY -> STOPPING -> STOPPED, and FAILED from any. UNKNOWN: nothing tells."""

    STARTING = "starting"
    RUNNING = "running"
    UNHEALTHY = "unhealthy"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"
    UNKNOWN = "unknown"

    @property
    def alive(self) -> bool:
        return self in (State.STARTING, State.RUNNING, State.UNHEALTHY, State.STOPPING)

    @property
    def exit_code(self) -> int:
        """As in the Linux Standard Base: 0 running, 1 dead though it should run, 3 not running, 4 unknown."""
        if self in (State.STARTING, State.RUNNING, State.STOPPING):
            return 0
        return {State.STOPPED: 3, State.FAILED: 1}.get(self, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One start of one instance."""

    name: str
    resolved: Resolved
    pid: int | None
    """None: stopped on purpose."""
    identity: str
    """The process' identity, which tells it from a later process with the same pid (see process.identity)."""
    run_id: str
    """In the environment of every process of this start."""
    hostname: str
    argv: tuple[str, ...]
    started_at: float
    """Seconds since 1970."""
    version: str
    cleanup: tuple[str, ...] = ()
    """A command that ends what outlives the processes (Launch.cleanup)."""
    predicted_kv_tokens: int | None = None
    job: str | None = None
    """Slurm's job number, for an instance that is a Slurm job (and has no pid here). None after it was stopped."""

    @property
    def elsewhere(self) -> bool:
        """Whether another machine, which shares this folder, started it."""
        return self.hostname != socket.gethostname()


class Instances:
    """The records under one home folder."""

    def __init__(self, home: Path) -> None:
        self._root = instances_folder(home)

    def folder(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"name must be at most 64 letters, digits, '.', '_' and '-', the first a letter or digit, not {name!r}",
                param="name",
            )
        return self._root / name

    def log_path(self, name: str) -> Path:
        return self.folder(name) / "server.log"

    def names(self) -> list[str]:
        if not self._root.is_dir():
            return []
        return sorted(path.parent.name for path in self._root.glob("*/record.json"))

    def read(self, name: str) -> Record | None:
        """None when nothing of that name was ever started. InstanceError when the record cannot be read."""
        path = self.folder(name) / "record.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=Record)
        except FileNotFoundError:
            return None
        except OSError as e:
            raise InstanceError(f"cannot read {path}: {e.strerror}") from e
        except (msgspec.DecodeError, msgspec.ValidationError) as e:
            raise InstanceError(f"{path} is not a record of this version ({e}); remove it if nothing runs") from e

    def write(self, record: Record) -> None:
        """Replace the record in one step. InstanceError when the disk is full or the folder is not ours."""
        path = self.folder(record.name) / "record.json"
        temporary = path.with_name(f"record.json.{os.getpid()}")
        try:
            # 0600: the config holds the API key.
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(msgspec.json.encode(record))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as e:
            temporary.unlink(missing_ok=True)
            raise InstanceError(f"cannot write {path}: {e.strerror}") from e

    def mark_stopped(self, name: str, pid: int) -> None:
        """Note that process `pid` ended on purpose. Nothing happens when the record is of another process."""
        record = self.read(name)
        if record is not None and record.pid == pid:
            self.write(replace(record, pid=None))

    @contextlib.contextmanager
    def lock(self, name: str, verb: str, timeout_s: float = 3.0) -> Iterator[None]:
        """Let only one command at a time change an instance. After `timeout_s`, InstanceError names the other command.

        The kernel releases the lock when its holder ends, so a killed command blocks nobody.
        """
        folder = self.folder(name)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as e:
            raise InstanceError(f"cannot use {folder}: {e.strerror}") from e
        with open(descriptor, "r+") as file:
            _acquire(file.fileno(), name, time.monotonic() + timeout_s)
            with contextlib.suppress(OSError):  # only a hint for a command that waits; a full disk may refuse it
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{verb}, pid {os.getpid()}".encode(), 0)
            yield


def _acquire(descriptor: int, name: str, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                holder = os.pread(descriptor, 100, 0).decode(errors="replace")
                raise InstanceError(f"another command is at work on instance {name} ({holder}); try again") from None
        time.sleep(_LOCK_POLL_S)
