"""What this machine's CPU can do, and the tile sizes that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import llvmlite.binding as llvm
from numba.core import config

ByteDot = Literal["vnni512", "vnni256", "avx2", "generic"]
"""How four products of bytes are added to an int32 lane; see tiles.int8_tile."""


@dataclass(frozen=True, slots=True)
class Target:
    """One instruction set. Speed depends on it, but never the result of an integer sum."""

    byte_dot: ByteDot
    byte_rows: int
    """The most rows of activations that an int8 tile takes."""
    float_vectors: int
    """How many 16-lane float accumulators fit into the registers."""

    @property
    def byte_lanes(self) -> int:
        """int32 lanes of one accumulator of an int8 tile."""
        return 16 if self.byte_dot in ("vnni512", "generic") else 8


def target_of(features: frozenset[str]) -> Target:
    """The best tiles for a CPU with LLVM's `features`."""
    if {"avx512f", "avx512bw", "avx512vl", "avx512vnni"} <= features:
        return Target("vnni512", 6, 24)
    if "avxvnni" in features:
        return Target("vnni256", 3, 6)
    if "avx2" in features:
        return Target("avx2", 3, 6)
    return Target("generic", 2, 3)


def host_features() -> frozenset[str]:
    """LLVM's names for what numba compiles for: NUMBA_CPU_NAME and NUMBA_CPU_FEATURES, or the host's."""
    settings = vars(config)
    if settings["CPU_FEATURES"] is not None:
        flags = settings["CPU_FEATURES"].split(",")
        return frozenset(flag[1:] for flag in flags if flag.startswith("+"))
    if settings["CPU_NAME"] is not None:
        return frozenset()
    return frozenset(name for name, there in llvm.get_host_cpu_features().items() if there)


TARGET = target_of(host_features())
"""What the kernels of this process are compiled for."""
