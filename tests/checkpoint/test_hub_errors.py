"""What goes wrong with the hub is told in one clear line, and costs as little as it can."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub_model import MODEL, SHARDS, fails, files, part_of
from stand_in_hub import GOOD_TOKEN, OTHER_TOKEN, Fault, StandInHub

from ziphius.checkpoint.config import ModelConfig
from ziphius.checkpoint.hub import fetch_snapshot
from ziphius.checkpoint.hub_settings import HubSettings
from ziphius.errors import CheckpointError, ConfigError, DownloadError, ModelError, ModelNotFound, UnsupportedModel

# --- tokens ---


def test_gated(hub: StandInHub, settings: HubSettings) -> None:
    hub.repository(MODEL).gated = True
    message = fails(settings, DownloadError)
    assert (
        message
        == f"{MODEL} is gated: ask for access at {hub.url}/{MODEL}, then set HF_TOKEN to a token of that account"
    )
    message = fails(replace(settings, token=OTHER_TOKEN), DownloadError)
    assert message == f"{MODEL} is gated and the token's account has no access yet: ask for it at {hub.url}/{MODEL}"
    fetch_snapshot(MODEL, replace(settings, token=GOOD_TOKEN))
    assert {r.token for r in hub.requests if "/cdn/" in r.path} == {None}, "the token must not leave the hub"


def test_private(hub: StandInHub, settings: HubSettings) -> None:
    hub.repository(MODEL).private = True
    assert fails(settings, ModelNotFound).endswith("or it is private: then set HF_TOKEN")
    assert fails(replace(settings, token=OTHER_TOKEN), ModelNotFound).endswith("the token's account may not see it")
    fetch_snapshot(MODEL, replace(settings, token=GOOD_TOKEN))


def test_a_bad_token(hub: StandInHub, settings: HubSettings) -> None:
    message = fails(replace(settings, token="hf_wrong"), DownloadError)
    assert "does not accept the token (of HF_TOKEN, or kept by `hf auth login`)" in message
    assert "Invalid credentials in Authorization header" in message
    assert "hf_wrong" not in message
    assert "hf_wrong" not in repr(replace(settings, token="hf_wrong"))


# --- what goes wrong ---


def test_no_such_model(hub: StandInHub, settings: HubSettings) -> None:
    with pytest.raises(ModelNotFound, match=r"there is no model no/such at http://127\.0\.0\.1:\d+, or it is private"):
        fetch_snapshot("no/such", settings)
    with pytest.raises(ModelNotFound, match="cannot be a model of the hub"):
        fetch_snapshot("no/such..thing--", settings)


def test_no_such_revision(hub: StandInHub, settings: HubSettings) -> None:
    assert fails(settings, ModelNotFound, revision="v9") == f"{MODEL} has no revision 'v9' at {hub.url}"


def test_the_disk_is_too_small(hub: StandInHub, settings: HubSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    from ziphius.checkpoint import hub_fetch

    def disk_usage(path: Path) -> Any:
        return type("Usage", (), {"free": 5_000_000})

    monkeypatch.setattr(hub_fetch.shutil, "disk_usage", disk_usage)
    message = fails(settings, DownloadError)
    assert message == (
        f"{MODEL} needs 9.0 MB more in {settings.cache}, where 5.0 MB are free: free 4.0 MB, or set HF_HOME to a "
        "larger disk"
    )
    assert hub.counts() == {}
    part = part_of(hub, settings, SHARDS[0])
    part.write_bytes(files()[SHARDS[0]][:2_900_000])  # what is there already needs no room
    assert "needs 6.1 MB more" in fails(settings, DownloadError)


def test_the_disk_fills_up(hub: StandInHub, settings: HubSettings) -> None:
    part = part_of(hub, settings, SHARDS[1])
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")  # every write fails as on a full disk
    message = fails(settings, DownloadError)
    assert message == (
        f"the disk of {settings.cache} is full; what was fetched of {MODEL} is kept: make room, and run it again"
    )
    part.unlink()
    fetch_snapshot(MODEL, settings)


def test_a_cache_that_cannot_be_written(hub: StandInHub, settings: HubSettings) -> None:
    settings.cache.write_text("a file where a folder should be")
    assert fails(settings, DownloadError).startswith(f"cannot keep {MODEL} in {settings.cache}: ")


def test_nobody_answers(tmp_path: Path) -> None:
    nowhere = HubSettings("http://127.0.0.1:1", tmp_path)
    message = fails(nowhere, DownloadError)
    assert message.startswith(f"{MODEL} cannot be fetched: http://127.0.0.1:1 cannot be reached (")
    assert "refused" in message


def test_a_broken_server(hub: StandInHub, settings: HubSettings) -> None:
    hub.down = True
    message = fails(settings, DownloadError)
    assert message == f"{MODEL} cannot be fetched: {hub.url} answered 503 (Service Unavailable)"


def test_a_silent_server(hub: StandInHub, settings: HubSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1.0)
    hub.faults[SHARDS[0]] = Fault(hang_s=5.0, times=9)
    message = fails(replace(settings, waits=()), DownloadError)
    assert "was lost at 0 of 3000000 bytes" in message
    assert "timed out" in message.lower()


def test_a_config_that_does_not_suit_costs_no_download(hub: StandInHub, settings: HubSettings) -> None:
    def check(config: ModelConfig) -> None:
        raise ConfigError(f"3 ranks cannot share {config.num_attention_heads} heads")

    with pytest.raises(ConfigError, match="3 ranks cannot share 2 heads"):
        fetch_snapshot(MODEL, settings, check=check)
    assert hub.counts() == {}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"config.json": None}, CheckpointError, "has no config.json"),
        ({"config.json": b'{"architectures": ["GPT2LMHeadModel"]}'}, UnsupportedModel, "GPT2LMHeadModel"),
        ({"config.json": b"{"}, ModelError, "not valid JSON"),
        ({SHARDS[1]: None}, CheckpointError, f"names {SHARDS[1]}, which the repository does not have"),
        ({"model.safetensors.index.json": None}, CheckpointError, "has several safetensors files"),
        ({"model.safetensors.index.json": b"{}"}, CheckpointError, "weight_map"),
        (dict.fromkeys(["model.safetensors.index.json", "consolidated.safetensors", *SHARDS]), UnsupportedModel,
         r"has no safetensors weights \(only \.bin, \.pth\)"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_used_costs_no_download(
    hub: StandInHub, settings: HubSettings, change: dict[str, bytes | None], error: type[ModelError], words: str
) -> None:
    hub.repository(MODEL).commit(files(**change))
    with pytest.raises(error, match=words) as caught:
        fetch_snapshot(MODEL, settings)
    assert MODEL in caught.value.message or "index.json" in caught.value.message
    assert hub.counts() == {}
