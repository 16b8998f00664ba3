"""What a GPU can do, and how kernels of one stream overlap.

Programmatic dependent launch (sm_90 and later): a kernel lets the next one start before it has ended
(`allow_next`), and the next waits where it first needs what this one computes (`wait_for_previous`). What comes
before that wait (loads of weights into registers or into L2) runs while the kernel before it ends, which
hides most of the start of a small kernel. Every kernel waits exactly once, on every path, before it reads or writes
anything that another kernel writes or reads. Without PDL the helpers do nothing, and kernels run in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl


@dataclass(frozen=True, slots=True)
class GpuDevice:
    """The device that kernels are launched on."""

    name: str
    """The name under which tuned data is stored, or `interpreter`."""
    processors: int
    pdl: bool
    """Whether kernels may overlap by programmatic dependent launch."""
    batch_invariant: bool = False
    """Whether no program's shape may depend on the batch, and so no order of additions (--deterministic)."""

    @classmethod
    def of(cls, device: torch.device, batch_invariant: bool = False) -> GpuDevice:
        """The CUDA device `device`. On a CPU it is Triton's interpreter, as a device with few processors."""
        if device.type != "cuda":
            return cls("interpreter", 4, False, batch_invariant)
        properties = torch.cuda.get_device_properties(device)
        return cls(properties.name, properties.multi_processor_count, properties.major >= 9, batch_invariant)

    @property
    def overlap(self) -> dict[str, Any]:
        """Launch options of a kernel that uses the helpers below."""
        return {"PDL": True, "launch_pdl": True} if self.pdl else {"PDL": False}


@triton.jit
def allow_next(PDL: tl.constexpr):
    """Once all programs have called this, the next kernel may start."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait until everything before this kernel has ended and its writes are visible."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch_rows_l2(rows, index, nbytes, PDL: tl.constexpr):
    """Bring `nbytes` (a multiple of 16) from each of `rows` [N] (16-byte aligned) into L2, without waiting.

    `index` is arange(N), N no more than the program's threads: thread i asks for row i.
    """
    if PDL:
        tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            mov.u32 $0, %tid.x;
            setp.eq.u32 p, $0, $2;
            @p cp.async.bulk.prefetch.L2.global [$1], $3;
            }""",
            "=r,l,r,r",
            [rows.to(tl.int64), index, nbytes],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
