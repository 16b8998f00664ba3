"""Team: one rank among the others: its collectives, and how batches get from rank 0 to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ziphius.distributed import SINGLE, ParallelState, Rendezvous, join
from ziphius.errors import ConfigError
from ziphius.ipc.messages import ScheduledBatch, Shutdown
from ziphius.ipc.sockets import BatchReceiver, BatchSender
from ziphius.ranks.spec import WorkerSpec

_BATCHES_KEY = "batches"


@dataclass(slots=True)
class Team:
    """The team of a single rank: there is nobody to send to or to receive from."""

    parallel: ParallelState = SINGLE
    ranks_here: int = 1
    """How many ranks are on this machine and share its main memory."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where the collectives run."""
    sender: BatchSender | None = None
    receiver: BatchReceiver | None = None
    _missing: int = 0

    @property
    def alone(self) -> bool:
        return self.parallel.size == 1

    def smallest(self, *values: int) -> list[int]:
        """For each of `values` the lowest that any rank gave. Returns once every rank has called it."""
        return self.parallel.smallest(values, self.device)

    def meet(self) -> None:
        """Return once every rank has called it."""
        self.smallest(0)

    def broadcast(self, content: ScheduledBatch | Shutdown) -> None:
        """rank 0: send to the others, without waiting for them. All must be listening at the first call."""
        if self.sender is None:
            return
        if self._missing:
            self.sender.wait_for(self._missing)
            self._missing = 0
        self.sender.send(content)

    def receive(self) -> ScheduledBatch | Shutdown:
        """Ranks > 0: wait for rank 0's next message and return it."""
        assert self.receiver is not None
        return self.receiver.receive()


@contextmanager
def join_team(spec: WorkerSpec, device: torch.device) -> Iterator[Team]:
    """Be rank `spec.rank` while the block runs. It first waits for all ranks.

    EngineFailed when the others cannot be reached. When rank 0's block ends without an error, it tells the others.
    """
    size, rank = spec.config.tp, spec.rank
    ranks_here = size // spec.config.nnodes
    if size == 1:
        yield Team()
        return
    where = parse_rendezvous(spec.rendezvous, spec.store_fd)
    with join(where, rank, size, device, spec.config.deterministic) as (parallel, store):
        team = Team(parallel, ranks_here, device, _missing=size - 1)
        try:
            if rank == 0:
                team.sender = BatchSender(spec.batches)
                store.set(_BATCHES_KEY, team.sender.endpoint)
            else:
                team.receiver = BatchReceiver(store.get(_BATCHES_KEY).decode())
            yield team
            team.broadcast(Shutdown())
        finally:
            for end in (team.sender, team.receiver):
                if end is not None:
                    end.close()


def parse_rendezvous(text: str, listening_fd: int) -> Rendezvous:
    """WorkerSpec.rendezvous -> Rendezvous. ConfigError when it begins with neither file: nor tcp://."""
    if text.startswith("file:"):
        return Rendezvous(path=text.removeprefix("file:"))
    host, colon, port = text.removeprefix("tcp://").rpartition(":")
    if not text.startswith("tcp://") or not colon or not port.isdecimal():
        raise ConfigError(f"the ranks have no place to meet: {text!r}")
    return Rendezvous(host=host.strip("[]"), port=int(port), listening_fd=listening_fd)


def select_device(spec: WorkerSpec) -> None:
    """Make this rank's GPU the current one, if it computes on a GPU. ConfigError when there are too few GPUs."""
    if spec.config.device == "cpu" or not torch.cuda.is_available():
        return
    there, wanted = torch.cuda.device_count(), spec.config.tp // spec.config.nnodes
    if spec.device_index >= there:
        raise ConfigError(
            f"{wanted} ranks on this machine (--tp) need {wanted} GPUs, and CUDA shows {there}: "
            "take a smaller --tp, or --device cpu",
            param="tp",
        )
    torch.cuda.set_device(spec.device_index)
