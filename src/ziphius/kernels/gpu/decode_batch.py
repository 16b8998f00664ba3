"""A decode step's integers, uploaded in one piece and unpacked into the tensors that the model reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

HEADER = 2
"""The number of integers before the rows: the count of rows, and the pages of a row."""


@dataclass(frozen=True, slots=True)
class DecodeTensors:
    """The integers of B rows. Rows after the step's own repeat its first row and write into the scratch slot."""

    input_ids: Tensor
    """[B] int64."""
    positions: Tensor
    """[B] int64."""
    slots: Tensor
    """[B] int64."""
    seq_lens: Tensor
    """[B] int32."""
    rows: Tensor
    """[B] int32: the row of the table that gets each token; the padding row for rows after the step's own."""
    page_table: Tensor
    """[B, pages] int32."""

    @classmethod
    def empty(cls, rows: int, pages: int, device: torch.device) -> DecodeTensors:
        ids, positions, slots = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(3))
        seq_lens, whose = (torch.zeros(rows, dtype=torch.int32, device=device) for _ in range(2))
        table = torch.zeros((rows, pages), dtype=torch.int32, device=device)
        return cls(ids, positions, slots, seq_lens, whose, table)

    def first(self, rows: int) -> DecodeTensors:
        """Views of the first `rows`."""
        return DecodeTensors(
            self.input_ids[:rows],
            self.positions[:rows],
            self.slots[:rows],
            self.seq_lens[:rows],
            self.rows[:rows],
            self.page_table[:rows],
        )


def pack(
    rows: NDArray[np.int64], positions: NDArray[np.int64], slots: NDArray[np.int64], pages: NDArray[np.int32]
) -> NDArray[np.int32]:
    """What `unpack` reads: [n, width, rows [n], positions [n], slots [n], pages [n, width]]."""
    header = np.array([len(rows), pages.shape[1]], dtype=np.int32)
    return np.concatenate([header, rows, positions, slots, pages.ravel()], dtype=np.int32, casting="unsafe")


@triton.jit
def _unpack_kernel(packed, last_token, input_ids, positions, slots, seq_lens, rows, page_table, stride_table,
                   scratch_slot, padding_row, HEADER: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Program i does row i. It does not overlap with other kernels, because a copy makes its input."""
    i = tl.program_id(0)
    count, width = tl.load(packed), tl.load(packed + 1)
    source = tl.where(i < count, i, 0)
    at = packed + HEADER + source
    row, position, slot = tl.load(at), tl.load(at + count), tl.load(at + 2 * count)
    tl.store(input_ids + i, tl.load(last_token + row))
    tl.store(positions + i, position.to(tl.int64))
    tl.store(slots + i, tl.where(i < count, slot, scratch_slot).to(tl.int64))
    tl.store(seq_lens + i, position + 1)
    tl.store(rows + i, tl.where(i < count, row, padding_row))
    pages = packed + HEADER + 3 * count + source.to(tl.int64) * width
    for start in tl.range(0, width, BLOCK):
        page = start + tl.arange(0, BLOCK)
        value = tl.load(pages + page, mask=page < width, other=0)
        tl.store(page_table + i.to(tl.int64) * stride_table + page, value, mask=page < width)


def unpack(packed: Tensor, last_token: Tensor, to: DecodeTensors, scratch_slot: int, padding_row: int) -> None:
    """Unpack `packed` (see `pack`) and the rows' last tokens [rows] into `to`, which has at least as many rows."""
    _unpack_kernel[(to.input_ids.shape[0],)](
        packed, last_token, to.input_ids, to.positions, to.slots, to.seq_lens, to.rows, to.page_table,
        to.page_table.stride(0), scratch_slot, padding_row, HEADER=HEADER, BLOCK=256,
    )  # fmt: skip


def unpack_torch(packed: Tensor, last_token: Tensor, to: DecodeTensors, scratch_slot: int, padding_row: int) -> None:
    """The same in plain torch."""
    count, width = packed[:HEADER].tolist()
    values = packed[HEADER : HEADER + 3 * count].view(3, count).long()
    pages = packed[HEADER + 3 * count :][: count * width].view(count, width)
    for i in range(to.input_ids.shape[0]):
        row, position, slot = values[:, i if i < count else 0]
        to.input_ids[i] = last_token[row]
        to.positions[i], to.seq_lens[i] = position, position + 1
        to.slots[i] = slot if i < count else scratch_slot
        to.rows[i] = row if i < count else padding_row
        to.page_table[i, :width] = pages[i if i < count else 0]
