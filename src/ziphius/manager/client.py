"""Asks a server how it is, for the manager. What the answer means is decided in `status`.

It uses http.client, and imports it only to ask: a library for HTTP takes longer to import than all of `ziphius status`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from ziphius.ipc.messages import LoadProgress

if TYPE_CHECKING:
    import http.client

_MAX_ANSWER = 1 << 20


class ServerStatus(msgspec.Struct, frozen=True):
    """The answer of GET /status."""

    state: str
    progress: LoadProgress | None = None
    model: str | None = None
    uptime_s: float | None = None
    running: int | None = None
    queued: int | None = None
    generated_tokens_per_s: float | None = None
    prompt_tokens_per_s: float | None = None
    kv_tokens: int | None = None
    kv_tokens_used: int | None = None
    engine_pids: list[int] = []
    version: str | None = None
    error: str | None = None
    """Why the server is going to end."""


@dataclass(frozen=True, slots=True)
class ServerAnswer:
    """What a server said, or why it said nothing."""

    status: ServerStatus | None = None
    healthy: bool = False
    """GET /health was answered 200."""
    problem: str = ""
    listening: bool = True
    """False when nothing listens on the port."""


def base_url(host: str, port: int) -> str:
    """The URL at which a server that listens on `host` is reached from this machine."""
    reached = reachable(host)
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"


def reachable(host: str) -> str:
    """The address to connect to for one to listen on: nobody can connect to a wildcard address."""
    return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)


def ask(host: str, port: int, timeout_s: float = 3.0) -> ServerAnswer:
    """GET /status, and /health where it says `ready`. Never raises for what the server does or fails to do."""
    import http.client  # here: `status` of a server that is stopped does without it

    url = base_url(host, port)
    connection = http.client.HTTPConnection(reachable(host), port, timeout=timeout_s)
    try:
        code, body = get(connection, "/status")
        if code != 200:
            return ServerAnswer(problem=f"{url}/status answered {code}")
        status = msgspec.json.decode(body, type=ServerStatus)
        healthy = status.state == "ready" and get(connection, "/health")[0] == 200
        return ServerAnswer(status, healthy)
    except ConnectionRefusedError:
        return ServerAnswer(problem=f"nothing listens on {url}", listening=False)
    except TimeoutError:
        return ServerAnswer(problem=f"{url} did not answer within {timeout_s:g} s")
    except (OSError, http.client.HTTPException) as e:
        return ServerAnswer(problem=f"{url}: {e or type(e).__name__}")
    except (msgspec.DecodeError, msgspec.ValidationError):
        return ServerAnswer(problem=f"{url} is not a Ziphius server")
    finally:
        connection.close()


def get(connection: http.client.HTTPConnection, path: str) -> tuple[int, bytes]:
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.read(_MAX_ANSWER)
