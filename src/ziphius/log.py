"""The log format that every process of an instance uses."""

from __future__ import annotations

import logging
import sys


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        stamp = self.formatTime(record, "%Y-%m-%d %H:%M:%S")
        line = f"{stamp} {record.levelname.lower():<7} {record.name.removeprefix('ziphius.')}: {record.getMessage()}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def configure(level: str) -> None:
    """Send this process' log to stderr at `level` (debug, info, warning or error). Call once, in an entry point."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # httpx2 logs an info line for each request, with the hub's signed addresses in it.
    logging.getLogger("httpx2").setLevel(logging.WARNING)
