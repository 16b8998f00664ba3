"""ProgressLog: writes progress into the log, with few enough lines for a person to read."""

from __future__ import annotations

import logging
import time

from ziphius.ipc.messages import LoadProgress

_log = logging.getLogger(__name__)

_INTERVAL_S = 5.0


class ProgressLog:
    """Call it with each LoadProgress. It writes the first one of a phase, and then one every few seconds."""

    def __init__(self) -> None:
        self._phase = ""
        self._written_at = 0.0

    def __call__(self, progress: LoadProgress) -> None:
        now = time.monotonic()
        if progress.phase == self._phase and now - self._written_at < _INTERVAL_S:
            return
        self._phase, self._written_at = progress.phase, now
        percent = f" {100 * progress.done // progress.total}%" if progress.total and progress.done else ""
        detail = f": {progress.detail}" if progress.detail else ""
        _log.info("%s%s%s", progress.phase, percent, detail)
