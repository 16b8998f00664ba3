"""Models from a stand-in of the hub: what is fetched, shared with other tools, resumed and kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hub_model import CONFIG, MODEL, SHARD_BYTES, SHARDS, blobs, fails, files, names, part_of
from stand_in_hub import GOOD_TOKEN, Fault, StandInHub

from ziphius.checkpoint.checkpoint import open_checkpoint
from ziphius.checkpoint.hub import fetch_snapshot
from ziphius.checkpoint.hub_settings import HubSettings, Snapshot
from ziphius.errors import DownloadError
from ziphius.ipc.messages import LoadProgress

# --- what is fetched ---


def test_the_needed_files_and_no_others(hub: StandInHub, settings: HubSettings) -> None:
    seen: list[LoadProgress] = []
    found = fetch_snapshot(MODEL, settings, seen.append)
    assert found == Snapshot(found.path, hub.repositories[MODEL].revisions["main"])
    assert names(found.path) == sorted(
        ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
         "model.safetensors.index.json", *SHARDS]
    )  # fmt: skip
    for name, data in files().items():
        assert not (found.path / name).exists() or (found.path / name).read_bytes() == data
    assert hub.counts() == dict.fromkeys(SHARDS, 1)
    assert list(dict.fromkeys(m.phase for m in seen)) == ["configs", "downloading"]
    last = seen[-1]
    assert (last.phase, last.unit, last.done, last.total) == ("downloading", "bytes", 3 * SHARD_BYTES, 3 * SHARD_BYTES)
    assert last.detail.startswith(f"{MODEL}@{found.commit[:12]}: 3 of 3 files")
    assert not [path for path in blobs(settings) if path.name.endswith(".incomplete")]


def test_other_tools_find_it(settings: HubSettings) -> None:
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    found = fetch_snapshot(MODEL, settings)
    assert snapshot_download(MODEL, cache_dir=settings.cache, local_files_only=True) == str(found.path)
    assert try_to_load_from_cache(MODEL, "config.json", settings.cache) == str(found.path / "config.json")


def test_what_another_tool_fetched_is_used(hub: StandInHub, settings: HubSettings) -> None:
    from huggingface_hub import snapshot_download

    path = snapshot_download(MODEL, cache_dir=settings.cache, endpoint=hub.url, token=False)
    hub.down = True
    assert fetch_snapshot(MODEL, settings).path == Path(path)


@pytest.mark.parametrize(("single", "others"), [("model.safetensors", ["x.safetensors"]), ("odd.safetensors", [])])
def test_a_model_in_one_file(hub: StandInHub, settings: HubSettings, single: str, others: list[str]) -> None:
    some = {name: data for name, data in files().items() if not name.endswith(("safetensors", "index.json"))}
    hub.repository(MODEL).commit(some | dict.fromkeys([single, *others], b"w" * 1000))
    found = fetch_snapshot(MODEL, settings)
    assert [name for name in names(found.path) if name.endswith(".safetensors")] == [single]


def test_files_of_equal_content(hub: StandInHub, settings: HubSettings) -> None:
    hub.repository(MODEL).commit(files(**dict.fromkeys(SHARDS, b"s" * 500_000)))
    found = fetch_snapshot(MODEL, settings)
    assert all((found.path / shard).stat().st_size == 500_000 for shard in SHARDS)
    assert sum(hub.counts().values()) == 1


def test_without_weights(hub: StandInHub, settings: HubSettings) -> None:
    found = fetch_snapshot(MODEL, settings, weights=False)
    assert names(found.path) == ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert hub.counts() == {}
    assert fetch_snapshot(MODEL, settings).path == found.path
    assert sorted(hub.counts()) == SHARDS


def test_an_empty_file(hub: StandInHub, settings: HubSettings) -> None:
    hub.repository(MODEL).commit(files(**{"added_tokens.json": b""}))
    assert (fetch_snapshot(MODEL, settings).path / "added_tokens.json").read_bytes() == b""


# --- revisions ---


def test_revisions(hub: StandInHub, settings: HubSettings) -> None:
    repository = hub.repository(MODEL)
    first = repository.revisions["main"]
    repository.commit(files(**{"config.json": json.dumps(CONFIG | {"hidden_size": 32}).encode()}), "next", "v2")
    for revision in ("v2", "next", first, "main"):
        found = fetch_snapshot(MODEL, settings, revision=revision)
        assert found.commit == repository.resolve(revision)
        hidden = json.loads((found.path / "config.json").read_text())["hidden_size"]
        assert hidden == (32 if revision in ("v2", "next") else 16)
    assert hub.counts() == dict.fromkeys(SHARDS, 1)  # the weights are the same


def test_a_start_stays_with_what_it_has_and_pull_moves_on(hub: StandInHub, settings: HubSettings) -> None:
    before = fetch_snapshot(MODEL, settings)
    asked = len(hub.requests)
    hub.repository(MODEL).commit(files(**{SHARDS[1]: b"new" * 1000}))
    assert fetch_snapshot(MODEL, settings) == before
    assert len(hub.requests) == asked  # not a question
    after = fetch_snapshot(MODEL, settings, update=True)
    assert after.commit != before.commit
    assert hub.counts() == {SHARDS[0]: 1, SHARDS[1]: 2, SHARDS[2]: 1}
    assert fetch_snapshot(MODEL, settings) == after
    assert fetch_snapshot(MODEL, settings, revision=before.commit, update=True) == before


# --- resuming ---


def test_a_cut_connection_is_resumed(hub: StandInHub, settings: HubSettings) -> None:
    hub.faults[SHARDS[1]] = Fault(after=1_000_000, times=2)
    found = fetch_snapshot(MODEL, settings)
    assert (found.path / SHARDS[1]).read_bytes() == files()[SHARDS[1]]
    ranges = [r.range for r in hub.gets(SHARDS[1]) if "/cdn/" in r.path]
    starts = [0 if r is None else int(r.removeprefix("bytes=").rstrip("-")) for r in ranges]
    assert len(starts) == 3
    assert starts == sorted(set(starts)), "each attempt goes on from where the last one ended"


def test_a_lost_connection_keeps_what_came_and_the_next_run_goes_on(hub: StandInHub, settings: HubSettings) -> None:
    hub.faults[SHARDS[1]] = Fault(after=1_000_000, times=1)
    settings = replace(settings, waits=(), workers=1)
    message = fails(settings, DownloadError)
    assert f"{SHARDS[1]} of {MODEL}: the connection to {hub.url} was lost at 1000000 of 3000000 bytes" in message
    assert "what was fetched is kept" in message
    assert part_of(hub, settings, SHARDS[1]).stat().st_size == 1_000_000
    hub.requests.clear()
    found = fetch_snapshot(MODEL, settings)
    assert (found.path / SHARDS[1]).read_bytes() == files()[SHARDS[1]]
    assert [r.range for r in hub.gets(SHARDS[1])] == ["bytes=1000000-"] * 2  # the hub, then its CDN
    assert sorted(hub.counts()) == SHARDS[1:], "a whole file is not fetched again"


def test_attempts_count_only_while_nothing_comes(hub: StandInHub, settings: HubSettings) -> None:
    hub.faults[SHARDS[0]] = Fault(after=400_000, times=7)
    assert (fetch_snapshot(MODEL, settings).path / SHARDS[0]).stat().st_size == SHARD_BYTES
    hub.repository(MODEL).commit(files(**{SHARDS[0]: b"other" * 1000}))
    hub.faults[SHARDS[0]] = Fault(after=0, times=99)
    assert "was lost at 0 of 5000 bytes" in fails(settings, DownloadError, update=True)


def test_a_server_that_ignores_ranges(hub: StandInHub, settings: HubSettings) -> None:
    hub.faults[SHARDS[1]] = Fault(after=1_000_000)
    fails(replace(settings, waits=()), DownloadError)
    hub.faults[SHARDS[1]] = Fault(no_ranges=True)
    assert (fetch_snapshot(MODEL, settings).path / SHARDS[1]).read_bytes() == files()[SHARDS[1]]


def test_a_busy_server_is_asked_again(hub: StandInHub, settings: HubSettings) -> None:
    hub.faults |= {SHARDS[0]: Fault(status=429, retry_after="0"), "config.json": Fault(status=503, times=2)}
    fetch_snapshot(MODEL, settings)


def test_damage_on_the_way_is_noticed(hub: StandInHub, settings: HubSettings) -> None:
    hub.faults = {SHARDS[2]: Fault(damage=True), "tokenizer.json": Fault(damage=True)}
    found = fetch_snapshot(MODEL, settings)
    assert (found.path / SHARDS[2]).read_bytes() == files()[SHARDS[2]]
    hub.repository(MODEL).commit(files(**{SHARDS[2]: b"third" * 1000}))
    hub.faults = {SHARDS[2]: Fault(damage=True, times=9)}
    message = fails(settings, DownloadError, update=True)
    assert message == f"{SHARDS[2]} of {MODEL} came damaged twice: its checksum is wrong"


def test_a_damaged_part_is_begun_anew(hub: StandInHub, settings: HubSettings) -> None:
    part = part_of(hub, settings, SHARDS[0])
    part.parent.mkdir(parents=True)
    part.write_bytes(b"rubbish")
    assert (fetch_snapshot(MODEL, settings).path / SHARDS[0]).read_bytes() == files()[SHARDS[0]]


class Cancelled(Exception):
    pass


def test_a_cancelled_download_ends_at_once_and_keeps_what_came(hub: StandInHub, settings: HubSettings) -> None:
    hub.slow_bytes_per_s = 2e6

    def on_progress(progress: LoadProgress) -> None:
        if progress.total == 3 * SHARD_BYTES and progress.done > 100_000:
            raise Cancelled

    with pytest.raises(Cancelled):
        fetch_snapshot(MODEL, settings, on_progress)
    kept = sum(path.stat().st_size for path in blobs(settings) if path.name.endswith(".incomplete"))
    assert 100_000 < kept < 3 * SHARD_BYTES
    assert not [t for t in threading.enumerate() if t.name == "download"]
    hub.slow_bytes_per_s = None
    fetch_snapshot(MODEL, settings)


def test_two_at_once_share_the_work(hub: StandInHub, settings: HubSettings) -> None:
    hub.slow_bytes_per_s = 2e7
    found: list[Snapshot] = []
    threads = [threading.Thread(target=lambda: found.append(fetch_snapshot(MODEL, settings))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert hub.counts() == dict.fromkeys(SHARDS, 1)


# --- offline ---


def test_offline_use_of_the_cache(hub: StandInHub, settings: HubSettings) -> None:
    offline = replace(settings, offline=True)
    assert fails(offline, DownloadError) == (
        f"HF_HUB_OFFLINE is set, and the cache {settings.cache} does not have {MODEL} at revision main"
    )
    found = fetch_snapshot(MODEL, settings)
    asked = len(hub.requests)
    for revision in (None, "main", found.commit):
        assert fetch_snapshot(MODEL, offline, revision=revision, update=True) == found
    assert len(hub.requests) == asked
    assert "does not have deepseek-ai/tiny at revision v9" in fails(offline, DownloadError, revision="v9")
    (found.path / SHARDS[1]).unlink()
    assert fails(offline, DownloadError).endswith(f"only a part of {MODEL} at revision main: {SHARDS[1]} missing")
    assert fetch_snapshot(MODEL, offline, weights=False) == found


def test_without_a_network_the_cache_serves(
    hub: StandInHub, settings: HubSettings, caplog: pytest.LogCaptureFixture
) -> None:
    found = fetch_snapshot(MODEL, settings)
    unreachable = replace(settings, endpoint="http://127.0.0.1:1")
    assert fetch_snapshot(MODEL, unreachable) == found
    assert caplog.messages == []
    assert fetch_snapshot(MODEL, unreachable, update=True) == found
    assert f"using commit {found.commit} from the cache" in caplog.text
    hub.down = True
    assert fetch_snapshot(MODEL, settings, update=True) == found
    (found.path / SHARDS[0]).unlink()
    assert "cannot be reached" in fails(unreachable, DownloadError)


def test_a_cache_without_the_tokenizer_is_completed(hub: StandInHub, settings: HubSettings) -> None:
    """As left by a tool that fetches a tokenizer only when it needs one."""
    found = fetch_snapshot(MODEL, settings)
    (found.path / "tokenizer.json").unlink()
    assert fetch_snapshot(MODEL, replace(settings, offline=True)) == found
    fetch_snapshot(MODEL, settings)
    assert (found.path / "tokenizer.json").exists()


# --- as a user does it ---

OPEN = """
import sys
from pathlib import Path
from ziphius.errors import ZiphiusError
from ziphius.checkpoint.checkpoint import open_checkpoint
try:
    found = open_checkpoint(sys.argv[1], Path(sys.argv[2]), revision=sys.argv[3] or None, load_format=sys.argv[4])
    print(found.name, found.commit, found.path)
except ZiphiusError as e:
    print(type(e).__name__, e)
print(*[m for m in ("torch", "transformers", "hf_xet") if m in sys.modules])
"""


def run_open(hub: StandInHub, home: Path, revision: str = "", load_format: str = "auto", **env: str) -> list[str]:
    known = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_", "XDG_"))}
    environment = known | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf")} | env
    command = [sys.executable, "-c", OPEN, MODEL, str(home), revision, load_format]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_the_environment_is_huggingface_hubs(hub: StandInHub, tmp_path: Path) -> None:
    hub.repository(MODEL).gated = True
    told = run_open(hub, tmp_path)[0]
    assert told.startswith(f"DownloadError {MODEL} is gated: ask for access at {hub.url}")
    first, modules = run_open(hub, tmp_path, HF_TOKEN=GOOD_TOKEN)
    commit = hub.repositories[MODEL].revisions["main"]
    cache = tmp_path / "hf" / "hub" / "models--deepseek-ai--tiny" / "snapshots"
    assert first == f"{MODEL} {commit} {cache / commit}"
    assert modules == ""
    asked = len(hub.requests)
    assert run_open(hub, tmp_path, HF_HUB_OFFLINE="1")[0] == first
    assert run_open(hub, tmp_path, commit)[0] == first
    assert len(hub.requests) == asked
    elsewhere = run_open(hub, tmp_path, HF_TOKEN=GOOD_TOKEN, HF_HUB_CACHE=str(tmp_path / "c"), load_format="dummy")
    assert elsewhere[0].endswith(f" {tmp_path / 'c' / 'models--deepseek-ai--tiny' / 'snapshots' / commit}")
    assert sorted(hub.counts()) == SHARDS


def test_a_folder_of_that_name_comes_first(hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / MODEL
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint(MODEL, tmp_path).path == folder
