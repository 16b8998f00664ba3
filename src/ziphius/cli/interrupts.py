"""Ctrl-C and SIGTERM as an exception, for a verb that must clean up; it ends no process itself."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def interrupts_once() -> Iterator[None]:
    """SIGTERM and Ctrl-C interrupt the block; later ones are ignored, so that it can clean up in peace."""

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
