"""Loading holds no more than one layer beyond what the rank keeps: measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ziphius.checkpoint.config import ModelConfig
from ziphius.distributed import SINGLE
from ziphius.layers.dense import DenseFormat
from ziphius.models.causal_lm import make_model

CONFIG = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 512,
    "num_hidden_layers": 10,
    "num_attention_heads": 4,
    "intermediate_size": 2048,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
}
LAYER_BYTES = 17 * 3 * 512 * 256 * 4
"""Of a layer's experts, in float32: nearly all of the layer."""
SHARDS = 4

LOAD = """
import re, sys
from pathlib import Path
import torch
from ziphius.distributed import ParallelState
from ziphius.checkpoint.config import ModelConfig
from ziphius.models.loader import load_model
from ziphius.checkpoint.safetensors_source import SafetensorsSource

def memory(what):
    return int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

small, folder, size, weights_format = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
parallel = ParallelState(size - 1, size)
torch.set_num_threads(1)

def load(folder):
    config, source = ModelConfig.from_folder(folder), SafetensorsSource(folder, threads=4)
    return load_model(config, source, parallel, weights_format, torch.float32, torch.device("cpu"))

load(small)  # the libraries' own memory comes with the first use
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
model = load(folder)
print(memory("VmHWM") - before, model.nbytes)
"""


def make_checkpoint(folder: Path, settings: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(settings))
    model = make_model(ModelConfig.from_hf(settings), SINGLE, DenseFormat(torch.float32), torch.float32,
                       torch.device("cpu"))  # fmt: skip
    shapes = {t.name: t.shape for t in model.checkpoint_tensors()}
    del model
    names = list(shapes)
    weight_map = {name: f"model-{i * SHARDS // len(names)}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(weight_map.values())):
        save_file({n: torch.full(shapes[n], 0.5) for n in names if weight_map[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64, "moe_intermediate_size": 64}
    return make_checkpoint(tmp_path_factory.mktemp("small"), CONFIG | sizes)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), CONFIG)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("size", "weights_format"), [(1, "fp32"), (2, "bf16"), (4, "int8")])
def test_peak_memory(small: Path, checkpoint: Path, size: int, weights_format: str) -> None:
    command = [sys.executable, "-c", LOAD, str(small), str(checkpoint), str(size), weights_format]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    peak, kept = map(int, done.stdout.split())
    total = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert total > 8 * LAYER_BYTES, "else the test would tell little"
    assert peak - kept < LAYER_BYTES, f"{(peak - kept) / 2**20:.1f} MiB over what is kept, of {LAYER_BYTES / 2**20:.1f}"
