"""Host: what the planner knows about a machine, which a user named or recorded, or which probe.py looked at."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import msgspec
from msgspec.structs import replace

from ziphius.errors import ConfigError
from ziphius.planner.memory import MIB


class GpuProcess(msgspec.Struct, frozen=True, kw_only=True):
    """A process that holds memory on a GPU. In a container the driver may give neither its name nor its size."""

    pid: int
    name: str = "unknown"
    used_mib: int | None = None


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU, or one MIG slice, as the driver reports it. Sizes in MiB."""

    index: int
    name: str
    memory_total_mib: int
    memory_free_mib: int
    """What a process may still allocate, before its own CUDA context."""
    compute_capability: tuple[int, int]
    nvlink: bool = False
    """Whether peers are reached over NVLink (or NVSwitch) rather than PCIe."""
    mig: bool = False
    """A MIG slice: it cannot take part in tensor parallel (NCCL reaches no peer from a slice)."""
    processes: tuple[GpuProcess, ...] = ()


class Host(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A machine: its GPUs and its main memory. Also the format of a recorded host (JSON)."""

    origin: Literal["probed", "named", "recorded"] = "recorded"
    gpus: tuple[Gpu, ...] = ()
    driver_version: str | None = None
    cuda_version: str | None = None
    """The newest CUDA that the driver runs."""
    gpu_error: str | None = None
    """Why the driver could not be asked about GPUs, although there seems to be one."""
    cpu_name: str = "CPU"
    cpu_cores: int | None = None
    memory_total_mib: int | None = None
    memory_available_mib: int | None = None
    """What processes may still allocate under the limit of their container. None: not known (a named host)."""

    def chosen(self, count: int) -> tuple[Gpu, ...]:
        """The `count` whole GPUs with the most free memory, in the driver's order; fewer when there are fewer."""
        whole = [g for g in self.gpus if not g.mig] or list(self.gpus)
        best = sorted(whole, key=lambda g: -g.memory_free_mib)[:count]
        return tuple(sorted(best, key=lambda g: g.index))


class Card(msgspec.Struct, frozen=True):
    """A GPU model. Memory as the driver reports it; rates from NVIDIA's data sheets, dense."""

    name: str
    """As NVML gives it."""
    memory_mib: int
    usable_mib: int
    """The part that CUDA can use, which is the total in PyTorch's out-of-memory messages. The driver keeps the rest."""
    bandwidth_gb_s: int
    bf16_tflops: int
    fp8_tflops: int | None
    compute_capability: tuple[int, int]
    nvlink: bool


# The short name that --gpu takes -> the card.
CARDS: dict[str, Card] = {
    "H200": Card("NVIDIA H200", 143771, 143155, 4800, 989, 1979, (9, 0), True),
    "H200-NVL": Card("NVIDIA H200 NVL", 143771, 143155, 4800, 835, 1671, (9, 0), True),
    "H100": Card("NVIDIA H100 80GB HBM3", 81559, 81080, 3350, 989, 1979, (9, 0), True),
    "H100-PCIE": Card("NVIDIA H100 PCIe", 81559, 81080, 2039, 756, 1513, (9, 0), False),
    "H100-NVL": Card("NVIDIA H100 NVL", 95830, 95232, 3938, 835, 1671, (9, 0), True),
    "A100-80": Card("NVIDIA A100-SXM4-80GB", 81920, 81049, 2039, 312, None, (8, 0), True),
    "A100-40": Card("NVIDIA A100-SXM4-40GB", 40960, 40325, 1555, 312, None, (8, 0), True),
    "H20": Card("NVIDIA H20", 97871, 97280, 4000, 148, 296, (9, 0), True),
    "B200": Card("NVIDIA B200", 183359, 182630, 8000, 2250, 4500, (10, 0), True),
    "L40S": Card("NVIDIA L40S", 46068, 45455, 864, 362, 733, (8, 9), False),
    "RTX4090": Card("NVIDIA GeForce RTX 4090", 24564, 24084, 1008, 165, 330, (8, 9), False),
    "RTX5090": Card("NVIDIA GeForce RTX 5090", 32607, 32112, 1792, 209, 419, (12, 0), False),
}
_ALIASES = {
    "H200SXM": "H200",
    "H200SXM5": "H200",
    "H100SXM": "H100",
    "H100SXM5": "H100",
    "H10080": "H100",
    "A100": "A100-80",
    "A10080GB": "A100-80",
    "A10040GB": "A100-40",
    "4090": "RTX4090",
    "5090": "RTX5090",
}
_TERM = re.compile(r"(?:(\d+)\s*[xX*]\s*)?([A-Za-z0-9][A-Za-z0-9 _-]*)")
MAX_GPUS = 1024


def _plain(name: str) -> str:
    return re.sub(r"[^A-Z0-9]", "", name.upper())


def card_by_short_name(name: str) -> Card | None:
    """By the name that --gpu takes, another spelling of it, or the driver's own; None for an unknown one."""
    plain = _plain(name)
    by_plain = {_plain(card.name): short for short, card in CARDS.items()}
    by_plain |= {full.removeprefix("NVIDIA"): short for full, short in by_plain.items()}
    by_plain |= {_plain(short): short for short in CARDS} | _ALIASES
    short = by_plain.get(plain)
    return CARDS[short] if short else None


def card_of(gpu: Gpu) -> Card | None:
    """The data sheet of a probed or recorded GPU, found by NVML's name; None for a card this table lacks."""
    plain = _plain(gpu.name)
    for card in CARDS.values():
        if _plain(card.name) == plain:
            return card
    # "NVIDIA H100" without its form, "RTX 4090" without its vendor. A longer name is another card ("RTX 4090 Laptop").
    bare = plain.removeprefix("NVIDIA").removeprefix("GEFORCE")
    for short, card in CARDS.items():
        if _plain(short) == bare:
            return card
    if bare.startswith("A100"):
        return CARDS["A100-40" if gpu.memory_total_mib < 50_000 else "A100-80"]
    return None


def parse_gpus(spec: str) -> Host:
    """`4xH200`, `H200`, `2xH100,1xL40S` -> a host with idle cards of these kinds. ConfigError names the known kinds."""
    gpus: list[Gpu] = []
    for term in spec.split(","):
        match = _TERM.fullmatch(term.strip())
        card = card_by_short_name(match.group(2)) if match else None
        # "4090" alone is a card; "2x4090" is two of them. A name may itself start with digits.
        count = int(match.group(1)) if match and match.group(1) else 1
        if match is None or card is None:
            raise ConfigError(f"--gpu {spec!r}: {term.strip()!r} is not a known GPU; known are {', '.join(CARDS)}, "
                              "as in 4xH200; record other machines with --host-file")  # fmt: skip
        if not 1 <= count <= MAX_GPUS:
            raise ConfigError(f"--gpu {spec!r}: the number of GPUs must be 1 to {MAX_GPUS}, not {count}")
        for _ in range(count):
            gpus.append(idle_gpu(card, len(gpus)))
    return Host(origin="named", gpus=tuple(gpus))


def idle_gpu(card: Card, index: int) -> Gpu:
    return Gpu(
        index=index,
        name=card.name,
        memory_total_mib=card.memory_mib,
        memory_free_mib=card.usable_mib,
        compute_capability=card.compute_capability,
        nvlink=card.nvlink,
    )


def read_host(path: Path) -> Host:
    """A recorded host. ConfigError says what is wrong with the file."""
    try:
        host = msgspec.json.decode(path.read_bytes(), type=Host)
    except OSError as e:
        raise ConfigError(f"cannot read the host file {path}: {e.strerror}") from e
    except (msgspec.DecodeError, msgspec.ValidationError) as e:
        raise ConfigError(f"{path} is no recorded host: {e}") from e
    for gpu in host.gpus:
        if not 0 <= gpu.memory_free_mib <= gpu.memory_total_mib:
            raise ConfigError(f"{path}: GPU {gpu.index} has {gpu.memory_free_mib} MiB free "
                              f"of {gpu.memory_total_mib}")  # fmt: skip
    return host


def idle_bytes(gpu: Gpu) -> int:
    """What a GPU offers when no process uses it: its card's number; for an unknown card what is free or held now."""
    card = card_of(gpu)
    if card is not None and card.memory_mib == gpu.memory_total_mib:
        return card.usable_mib * MIB
    return min(gpu.memory_total_mib, gpu.memory_free_mib + sum(p.used_mib or 0 for p in gpu.processes)) * MIB


def emptied(host: Host) -> Host:
    """The same host with no process on its GPUs."""
    gpus = tuple(replace(g, memory_free_mib=max(g.memory_free_mib, idle_bytes(g) // MIB), processes=())
                 for g in host.gpus)  # fmt: skip
    return replace(host, gpus=gpus)


def with_more_gpus(host: Host, count: int) -> Host:
    """The same host with idle GPUs added, like its best one, up to `count`: it shows what more GPUs would change."""
    whole = [g for g in host.gpus if not g.mig]
    if not whole or len(whole) >= count:
        return host
    best = max(whole, key=lambda g: g.memory_total_mib)
    like = replace(best, memory_free_mib=idle_bytes(best) // MIB, processes=())
    first = max(g.index for g in whole) + 1
    added = tuple(replace(like, index=first + i) for i in range(count - len(whole)))
    return replace(host, gpus=tuple(whole) + added)


def times(host: Host, machines: int) -> Host:
    """What `machines` hosts like this one have together."""
    if machines == 1:
        return host
    stride = max((g.index for g in host.gpus), default=0) + 1
    gpus = tuple(replace(g, index=g.index + i * stride) for i in range(machines) for g in host.gpus)
    available = host.memory_available_mib
    return replace(host, gpus=gpus, memory_available_mib=None if available is None else machines * available)


def describe(host: Host) -> str:
    """One line: `4 x NVIDIA H200, 143,771 MiB each`; mixed cards one after another."""
    if not host.gpus:
        memory = f", {host.memory_available_mib / 1024:.1f} GiB of memory free" if host.memory_available_mib else ""
        cores = f", {host.cpu_cores} cores" if host.cpu_cores else ""
        return f"{host.cpu_name}{cores}{memory}; no GPU"
    groups: dict[tuple[str, int, bool], int] = {}
    for gpu in host.gpus:
        key = (gpu.name, gpu.memory_total_mib, gpu.mig)
        groups[key] = groups.get(key, 0) + 1
    return " + ".join(
        f"{count} x {name}{' (MIG slice)' if mig else ''}, {total:,} MiB" + (" each" if count > 1 else "")
        for (name, total, mig), count in groups.items()
    )


def usable_bytes(gpu: Gpu) -> int:
    return gpu.memory_free_mib * MIB
