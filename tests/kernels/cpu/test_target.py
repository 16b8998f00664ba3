"""Other instruction sets than this CPU's: which tiles they get, and that those compute the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ziphius.kernels.cpu.cache import kernel_cache_folder
from ziphius.kernels.cpu.target import host_features, target_of

AVX2 = "+avx,+avx2,+fma,+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2"

COMPARE = """
import torch
from ziphius.kernels.cpu.attention import attention_reference, group_keys
from ziphius.kernels.cpu.linear import Int8Linear, int8_linear_reference
from ziphius.kernels.cpu.paged_attention import PagedAttention
from ziphius.kernels.cpu.pool import ThreadPool
from ziphius.kernels.cpu.quantize import pack_weight
from ziphius.kernels.cpu.target import TARGET

torch.manual_seed(0)
pool = ThreadPool(2)
linear = Int8Linear(pool)
for rows, k, n in ((1, 64, 32), (7, 130, 70), (20, 5, 33)):
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    weight[0], weight[-1] = 127, -127
    packed, x = pack_weight(weight, torch.rand(n)), torch.randn(rows, k)
    expected = int8_linear_reference(x, packed)
    assert (linear(x, packed) - expected).abs().max() <= 2e-6 * expected.abs().max(), (rows, k, n)

heads, kv_heads, size, lens, starts = 6, 2, 32, [70, 33], [0, 1, 21]
k, v = torch.randn(128, kv_heads, size), torch.randn(128, kv_heads, size)
table = torch.tensor([[0, 2, 4, 6, 7], [1, 3, 5, 0, 0]], dtype=torch.int32)
q = torch.randn(21, heads, size)
attention = PagedAttention(pool)
attention.begin(table, 16, lens, starts, 1)
actual = attention(q, group_keys(k), v, 0.2)
expected = attention_reference(q, k, v, table, 16, lens, starts, 0.2)
torch.testing.assert_close(actual, expected, rtol=1e-5, atol=3e-6)
print(TARGET.byte_dot)
"""


def test_targets() -> None:
    avx512 = frozenset({"avx2", "avx512f", "avx512bw", "avx512vl", "avx512vnni"})
    assert target_of(avx512).byte_dot == "vnni512"
    assert target_of(avx512 - {"avx512vnni"}).byte_dot == "avx2"
    assert target_of(frozenset({"avx2", "avxvnni"})).byte_dot == "vnni256"
    assert target_of(frozenset()).byte_dot == "generic"
    assert "not a feature" not in host_features()


@pytest.mark.parametrize(
    ("name", "cpu", "features"),
    [("vnni256", "generic", f"{AVX2},+avxvnni"), ("avx2", "generic", AVX2), ("generic", "generic", "")],
)
def test_other_instruction_sets_compute_the_same(name: str, cpu: str, features: str) -> None:
    if not {part.removeprefix("+") for part in features.split(",") if part} <= host_features():
        pytest.skip(f"this CPU does not run {name}")
    environment = {**os.environ, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features}
    done = subprocess.run(
        [sys.executable, "-c", COMPARE], capture_output=True, text=True, timeout=280, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [name]


def test_the_folder_of_compiled_code(tmp_path: Path) -> None:
    folder = kernel_cache_folder(tmp_path)
    assert folder is not None
    assert folder.is_dir()
    assert kernel_cache_folder(tmp_path) == folder
    (tmp_path / "file").touch()
    assert kernel_cache_folder(tmp_path / "file") is None


def test_the_folder_is_found_without_torch_and_numba() -> None:
    code = (
        "import sys, ziphius.kernels.cpu.cache\n"
        "sys.exit('torch' in sys.modules or 'numba' in sys.modules)"
    )  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True)
