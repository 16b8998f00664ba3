"""The version of this package; it knows no other's."""

from __future__ import annotations

from importlib import metadata


def package_version() -> str:
    """Of the installed package; `unknown` in a tree that is not installed."""
    try:
        return metadata.version("ziphius")
    except metadata.PackageNotFoundError:
        return "unknown"
