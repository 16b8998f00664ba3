"""ModelConfig: what a checkpoint's config says, checked and named; it reads no weights and imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ziphius.checkpoint.quantization import Quantization
from ziphius.errors import ModelError, ModelNotFound, UnsupportedModel

Architecture = Literal["LlamaForCausalLM", "DeepseekV2ForCausalLM"]
TopkMethod = Literal["greedy", "group_limited_greedy"]

_REQUIRED = object()


@dataclass(frozen=True, slots=True)
class YarnConfig:
    """YaRN's parameters (Peng et al. 2023, arXiv:2309.00071), under Hugging Face's names."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


@dataclass(frozen=True, slots=True)
class Llama3RopeConfig:
    """Llama 3.1's frequency scaling, under Hugging Face's names."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434), under Hugging Face's names."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values the cache keeps of one token in one layer: the latent and the rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """DeepSeek-V2's mixture of experts, under Hugging Face's names."""

    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    n_shared_experts: int
    first_k_dense_replace: int
    moe_layer_freq: int
    topk_method: TopkMethod
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float

    @property
    def shared_intermediate_size(self) -> int:
        return self.n_shared_experts * self.moe_intermediate_size


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only model's shape. Exactly the Llama family has `mla is None`."""

    architecture: Architecture
    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    """Of q and k; for MLA qk_nope_head_dim + qk_rope_head_dim."""
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: YarnConfig | Llama3RopeConfig | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    torch_dtype: str
    mla: MLAConfig | None = None
    moe: MoEConfig | None = None
    quantization: Quantization | None = None
    """How the checkpoint's weights are quantized already; None: they are floats."""

    def is_moe_layer(self, layer_id: int) -> bool:
        moe = self.moe
        return moe is not None and layer_id >= moe.first_k_dense_replace and layer_id % moe.moe_layer_freq == 0

    @property
    def kv_values_per_token(self) -> int:
        """Cache values of one token over all layers on one rank of tensor parallel 1."""
        if self.mla is not None:
            return self.num_hidden_layers * self.mla.latent_dim
        return self.num_hidden_layers * 2 * self.num_key_value_heads * self.head_dim

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read `folder`/config.json. ModelNotFound without one; ModelError when it is not JSON."""
        return cls.from_file(folder / "config.json")

    @classmethod
    def from_file(cls, path: Path) -> ModelConfig:
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
        return replace(cls.from_hf(data), quantization=Quantization.from_hf(data))

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> ModelConfig:
        """From a Hugging Face config.json. UnsupportedModel or ModelError name the key at fault."""
        keys = _Keys(data)
        architectures = keys.get("architectures", list)
        if not architectures:
            raise ModelError("config.json: architectures is empty")
        if architectures[0] == "LlamaForCausalLM":
            return _llama(keys)
        if architectures[0] == "DeepseekV2ForCausalLM":
            return _deepseek_v2(keys)
        raise UnsupportedModel(
            f"architecture {architectures[0]} is not supported; this engine has LlamaForCausalLM and "
            "DeepseekV2ForCausalLM"
        )


class _Keys:
    """A config.json that refuses to guess: a missing or mistyped key is an error with its name."""

    def __init__(self, data: Mapping[str, Any], where: str = "config.json") -> None:
        self._data = data
        self._where = where

    def get(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        value = self._data.get(key, default)
        if value is _REQUIRED:
            raise ModelError(f"{self._where}: the key {key} is missing")
        if value is None and default is not _REQUIRED:
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ModelError(f"{self._where}: {key} must be {kind.__name__}, not {value!r}")
        return value

    def size(self, key: str, default: Any = _REQUIRED, *, least: int = 1, most: int | None = None) -> int:
        """An integer of at least `least` (default: positive) and at most `most`."""
        value: int = self.get(key, int, default)
        if value < least:
            limit = "positive" if least == 1 else f"at least {least}"
            raise ModelError(f"{self._where}: {key} must be {limit}, not {value}")
        if most is not None and value > most:
            raise ModelError(f"{self._where}: {key} must be at most {most}, not {value}")
        return value

    def size_or_null(self, key: str, *, least: int = 1) -> int | None:
        """An integer of at least `least`, or None where the config says null: the key must be there."""
        if key in self._data and self._data[key] is None:
            return None
        return self.size(key, least=least)

    def ids(self, key: str) -> tuple[int, ...]:
        """A token id, a list of them, or none."""
        value = self._data.get(key)
        if value is None:
            return ()
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            raise ModelError(f"{self._where}: {key} must be a token id or a list of them, not {value!r}")
        return tuple(values)

    def refuse_unless(self, key: str, allowed: tuple[Any, ...], default: Any = _REQUIRED) -> Any:
        value = self._data.get(key, default)
        if value is _REQUIRED:
            raise ModelError(f"{self._where}: the key {key} is missing")
        if value not in allowed:
            names = " or ".join(repr(a) for a in allowed)
            raise UnsupportedModel(f"{self._where}: {key} = {value!r} is not supported (only {names})")
        return value

    def child(self, key: str) -> _Keys | None:
        value = self._data.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise ModelError(f"{self._where}: {key} must be an object, not {value!r}")
        return _Keys(value, f"{self._where}: {key}")


def _rope(keys: _Keys) -> tuple[float, YarnConfig | Llama3RopeConfig | None]:
    # transformers 5 writes rope_parameters, with rope_theta inside; 4 wrote rope_scaling beside rope_theta.
    scaling = keys.child("rope_parameters") or keys.child("rope_scaling")
    theta = (scaling.get("rope_theta", float, None) if scaling else None) or keys.get("rope_theta", float, 10000.0)
    if scaling is None:
        return theta, None
    kind = scaling.get("rope_type", str, None) or scaling.get("type", str, "default")
    if kind == "default":
        return theta, None
    if kind == "yarn":
        return theta, YarnConfig(
            factor=scaling.get("factor", float),
            original_max_position_embeddings=scaling.size("original_max_position_embeddings"),
            beta_fast=scaling.get("beta_fast", float, 32.0),
            beta_slow=scaling.get("beta_slow", float, 1.0),
            mscale=scaling.get("mscale", float, 1.0),
            mscale_all_dim=scaling.get("mscale_all_dim", float, 0.0),
        )
    if kind == "llama3":
        return theta, Llama3RopeConfig(
            factor=scaling.get("factor", float),
            low_freq_factor=scaling.get("low_freq_factor", float),
            high_freq_factor=scaling.get("high_freq_factor", float),
            original_max_position_embeddings=scaling.size("original_max_position_embeddings"),
        )
    raise UnsupportedModel(f"config.json: rope scaling {kind!r} is not supported (only yarn and llama3)")


def _common(keys: _Keys) -> dict[str, Any]:
    keys.refuse_unless("hidden_act", ("silu",), "silu")
    theta, scaling = _rope(keys)
    bos = keys.ids("bos_token_id")
    return {
        "vocab_size": keys.size("vocab_size"),
        "hidden_size": keys.size("hidden_size"),
        "num_hidden_layers": keys.size("num_hidden_layers"),
        "num_attention_heads": keys.size("num_attention_heads"),
        "intermediate_size": keys.size("intermediate_size"),
        "rms_norm_eps": keys.get("rms_norm_eps", float),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_position_embeddings": keys.size("max_position_embeddings"),
        "tie_word_embeddings": keys.get("tie_word_embeddings", bool, False),
        "attention_bias": keys.get("attention_bias", bool, False),
        "bos_token_id": bos[0] if bos else None,
        "eos_token_ids": keys.ids("eos_token_id"),
        "torch_dtype": keys.get("torch_dtype", str, None) or keys.get("dtype", str, "float32"),
    }


def _llama(keys: _Keys) -> ModelConfig:
    common = _common(keys)
    heads = common["num_attention_heads"]
    head_dim = keys.size("head_dim", common["hidden_size"] // heads)
    kv_heads = keys.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ModelError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    if isinstance(common["rope_scaling"], YarnConfig):
        raise UnsupportedModel("config.json: yarn scaling is supported for DeepseekV2ForCausalLM only")
    return ModelConfig(
        architecture="LlamaForCausalLM",
        model_type=keys.get("model_type", str, "llama"),
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        mlp_bias=keys.get("mlp_bias", bool, False),
        **common,
    )


def _deepseek_v2(keys: _Keys) -> ModelConfig:
    common = _common(keys)
    keys.refuse_unless("scoring_func", ("softmax",), "softmax")
    mla = MLAConfig(
        q_lora_rank=keys.size_or_null("q_lora_rank"),
        kv_lora_rank=keys.size("kv_lora_rank"),
        qk_nope_head_dim=keys.size("qk_nope_head_dim"),
        qk_rope_head_dim=keys.size("qk_rope_head_dim"),
        v_head_dim=keys.size("v_head_dim"),
    )
    return ModelConfig(
        architecture="DeepseekV2ForCausalLM",
        model_type=keys.get("model_type", str, "deepseek_v2"),
        num_key_value_heads=common["num_attention_heads"],
        head_dim=mla.qk_head_dim,
        mlp_bias=keys.get("mlp_bias", bool, False),
        mla=mla,
        moe=_moe(keys),
        **common,
    )


def _moe(keys: _Keys) -> MoEConfig | None:
    experts = keys.size_or_null("n_routed_experts")
    if experts is None:
        return None
    method = keys.refuse_unless("topk_method", ("greedy", "group_limited_greedy"))
    groups, kept = 1, 1
    if method == "group_limited_greedy":
        groups = keys.size("n_group")
        if experts % groups:
            raise ModelError(f"config.json: n_routed_experts {experts} is not a multiple of n_group {groups}")
        kept = keys.size("topk_group", most=groups)
    return MoEConfig(
        n_routed_experts=experts,
        num_experts_per_tok=keys.size("num_experts_per_tok", most=experts // groups * kept),
        moe_intermediate_size=keys.size("moe_intermediate_size"),
        n_shared_experts=keys.size_or_null("n_shared_experts", least=0) or 0,
        first_k_dense_replace=keys.size("first_k_dense_replace", least=0),
        moe_layer_freq=keys.size("moe_layer_freq", 1),
        topk_method=method,
        n_group=groups,
        topk_group=kept,
        norm_topk_prob=keys.get("norm_topk_prob", bool),
        routed_scaling_factor=keys.get("routed_scaling_factor", float),
    )
