"""ParallelState: which tensor-parallel rank this is, and its collectives."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ziphius.errors import ConfigError, EngineFailed, RankLost

_log = logging.getLogger(__name__)

_PEER_BYTES = 512 << 10
"""Largest sum that goes through shared memory: each rank reads all of every other's part."""
_NEVER = timedelta(days=1)
"""Ranks wait for each other while the slowest one loads. The frontend notices a rank that has died or hangs."""


@dataclass(slots=True)
class CollectiveCount:
    """How many collectives a rank has entered: when ranks wait for each other, the lowest count is to blame."""

    entered: int = 0


class PeerSums:
    """Sums of small tensors over the GPUs of one machine, through memory that all of them see.

    NCCL is made for much data; what a decode step adds up is a few kilobytes, over a hundred times. Here a rank puts
    its part where the others read it, and each adds all parts in one order: one launch, capturable, the same bits on
    every rank. The buffer is torch's symmetric memory, which needs peer access between the GPUs.
    """

    _DTYPES = (torch.float32, torch.bfloat16)

    def __init__(self, device: torch.device, any_size: bool = False) -> None:
        """Together with every other rank of the default group. RuntimeError where the GPUs cannot see each other.

        `any_size`: every tensor, large ones a piece at a time. NCCL would be faster, but the order in which it adds
        depends on the size.
        """
        from torch.distributed import _symmetric_memory

        self._group = dist.group.WORLD.group_name  # type: ignore[union-attr]
        self._any_size = any_size
        self._buffer = _symmetric_memory.empty(_PEER_BYTES, dtype=torch.uint8, device=device)
        _symmetric_memory.rendezvous(self._buffer, self._group)

    def takes(self, x: Tensor) -> bool:
        fits = self._any_size or (x.nbytes <= _PEER_BYTES and x.dtype in self._DTYPES)
        return fits and x.nbytes % 16 == 0 and x.is_contiguous()

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's `x`, same shape, new memory."""
        if x.dtype not in self._DTYPES:
            return self.sum(x.float()).to(x.dtype)
        if x.nbytes <= _PEER_BYTES:
            return self._sum(x)
        pieces = x.view(-1).split(_PEER_BYTES // x.element_size())  # type: ignore[no-untyped-call]
        return torch.cat([self._sum(piece) for piece in pieces]).view(x.shape)

    def _sum(self, x: Tensor) -> Tensor:
        # The kernel waits for all ranks before it reads and again before it ends: the next sum may write at once.
        shared = self._buffer[: x.nbytes].view(x.dtype).view(x.shape)
        total: Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(shared, x, "sum", self._group)
        return total


@dataclass(frozen=True, slots=True)
class ParallelState:
    """One rank's view of its tensor-parallel group. With `size` 1 every collective returns its input.

    With `size` > 1 the collectives run over `group` (None: torch.distributed's default group), which `join` has
    made: gloo on a CPU, NCCL on CUDA. They raise RankLost when they fail.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    count: CollectiveCount = field(default_factory=CollectiveCount, compare=False)
    peers: PeerSums | None = field(default=None, compare=False)
    """For small sums. None where the GPUs share no memory."""

    @property
    def capturable(self) -> bool:
        """Whether the collectives can be part of a CUDA graph: gloo's cannot."""
        return self.size == 1 or dist.get_backend(self.group) == "nccl"

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's `x`, same shape; `x` itself may be overwritten."""
        if self.size > 1:
            with self._entered():
                if self.peers is not None and self.peers.takes(x):
                    return self.peers.sum(x)
                dist.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """Every rank's `x` joined along `dim` in rank order."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        with self._entered():
            dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=dim)

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """Rank `source`'s `x` on every rank; `x` is overwritten on the others."""
        if self.size > 1:
            with self._entered():
                dist.broadcast(x, group_src=source, group=self.group)
        return x

    def smallest(self, values: Sequence[int], device: torch.device) -> list[int]:
        """For each of `values` the least that any rank gave. Returns once every rank is here."""
        if self.size == 1:
            return list(values)
        together = torch.tensor(values, dtype=torch.int64, device=device)
        with self._entered():
            dist.all_reduce(together, op=dist.ReduceOp.MIN, group=self.group)
        least: list[int] = together.tolist()
        return least

    def shard(self, total: int, what: str) -> int:
        """This rank's share of `total`. ConfigError names `what` when it does not divide."""
        if total % self.size:
            raise ConfigError(f"{what} {total} is not a multiple of the tensor-parallel size {self.size}", param="tp")
        return total // self.size

    def shard_kv_heads(self, kv_heads: int) -> int:
        """KV heads this rank keeps: an equal share, or one replicated head when there are more ranks than heads."""
        if self.size > kv_heads and self.size % kv_heads == 0:
            return 1
        return self.shard(kv_heads, "num_key_value_heads")

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """Inside a collective. An error of torch.distributed becomes RankLost; the device's own stay what they are."""
        self.count.entered += 1
        try:
            yield
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except RuntimeError as error:
            lost = f"rank {self.rank} lost the others in collective {self.count.entered}: {_first_line(error)}"
            raise RankLost(lost) from error


SINGLE = ParallelState()
"""The whole model on one rank."""


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where ranks find each other: a file that all of them can open, or rank 0's store on `host`:`port`."""

    path: str = ""
    host: str = ""
    port: int = 0
    listening_fd: int = -1
    """rank 0: a socket that listens on `port` already."""


class Store(Protocol):
    """Strings that all ranks share (torch.distributed's stores)."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes:
        """Waits until some rank has set it."""


@contextmanager
def join(
    where: Rendezvous, rank: int, size: int, device: torch.device, batch_invariant: bool = False
) -> Iterator[tuple[ParallelState, Store]]:
    """Become rank `rank` of `size` while the block runs. Yields its collectives and a store that all ranks share.

    `batch_invariant`: no sum may depend, bit for bit, on what else is in the tensor; ConfigError where that cannot be.
    Waits for the others. EngineFailed when they cannot be reached. A block that raises leaves the group as it is:
    leaving it would wait for ranks that may be gone, and the process is going to end anyway.
    """
    try:
        store = _store(where, rank, size)
        # The GPU is named so that NCCL connects now: a fault shows here, and not in the first step.
        named = device if device.type == "cuda" else None
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=_NEVER, device_id=named
        )  # fmt: skip
    except RuntimeError as error:
        raise EngineFailed(f"rank {rank} could not join the other {size - 1}: {_first_line(error)}") from error
    one_order = batch_invariant and size > 2  # Two numbers have the same sum in any order.
    # Ranks that meet in a file are on one machine.
    peers = peer_sums(device, one_order) if device.type == "cuda" and size > 1 and where.path else None
    if one_order and peers is None:
        raise ConfigError(
            f"deterministic needs GPUs that share memory for {size} ranks: NCCL's sums depend on the batch",
            param="deterministic",
        )
    yield ParallelState(rank, size, peers=peers), store
    dist.destroy_process_group()


def peer_sums(device: torch.device, any_size: bool) -> PeerSums | None:
    """Sums through shared memory; None on all ranks when one of them cannot reach it.

    Ranks that add in different ways would wait for each other for ever.
    """
    peers, reason = None, "another rank's cannot be reached"
    try:
        peers = PeerSums(device, any_size)
    except (RuntimeError, AttributeError, ImportError) as error:
        reason = _first_line(error)
    able = torch.tensor([peers is not None], dtype=torch.int32, device=device)
    dist.all_reduce(able, op=dist.ReduceOp.MIN)
    if able.item():
        return peers
    _log.warning("small sums go over NCCL, as the GPUs share no memory: %s", reason)
    return None


def _store(where: Rendezvous, rank: int, size: int) -> Any:
    if where.path:
        return dist.FileStore(where.path, size)  # type: ignore[attr-defined]
    fd = where.listening_fd if rank == 0 and where.listening_fd >= 0 else None
    return dist.TCPStore(  # type: ignore[attr-defined]
        where.host, where.port, size, rank == 0, timeout=_NEVER, master_listen_fd=fd
    )


def _first_line(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line.partition(" This is typically caused by")[0]  # gloo's advice is wrong where the peer was killed
