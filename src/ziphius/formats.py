"""FORMATS: every weights format, one row each: its size in bytes, where it can be computed, and what `auto` means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from ziphius.errors import ConfigError

WeightsFormat = Literal["fp32", "bf16", "fp16", "int8", "fp8", "int4"]
Device = Literal["cuda", "cpu"]
Use = Literal["linear", "expert", "latent_up", "head"]
"""What a matrix is for: a projection, a routed expert, MLA's kv_b_proj, or the head over the vocabulary."""


@dataclass(frozen=True, slots=True)
class Scales:
    """A quantized format's scales: one for each block of [out_features, in_features] weights of a matrix."""

    nbytes: int
    """Of one scale."""
    out_features: int
    in_features: int | None
    """None: a whole row, however long it is."""
    unit: str = ""
    """Several blocks, for a message. Empty where a rank's share cannot cut a block."""

    def count(self, out_features: int, in_features: int) -> int:
        """Scales of a matrix [out_features, in_features]; the last block of a row or column may be shorter."""
        along = 1 if self.in_features is None else -(-in_features // self.in_features)
        return -(-out_features // self.out_features) * along


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One weights format. The planner, the command line and the layers all read these rows."""

    name: WeightsFormat
    bits: int
    """Of one weight, without scales."""
    dtype: str | None = None
    """A float format's type, by its name in torch; None for a quantized format."""
    scales: Scales | None = None
    usual_float_bytes: int
    """Size of a value that stays in the activations' type, where that type is not known."""
    in_dtype: frozenset[Use] = frozenset()
    """Matrices that this format leaves in the activations' type."""
    beside_experts: WeightsFormat | None = None
    """The format of all other matrices, where this one is for routed experts alone."""
    plain_body: str | None = None
    """The module of `layers/` that computes it in plain torch on any device; None: the native engine does not."""
    cpu_body: str | None = None
    """The module of `layers/` with kernels for a CPU."""
    gpu_body: str | None = None
    """The module of `layers/` with kernels for a GPU."""
    sglang: bool = True
    """Whether SGLang has this format."""
    option: bool = True
    """Whether `--weights-format` of a start takes it; a plan may be asked about every format."""
    planned_on: frozenset[Device] = frozenset()
    """Devices for which a plan evaluates it without being asked."""

    @property
    def native(self) -> frozenset[Device]:
        """Devices on which the native engine runs it. Plain torch is too slow to offer it on a GPU."""
        cpu: frozenset[Device] = frozenset({"cpu"}) if self.plain_body is not None else frozenset()
        return cpu | {"cuda"} if self.gpu_body is not None else cpu

    @property
    def block(self) -> tuple[int, int]:
        """[out, in] weights under one scale, which a rank's share must not cut; (1, 1) where it may cut anywhere."""
        scales = self.scales
        if scales is None or scales.in_features is None:
            return 1, 1
        return scales.out_features, scales.in_features

    def matrix_bytes(self, out_features: int, in_features: int) -> int:
        """Of one matrix [out_features, in_features] with its scales."""
        scales = 0 if self.scales is None else self.scales.nbytes * self.scales.count(out_features, in_features)
        return out_features * (in_features * self.bits // 8) + scales

    def of(self, use: Use) -> Format | None:
        """The format of a matrix for `use`; None: the activations' type."""
        if use in self.in_dtype:
            return None
        return self if use == "expert" or self.beside_experts is None else FORMATS[self.beside_experts].of(use)


_BOTH: frozenset[Device] = frozenset({"cuda", "cpu"})
_CUDA: frozenset[Device] = frozenset({"cuda"})
_CPU: frozenset[Device] = frozenset({"cpu"})
_LATENT_UP: frozenset[Use] = frozenset({"latent_up"})
"""Decoding absorbs kv_b_proj, so the native engine's formats leave it float."""
_HEAD: frozenset[Use] = frozenset({"head"})
"""DeepSeek's checkpoints in fp8 leave the head float."""

_ROWS = (
    Format(name="fp32", bits=32, dtype="float32", usual_float_bytes=4, in_dtype=_LATENT_UP,
           plain_body="dense", gpu_body="cuda_dense", planned_on=_CPU),
    Format(name="bf16", bits=16, dtype="bfloat16", usual_float_bytes=2, in_dtype=_LATENT_UP,
           plain_body="dense", gpu_body="cuda_dense", planned_on=_BOTH),
    Format(name="fp16", bits=16, dtype="float16", usual_float_bytes=2, in_dtype=_LATENT_UP,
           plain_body="dense", gpu_body="cuda_dense"),
    # The CPU's format: the floats beside it are float32.
    Format(name="int8", bits=8, scales=Scales(4, 1, None), usual_float_bytes=4, in_dtype=_LATENT_UP,
           plain_body="int8", cpu_body="packed_int8", sglang=False, planned_on=_CPU),
    # As DeepSeek-V3's checkpoints store it: kv_b_proj too, with float32 scales.
    Format(name="fp8", bits=8, scales=Scales(4, 128, 128, "fp8 blocks"), usual_float_bytes=2, in_dtype=_HEAD,
           planned_on=_CUDA),
    Format(name="int4", bits=4, scales=Scales(2, 1, 128, "int4 groups"), usual_float_bytes=2, in_dtype=_HEAD,
           beside_experts="fp8", option=False, planned_on=_CUDA),
)  # fmt: skip

FORMATS: Mapping[WeightsFormat, Format] = MappingProxyType({row.name: row for row in _ROWS})
OPTION_CHOICES: tuple[str, ...] = ("auto", *(row.name for row in _ROWS if row.option))
"""What `--weights-format` of a start takes."""


def planned_formats(device: Device) -> tuple[WeightsFormat, ...]:
    """Formats that a plan evaluates unasked, the best first: on a GPU the least loss, on a CPU the fewest bytes."""
    rows = [row for row in _ROWS if device in row.planned_on]
    return tuple(row.name for row in sorted(rows, key=lambda row: row.bits if device == "cpu" else -row.bits))


def plan_choices() -> tuple[WeightsFormat, ...]:
    """What `--weights-format` of a plan takes: what is planned for a GPU, then the others, the smallest first."""
    first = planned_formats("cuda")
    others = sorted((row for row in _ROWS if row.name not in first), key=lambda row: row.bits)
    return (*first, *(row.name for row in others))


def native_formats() -> tuple[WeightsFormat, ...]:
    """Formats that the native engine holds on some device."""
    return tuple(row.name for row in _ROWS if row.native)


def format_named(name: str) -> Format | None:
    """The row of `name`; None for `auto` and for names that no format has."""
    return next((row for row in _ROWS if row.name == name), None)


def unknown_format(name: str) -> ConfigError:
    """What to raise for a format that the native engine does not hold."""
    return ConfigError(f"weights_format {name!r} is not one of {', '.join(native_formats())}", param="weights_format")


def format_of_dtype(dtype: str) -> WeightsFormat:
    """The format of weights held in the type of the activations: float32, bfloat16 or float16."""
    return next(row.name for row in _ROWS if row.dtype == dtype)


def auto_format(device: str) -> WeightsFormat | None:
    """What `auto` means where no dtype was asked for: int8 on a CPU; None on a GPU: the format of the dtype."""
    return "int8" if device == "cpu" else None


def resolve_formats(device: Device, dtype: str, weights_format: str) -> tuple[str, WeightsFormat]:
    """(dtype, weights format) with each `auto` made definite.

    On a CPU dtype is float32, on a GPU bfloat16. Weights are held in the dtype, but on a CPU in int8 where neither
    was asked for. ConfigError for a name that no format has.
    """
    automatic = dtype == "auto"
    if automatic:
        dtype = "float32" if device == "cpu" else "bfloat16"
    if weights_format == "auto":
        return dtype, (auto_format(device) if automatic else None) or format_of_dtype(dtype)
    row = format_named(weights_format)
    if row is None:
        raise unknown_format(weights_format)
    return dtype, row.name
