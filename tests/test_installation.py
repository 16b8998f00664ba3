"""Where state goes, by environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from ziphius.installation import instances_folder, models_folder, ziphius_home


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"HOME": "/home/me"}, "/home/me/.local/state/ziphius"),
        ({"HOME": "/home/me", "XDG_STATE_HOME": "/state"}, "/state/ziphius"),
        ({"HOME": "/home/me", "XDG_STATE_HOME": "relative"}, "/home/me/.local/state/ziphius"),
        ({"HOME": "/home/me", "XDG_STATE_HOME": ""}, "/home/me/.local/state/ziphius"),
        ({"HOME": "/home/me", "XDG_STATE_HOME": "/state", "ZIPHIUS_HOME": "/z"}, "/z"),
        ({"HOME": "/home/me", "ZIPHIUS_HOME": ""}, "/home/me/.local/state/ziphius"),
    ],
)
def test_home(env: dict[str, str], expected: str) -> None:
    assert ziphius_home(env) == Path(expected)


def test_a_relative_home_is_taken_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ziphius_home({"ZIPHIUS_HOME": "z"}) == tmp_path / "z"


def test_one_folder_holds_all() -> None:
    home = Path("/z")
    assert models_folder(home) == Path("/z/cache/models")
    assert instances_folder(home) == Path("/z/instances")
