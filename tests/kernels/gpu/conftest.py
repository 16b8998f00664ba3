"""Kernels run on the GPU where there is one, and under Triton's interpreter otherwise: the same tests, small shapes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FunctionType

import pytest
import torch

# Helpers lie beside this file, and transformers as the oracle beside the models' tests.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "models")]

pytest.importorskip("triton", reason="triton is not installed")


def _let_loop_bounds_be_arrays() -> None:
    """Triton 3.6's interpreter turns a loop bound, an array of one element, into an int as numpy 2.4 refuses to."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_too(tensor: object, scope: interpreter._LangPatchScope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_too


def _replace_the_language_once() -> None:
    """Triton's interpreter replaces the functions of Triton's language at each call of a kernel and of each function
    in it, which takes a third of the time. No kernel is compiled in this process: what is replaced may stay so."""
    from triton import language
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set[bool]()

    def patch_once(fn: FunctionType) -> interpreter._LangPatchScope:
        # Those of the language itself are replaced only for a function that knows it, not for one that knows `core`.
        whole = any(value is language for value in fn.__globals__.values())
        if whole not in patched:
            patched.add(whole)
            patch(fn)
        return interpreter._LangPatchScope()  # there is nothing to put back

    interpreter._patch_lang = patch_once


if not torch.cuda.is_available():
    _let_loop_bounds_be_arrays()
    _replace_the_language_once()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
