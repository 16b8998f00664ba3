"""What MODEL means: one answer for all who take one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ziphius.checkpoint.locate import (
    ConfigFile,
    HubRepository,
    Location,
    ModelFolder,
    Packaged,
    WeightsFile,
    local_path,
    locate,
)
from ziphius.checkpoint.packaged import SMOLLM2
from ziphius.errors import CheckpointError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for folder in ("m", "owner/name", SMOLLM2.model_id):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("m/config.json", "tiny.json", "m.gguf", "weights"):
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("m", ModelFolder(Path("m"))),
        ("~/m/", ModelFolder(Path("m"))),
        ("m/config.json", ConfigFile(Path("m/config.json"))),
        ("tiny.json", ConfigFile(Path("tiny.json"))),
        ("m.gguf", WeightsFile(Path("m.gguf"))),
        ("weights", WeightsFile(Path("weights"))),
        ("owner/name", ModelFolder(Path("owner/name"))),
        ("./" + SMOLLM2.model_id, ModelFolder(Path(SMOLLM2.model_id))),
        (SMOLLM2.model_id, Packaged(SMOLLM2)),
        ("owner/other.model-2", HubRepository("owner/other.model-2")),
    ],
)
def test_what_is_there(here: Path, model: str, expected: Location) -> None:
    if isinstance(expected, (ModelFolder, ConfigFile, WeightsFile)):
        expected = type(expected)(here / expected.path)
    assert locate(model) == expected


@pytest.mark.parametrize("model", ["", " ", "nothing", "./owner/other", "../a", "a/b/c", "~nobody-here/m", "a\0b"])
def test_what_is_nothing(model: str) -> None:
    assert locate(model) is None


def test_what_is_neither_a_folder_nor_a_file() -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a file"):
        locate(os.devnull)


def test_the_repositorys_own_name() -> None:
    assert HubRepository("owner/other").name == "other"


def test_the_path_of_what_is_here_and_of_nothing_else() -> None:
    assert local_path("m") == Path("m").absolute()
    assert [local_path(model) for model in (SMOLLM2.model_id, "other/name", "nothing", " ")] == [None] * 4
