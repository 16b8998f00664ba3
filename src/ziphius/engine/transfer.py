"""Copies of small arrays from the host to the device, and back, without waiting for the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor


def upload(values: ArrayLike, device: torch.device, dtype: Any = None) -> Tensor:
    """`values` as a tensor on `device`; `dtype` is numpy's. On a CPU the tensor shares the array's memory.

    torch.tensor(values, device="cuda") would wait until the device has finished all its work.
    """
    host = torch.from_numpy(np.asarray(values, dtype=dtype))
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def download(tensor: Tensor) -> Tensor:
    """`tensor` on the CPU. From a GPU it is complete once all work launched until now is done."""
    return tensor.to("cpu", non_blocking=True)
