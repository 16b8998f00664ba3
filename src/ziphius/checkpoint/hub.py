"""Models of the Hugging Face hub: from the cache if they are there, else downloaded by `hub_fetch`.

A model that is whole in the cache is used as it is, and the hub is not asked: a start then needs no network and never
changes the model by itself. Only `update` (ziphius pull) asks whether a branch has moved.
"""

from __future__ import annotations

from ziphius.checkpoint.hub_cache import HubCache, has_tokenizer, is_commit, missing_files
from ziphius.checkpoint.hub_settings import ConfigCheck, HubSettings, Report, Snapshot
from ziphius.errors import DownloadError

DEFAULT_REVISION = "main"


def fetch_snapshot(
    model_id: str,
    settings: HubSettings,
    on_progress: Report | None = None,
    *,
    revision: str | None = None,
    weights: bool = True,
    update: bool = False,
    check: ConfigCheck | None = None,
) -> Snapshot:
    """The folder of `model_id` (OWNER/NAME) in the cache, completed from the hub where something is missing.

    `revision`: a branch, tag or commit (default: main). `weights` False leaves the weights out. `update` asks the
    hub even when the cache has everything. `check` is called with the config before weights are fetched; it is not
    called if nothing is fetched. What `check` or `on_progress` raises ends the fetching cleanly.

    ModelNotFound for what the hub does not have; DownloadError, in one line, for everything that goes wrong on the
    way; ModelError for a config or weights that this engine cannot use, before the weights are fetched. What was
    fetched is kept, and the next call continues from there.
    """
    revision = revision or DEFAULT_REVISION
    cache = HubCache(settings.cache, model_id)
    found = _cached(cache, revision, weights)
    if found is not None and has_tokenizer(found.path) and (not update or is_commit(revision)):
        return found
    if settings.offline:
        if found is None:
            raise DownloadError(_not_cached(cache, revision, weights))
        return found
    # Imported here: the libraries take a quarter of a second, and a model in the cache does not need them.
    from ziphius.checkpoint.hub_fetch import fetch_missing

    return fetch_missing(cache, revision, settings, on_progress, weights=weights, fallback=found, check=check)


def _cached(cache: HubCache, revision: str, weights: bool) -> Snapshot | None:
    commit = cache.commit_of(revision)
    if commit is None:
        return None
    path = cache.snapshot(commit)
    return None if missing_files(path, weights) else Snapshot(path, commit)


def _not_cached(cache: HubCache, revision: str, weights: bool) -> str:
    what = f"{cache.model_id} at revision {revision}"
    commit = cache.commit_of(revision)
    if commit is None or not cache.snapshot(commit).is_dir():
        return f"HF_HUB_OFFLINE is set, and the cache {cache.root} does not have {what}"
    lost = missing_files(cache.snapshot(commit), weights)
    shown = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
    return f"HF_HUB_OFFLINE is set, and the cache {cache.root} has only a part of {what}: {shown} missing"
