from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from ziphius.manager.client import ask, base_url


@contextlib.contextmanager
def server(*answers: bytes, host: str = "127.0.0.1") -> Iterator[int]:
    """Answers each request on its one connection with the next of `answers`, then hangs up."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                connection, _ = listening.accept()
                with connection:
                    for answer in answers:
                        connection.recv(65536)
                        connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listening.getsockname()[1]


def http(code: int, body: str) -> bytes:
    return f"HTTP/1.1 {code} X\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


def test_a_ready_server_is_asked_for_its_health() -> None:
    with server(http(200, '{"state": "ready", "new_field": 1, "kv_tokens": 5}'), http(200, "{}")) as port:
        answer = ask("127.0.0.1", port)
    assert answer.healthy
    assert answer.status is not None
    assert answer.status.kv_tokens == 5
    with server(http(200, '{"state": "ready"}'), http(503, "{}")) as port:
        assert not ask("127.0.0.1", port).healthy


def test_a_loading_server_tells_its_progress() -> None:
    with server(http(200, '{"state": "loading", "progress": {"phase": "loading", "done": 1, "total": 2}}')) as port:
        answer = ask("127.0.0.1", port)
    assert not answer.healthy
    assert answer.status is not None
    assert answer.status.progress is not None
    assert (answer.status.progress.phase, answer.status.progress.total) == ("loading", 2)


@pytest.mark.parametrize(
    ("answers", "problem"),
    [
        ((http(404, ""),), "/status answered 404"),
        ((http(200, "<html>"),), "is not a Ziphius server"),
        ((http(200, "[]"),), "is not a Ziphius server"),
        ((b"SSH-2.0-OpenSSH_9.2\r\n",), "BadStatusLine|SSH"),
        ((), ""),
    ],
)
def test_what_is_no_server_of_ours(answers: tuple[bytes, ...], problem: str) -> None:
    with server(*answers) as port:
        answer = ask("127.0.0.1", port)
    assert answer.status is None
    assert answer.listening
    assert any(part in answer.problem for part in problem.split("|"))


def test_a_server_that_never_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        answer = ask("127.0.0.1", silent.getsockname()[1], timeout_s=0.2)
    assert "did not answer within 0.2 s" in answer.problem


def test_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert not ask("127.0.0.1", port).listening


def test_wildcards_are_reached_on_loopback() -> None:
    assert base_url("0.0.0.0", 1) == "http://127.0.0.1:1"
    assert base_url("::", 1) == "http://[::1]:1"
    assert base_url("example.org", 1) == "http://example.org:1"
    with server(http(200, '{"state": "draining"}')) as port:
        assert ask("0.0.0.0", port).status is not None
