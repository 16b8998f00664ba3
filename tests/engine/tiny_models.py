"""Random checkpoints in Hugging Face's format, written without transformers: shapes that 2 and 4 ranks divide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ziphius.checkpoint.config import ModelConfig
from ziphius.distributed import SINGLE
from ziphius.layers.dense import DenseFormat
from ziphius.models.causal_lm import make_model

COMMON: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip
LLAMA = {**COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_attention_heads": 8,
         "num_key_value_heads": 2}  # fmt: skip
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True}
QWEN3 = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 12}
V2_LITE = {
    **COMMON, "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 20, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "moe_intermediate_size": 24, "n_shared_experts": 2, "first_k_dense_replace": 1, "moe_layer_freq": 1,
    "n_group": 1, "topk_group": 1, "topk_method": "greedy", "routed_scaling_factor": 1.0, "norm_topk_prob": False,
    "scoring_func": "softmax",
}  # fmt: skip
V2 = {
    **V2_LITE, "q_lora_rank": 40, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 16.0, "max_position_embeddings": 1280,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 32, "beta_fast": 32,
                     "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707},
}  # fmt: skip


def write_checkpoint(folder: Path, settings: dict[str, Any], seed: int = 1) -> Path:
    """A folder with config.json and model.safetensors; matrices are random, norms near 1."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    torch.manual_seed(seed)
    config = ModelConfig.from_folder(folder)
    model = make_model(config, SINGLE, DenseFormat(torch.float32), torch.float32, torch.device("cpu"))
    tensors = {}
    for taken in model.checkpoint_tensors():
        if len(taken.shape) == 1:
            tensors[taken.name] = 1 + 0.1 * torch.randn(taken.shape)
        else:
            tensors[taken.name] = torch.randn(taken.shape) * (
                0.5 if "embed" in taken.name else 1.5 * taken.shape[-1] ** -0.5
            )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
