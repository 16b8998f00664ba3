"""Watches an SGLang server: its log for the phases, /health for readiness, /metrics for numbers."""

from __future__ import annotations

import http.client
import re
from dataclasses import dataclass
from pathlib import Path

from ziphius.config import Resolved
from ziphius.launchers.diagnosis import diagnose, last_exception
from ziphius.launchers.sglang_log import LogState, read_state
from ziphius.launchers.sglang_settings import model_name
from ziphius.manager.client import ServerAnswer, ServerStatus, base_url, get, reachable

_HEALTH_S = 4.0
"""SGLang's /health generates a token, and looks for it once a second, so it never answers faster."""
_READ = 1 << 20
_METRIC = re.compile(r"^sglang[:_](\w+)(?:\{[^}]*\})? ([\d.eE+-]+)$", re.MULTILINE)


class SglangWatch:
    """`resolved`: what was started; `log`: the file that has all its output."""

    def __init__(self, resolved: Resolved, log: Path) -> None:
        self._config = resolved.config
        self._log = log

    def ask(self, timeout_s: float) -> ServerAnswer:
        state = read_state(_ends_of(self._log))
        host, port = self._config.host, self._config.port
        url = base_url(host, port)
        connection = http.client.HTTPConnection(reachable(host), port, timeout=max(timeout_s, _HEALTH_S))
        try:
            code, _ = get(connection, "/health")
        except ConnectionRefusedError:
            return _not_ready(state, f"nothing listens on {url}", listening=False)
        except TimeoutError:
            # A server that is starting answers 503 at once, so this one is not starting.
            return ServerAnswer(problem=f"{url}/health did not answer in time: it computes a long prompt, or hangs")
        except (OSError, http.client.HTTPException) as e:
            return _not_ready(state, f"{url}/health: {e or type(e).__name__}")
        else:
            if code == 200:
                return ServerAnswer(self._status("ready", state, connection), healthy=True)
            return _not_ready(state, f"{url}/health answered {code}")
        finally:
            connection.close()

    def last_words(self) -> str | None:
        text = _ends_of(self._log)
        found = diagnose(text)
        return str(found) if found is not None else last_exception(text)

    def _status(self, word: str, state: LogState, connection: http.client.HTTPConnection) -> ServerStatus:
        numbers = _metrics(connection)
        return ServerStatus(
            state=word,
            model=self._config.served_model_name or model_name(self._config.model),
            running=numbers.running,
            queued=numbers.queued,
            generated_tokens_per_s=numbers.generated_tokens_per_s,
            kv_tokens=numbers.kv_tokens or state.kv_tokens,
            kv_tokens_used=numbers.kv_tokens_used,
        )


@dataclass(frozen=True, slots=True)
class _Numbers:
    running: int | None = None
    queued: int | None = None
    generated_tokens_per_s: float | None = None
    kv_tokens: int | None = None
    kv_tokens_used: int | None = None


def _metrics(connection: http.client.HTTPConnection) -> _Numbers:
    """The numbers of /metrics. None of them is known when it does not answer; the server may still be healthy."""
    try:
        code, body = get(connection, "/metrics/")
    except (OSError, http.client.HTTPException):
        return _Numbers()
    if code != 200:
        return _Numbers()
    found: dict[str, float] = {}
    for name, value in _METRIC.findall(body.decode(errors="replace")):
        found.setdefault(name, float(value))

    def whole(name: str) -> int | None:
        return int(found[name]) if name in found else None

    return _Numbers(
        running=whole("num_running_reqs"),
        queued=whole("num_queue_reqs"),
        generated_tokens_per_s=found.get("gen_throughput"),
        kv_tokens=whole("max_total_num_tokens"),
        kv_tokens_used=whole("num_used_tokens"),
    )


def _not_ready(state: LogState, problem: str, listening: bool = True) -> ServerAnswer:
    if state.draining:
        return ServerAnswer(ServerStatus(state="draining"), problem=problem, listening=listening)
    if not state.was_healthy:
        return ServerAnswer(
            ServerStatus(state="loading", progress=state.progress), problem=problem, listening=listening
        )
    return ServerAnswer(problem=problem, listening=listening)


def _ends_of(path: Path) -> str:
    """The log's beginning, which tells of the start, and its end, which tells of errors."""
    try:
        with path.open("rb") as file:
            data = file.read(_READ)
            size = file.seek(0, 2)
            if size > _READ:
                file.seek(max(_READ, size - _READ))
                data += b"\n" + file.read(_READ)
    except OSError:
        return ""
    return data.decode(errors="replace")
