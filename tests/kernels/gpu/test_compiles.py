"""Every kernel of a step compiles for an A100 and for a Hopper GPU, fits shared memory, and spills no registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ziphius.kernels.gpu.device import GpuDevice
from ziphius.kernels.gpu.tuning import Tuned

HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "planner" / "data" / "deepseek-v2.5-one-rank-of-tp4.json"
STEPS = ["1", "8", "128", "p300", "p8192"]
SPILLED = 256
"""Bytes of stack a thread may have: a few registers of an attention kernel are not what it waits for."""


@pytest.mark.parametrize(("capability", "shared"), [(80, 163 << 10), (90, 227 << 10)])
def test_a_rank_of_v25(capability: int, shared: int, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    argv = [sys.executable, str(HERE / "compile_for.py"), str(capability), str(CONFIG), *STEPS]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = json.loads(done.stdout)
    assert {"_mla_kernel", "_flash_kernel", "gate_up_kernel", "prompt_down_kernel"} <= {name for name, *_ in compiled}
    assert [kernel for kernel in compiled if kernel[1] > shared or kernel[2] > SPILLED] == []


def test_an_h100_takes_what_was_measured_on_an_h200() -> None:
    h200 = Tuned.of(GpuDevice("NVIDIA H200", 132, True))
    assert h200.measured
    assert Tuned.of(GpuDevice("NVIDIA H100 80GB HBM3", 132, True)).measured == h200.measured
    assert Tuned.of(GpuDevice("NVIDIA GH200 480GB", 132, True)).measured == h200.measured
    assert Tuned.of(GpuDevice("NVIDIA A100-SXM4-80GB", 108, False)).measured == {}
