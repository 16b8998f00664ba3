"""DeepSeek-V2.5 scaled down: the published config with smaller numbers, the real tokenizer, random bf16 shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tests.tokenizer.v25_tokenizer import write_v25_tokenizer

from ziphius.checkpoint.config import ModelConfig
from ziphius.distributed import SINGLE
from ziphius.layers.dense import DenseFormat
from ziphius.models.causal_lm import make_model

PUBLISHED = Path(__file__).parents[1] / "planner" / "data" / "deepseek-v2.5-1210.json"
SMALLER: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 8, "q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 16, "n_routed_experts": 16, "moe_intermediate_size": 32,
}  # fmt: skip
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def write_small_v25(folder: Path) -> Path:
    """A folder as the hub has it: configs, tokenizer, three shards and their index. The same one every time."""
    folder.mkdir(parents=True)
    published = json.loads(PUBLISHED.read_text())
    assert set(SMALLER) <= set(published)
    (folder / "config.json").write_text(json.dumps(published | SMALLER))
    generation = {"bos_token_id": 100000, "eos_token_id": 100001, "temperature": 0.3, "top_p": 0.95}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    write_v25_tokenizer(folder)
    config = ModelConfig.from_folder(folder)
    model = make_model(config, SINGLE, DenseFormat(torch.float32), torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(5)
    tensors = {t.name: _random(t.name, t.shape, generator) for t in model.checkpoint_tensors()}
    weight_map = {name: SHARDS[i * len(SHARDS) // len(tensors)] for i, name in enumerate(tensors)}
    for shard in SHARDS:
        part = {name: tensors[name] for name, file in weight_map.items() if file == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Norms near 1, matrices that keep their input's size, so that answers differ and are far from ties."""
    values = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return (1 + 0.1 * values).bfloat16()
    return (values * (1.0 if "embed" in name else 1.5 * shape[-1] ** -0.5)).bfloat16()
