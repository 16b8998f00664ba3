"""out_of_memory_explained: turns a failed allocation into DoesNotFit with advice."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ziphius.errors import DoesNotFit


@contextmanager
def out_of_memory_explained(when: str) -> Iterator[None]:
    """Raise DoesNotFit in place of each error that a failed allocation can raise. `when`: `the KV cache was made`."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
        system = isinstance(error, OSError) and error.errno == errno.ENOMEM
        if not (cpu or system or isinstance(error, (MemoryError, torch.OutOfMemoryError))):
            raise
        raise DoesNotFit(
            f"memory ran out while {when}: free memory, or lower --max-total-tokens, --context-length or "
            f"--max-running-requests ({error})"
        ) from error
