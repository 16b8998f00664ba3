from __future__ import annotations

import io
import sys

import pytest

from ziphius.config import resolve
from ziphius.errors import ConfigError
from ziphius.launchers.native import native, read_resolved


def test_the_child_gets_exactly_what_was_resolved() -> None:
    resolved = resolve(
        {"port": 1234, "api_key": "the-key", "prefix_cache": False, "mem_fraction": "0.5"}, {"ZIPHIUS_NAME": "x"}
    )
    launch = native(resolved, {"ZIPHIUS_API_KEY": "the-key", "ZIPHIUS_HOME": "/home", "HF_TOKEN": "t"})
    assert read_resolved(io.BytesIO(launch.stdin)) == resolved
    assert launch.argv[:4] == (sys.executable, "-m", "ziphius", "serve")
    assert "the-key" not in " ".join(launch.argv)
    assert (launch.env["ZIPHIUS_HOME"], launch.env["HF_TOKEN"]) == ("/home", "t")
    assert "ZIPHIUS_API_KEY" not in launch.env


@pytest.mark.parametrize(("data", "reason"), [(b"", "ended too early"), (b"{", "broken"), (b'{"config": 1}', "broken")])
def test_a_starter_that_died_first(data: bytes, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        read_resolved(io.BytesIO(data))
