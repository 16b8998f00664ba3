"""Servers for the tests of this folder. Its helpers lie beside it; tests import them by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import server_fakes as fakes
from running_server import RunningServer

StartServer = Callable[..., RunningServer]


@pytest.fixture
def start_server() -> Iterator[StartServer]:
    """Starts servers for one test. Keyword arguments: step_s, ready, write_timeout_s, core, and any config field."""
    running: list[RunningServer] = []

    def start(core: fakes.FakeCore | None = None, step_s: float = 0.001, ready: bool = True,
              write_timeout_s: float = 60.0, **settings: Any) -> RunningServer:  # fmt: skip
        server = RunningServer(core or fakes.FakeCore(), step_s, ready, write_timeout_s, settings)
        running.append(server)
        return server

    yield start
    for server in running:
        server.stop()


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """One server for a module whose tests leave nothing behind."""
    running = RunningServer(fakes.FakeCore(), 0.001, True, 60.0, {})
    yield running
    running.stop()


@pytest.fixture(scope="module")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client
