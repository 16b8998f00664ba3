"""ModelConfig: what a checkpoint's config says, checked and named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ziphius.checkpoint.architectures import architecture_of, names_with_yarn
from ziphius.checkpoint.attention import AttentionShape
from ziphius.checkpoint.attention import GroupedQueryAttention as GroupedQueryAttention  # for those who ask a config
from ziphius.checkpoint.attention import LatentAttention as LatentAttention
from ziphius.checkpoint.decoder import MoEConfig as MoEConfig
from ziphius.checkpoint.keys import Keys
from ziphius.checkpoint.quantization import Quantization
from ziphius.checkpoint.rope import Llama3RopeConfig as Llama3RopeConfig
from ziphius.checkpoint.rope import YarnConfig as YarnConfig
from ziphius.checkpoint.rope import read_rope
from ziphius.errors import ModelError, ModelNotFound, UnsupportedModel


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only model's shape."""

    architecture: str
    """The name of a row of ARCHITECTURES."""
    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: YarnConfig | Llama3RopeConfig | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    mlp_bias: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    torch_dtype: str
    attention: AttentionShape
    moe: MoEConfig | None = None
    quantization: Quantization | None = None
    """How the checkpoint's weights are quantized already; None: they are floats."""

    @property
    def num_attention_heads(self) -> int:
        return self.attention.heads

    @property
    def num_key_value_heads(self) -> int:
        return self.attention.kv_heads

    @property
    def head_dim(self) -> int:
        """Of q and k."""
        return self.attention.qk_head_dim

    def is_moe_layer(self, layer_id: int) -> bool:
        """Whether the layer has experts; layers count from 0."""
        moe = self.moe
        return moe is not None and layer_id >= moe.first_k_dense_replace and layer_id % moe.moe_layer_freq == 0

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read `folder`/config.json. ModelNotFound without one; ModelError when it is not JSON."""
        return cls.from_file(folder / "config.json")

    @classmethod
    def from_file(cls, path: Path) -> ModelConfig:
        """As `from_folder`, from a file of any name."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelNotFound(f"no config.json in {path.parent}") from None
        except OSError as e:
            raise ModelError(f"cannot read {path}: {e.strerror}") from e
        except ValueError as e:
            raise ModelError(f"{path} is not valid JSON: {e}") from e
        if not isinstance(data, dict):
            raise ModelError(f"{path} must hold a JSON object, not {type(data).__name__}")
        return cls.from_hf(data)

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> ModelConfig:
        """From a Hugging Face config.json. UnsupportedModel or ModelError name the key at fault."""
        keys = Keys(data)
        architectures = keys.get("architectures", list)
        if not architectures:
            raise ModelError("config.json: architectures is empty")
        architecture = architecture_of(architectures[0])
        keys.refuse_unless("hidden_act", ("silu",), "silu")
        theta, scaling = read_rope(keys)
        if isinstance(scaling, YarnConfig) and not architecture.yarn:
            raise UnsupportedModel(f"config.json: yarn scaling is supported for {names_with_yarn()} only")
        shape = architecture.parse(keys)
        bos = keys.ids("bos_token_id")
        return cls(
            architecture=architecture.name,
            model_type=keys.get("model_type", str, architecture.model_type),
            vocab_size=keys.size("vocab_size"),
            hidden_size=keys.size("hidden_size"),
            num_hidden_layers=keys.size("num_hidden_layers"),
            intermediate_size=keys.size("intermediate_size"),
            rms_norm_eps=keys.get("rms_norm_eps", float),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=keys.size("max_position_embeddings"),
            tie_word_embeddings=keys.get("tie_word_embeddings", bool, False),
            mlp_bias=shape.mlp_bias,
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=keys.ids("eos_token_id"),
            torch_dtype=keys.get("torch_dtype", str, None) or keys.get("dtype", str, "float32"),
            attention=shape.attention,
            moe=shape.moe,
            quantization=Quantization.from_hf(data),
        )
