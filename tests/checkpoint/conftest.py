"""A stand-in of the hub. Helpers of this folder lie beside this file; tests import them by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from hub_model import MODEL, files
from stand_in_hub import StandInHub

from ziphius.checkpoint.hub_settings import HubSettings


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    with StandInHub().serving() as stand_in:
        stand_in.repository(MODEL).commit(files())
        yield stand_in


@pytest.fixture
def settings(hub: StandInHub, tmp_path: Path) -> HubSettings:
    return HubSettings(hub.url, tmp_path / "hub", workers=3, waits=(0.01, 0.01))
