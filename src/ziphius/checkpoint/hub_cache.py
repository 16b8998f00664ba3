"""HubCache: one model in Hugging Face's cache folder, and whether all of it is there.

The layout is huggingface_hub's (its guide "Understand caching"), so that other tools share what was fetched:
models--OWNER--NAME/{refs/REVISION, snapshots/COMMIT/FILE -> blobs/ETAG, blobs/ETAG}. A file appears in a snapshot
only when it is whole.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ziphius.errors import CheckpointError, UnsupportedModel

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

_INDEX_ENDING = ".index.json"
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubCache:
    """Where the files of `model_id` lie under `root`, whether they exist or not."""

    root: Path
    model_id: str

    @property
    def folder(self) -> Path:
        return self.root / self._name

    @property
    def _name(self) -> str:
        return "models--" + self.model_id.replace("/", "--")

    def commit_of(self, revision: str) -> str | None:
        """The commit that a branch or tag stood for when it was last fetched; a whole commit hash is itself."""
        if is_commit(revision):
            return revision
        try:
            found = (self.folder / "refs" / revision).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return None
        return found if is_commit(found) else None

    def snapshot(self, commit: str) -> Path:
        return self.folder / "snapshots" / commit

    def blob(self, etag: str) -> Path:
        return self.folder / "blobs" / etag

    def part(self, etag: str) -> Path:
        """The beginning of a blob, which the next attempt continues; huggingface_hub 1 used the same name for it."""
        return self.folder / "blobs" / f"{etag}.incomplete"

    def lock_file(self, etag: str) -> Path:
        """The file that huggingface_hub locks while it writes the blob."""
        return self.root / ".locks" / self._name / f"{etag}.lock"


def hub_cache(env: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps repositories: HF_HUB_CACHE, HF_HOME/hub, XDG_CACHE_HOME/huggingface/hub.

    Read here rather than by the library: its import takes a fifth of the second that a plan may take.
    """
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if env.get(name):
            return Path(env[name]).expanduser()
    return hub_home(env) / "hub"


def hub_home(env: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps all that is its own, the login's token too."""
    if env.get("HF_HOME"):
        return Path(env["HF_HOME"]).expanduser()
    cache = env.get("XDG_CACHE_HOME") or os.path.join(env.get("HOME") or os.path.expanduser("~"), ".cache")
    return Path(cache).expanduser() / "huggingface"


def is_commit(revision: str) -> bool:
    return _COMMIT.fullmatch(revision) is not None


def missing_files(snapshot: Path, weights: bool) -> list[str]:
    """The files that a model needs and `snapshot` does not have: config.json and, with `weights`, the weights."""
    wanted = ["config.json"]
    if weights:
        wanted += _weights_there(snapshot)
    return [name for name in wanted if not (snapshot / name).is_file()]


def has_tokenizer(snapshot: Path) -> bool:
    return all((snapshot / name).is_file() for name in TOKENIZER_FILES)


def _weights_there(snapshot: Path) -> list[str]:
    if (snapshot / INDEX_FILE).is_file():
        return shards_of(snapshot / INDEX_FILE)
    found = sorted(path.name for path in snapshot.glob("*.safetensors"))
    return found if len(found) == 1 else [SINGLE_FILE]


def shards_of(index: Path) -> list[str]:
    """The files that model.safetensors.index.json names. CheckpointError when it is malformed."""
    return sorted(set(weight_map_of(index).values()))


def weight_map_of(index: Path) -> dict[str, str]:
    """Tensor name -> file name, as model.safetensors.index.json says. CheckpointError when it is malformed."""
    try:
        data: Any = json.loads(index.read_bytes())
    except OSError as e:
        raise CheckpointError(f"cannot read {index}: {e.strerror}") from e
    except ValueError as e:
        raise CheckpointError(f"{index} is malformed: its JSON cannot be read: {e}") from e
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must be an object of file names")
    return weight_map


def small_files(names: Collection[str]) -> list[str]:
    """Those of a repository's files that a model needs beside its weights: configs, tokenizer, templates.

    Files in folders are left out: they hold the same model in other formats (original/, onnx/).
    """
    return sorted(
        n for n in names if "/" not in n and n.endswith((".json", ".jinja")) and not n.endswith(_INDEX_ENDING)
    )


def weight_files(model_id: str, names: Collection[str], index: Path | None) -> list[str]:
    """The safetensors files of the model, each weight once. `index`: model.safetensors.index.json, if it has one.

    UnsupportedModel when all weights are in other formats; CheckpointError when the index is wrong.
    """
    if index is not None:
        shards = shards_of(index)
        lost = [shard for shard in shards if shard not in names or "/" in shard]
        if lost:
            raise CheckpointError(f"{model_id}: {INDEX_FILE} names {lost[0]}, which the repository does not have")
        return shards
    found = sorted(n for n in names if "/" not in n and n.endswith(".safetensors"))
    if SINGLE_FILE in found:
        return [SINGLE_FILE]
    if len(found) == 1:
        return found
    if found:
        raise CheckpointError(f"{model_id} has several safetensors files ({', '.join(found[:3])}) and no {INDEX_FILE}")
    others = sorted({n.rsplit(".", 1)[-1] for n in names if n.endswith((".bin", ".pt", ".pth", ".gguf", ".h5"))})
    what = f"only .{', .'.join(others)}" if others else "none at all"
    tip = "; download its .gguf file and give the path" if "gguf" in others else ""
    raise UnsupportedModel(f"{model_id} has no safetensors weights ({what}){tip}")
