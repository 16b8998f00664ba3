"""HubSettings: how the Hugging Face hub is reached; Snapshot: a model that came from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ziphius.checkpoint.config import ModelConfig
from ziphius.ipc.messages import LoadProgress

Report = Callable[[LoadProgress], None]
ConfigCheck = Callable[[ModelConfig], None]
"""Called with a model's config before its weights are fetched; what it raises ends the fetching."""


@dataclass(frozen=True, slots=True)
class HubSettings:
    """How to reach the hub, and where files are kept."""

    endpoint: str
    cache: Path
    offline: bool = False
    token: str | None = field(default=None, repr=False)
    workers: int = 8
    """Files fetched at the same time."""
    waits: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0)
    """Seconds before each further attempt at a file. After an attempt that brings a byte, counting starts again."""

    @classmethod
    def from_environment(cls) -> HubSettings:
        """As huggingface_hub reads the environment: HF_ENDPOINT, HF_HUB_CACHE or HF_HOME, HF_HUB_OFFLINE, and HF_TOKEN
        or else the token that `hf auth login` keeps."""
        from huggingface_hub import constants, get_token

        offline = constants.is_offline_mode()
        token = None if offline else get_token()
        return cls(constants.ENDPOINT, Path(constants.HF_HUB_CACHE).absolute(), offline, token)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A model in the cache."""

    path: Path
    commit: str
