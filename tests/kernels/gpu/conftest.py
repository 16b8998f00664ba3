"""Kernels run on the GPU where there is one, and under Triton's interpreter otherwise: the same tests, small shapes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

# Helpers lie beside this file, and transformers as the oracle beside the models' tests.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "models")]

if not torch.cuda.is_available():
    # Read when a kernel is defined, Triton's own too: before triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton", reason="triton is not installed")


def _let_loop_bounds_be_arrays() -> None:
    """Triton 3.6's interpreter turns a loop bound, an array of one element, into an int as numpy 2.4 refuses to."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_too(tensor: object, scope: interpreter._LangPatchScope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_too


if not torch.cuda.is_available():
    _let_loop_bounds_be_arrays()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
