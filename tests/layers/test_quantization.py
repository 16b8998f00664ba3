"""int8: what is stored, what is multiplied, and that a row's answer is the row's alone."""

from __future__ import annotations

import pytest
import torch

from ziphius.errors import ConfigError
from ziphius.layers import int8
from ziphius.layers.dense import DenseFormat, DenseWeight
from ziphius.layers.int8 import Int8Format, Int8Weight, int8_linear, quantize_int8
from ziphius.layers.select import has_gpu_kernels, make_linear_format

CPU = torch.device("cpu")


def test_quantize_rounds_to_the_nearest_step_of_each_row() -> None:
    torch.manual_seed(0)
    rows = torch.randn(7, 33) * torch.logspace(-3, 3, 7).unsqueeze(1)
    quantized, scale = quantize_int8(rows)
    torch.testing.assert_close(scale, rows.abs().amax(1) / 127)
    assert ((quantized * scale.unsqueeze(1) - rows).abs() <= scale.unsqueeze(1) * 0.5001).all()
    assert (quantized.abs().amax(1) == 127).all()


def test_a_row_of_zeros_stays_zeros() -> None:
    quantized, scale = quantize_int8(torch.zeros(2, 5))
    assert not quantized.any()
    assert scale.isfinite().all()
    assert not int8_linear(torch.zeros(3, 5), quantized, scale).any()


def test_int8_linear_is_near_the_float_product() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(9, 256), torch.randn(40, 256)
    expected = x @ weight.T
    error = (int8_linear(x, *quantize_int8(weight)) - expected).abs().max() / expected.abs().max()
    assert error < 0.02


def test_a_token_does_not_depend_on_the_rest_of_the_batch() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(6, 64), quantize_int8(torch.randn(10, 64))
    x[3] *= 1000
    together = int8_linear(x, *weight)
    for row in range(6):
        assert torch.equal(int8_linear(x[row : row + 1], *weight), together[row : row + 1])


def test_the_results_type_is_the_activations() -> None:
    x, weight = torch.randn(2, 16).bfloat16(), torch.randn(4, 16)
    assert int8_linear(x, *quantize_int8(weight)).dtype == torch.bfloat16
    assert DenseWeight(weight)(x).dtype == torch.bfloat16
    torch.testing.assert_close(DenseWeight(weight)(x), (x.float() @ weight.T).bfloat16())


def test_the_packed_format_means_the_same() -> None:
    torch.manual_seed(0)
    rows, x = torch.randn(45, 70), torch.randn(9, 70)
    packed, plain = (f.linear(45, 70, CPU) for f in (make_linear_format("int8", torch.float32, CPU), Int8Format()))
    for weight in (packed, plain):
        weight.load_rows(32, rows[32:])
        weight.load_rows(0, rows[:32])
    torch.testing.assert_close(packed(x), plain(x), rtol=1e-5, atol=1e-5)
    assert packed(x.bfloat16()).dtype == torch.bfloat16
    assert packed(x[:0]).shape == (0, 45)
    assert packed.nbytes == plain.nbytes


@pytest.mark.parametrize("rows_at_once", [2, 1024])
def test_loading_in_parts_is_loading_the_whole(monkeypatch: pytest.MonkeyPatch, rows_at_once: int) -> None:
    monkeypatch.setattr(int8, "ROWS_AT_ONCE", rows_at_once)
    rows = torch.randn(9, 16)
    weight = Int8Weight(9, 16, CPU)
    weight.load_rows(5, rows[5:].bfloat16())
    weight.load_rows(0, rows[:5].half())
    expected, scale = quantize_int8(torch.cat((rows[:5].half().float(), rows[5:].bfloat16().float())))
    assert torch.equal(weight.weight, expected)
    assert torch.equal(weight.scale, scale)


@pytest.mark.parametrize("name", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("sizes", [(96, 64), (45, 50)])
def test_random_weights_have_the_deviation_that_was_asked_for(name: str, sizes: tuple[int, int]) -> None:
    """Whatever the format: seen in products with x of deviation 1, which grow by the root of the inputs' number."""
    made = make_linear_format(name, torch.float32, CPU)
    weight, experts = made.linear(*sizes, CPU), made.experts(3, *sizes, CPU)
    x = torch.randn(200, sizes[1])
    results = []
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        weight.fill_random(0.02, generator)
        experts.fill_random(0.02, generator)
        results.append([weight(x), *(experts.apply(i, x) for i in range(3))])
    for product in results[0]:
        assert product.std() / sizes[1] ** 0.5 == pytest.approx(0.02, rel=0.1)
    first, again, other = (torch.stack(products) for products in results)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[1], first[2])


@pytest.mark.parametrize("name", ["fp32", "int8"])
def test_experts_are_loaded_one_by_one(name: str) -> None:
    torch.manual_seed(0)
    experts = make_linear_format(name, torch.float32, CPU).experts(3, 8, 16, CPU)
    weights = torch.randn(3, 8, 16)
    for expert in (2, 0, 1):
        experts.load_rows(expert, 4, weights[expert, 4:])
        experts.load_rows(expert, 0, weights[expert, :4])
    x = torch.randn(5, 16)
    for expert in range(3):
        expected = x @ weights[expert].T
        assert (experts.apply(expert, x) - expected).abs().max() < (1e-5 if name == "fp32" else 0.2)


def test_formats_by_name() -> None:
    assert make_linear_format("fp16", torch.float32, CPU) == DenseFormat(torch.float16)
    assert make_linear_format("auto", torch.float32, CPU).tied(torch.zeros(4, 2)) is None, "int8 on a CPU"
    if not has_gpu_kernels():
        assert make_linear_format("auto", torch.bfloat16, torch.device("cuda")) == DenseFormat(torch.bfloat16)
    with pytest.raises(ConfigError, match="int5"):
        make_linear_format("int5", torch.float32, CPU)
