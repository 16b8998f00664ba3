"""Rotary frequencies against transformers, and DeepSeek's constants against the published formula."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from ziphius.checkpoint.config import Llama3RopeConfig, YarnConfig
from ziphius.layers.ops import TorchOps
from ziphius.layers.rotary import RotaryEmbedding, yarn_mscale, yarn_rotary_scale, yarn_softmax_scale

CPU = torch.device("cpu")
V25 = YarnConfig(40.0, 4096, 32.0, 1.0, mscale=1.0, mscale_all_dim=1.0)
LLAMA31 = Llama3RopeConfig(8.0, 1.0, 4.0, 8192)
POSITIONS = torch.tensor([0, 1, 17, 4095, 4096, 9000, 163839])


def transformers_angles(dim: int, theta: float, parameters: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_theta": theta} | parameters
    config = LlamaConfig(head_dim=dim, max_position_embeddings=163840, rope_parameters=rope)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), POSITIONS.unsqueeze(0))
    return cos[0, :, : dim // 2], sin[0, :, : dim // 2]


def yarn_parameters(yarn: YarnConfig) -> dict[str, Any]:
    names = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    return {"rope_type": "yarn"} | {name: getattr(yarn, name) for name in names}


@pytest.mark.parametrize("dim", [16, 64, 128])
def test_plain(dim: int) -> None:
    actual = RotaryEmbedding(dim, 10000.0, None, CPU)(POSITIONS)
    torch.testing.assert_close(actual, transformers_angles(dim, 10000.0, {"rope_type": "default"}), rtol=0, atol=1e-6)


@pytest.mark.parametrize("yarn", [V25, replace(V25, mscale=0.707, mscale_all_dim=0.707), replace(V25, mscale=0.5)])
def test_yarn(yarn: YarnConfig) -> None:
    actual = RotaryEmbedding(64, 10000.0, yarn, CPU)(POSITIONS)
    expected = transformers_angles(64, 10000.0, yarn_parameters(yarn))
    # At position 163839 one float32 rounding of a frequency is 0.01 of an angle.
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-2)
    torch.testing.assert_close([x[:-1] for x in actual], [x[:-1] for x in expected], rtol=0, atol=1e-3)


def test_llama3() -> None:
    parameters = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    expected = transformers_angles(128, 500000.0, parameters | {"original_max_position_embeddings": 8192})
    torch.testing.assert_close(RotaryEmbedding(128, 500000.0, LLAMA31, CPU)(POSITIONS), expected, rtol=0, atol=2e-2)


def test_deepseek_v25_softmax_scale() -> None:
    # 0.1 * ln(40) + 1 = 1.36888; squared 1.87383; over sqrt(192) 0.135233.
    assert yarn_mscale(40.0, 1.0) == pytest.approx(1.3688879)
    assert 192**-0.5 * yarn_softmax_scale(V25) == pytest.approx(0.1352337, rel=1e-6)
    assert yarn_rotary_scale(V25) == 1.0


def test_deepseek_v2_softmax_scale() -> None:
    v2 = replace(V25, mscale=0.707, mscale_all_dim=0.707)
    assert yarn_softmax_scale(v2) == pytest.approx((0.0707 * math.log(40.0) + 1.0) ** 2)
    assert yarn_softmax_scale(v2) == pytest.approx(1.5896262, rel=1e-6)


def test_where_transformers_differs_the_published_model_is_followed() -> None:
    """modeling_deepseek.py: cos and sin times mscale's temperature over mscale_all_dim's, which is 1 at 0."""
    only_mscale = replace(V25, mscale=0.707, mscale_all_dim=0.0)
    assert yarn_rotary_scale(only_mscale) == pytest.approx(0.0707 * math.log(40.0) + 1.0)
    assert yarn_softmax_scale(only_mscale) == 1.0


def test_nothing_is_scaled_when_nothing_is_stretched() -> None:
    assert yarn_mscale(1.0, 1.0) == 1.0
    assert yarn_mscale(0.5, 1.0) == 1.0


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotate_turns_each_pair(interleaved: bool) -> None:
    torch.manual_seed(0)
    x, angles = torch.randn(3, 2, 6), torch.rand(3, 3) * 6
    actual = TorchOps().rotate(x, angles.cos(), angles.sin(), interleaved)
    for pair in range(3):
        i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 3)
        turned = torch.complex(x[..., i], x[..., j]) * torch.polar(torch.ones(3), angles[:, pair]).unsqueeze(1)
        torch.testing.assert_close(actual[..., i], turned.real)
        torch.testing.assert_close(actual[..., j], turned.imag)
