"""This installation of Ziphius: its version and the folders that it keeps its files in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ziphius.errors import ConfigError


def ziphius_home(env: Mapping[str, str]) -> Path:
    """The one folder of all state: `ZIPHIUS_HOME`, else `XDG_STATE_HOME`/ziphius, else ~/.local/state/ziphius.

    An empty variable counts as unset, and so does a relative XDG_STATE_HOME (XDG base directory
    specification 0.8). A relative ZIPHIUS_HOME is taken from the working folder. ConfigError when no
    variable names a folder and the user has no home.
    """
    own = env.get("ZIPHIUS_HOME", "")
    if own:
        return Path(own).expanduser().absolute()
    xdg = Path(env.get("XDG_STATE_HOME", ""))
    if xdg.is_absolute():
        return xdg / "ziphius"
    try:
        user = Path(env["HOME"]) if env.get("HOME") else Path.home()
    except RuntimeError:
        raise ConfigError("there is no home folder to keep state in; set ZIPHIUS_HOME to a folder") from None
    return user.absolute() / ".local" / "state" / "ziphius"


def models_folder(home: Path) -> Path:
    """Fetched models, one folder each. Everything under `cache` can be deleted: it is fetched again."""
    return home / "cache" / "models"


def instances_folder(home: Path) -> Path:
    """Records and logs of named instances."""
    return home / "instances"


def package_version() -> str:
    """The version of the installed package; `unknown` in a source tree that is not installed."""
    from importlib import metadata  # here: it is slow to import, and few callers ask for the version

    try:
        return metadata.version("ziphius")
    except metadata.PackageNotFoundError:
        return "unknown"
