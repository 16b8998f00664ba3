"""A packed step is laid out for the graph; rows beyond it repeat the first and harm nobody."""

from __future__ import annotations

import numpy as np
import torch

from ziphius.kernels.gpu.decode_batch import DecodeTensors, pack, unpack, unpack_torch


def test_unpack(device: torch.device) -> None:
    rng = np.random.default_rng(0)
    rows, positions, slots = np.array([4, 0, 2]), np.array([11, 300, 5]), np.array([71, 1230, 9])
    packed = torch.from_numpy(pack(rows, positions, slots, rng.integers(0, 99, (3, 300), dtype=np.int32))).to(device)
    last_token = torch.arange(50, 60, device=device)
    both = [DecodeTensors.empty(5, 310, device) for _ in range(2)]
    unpack(packed, last_token, both[0], 777, 9)
    unpack_torch(packed, last_token, both[1], 777, 9)
    for name in ("input_ids", "positions", "slots", "seq_lens", "rows", "page_table"):
        assert torch.equal(getattr(both[0], name), getattr(both[1], name)), name
    assert both[0].input_ids.tolist() == [54, 50, 52, 54, 54]
    assert both[0].slots.tolist() == [71, 1230, 9, 777, 777]
    assert both[0].rows.tolist() == [4, 0, 2, 9, 9]
