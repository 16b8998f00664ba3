"""Importable triton, torchvision and sgl_kernel for SGLang on a CPU, which imports them all and calls none.

PyPI has builds of them for GPUs only, gigabytes of which a test of the launcher has no use for. Every name in them is a
placeholder: a class that can be inherited from, called, subscripted and used as a decorator, which it then is not.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence

_PACKAGES = ("triton", "torchvision", "sgl_kernel")
_VERSIONS = {"triton": "3.0.0", "torchvision": "0.0.0", "sgl_kernel": "0.0.0"}


class _Meta(type):
    def __getattr__(cls, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _placeholder(name)
        setattr(cls, name, made)
        return made

    def __getitem__(cls, _: object) -> type:
        return cls

    def __or__(cls, other: object) -> object:
        return other

    def __ror__(cls, other: object) -> object:
        return other

    def __iter__(cls) -> object:
        return iter(())

    def __len__(cls) -> int:
        return 0

    def __index__(cls) -> int:
        return 0


class _Placeholder(metaclass=_Meta):
    def __new__(cls, *args: object, **kwargs: object) -> object:
        # `@triton.jit`: the function stays what it is.
        if cls.__module__ == __name__ and len(args) == 1 and not kwargs and isinstance(args[0], types.FunctionType):
            return args[0]
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.value = args[0] if args else None
        self.args = args
        self.kwargs = kwargs

    def __call__(self, *args: object, **kwargs: object) -> object:
        # `@triton.autotune(…)`: what it gives back is called with the function.
        return args[0] if len(args) == 1 and callable(args[0]) else None

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return _VALUES.get(name) or _placeholder(name)


class _Raised(Exception):
    """Stands for the exceptions, which `except` wants to be ones."""


def _placeholder(name: str) -> type:
    if name.endswith(("Error", "Exception")) or name == "OutOfResources":
        return type(name, (_Raised,), {})
    return _Meta(name, (_Placeholder,), {"__module__": __name__})


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _VALUES.get(name) or _placeholder(name)
        setattr(self, name, made)
        return made


_VALUES = {
    "cdiv": lambda a, b: -(-a // b),
    "next_power_of_2": lambda n: 1 << max(0, n - 1).bit_length(),
    "backend": "cpu",  # triton.runtime.driver.active.get_current_target().backend
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in _PACKAGES:
            return None
        return importlib.util.spec_from_loader(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__version__ = _VERSIONS[module.__name__.partition(".")[0]]  # type: ignore[attr-defined]


def install() -> None:
    """Called by a .pth file of the environment, before anything else is imported."""
    # Behind all others: a real one, where it is installed, is taken.
    sys.meta_path.append(_Finder())
