"""How a started engine is watched: what it says about itself, and why it ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from ziphius.config import Resolved
from ziphius.manager import logs
from ziphius.manager.client import ServerAnswer, ask


class Watch(Protocol):
    """One start of one instance. No method raises because of something that an engine does or fails to do."""

    def ask(self, timeout_s: float) -> ServerAnswer:
        """How it is now. It may take longer than `timeout_s` for an engine whose health check is slow by design."""
        ...

    def last_words(self) -> str | None:
        """Why it ended, as far as its log says, with what to do if that is known."""
        ...


WatchOf = Callable[[Resolved, Path], Watch]
"""Makes a watch from the settings that were started and the log file."""


class NativeWatch:
    """Ziphius' own server: GET /status tells all that a watch needs."""

    def __init__(self, resolved: Resolved, log: Path) -> None:
        self._config = resolved.config
        self._log = log

    def ask(self, timeout_s: float) -> ServerAnswer:
        return ask(self._config.host, self._config.port, timeout_s)

    def last_words(self) -> str | None:
        return logs.last_error(self._log)


def watch_of(resolved: Resolved, log: Path) -> Watch:
    """The watch of the engine that `resolved` names."""
    if resolved.config.engine == "sglang":
        from ziphius.manager.sglang_watch import SglangWatch  # here: it is slow to import, and rarely needed

        return SglangWatch(resolved, log)
    return NativeWatch(resolved, log)
