"""Arrays in kernels as plain addresses: views of them, and aligned buffers. A view does not keep its memory alive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from numba.core import types
from numba.np import arrayobj
from numpy.typing import NDArray
from torch import Tensor

from ziphius.kernels.cpu.jit import instruction

ALIGNMENT = 64
"""Bytes of a cache line, and of the widest vector."""

_populate: Callable[..., Any] = arrayobj.populate_array


def aligned_bytes(size: int) -> Tensor:
    """`size` zero bytes, uint8, on a cache line of their own."""
    buffer = torch.zeros(size + ALIGNMENT, dtype=torch.uint8)
    start = -buffer.data_ptr() % ALIGNMENT
    return buffer[start : start + size]


def _viewer(element: Any) -> Callable[..., Any]:
    """An array that does not own its memory. numba's carray would cost every kernel a tenth of a second."""
    kind = types.Array(element, 1, "C")

    @instruction(kind, types.intp, types.intp)
    def view(context: Any, builder: Any, address: Any, count: Any) -> Any:
        array = context.make_array(kind)(context, builder)
        data = context.get_data_type(element)
        size = context.get_constant(types.intp, context.get_abi_sizeof(data))
        pointer = builder.inttoptr(address, data.as_pointer())
        _populate(array, data=pointer, shape=[count], strides=[size], itemsize=size, meminfo=None)
        return array._getvalue()

    return view


floats = cast(Callable[[int, int], NDArray[np.float32]], _viewer(types.float32))
"""float32 [count] at an address."""
bytes8 = cast(Callable[[int, int], NDArray[np.int8]], _viewer(types.int8))
"""int8 [count] at an address."""
ints32 = cast(Callable[[int, int], NDArray[np.int32]], _viewer(types.int32))
"""int32 [count] at an address."""
ints64 = cast(Callable[[int, int], NDArray[np.int64]], _viewer(types.int64))
"""int64 [count] at an address."""
