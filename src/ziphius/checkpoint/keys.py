"""Keys: reads a config.json without guessing. A key that is missing or of another type is an error with its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ziphius.errors import ModelError, UnsupportedModel

_REQUIRED = object()


class Keys:
    """The keys of one JSON object. A key without a default must be there; null counts as the default."""

    def __init__(self, data: Mapping[str, Any], where: str = "config.json") -> None:
        """`where` begins every message."""
        self._data = data
        self.where = where

    def get(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        """The value, of type `kind`; an integer will do for a float."""
        value = self._data.get(key, default)
        if value is _REQUIRED:
            raise ModelError(f"{self.where}: the key {key} is missing")
        if value is None and default is not _REQUIRED:
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ModelError(f"{self.where}: {key} must be {kind.__name__}, not {value!r}")
        return value

    def size(self, key: str, default: Any = _REQUIRED, *, least: int = 1, most: int | None = None) -> int:
        """An integer of at least `least` (default: positive) and at most `most`."""
        value: int = self.get(key, int, default)
        if value < least:
            limit = "positive" if least == 1 else f"at least {least}"
            raise ModelError(f"{self.where}: {key} must be {limit}, not {value}")
        if most is not None and value > most:
            raise ModelError(f"{self.where}: {key} must be at most {most}, not {value}")
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
            raise ModelError(f"{self.where}: {key} must be a token id or a list of them, not {value!r}")
        return tuple(values)

    def refuse_unless(self, key: str, allowed: tuple[Any, ...], default: Any = _REQUIRED) -> Any:
        """The value, which must be one of `allowed`; UnsupportedModel for another."""
        value = self._data.get(key, default)
        if value is _REQUIRED:
            raise ModelError(f"{self.where}: the key {key} is missing")
        if value not in allowed:
            names = " or ".join(repr(a) for a in allowed)
            raise UnsupportedModel(f"{self.where}: {key} = {value!r} is not supported (only {names})")
        return value

    def child(self, key: str) -> Keys | None:
        """The object at `key`, or None where there is none."""
        value = self._data.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise ModelError(f"{self.where}: {key} must be an object, not {value!r}")
        return Keys(value, f"{self.where}: {key}")
