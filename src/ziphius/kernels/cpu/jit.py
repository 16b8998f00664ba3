"""How kernels are compiled (`kernel`), how threads call them (`PoolJob`), and where compiled code is kept."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from numba.core import config, types
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])

# No fast-math: LLVM would join or reorder operations in one variant of a tile and not in another, and a row's result
# would depend on how many rows are computed with it.
_OPTIONS: dict[str, Any] = {"error_model": "numpy"}

_JOB = types.void(types.intp, types.intp, types.intp, types.intp)


def kernel(function: F) -> F:
    """Compile on first use, for numbers and addresses, without the interpreter lock.

    Code is kept only when NUMBA_CACHE_DIR is set. numba looks for changes only in the file of a function, not in the
    files of the functions that it calls, so the folder must change with the sources; see `cache.kernel_cache_folder`.
    """
    return cast(F, numba.njit(nogil=True, cache=_keeps_code(), **_OPTIONS)(function))


def instruction(result: Any, *arguments: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make emit(context, builder, *values) callable in kernels: arguments and result are of these numba types."""

    def make(emit: Callable[..., Any]) -> Callable[..., Any]:
        def definition(typing: Any, *kinds: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
                value = emit(context, builder, *values)
                return context.get_dummy_value() if value is None else value

            return result(*arguments), generate

        # numba reads the parameters, and their number must not be variable.
        names = ["typing", *(f"argument{i}" for i in range(len(arguments)))]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([inspect.Parameter(name, kind) for name in names])
        definition.__signature__ = signature  # type: ignore[attr-defined]
        definition.__name__ = emit.__name__
        return cast(Callable[..., Any], intrinsic(definition))

    return make


def _keeps_code() -> bool:
    return bool(vars(config)["CACHE_DIR"])


class PoolJob:
    """A function (thread, threads, sync, arguments) that all threads of a pool call together.

    `arguments` is the address of int64 values. It is compiled when `address` is first asked for. Callers use
    that address, so they do not compile it again.
    """

    def __init__(self, function: Callable[[int, int, int, int], None]) -> None:
        self._function = function
        self._compiled: Any = None

    @property
    def address(self) -> int:
        if self._compiled is None:
            self._compiled = numba.cfunc(_JOB, cache=_keeps_code(), **_OPTIONS)(self._function)
        address: int = self._compiled.address
        return address
