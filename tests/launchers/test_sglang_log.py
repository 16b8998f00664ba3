from __future__ import annotations

from pathlib import Path

from ziphius.launchers.sglang_log import read_state

START = Path(__file__).with_name("data") / "start.txt"
LINES = START.read_text().splitlines()


def phases(lines: list[str]) -> list[str]:
    """The phases in order, as someone sees them who looks after each line."""
    seen = [read_state("\n".join(lines[: n + 1])).progress.phase for n in range(len(lines))]
    return [phase for n, phase in enumerate(seen) if n == 0 or seen[n - 1] != phase]


def test_the_phases_of_a_recorded_start() -> None:
    assert phases(LINES) == ["starting", "joining", "loading", "cache", "warm-up"]
    state = read_state("\n".join(LINES))
    assert state.kv_tokens == 16384
    assert state.weight_bytes == int(0.62 * 2**30)
    assert state.fired_up
    assert state.was_healthy
    assert not state.draining


def test_a_gpus_start() -> None:
    """Four ranks, in the words of 0.5.16; a bar is redrawn with carriage returns."""
    stamp = "[2026-01-01 00:00:00 TP0] "
    text = (
        f"{stamp}Init torch distributed begin.\n{stamp}Load weight begin. avail mem=138.90 GB\n"
        "\rLoading safetensors checkpoint shards:   0% Completed | 0/55 [00:00<?, ?it/s]"
        "\rLoading safetensors checkpoint shards:  22% Completed | 12/55 [01:10<04:10,  5.8s/it]"
    )
    progress = read_state(text).progress
    assert (progress.phase, progress.done, progress.total, progress.unit) == ("loading", 12, 55, "shards")
    text += f"\n{stamp}Load weight end. avail mem=27.33 GB, mem usage=111.47 GB.\n"
    assert read_state(text).progress.phase == "cache"
    text += f"{stamp}KV Cache is allocated. dtype: torch.bfloat16, #tokens: 278067, KV size: 17.90 GB\n"
    assert read_state(text).progress.detail == "278,067 tokens, 17.90 GB"
    text += f"{stamp}Capture cuda graph begin. This can take up to several minutes. avail mem=9.08 GB\n"
    assert read_state(text).progress.phase == "graphs"
    text += "\rCapturing batches (bs=512 avail_mem=8.90 GB):   2%|▏         | 1/52 [00:01<00:55,  1.09s/it]"
    progress = read_state(text).progress
    assert (progress.phase, progress.done, progress.total) == ("graphs", 1, 52)
    text += f"\n{stamp}max_total_num_tokens=278067, chunked_prefill_size=8192, max_prefill_tokens=16384\n"
    state = read_state(text)
    assert state.kv_tokens == 278067
    assert not state.fired_up


def test_an_empty_log_is_a_start() -> None:
    assert read_state("").progress.phase == "starting"


def test_a_drain() -> None:
    assert read_state("[2026-01-01 00:00:00] SIGTERM received. signum=None frame=None. Draining requests\n").draining


def test_words_in_the_settings_are_no_events() -> None:
    state = read_state("[2026-01-01 00:00:00] server_args={'x': 'Load weight begin max_total_num_tokens=5'}\n")
    assert (state.progress.phase, state.kv_tokens) == ("starting", None)
