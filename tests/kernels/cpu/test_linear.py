"""int8 products of the CPU kernels: equal to plain torch, and a row's result the row's alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ziphius.kernels.cpu.linear import ROW_BLOCK, Int8Linear, int8_linear_reference
from ziphius.kernels.cpu.pool import ThreadPool
from ziphius.kernels.cpu.quantize import PackedWeight, pack_weight
from ziphius.kernels.int8_reference import quantize_rows


@pytest.fixture(scope="module", params=[1, 2, 3])
def linear(request: pytest.FixtureRequest) -> Iterator[Int8Linear]:
    pool = ThreadPool(request.param)
    yield Int8Linear(pool)
    pool.close()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is not written shows."""
    empty = torch.empty

    def nan(*size: int | tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return empty(*size, dtype=dtype).fill_(torch.nan if dtype == torch.float32 else 77)

    monkeypatch.setattr(torch, "empty", nan)


def random_weight(out_features: int, in_features: int) -> PackedWeight:
    weight = torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8)
    return pack_weight(weight, torch.rand(out_features) + 0.1)


def random_rows(rows: int, size: int) -> Tensor:
    return torch.randn(rows, size) * torch.logspace(-3, 3, size).gather(0, torch.randperm(size)) * torch.rand(rows, 1)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """To float32's rounding of the largest term: groups may all but cancel each other."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 2e-6 * expected.abs().max() + 1e-7


@pytest.mark.parametrize("out_features", [1, 32, 77, 160])
@pytest.mark.parametrize("in_features", [1, 3, 64, 70, 576])
@pytest.mark.parametrize("rows", [1, 2, 5, 7, 16, 33])
def test_equals_plain_torch(linear: Int8Linear, rows: int, in_features: int, out_features: int) -> None:
    torch.manual_seed(rows * in_features * out_features)
    weight, x = random_weight(out_features, in_features), random_rows(rows, in_features)
    assert_near(linear(x, weight), int8_linear_reference(x, weight))


def test_many_rows(linear: Int8Linear) -> None:
    weight, x = random_weight(45, 130), random_rows(ROW_BLOCK + 19, 130)
    assert_near(linear(x, weight), int8_linear_reference(x, weight))


def test_no_rows(linear: Int8Linear) -> None:
    assert linear(torch.zeros(0, 64), random_weight(8, 64)).shape == (0, 8)


def test_rows_that_are_not_contiguous(linear: Int8Linear) -> None:
    weight, x = random_weight(40, 64), random_rows(9, 128)[:, ::2]
    assert_near(linear(x, weight), int8_linear_reference(x, weight))


def test_the_largest_sums_do_not_overflow(linear: Int8Linear) -> None:
    size = 4096
    weight = pack_weight(torch.full((32, size), -127, dtype=torch.int8), torch.ones(32))
    y = linear(torch.full((1, size), 127.0), weight)
    torch.testing.assert_close(y, torch.full((1, 32), -127.0 * 127 * size), rtol=1e-6, atol=0)


def test_a_row_does_not_depend_on_the_others(linear: Int8Linear) -> None:
    weight, x = random_weight(96, 200), random_rows(50, 200)
    together = linear(x, weight)
    for part in (slice(0, 1), slice(3, 5), slice(7, 20), slice(49, 50)):
        assert torch.equal(linear(x[part], weight), together[part])


def test_nothing_but_zeros(linear: Int8Linear) -> None:
    assert not linear(torch.zeros(3, 100), random_weight(33, 100)).any()
    tiny = torch.full((1, 100), 1e-38)
    assert linear(tiny, random_weight(33, 100)).isfinite().all()


def test_packing_keeps_the_weight() -> None:
    weight, scale = torch.randint(-127, 128, (70, 9), dtype=torch.int8), torch.rand(70)
    packed = PackedWeight.zeros(70, 9)
    for start, end in ((64, 70), (0, 32), (32, 33), (33, 64)):
        packed.store_rows(start, weight[start:end], scale[start:end])
    assert torch.equal(packed.unpack(), weight)
    assert torch.equal(packed.scale[:70], scale)
    assert not packed.scale[70:].any()


def test_groups_are_quantized_to_their_own_largest() -> None:
    x = torch.cat([torch.randn(4, 64), torch.randn(4, 64) * 1000, torch.randn(4, 5)], dim=1)
    values, scales = quantize_rows(x)
    assert scales.shape == (4, 3)
    restored = values * scales.repeat_interleave(64, dim=1)[:, :133]
    assert ((restored - x).abs() <= scales.repeat_interleave(64, dim=1)[:, :133] * 0.5001).all()
    for part in (slice(0, 64), slice(64, 128), slice(128, 133)):
        assert (values[:, part].abs().amax(1) == 127).all()
