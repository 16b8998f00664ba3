"""An engine that breaks on a request, or dies: everybody is told, once, in the way they can read."""

from __future__ import annotations

import json
import threading
import time

import pytest

ENDLESS = {"temperature": 0, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "hi"}], **ENDLESS, "max_tokens": 400}
GENERATE = {"text": "a", "sampling_params": {**ENDLESS, "max_new_tokens": 400}}


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/generate", GENERATE)])
@pytest.mark.parametrize("n", [1, 3])
def test_a_broken_request_is_an_error_with_a_status(start_server, path, body, n):
    server = start_server()
    server.core.fail_after = 4
    body = {**body, "n": n} if path.startswith("/v1") else {**body, "text": ["a"] * n}
    with server.http() as http:
        response = http.post(path, json=body)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "engine_failed"
    assert response.json()["error"]["message"] == "the fake engine broke"
    wait_for(lambda: server.client.num_open == 0)
    assert server.service.metrics.failed >= 1


def test_a_stream_that_breaks_before_its_first_token_has_a_status(start_server):
    server = start_server()
    server.core.fail_after = 0
    with server.http() as http:
        response = http.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert response.status_code == 500
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/generate", GENERATE)])
def test_a_stream_that_breaks_later_ends_in_an_error_event(start_server, path, body):
    server = start_server()
    server.core.fail_after = 4
    with server.http() as http:
        response = http.post(path, json={**body, "stream": True})
    assert response.status_code == 200
    events = [line[6:] for line in response.text.split("\n") if line]
    assert json.loads(events[-1])["error"]["message"] == "the fake engine broke"
    assert sum("error" in event for event in events) == 1
    assert "[DONE]" not in response.text


def test_a_dead_engine_is_told_to_all(start_server):
    server = start_server(step_s=0.02, max_running_requests=3)
    answers = []

    def ask(path, body):
        with server.http() as http:
            answers.append(http.post(path, json=body))

    bodies = [("/v1/chat/completions", CHAT), ("/v1/chat/completions", {**CHAT, "stream": True}),
              ("/generate", {**GENERATE, "stream": True}), ("/v1/chat/completions", {**CHAT, "stream": True}),
              ("/v1/completions", {"prompt": "x", **ENDLESS, "max_tokens": 400}), ("/generate", GENERATE)]  # fmt: skip
    threads = [threading.Thread(target=ask, args=what) for what in bodies]
    for thread in threads:
        thread.start()
    wait_for(lambda: server.client.num_open == 6 and server.core.generated > 6)
    server.call(server.engine.running.clear)
    server.call(lambda: server.client.fail("the engine process 1 was ended by SIGKILL"))
    for thread in threads:
        thread.join(60)
    assert len(answers) == 6
    for answer in answers:
        assert "SIGKILL" in answer.text
        assert "[DONE]" not in answer.text
        assert answer.status_code == (200 if answer.headers["content-type"].startswith("text/event") else 500)
    assert server.client.num_open == 0
    with server.http() as http:
        assert http.post("/v1/chat/completions", json=CHAT).status_code == 500
        assert http.post("/flush_cache").status_code == 500


def test_an_engine_that_stands_still_is_unhealthy(start_server, monkeypatch):
    server = start_server()
    with server.http() as http:
        assert http.get("/health").status_code == 200
        server.call(server.engine.running.clear)
        thread = threading.Thread(target=lambda: http.post("/v1/chat/completions", json=CHAT))
        thread.start()
        wait_for(lambda: server.client.num_open == 1)
        monkeypatch.setattr("ziphius.frontend.engine_client.STALL_S", 0.0)
        health = http.get("/health")
        assert health.status_code == 503
        assert "nothing" in health.json()["message"]
        monkeypatch.undo()
        server.call(server.engine.running.set)
        thread.join(60)
        assert http.get("/health").status_code == 200


def test_health_generate(start_server, monkeypatch):
    server = start_server()
    with server.http() as http:
        assert http.get("/health_generate").status_code == 200
        assert len(server.core.added) == 1
        server.call(server.engine.running.clear)
        monkeypatch.setattr("ziphius.frontend.admin_api._PROBE_TIMEOUT_S", 0.2)
        response = http.get("/health_generate")
        assert response.status_code == 503
        assert "no token" in response.json()["message"]
        wait_for(lambda: server.core.aborted)
