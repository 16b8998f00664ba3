"""What SGLang's log says of a start: the phase, the pool's tokens, and whether it drains.

The lines are those of SGLang 0.5.16 and 0.5.23. Each rank writes them, and a repeated line counts once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ziphius.ipc.messages import LoadProgress

STAMP = re.compile(r"^\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[^\]]*\] ")
_SHARDS = re.compile(r"shards:\s+\d+% Completed \| (\d+)/(\d+)")
_POOL = re.compile(r"KV Cache is allocated\..*?#tokens: (\d+)(?:, (.*))?$")
_SIZES = re.compile(r"([\d.]+) GB")
_CAPTURED = re.compile(r"Capturing batches.*?\|\s*(\d+)/(\d+)")
_MAX_TOKENS = re.compile(r"max_total_num_tokens=(\d+)")
_WEIGHTS = re.compile(r"Load weight end\..*?mem usage=([\d.]+) GB")
_DRAIN = re.compile(r"SIGTERM received\.|Gracefully exiting\.\.\.")
_PHASES = (
    ("Init torch distributed begin", "joining", "the ranks find one another"),
    ("Init parallel begin", "joining", "the ranks find one another"),
    ("Load weight begin", "loading", ""),
    ("Load weight end", "cache", ""),
    ("Uvicorn running on", "warm-up", ""),
)
FIRED_UP = "The server is fired up and ready to roll"
"""SGLang writes this line also when its port turns out to be taken, so it is only a hint. /health is the evidence."""


@dataclass(frozen=True, slots=True)
class LogState:
    """What the lines so far say."""

    progress: LoadProgress
    kv_tokens: int | None = None
    """Tokens of the pool, as the server reports them (max_total_num_tokens)."""
    weight_bytes: int | None = None
    """Tokens of one rank's pool, as the rank measured them."""
    fired_up: bool = False
    was_healthy: bool = False
    """It has answered a health check, so it is no longer starting."""
    draining: bool = False


def lines_of(text: str) -> list[str]:
    """The lines. Each redrawing of a progress bar (after a carriage return) counts as a line."""
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


def read_state(text: str) -> LogState:
    """The state after `text`, the log from its beginning (or the beginning and the end of a long one)."""
    progress = LoadProgress(phase="starting")
    kv_tokens: int | None = None
    weight_bytes: int | None = None
    fired_up = was_healthy = draining = False
    for line in lines_of(text):
        said = STAMP.sub("", line)
        if said.startswith("server_args="):
            continue  # this line repeats all settings, also the words of a chat template
        progress = _progress(said, progress)
        if match := _POOL.search(said):
            kv_tokens = kv_tokens or int(match[1])
        if match := _MAX_TOKENS.match(said):
            kv_tokens = int(match[1])
        if match := _WEIGHTS.search(said):
            weight_bytes = int(float(match[1]) * (1 << 30))
        fired_up = fired_up or said.startswith(FIRED_UP)
        was_healthy = was_healthy or '"GET /health HTTP/1.1" 200' in said
        draining = draining or _DRAIN.match(said) is not None
    return LogState(progress, kv_tokens, weight_bytes, fired_up, was_healthy, draining)


def _progress(said: str, before: LoadProgress) -> LoadProgress:
    """The phase after one more line. A line that begins no phase leaves the old one."""
    if match := _SHARDS.search(said):
        done, total = int(match[1]), int(match[2])
        return LoadProgress(phase="loading", done=done, total=total, unit="shards")
    if match := _POOL.search(said):
        size = sum(map(float, _SIZES.findall(match[2] or "")))
        return LoadProgress(phase="cache", detail=f"{int(match[1]):,} tokens" + (f", {size:.2f} GB" if size else ""))
    if match := _CAPTURED.search(said):
        return LoadProgress(phase="graphs", done=int(match[1]), total=int(match[2]), unit="batch sizes")
    if re.match(r"Capture .*begin", said):
        return LoadProgress(phase="graphs")
    if said.startswith(FIRED_UP):
        return LoadProgress(phase="warm-up", detail="waiting for a generated token")
    for start, phase, detail in _PHASES:
        if start in said and (said.startswith(start) or "INFO:" in said):
            return LoadProgress(phase=phase, detail=detail)
    return before
