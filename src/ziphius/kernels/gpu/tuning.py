"""Tuned: which tiling of a product is fastest on a device, read from what benchmarks/tune_kernels.py has measured.

`tuned/NAME.json` holds what was measured for a device and the shapes of some models:
{"gemv": {"ROWSxCOLUMNS": [rows a program, warps]},
 "skinny": {"ROWSxCOLUMNS": {"TOKENS": [SkinnyConfig's fields] | null}},
 "mla": {"HEADSxLORA": {"TOKENS": [splits, then MLADecodeConfig's fields]}},
 "experts": {"EXPERTSxHIDDENxWIDTH": {"TOKENS": {"pairs": [PairConfig's fields]} |
                                                {"block_m": B, "first": [GroupedConfig's fields], "second": [...],
                                                 "prompt": true where many tokens an expert are computed}}}}
A number of tokens means: up to so many. null: the library is faster. What is missing is guessed from the sizes, or
taken from a device with the same processors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import triton

from ziphius.kernels.gpu.device import GpuDevice
from ziphius.kernels.gpu.experts import GroupedConfig, PairConfig, pair_config
from ziphius.kernels.gpu.paged_decode import (
    FIXED_SPLIT,
    MLADecodeConfig,
    SplitPlan,
    fewer_splits,
    mla_config,
    split_plan,
)
from ziphius.kernels.gpu.skinny import SkinnyConfig

_MAX_SKINNY_TOKENS = 64


@dataclass(frozen=True, slots=True)
class GroupedPlan:
    """Pairs sorted into blocks of block_m, two products over the blocks."""

    block_m: int
    first: GroupedConfig
    second: GroupedConfig
    prompt: bool = False
    """Many tokens for each expert: use prompt_experts, which has no shared experts."""


ExpertsPlan = PairConfig | GroupedPlan
"""How the experts of a batch are computed: pair by pair, or sorted."""


@dataclass(frozen=True, slots=True)
class Tuned:
    gpu: GpuDevice
    measured: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, gpu: GpuDevice) -> Tuned:
        """What was measured on this device. Other Hopper GPUs use what was measured on an H200: the same processor."""
        hopper = re.match(r"NVIDIA G?H\d", gpu.name) is not None
        for name in (gpu.name, *(("NVIDIA H200",) if hopper else ())):
            path = resources.files("ziphius.kernels.gpu") / "tuned" / (re.sub(r"[ /]", "_", name) + ".json")
            if path.is_file():
                return cls(gpu, json.loads(path.read_text(encoding="utf-8")))
        return cls(gpu)

    def skinny(self, tokens: int, rows: int, columns: int) -> SkinnyConfig | None:
        """None: this kernel is not used."""
        if self.gpu.batch_invariant:
            return SkinnyConfig(32, 128 if columns >= 128 else 32, 1)
        by_tokens = self.measured.get("skinny", {}).get(f"{rows}x{columns}")
        if by_tokens is not None:
            best = _up_to(by_tokens, tokens) if tokens <= max(map(int, by_tokens)) else None
            return None if best is None else SkinnyConfig(*best)
        return guess_skinny(self.gpu, tokens, rows, columns) if tokens <= _MAX_SKINNY_TOKENS else None

    def gemv(self, rows: int, columns: int) -> tuple[int, int] | None:
        """None: guess from the sizes."""
        best = self.measured.get("gemv", {}).get(f"{rows}x{columns}")
        return None if best is None else (best[0], best[1])

    def mla(
        self, tokens: int, heads: int, lora: int, longest: int, element_size: int
    ) -> tuple[SplitPlan, MLADecodeConfig]:
        """`longest`: tokens of the longest sequence there may be."""
        guess = mla_config(heads, element_size)
        programs = tokens * triton.cdiv(heads, guess.block_h)
        if self.gpu.batch_invariant:
            return split_plan(programs, longest, self.gpu.processors, fixed=FIXED_SPLIT), guess
        by_tokens = self.measured.get("mla", {}).get(f"{heads}x{lora}")
        if by_tokens is None or element_size > 2:
            return split_plan(programs, longest, self.gpu.processors), guess
        splits, *fields = _up_to(by_tokens, tokens)
        return SplitPlan(fewer_splits(splits, longest), 0), MLADecodeConfig(*fields)

    def experts(self, tokens: int, experts: int, hidden: int, width: int, top_k: int) -> ExpertsPlan:
        if self.gpu.batch_invariant:
            return GroupedPlan(16, GroupedConfig(32, 64), GroupedConfig(64, 64, tiles=8))
        by_tokens = self.measured.get("experts", {}).get(f"{experts}x{hidden}x{width}")
        if by_tokens is None:
            return guess_experts(self.gpu, tokens, experts, hidden, width, top_k)
        best = _up_to(by_tokens, tokens)
        if "pairs" in best:
            return PairConfig(*best["pairs"])
        first, second = GroupedConfig(*best["first"]), GroupedConfig(*best["second"])
        return GroupedPlan(best["block_m"], first, second, best.get("prompt", False))


def guess_skinny(gpu: GpuDevice, tokens: int, rows: int, columns: int) -> SkinnyConfig:
    """Enough equal programs for two on each processor, each with at least 512 columns."""
    block_n = 64 if rows >= 64 else 16
    block_k = 128 if columns >= 128 else 32
    steps = triton.cdiv(columns, block_k)
    most = max(1, min(8, columns // 512, 2 * gpu.processors // triton.cdiv(rows, block_n)))
    splits = next(number for number in range(most, 0, -1) if steps % number == 0)
    return SkinnyConfig(block_n, block_k, splits, stages=4 if tokens <= 32 else 3)


def guess_experts(gpu: GpuDevice, tokens: int, experts: int, hidden: int, width: int, top_k: int) -> ExpertsPlan:
    """Blocks about as large as an expert's share of the tokens."""
    if tokens <= 4:
        return pair_config(hidden, width, 2)
    share = tokens * top_k / experts
    # Tensor descriptors, which the prompt kernels use, need rows of a multiple of 16 bytes.
    if share <= 24 or hidden % 8 or width % 8:
        return GroupedPlan(16, GroupedConfig(32, 128), GroupedConfig(64, 128, tiles=8))
    # Before Hopper the operands of a product need registers too.
    block_k = 64 if gpu.pdl else 32
    if share <= 96:
        first, second = GroupedConfig(64, block_k, 4, 4), GroupedConfig(128, block_k, 3, 4, tiles=8)
        return GroupedPlan(64, first, second, prompt=True)
    first, second = GroupedConfig(128, block_k, 4, 8), GroupedConfig(128, block_k, 3, 8, tiles=2)
    return GroupedPlan(128, first, second, prompt=True)


def _up_to(by_tokens: Mapping[str, Any], tokens: int) -> Any:
    """The entry of the smallest number that is not below `tokens`; the largest one's beyond it."""
    numbers = sorted(int(number) for number in by_tokens)
    return by_tokens[str(next((number for number in numbers if number >= tokens), numbers[-1]))]
