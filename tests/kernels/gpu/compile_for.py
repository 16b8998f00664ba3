"""Compiles every kernel that a model's steps launch, for a GPU that need not be there; it computes nothing.

    python compile_for.py CAPABILITY CONFIG.json TOKENS...

The real model runs on torch's meta device, and launches only compile. TOKENS: steps of so many decoding rows, or, with
a `p` before it, prompts of so many tokens. stdout: JSON, for each kernel [name, bytes of shared memory, stack bytes].
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ziphius.attention.batch import ForwardBatch
from ziphius.attention.cuda import CudaBackend
from ziphius.checkpoint.config import ModelConfig
from ziphius.distributed import SINGLE
from ziphius.kernels.gpu.device import GpuDevice
from ziphius.kv_cache.kv_pool import KVPool
from ziphius.layers.cuda_dense import CudaDenseFormat
from ziphius.layers.cuda_ops import CudaOps
from ziphius.models import deepseek_v2

META = torch.device("meta")
PAGE = 16
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class AbsentGpu:
    """What Triton asks its driver for while compiling."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return META


def stack_bytes(cubin: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        argv = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        told = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    return max(int(found) for found in re.findall(r"STACK:(\d+)", told))


def compile_only(compiled: dict[str, list[Any]]) -> None:
    run = JITFunction.run

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled[kernel.hash] = [self.__name__, kernel.metadata.shared, stack_bytes(kernel.asm["cubin"])]
        return kernel

    JITFunction.run = warm_up  # type: ignore[method-assign]


def batch_of(decodes: int, prompt: int) -> ForwardBatch:
    counts = [1] * decodes + ([prompt] if prompt else [])
    lens = [1024] * decodes + ([prompt] if prompt else [])
    starts = [sum(counts[:i]) for i in range(len(counts) + 1)]

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    total = starts[-1]
    return ForwardBatch(
        input_ids=empty(total),
        positions=empty(total),
        slots=empty(total),
        num_decodes=decodes,
        query_starts=starts,
        seq_lens=lens,
        seq_lens_device=empty(len(lens), dtype=torch.int32),
        page_table=empty(len(lens), 512, dtype=torch.int32),
        page_size=PAGE,
        sample_indices=torch.arange(len(lens)),
    )


def main() -> None:
    capability, config_file, *steps = sys.argv[1:]
    driver.set_active(AbsentGpu(int(capability)))
    compiled: dict[str, list[Any]] = {}
    compile_only(compiled)
    gpu = GpuDevice("a GPU that nobody measured", 108, int(capability) >= 90)
    GpuDevice.of = classmethod(lambda cls, device, batch_invariant=False: gpu)  # type: ignore[method-assign, assignment]
    deepseek_v2.make_ops = lambda device, batch_invariant: CudaOps(device, batch_invariant)
    config = replace(ModelConfig.from_file(Path(config_file)), num_hidden_layers=2)
    model = deepseek_v2.DeepseekV2ForCausalLM(
        config, SINGLE, CudaDenseFormat(torch.bfloat16, META), torch.bfloat16, META
    )
    pool = KVPool(config, 600, PAGE, torch.bfloat16, META, SINGLE)
    attention = CudaBackend(META)
    with torch.inference_mode():
        for step in steps:
            batch = batch_of(0, int(step[1:])) if step.startswith("p") else batch_of(int(step), 0)
            attention.prepare(batch)
            model.forward(batch, pool, attention)
    print(json.dumps(list(compiled.values())))


if __name__ == "__main__":
    main()
