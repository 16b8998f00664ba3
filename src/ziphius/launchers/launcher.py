"""What a launcher is: it turns a resolved config into a command. It does not start it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ziphius.config import Resolved

RUN_ID = "ZIPHIUS_RUN_ID"
"""Environment variable that marks every process of one start, also one that gets a new session or parent."""


@dataclass(frozen=True, slots=True)
class PrivateFile:
    """A file that must be there, readable by its owner only, before the process starts."""

    path: Path
    text: str
    told: str
    """What it holds, without secrets."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One process to start: its command line, its whole environment, and what must exist before."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    stdin: bytes | None
    """Written to the process once it is on record. A process that finds its stdin empty must end, because its parent
    has died. None: the program reads no stdin, and is held back until it is on record."""
    files: tuple[PrivateFile, ...] = ()
    folders: tuple[Path, ...] = ()
    marks: tuple[str, ...] = (RUN_ID,)
    """The variables that carry the start's mark into its processes."""
    cleanup: tuple[str, ...] = ()
    """A command that ends what outlives the process tree (a daemon's container); () when nothing does."""
    predicted_kv_tokens: int | None = None
    notes: tuple[str, ...] = ()
    """Sentences for the person who starts it."""


class Launcher(Protocol):
    """`env` is the caller's environment; no secret may go into argv, which every user of the machine can read."""

    def __call__(self, resolved: Resolved, env: Mapping[str, str]) -> Launch: ...
