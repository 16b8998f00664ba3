"""Fetching one revision of a hub's model into the cache: which files, whether the disk has room, and the progress."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError

from ziphius.checkpoint.config import ModelConfig
from ziphius.checkpoint.hub_cache import INDEX_FILE, HubCache, small_files, weight_files
from ziphius.checkpoint.hub_download import Downloader, RemoteFile, bring_all
from ziphius.checkpoint.hub_errors import Asked, disk_error, is_passing, model_error
from ziphius.checkpoint.hub_settings import ConfigCheck, HubSettings, Report, Snapshot
from ziphius.checkpoint.rate import RateMeter, size_words
from ziphius.errors import CheckpointError, DownloadError, ModelError, ModelNotFound
from ziphius.ipc.messages import LoadProgress

_POLL_S = 0.25
_LIST_TIMEOUT_S = 10.0

_log = logging.getLogger(__name__)


def fetch_missing(
    cache: HubCache,
    revision: str,
    settings: HubSettings,
    on_progress: Report | None,
    *,
    weights: bool,
    fallback: Snapshot | None,
    check: ConfigCheck | None,
) -> Snapshot:
    """Complete the snapshot of `revision` as it is on the hub now. `fallback` is used when the hub does not answer.

    Errors: see `hub.fetch_snapshot`.
    """
    asked = Asked(cache.model_id, revision, settings.endpoint, settings.token is not None)
    try:
        commit, files = _list(asked, settings.token)
    except httpx2.HTTPError as e:
        if fallback is not None and is_passing(e):
            _log.warning("%s; using commit %s from the cache", model_error(e, asked).message, fallback.commit)
            return fallback
        raise model_error(e, asked) from e
    _log.info("%s: revision %s is commit %s", asked.model_id, revision, commit)
    try:
        return _Fetch(asked, commit, files, cache, settings, on_progress).run(weights, check)
    except OSError as e:
        raise disk_error(e, asked, settings.cache) from e


def _list(asked: Asked, token: str | None) -> tuple[str, dict[str, RemoteFile]]:
    """(commit, files by name) of the revision."""
    try:
        info = HfApi(endpoint=asked.endpoint, token=token or False).model_info(
            asked.model_id, revision=asked.revision, files_metadata=True, timeout=_LIST_TIMEOUT_S
        )
    except HFValidationError as e:
        raise ModelNotFound(f"{asked.model_id!r} cannot be a model of the hub: {e}") from e
    if info.sha is None:
        raise DownloadError(f"{asked.endpoint} does not tell which commit {asked.revision} is")
    files: dict[str, RemoteFile] = {}
    for sibling in info.siblings or ():
        lfs = sibling.lfs
        etag, size = (sibling.blob_id, sibling.size) if lfs is None else (lfs.sha256, lfs.size)
        if etag is None or size is None:
            raise DownloadError(f"{asked.endpoint} does not tell the sizes and checksums of {asked.model_id}'s files")
        files[sibling.rfilename] = RemoteFile(sibling.rfilename, size, etag, lfs is not None)
    return info.sha, files


class _Fetch:
    """One commit on its way into the cache."""

    def __init__(
        self,
        asked: Asked,
        commit: str,
        files: Mapping[str, RemoteFile],
        cache: HubCache,
        settings: HubSettings,
        on_progress: Report | None,
    ) -> None:
        self._asked = asked
        self._commit = commit
        self._files = files
        self._cache = cache
        self._settings = settings
        self._on_progress = on_progress
        self._folder = cache.snapshot(commit)

    def run(self, weights: bool, check: ConfigCheck | None) -> Snapshot:
        if "config.json" not in self._files:
            raise CheckpointError(f"{self._asked.model_id} has no config.json: it is not in Hugging Face's format")
        self._bring(small_files(self._files), "configs")
        config = self._config()
        if check is not None:
            check(config)
        if weights:
            if INDEX_FILE in self._files:
                self._bring([INDEX_FILE], "configs")
            index = self._folder / INDEX_FILE
            self._bring(
                weight_files(self._asked.model_id, self._files, index if index.is_file() else None), "downloading"
            )
        self._downloader().remember_revision()
        return Snapshot(self._folder, self._commit)

    def _config(self) -> ModelConfig:
        """The config. A model that this engine does not have is refused here, before its weights are fetched."""
        try:
            return ModelConfig.from_folder(self._folder)
        except ModelError as e:
            raise type(e)(f"{self._asked.model_id}: {e.message}") from e

    def _downloader(self) -> Downloader:
        return Downloader(self._asked, self._commit, self._cache, self._settings.token, self._settings.waits)

    def _bring(self, names: Sequence[str], phase: str) -> None:
        files, downloader = [self._files[name] for name in names], self._downloader()
        what = f"{self._asked.model_id}@{self._commit[:12]}"
        progress = _Progress(files, downloader, phase, what, self._on_progress)
        self._check_disk(progress.total - progress.done)
        bring_all(downloader, files, self._settings.workers, progress.report, _POLL_S)
        progress.report()

    def _check_disk(self, needed: int) -> None:
        folder: Path = self._settings.cache
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise DownloadError(
                f"{self._asked.model_id} needs {size_words(needed)} more in {self._settings.cache}, where "
                f"{size_words(free)} are free: free {size_words(needed - free)}, or set HF_HOME to a larger disk"
            )


class _Progress:
    """What a person sees: the bytes that are on this disk, whoever fetched them, the speed and the time left."""

    def __init__(
        self, files: Sequence[RemoteFile], downloader: Downloader, phase: str, what: str, report: Report | None
    ) -> None:
        self._phase = phase
        self._files = files
        self._downloader = downloader
        self._what = what
        self._report = report
        self._meter = RateMeter()
        self._whole = 0
        self.total = sum({file.etag: file.size for file in files}.values())
        self.done = 0
        self._look()

    def report(self) -> None:
        self._look()
        if self._report is None:
            return
        parts = [f"{self._what}: {self._whole} of {len(self._files)} files", self._meter.words(self.total)]
        detail = ", ".join(part for part in parts if part)
        self._report(LoadProgress(phase=self._phase, done=self.done, total=self.total, unit="bytes", detail=detail))

    def _look(self) -> None:
        there = {file.etag: self._downloader.bytes_there(file) for file in self._files}
        self._whole = sum(there[file.etag] == file.size for file in self._files)
        self.done = sum(there.values())
        self._meter.update(self.done)
