"""What the hub and the network raise, in one sentence for the person who can do something about it."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ziphius.errors import DownloadError, ModelError, ModelNotFound

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_PASSING = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked for and where: the words that a message about an error needs."""

    model_id: str
    revision: str
    endpoint: str
    has_token: bool


def is_passing(error: httpx2.HTTPError) -> bool:
    """Whether the same request may succeed a moment later: after a lost connection, or when a server is busy."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _PASSING
    return isinstance(error, httpx2.TransportError)


def model_error(error: httpx2.HTTPError, asked: Asked) -> ModelError:
    """ModelNotFound for what the hub does not have, DownloadError for the rest."""
    model, endpoint = asked.model_id, asked.endpoint
    if isinstance(error, HfHubHTTPError):
        return _refusal(error, asked)
    if isinstance(error, httpx2.TimeoutException):
        return DownloadError(f"{model} cannot be fetched: {endpoint} does not answer ({_words(error)})")
    return DownloadError(f"{model} cannot be fetched: {endpoint} cannot be reached ({_words(error)})")


def _refusal(error: HfHubHTTPError, asked: Asked) -> ModelError:
    model, endpoint, status = asked.model_id, asked.endpoint, error.response.status_code
    if isinstance(error, GatedRepoError):
        page = f"{endpoint}/{model}"
        if asked.has_token:
            return DownloadError(f"{model} is gated and the token's account has no access yet: ask for it at {page}")
        return DownloadError(
            f"{model} is gated: ask for access at {page}, then set HF_TOKEN to a token of that account"
        )
    if isinstance(error, RevisionNotFoundError):
        return ModelNotFound(f"{model} has no revision {asked.revision!r} at {endpoint}")
    if isinstance(error, RemoteEntryNotFoundError):
        return DownloadError(f"{model}: {endpoint} lists a file that it does not have ({error.response.url.path})")
    if isinstance(error, DisabledRepoError):
        return DownloadError(f"{model} has been disabled at {endpoint}")
    if status == 401 and asked.has_token:
        return DownloadError(
            f"{endpoint} does not accept the token (of HF_TOKEN, or kept by `hf auth login`): {_said(error)}"
        )
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        private = "the token's account may not see it" if asked.has_token else "it is private: then set HF_TOKEN"
        return ModelNotFound(f"there is no model {model} at {endpoint}, or {private}")
    return DownloadError(f"{model} cannot be fetched: {endpoint} answered {status} ({_said(error)})")


def _said(error: HfHubHTTPError) -> str:
    message = (error.server_message or "").strip()
    return message.splitlines()[0][:200] if message else error.response.reason_phrase or "no reason given"


def _words(error: Exception) -> str:
    """The library's message on one line; its class when it has none, as timeouts do."""
    return " ".join(str(error).split()) or type(error).__name__


def disk_error(error: OSError, asked: Asked, cache: Path) -> DownloadError:
    """A full or unwritable disk."""
    if error.errno in _DISK_FULL:
        return DownloadError(
            f"the disk of {cache} is full; what was fetched of {asked.model_id} is kept: make room, and run it again"
        )
    return DownloadError(f"cannot keep {asked.model_id} in {cache}: {error.strerror or error}")
