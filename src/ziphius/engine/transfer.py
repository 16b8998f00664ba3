"""Small arrays from the host to the device without waiting for it; it owns no buffer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor


def upload(values: ArrayLike, device: torch.device, dtype: Any = None) -> Tensor:
    """`values` as a tensor on `device`; `dtype` is numpy's. On a CPU an array's own memory is used, not copied.

    torch.tensor(values, device="cuda") would wait until the device has done all its work.
    """
    host = torch.from_numpy(np.asarray(values, dtype=dtype))
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def download(tensor: Tensor) -> Tensor:
    """`tensor` on the CPU; from a GPU it is there once the work launched until now is done."""
    return tensor.to("cpu", non_blocking=True)
