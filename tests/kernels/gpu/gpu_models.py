"""Tiny checkpoints whose shapes wake every kernel, and models of them on the GPU kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_helpers import HALF
from hf_oracle import VOCAB, Session, Tiny, make_tiny

from ziphius.attention.cuda import CudaBackend
from ziphius.checkpoint.config import ModelConfig
from ziphius.checkpoint.safetensors_source import SafetensorsSource
from ziphius.distributed import SINGLE
from ziphius.layers.cuda_dense import CudaDenseFormat
from ziphius.layers.cuda_ops import CudaOps
from ziphius.models import deepseek_v2, llama, loader
from ziphius.models.causal_lm import CausalLM

_LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 512,
}
# Half of the experts for each token, so that a prompt of 49 tokens is computed by the prompt kernels, which want rows
# of whole 16 bytes; hidden and intermediate sizes are not powers of two.
_V2_5: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 72,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "q_lora_rank": 40,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 3,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 4.0,
    "norm_topk_prob": False,
    "max_position_embeddings": 1280,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 4,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}
_LITE: dict[str, Any] = {
    "q_lora_rank": None,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "rope_parameters": _V2_5["rope_parameters"] | {"mscale": 0.707, "mscale_all_dim": 0.707},
}
SETTINGS: dict[str, dict[str, Any]] = {"V2.5": _V2_5, "V2-Lite": _V2_5 | _LITE, "Llama": _LLAMA}


def make_rounded(folder: Path, settings: dict[str, Any]) -> Tiny:
    """Weights that HALF holds exactly: what differs in HALF is how it is computed."""
    tiny = make_tiny(folder, settings)
    with torch.no_grad():
        for parameter in tiny.oracle.parameters():
            parameter.copy_(parameter.to(HALF))
    tiny.oracle.save_pretrained(folder)
    return tiny


def load_on_kernels(
    tiny: Tiny,
    dtype: torch.dtype,
    device: torch.device,
    batch_invariant: bool = False,
    config: ModelConfig | None = None,
) -> CausalLM:
    """On a GPU as the engine loads; on a CPU with the GPU's bodies, which the interpreter runs."""
    with pytest.MonkeyPatch.context() as patch:
        if device.type != "cuda":
            patch.setattr(loader, "make_linear_format", lambda _, *which: CudaDenseFormat(*which))
            for module in (llama, deepseek_v2):
                patch.setattr(module, "make_ops", CudaOps)
        source = SafetensorsSource(tiny.folder)
        return loader.load_model(
            config or tiny.config, source, SINGLE, "dtype", dtype, device, batch_invariant=batch_invariant
        )


def session_on_kernels(
    model: CausalLM, dtype: torch.dtype, device: torch.device, batch_invariant: bool = False
) -> Session:
    return Session(model, 4, CudaBackend(device, batch_invariant), dtype, device)
