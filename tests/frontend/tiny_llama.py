"""A random Llama on disk, with the fakes' tokenizer: enough for a real server with real ranks to answer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import server_fakes as fakes
from safetensors.numpy import save_file

VOCAB = fakes.VOCAB_SIZE + fakes.VOCAB_SIZE % 2
HIDDEN, WIDTH, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 32, 48, 4, 2, 8, 2
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "intermediate_size": WIDTH, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096,
    "bos_token_id": None, "eos_token_id": fakes.EOS, "hidden_act": "silu", "tie_word_embeddings": True,
    "torch_dtype": "float32",
}  # fmt: skip


def write_tiny_llama(folder: Path, layers: int = LAYERS) -> Path:
    """The checkpoint, in Hugging Face's format; the same one every time."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    (folder / "tokenizer.json").write_text(fakes.tokenizer_json())
    settings = {"eos_token": "<|im_end|>", "chat_template": fakes.TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    shapes = {"model.embed_tokens": (VOCAB, HIDDEN), "model.norm": (HIDDEN,)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
            f"{layer}.self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{layer}.self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{layer}.self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
            f"{layer}.mlp.gate_proj": (WIDTH, HIDDEN),
            f"{layer}.mlp.up_proj": (WIDTH, HIDDEN),
            f"{layer}.mlp.down_proj": (HIDDEN, WIDTH),
            f"{layer}.input_layernorm": (HIDDEN,),
            f"{layer}.post_attention_layernorm": (HIDDEN,),
        }
    random = np.random.default_rng(1)
    tensors = {}
    for name, shape in shapes.items():
        values = random.standard_normal(shape) * 0.3 if len(shape) > 1 else np.ones(shape)
        tensors[f"{name}.weight"] = values.astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
