"""Ctrl-C and SIGTERM as an exception, for a verb that must clean up."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def interrupts_once() -> Iterator[None]:
    """The first SIGTERM or Ctrl-C interrupts the block. Later ones are ignored, so that it can clean up."""

    def interrupt(number: int, _: object) -> None:
        for handled in (signal.SIGINT, signal.SIGTERM):
            signal.signal(handled, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
