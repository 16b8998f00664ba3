"""Downloads of one commit's files into Hugging Face's cache: several at once, resumed where they broke, and checked.

huggingface_hub deletes a partial file when its process ends or gives up. The bytes are therefore fetched here, into
blobs/ETAG.incomplete, which the next attempt continues. The library then finds the whole blob and links it.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import constants, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

from ziphius.checkpoint.hub_cache import HubCache
from ziphius.checkpoint.hub_errors import Asked, is_passing, model_error
from ziphius.errors import DownloadError

_CHUNK = 1 << 20
_LOCK_POLL_S = 0.2
_LONGEST_WAIT_S = 300.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a commit, as the hub lists it."""

    name: str
    size: int
    etag: str
    """The blob's name: the sha256 of a large file, git's sha1 of a small one."""
    is_large: bool


class Stopped(Exception):
    """The download was asked to stop."""


class _Interrupted(Exception):
    """The connection or the server failed, but may work again; `wait_s` is set if the server said when."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class Downloader:
    """Brings files of one commit. Several threads may use one object, each for files of its own."""

    def __init__(self, asked: Asked, commit: str, cache: HubCache, token: str | None, waits: Sequence[float]) -> None:
        """`waits`: seconds before each further attempt. After an attempt that brings a byte, counting starts again."""
        self._asked = asked
        self._commit = commit
        self._cache = cache
        self._token = token
        self._waits = tuple(waits)
        self.stopping = threading.Event()

    def bytes_there(self, file: RemoteFile) -> int:
        """How many of its bytes are on this disk, whichever process brought them."""
        for path in (self._pointer(file), self._cache.blob(file.etag), self._cache.part(file.etag)):
            try:
                return min(path.stat().st_size, file.size)
            except FileNotFoundError:
                continue
        return 0

    def bring(self, file: RemoteFile) -> None:
        """Make `file` whole and link it into the commit's snapshot. Raises DownloadError, ModelNotFound or Stopped."""
        if self._pointer(file).exists():
            return
        blob = self._cache.blob(file.etag)
        blob.parent.mkdir(parents=True, exist_ok=True)
        with self._locked(self._cache.lock_file(file.etag)):
            if not blob.exists():
                self._download(file)
        self._link(file.name, self._commit)

    def _pointer(self, file: RemoteFile) -> Path:
        return self._cache.snapshot(self._commit) / file.name

    def remember_revision(self) -> None:
        """Write into the cache which commit the revision stands for. To be called when the snapshot is whole."""
        if self._asked.revision != self._commit:
            self._link("config.json", self._asked.revision)

    def _link(self, name: str, revision: str) -> None:
        try:
            hf_hub_download(
                self._asked.model_id,
                name,
                revision=revision,
                cache_dir=self._cache.root,
                endpoint=self._asked.endpoint,
                token=self._token or False,
            )
        except httpx2.HTTPError as e:
            raise model_error(e, self._asked) from e
        except LocalEntryNotFoundError as e:
            raise DownloadError(f"{name}: the connection to {self._asked.endpoint} was lost") from e

    def _download(self, file: RemoteFile) -> None:
        for last_chance in (False, True):
            with _Part(self._cache.part(file.etag), file) as part:
                self._complete(file, part)
                if part.is_right():
                    part.path.replace(self._cache.blob(file.etag))
                    return
                part.restart()
            if last_chance:
                raise DownloadError(f"{file.name} of {self._asked.model_id} came damaged twice: its checksum is wrong")
            _log.warning("%s came damaged: fetching it once more", file.name)

    def _complete(self, file: RemoteFile, part: _Part) -> None:
        attempt = 0
        while part.size < file.size:
            before = part.size
            try:
                self._stream(file, part)
            except _Interrupted as e:
                attempt = 1 if part.size > before else attempt + 1
                if attempt > len(self._waits):
                    raise DownloadError(
                        f"{file.name} of {self._asked.model_id}: the connection to {self._asked.endpoint} was lost "
                        f"at {part.size} of {file.size} bytes ({e}); what was fetched is kept, so run it again"
                    ) from e
                _log.info("%s: %s at %d of %d bytes, going on", file.name, e, part.size, file.size)
                if self.stopping.wait(max(self._waits[attempt - 1], e.wait_s)):
                    raise Stopped from None

    def _stream(self, file: RemoteFile, part: _Part) -> None:
        """One request, from where the part ends."""
        asked = self._asked
        url = hf_hub_url(asked.model_id, file.name, revision=self._commit, endpoint=asked.endpoint)
        # A compressed answer could not be resumed in the middle
        headers = {**build_hf_headers(token=self._token or False), "Accept-Encoding": "identity"}
        if part.size:
            headers["Range"] = f"bytes={part.size}-"
        try:
            with get_session().stream("GET", url, headers=headers, timeout=_timeout()) as response:
                hf_raise_for_status(response)
                if response.status_code != 206:
                    part.restart()
                for chunk in response.iter_bytes():  # no chunk size: a part of a chunk would be lost
                    if self.stopping.is_set():
                        raise Stopped
                    part.write(chunk)
        except httpx2.HTTPError as e:
            if not is_passing(e):
                raise model_error(e, asked) from e
            raise _interrupted(e) from e
        if part.size < file.size:
            raise _Interrupted("the answer ended early")

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if self.stopping.wait(_LOCK_POLL_S):
                        raise Stopped from None
                except OSError:
                    break  # a file system without locks: at worst two writers cause a wrong checksum
            yield


class _Part:
    """The beginning of a file on disk, and its checksum."""

    def __init__(self, path: Path, file: RemoteFile) -> None:
        self.path = path
        self.size = 0
        self._expected = file
        self._out = path.open("ab", buffering=0)
        self._digest = _new_digest(file)
        there = path.stat().st_size
        with path.open("rb") as data:
            while chunk := data.read(min(_CHUNK, there - self.size)):
                self._digest.update(chunk)
                self.size += len(chunk)

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()

    def write(self, chunk: bytes) -> None:
        left = memoryview(chunk)
        while left:
            count = self._out.write(left) or 0
            self._digest.update(left[:count])
            self.size += count
            left = left[count:]

    def restart(self) -> None:
        if self.size:
            self._out.truncate(0)
        self.size = 0
        self._digest = _new_digest(self._expected)

    def is_right(self) -> bool:
        return self.size == self._expected.size and self._digest.hexdigest() == self._expected.etag


def _interrupted(error: httpx2.HTTPError) -> _Interrupted:
    if isinstance(error, HfHubHTTPError):
        told_s = error.response.headers.get("Retry-After", "")
        wait_s = min(float(told_s), _LONGEST_WAIT_S) if told_s.isdigit() else 0.0
        return _Interrupted(f"it answered {error.response.status_code}", wait_s)
    return _Interrupted(" ".join(str(error).split()) or type(error).__name__)


def _new_digest(file: RemoteFile) -> hashlib._Hash:
    if file.is_large:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)


def _timeout() -> float:
    return float(constants.HF_HUB_DOWNLOAD_TIMEOUT)


def bring_all(
    downloader: Downloader, files: Sequence[RemoteFile], workers: int, poll: Callable[[], None], poll_s: float
) -> None:
    """`bring` every file, several at once; `poll` is called every `poll_s` seconds, in the calling thread.

    The first failure, or what `poll` raises, stops the other threads, and is raised when they have stopped. The
    threads are daemons, so that a process can end at once without them.
    """
    todo: queue.SimpleQueue[RemoteFile] = queue.SimpleQueue()
    for file in files:
        todo.put(file)
    results: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            while not downloader.stopping.is_set():
                downloader.bring(todo.get_nowait())
        except queue.Empty:
            results.put(None)
        except BaseException as e:  # noqa: BLE001 - raised again in the caller's thread
            results.put(e)
        else:
            results.put(Stopped())

    threads = [threading.Thread(target=work, name="download", daemon=True) for _ in range(min(workers, len(files)))]
    for thread in threads:
        thread.start()
    try:
        for _ in threads:
            error = _next_result(results, poll, poll_s)
            if error is not None:
                raise error
    finally:
        downloader.stopping.set()
        for thread in threads:
            thread.join()


def _next_result(
    results: queue.SimpleQueue[BaseException | None], poll: Callable[[], None], poll_s: float
) -> BaseException | None:
    while True:
        try:
            return results.get(timeout=poll_s)
        except queue.Empty:
            poll()
