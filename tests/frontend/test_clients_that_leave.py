"""Clients that go, stop reading, or come in numbers: the engine must not work for nobody, nor others wait."""

from __future__ import annotations

import json
import threading
import time

import pytest

ENDLESS = {"temperature": 0, "ignore_eos": True}
GENERATE = {"text": "a", "sampling_params": {**ENDLESS, "max_new_tokens": 500}}
CHAT = {"messages": [{"role": "user", "content": "hi"}], **ENDLESS, "max_tokens": 400}


def send(server, path, body):
    """A request on a raw socket, so that the test decides what is read and when."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    connection = server.connect()
    connection.sendall(head.encode() + data)
    return connection


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def read_until(connection, text):
    data = b""
    while text not in data:
        piece = connection.recv(65536)
        assert piece, data
        data += piece
    return data


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**CHAT, "stream": True}),
        ("/v1/chat/completions", {**CHAT, "stream": True, "n": 3}),
        ("/v1/chat/completions", CHAT),
        ("/generate", {**GENERATE, "stream": True}),
        ("/generate", {**GENERATE, "text": ["a", "b"]}),
    ],
)
def test_a_client_that_goes_is_aborted(start_server, path, body):
    server = start_server(step_s=0.02)
    connection = send(server, path, body)
    wait_for(lambda: server.core.generated > 3)
    connection.close()
    wait_for(lambda: server.client.num_open == 0)
    assert len(server.core.aborted) == len(server.core.added)
    assert not server.core.running
    assert server.service.metrics.aborted == len(server.core.added)
    wait_for(lambda: server.service.metrics.http_active == 0)


def test_a_client_that_goes_while_it_is_queued_is_aborted(start_server):
    server = start_server()
    server.call(server.engine.running.clear)
    connection = send(server, "/v1/chat/completions", {**CHAT, "stream": True})
    wait_for(lambda: server.core.added)
    connection.close()
    wait_for(lambda: server.core.aborted)
    wait_for(lambda: server.client.num_open == 0)


def test_a_client_that_goes_while_it_sends_its_body_does_no_harm(start_server):
    server = start_server()
    connection = server.connect()
    connection.sendall(
        b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{"
    )
    connection.close()
    with server.http() as http:
        assert http.post("/generate", json={"text": "a"}).status_code == 200
    assert len(server.core.added) == 1


def fat(server):
    """Answers so large that a client who does not read them fills every buffer on the way."""
    server.core.reply = lambda request: b"x" * 400
    return {"text": ["a"] * 30, "stream": True, "return_logprob": True, "top_logprobs_num": 128,
            "sampling_params": {**ENDLESS, "max_new_tokens": 400}}  # fmt: skip


def test_a_client_that_never_reads_is_given_up_and_blocks_nobody(start_server):
    server = start_server(write_timeout_s=1.0, step_s=0.01)
    connection = send(server, "/generate", fat(server))
    wait_for(lambda: server.core.generated > 300)
    with server.http() as http:
        others = http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 5})
    assert others.status_code == 200
    wait_for(lambda: server.client.num_open == 0)
    assert len(server.core.aborted) > 0
    connection.close()


def test_what_an_unread_stream_keeps_is_merged(start_server):
    """The writer is stuck, the engine goes on: the next event holds all that was missed, once."""
    server = start_server(step_s=0.005, write_timeout_s=600)
    connection = send(server, "/generate", fat(server))
    wait_for(lambda: server.client.num_open == 0 and server.core.generated == 30 * 400, 200)
    data = b""
    while b"data: [DONE]" not in data[-100:]:
        data += connection.recv(1 << 20)
    connection.close()
    # One event for each token would have been 30 * 400 of them
    assert data.count(b'"index":0}') < 400
    last = [part for part in data.split(b"data: ") if b'"index":7}' in part][-1]
    assert last.count(b"120,") > 390


def test_a_reset_connection_is_noticed(start_server):
    import socket
    import struct

    server = start_server(step_s=0.02)
    connection = send(server, "/v1/chat/completions", {**CHAT, "stream": True})
    read_until(connection, b"content")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    wait_for(lambda: server.client.num_open == 0)
    assert len(server.core.aborted) == 1


def test_abort_request(start_server):
    server = start_server(step_s=0.02)
    answers = {}

    def ask(name, path, body):
        with server.http() as http:
            answers[name] = http.post(path, json=body)

    asked = {
        "generate": ("/generate", {**GENERATE, "rid": "ab-1"}),
        "prefixed": ("/generate", {**GENERATE, "rid": "ab-12", "sampling_params": {**ENDLESS, "max_new_tokens": 60}}),
        "batch": ("/generate", {**GENERATE, "text": ["a", "b"], "rid": "ab-2"}),
        "chat": ("/v1/chat/completions", {**CHAT, "rid": "ab-3"}),
        "stream": ("/v1/chat/completions", {**CHAT, "rid": "ab-4", "stream": True}),
        "completion": ("/v1/completions", {"prompt": "a", **ENDLESS, "max_tokens": 400, "rid": "ab-5"}),
    }
    threads = [threading.Thread(target=ask, args=(name, *what)) for name, what in asked.items()]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(server.core.added) == 7 and not server.core.queued)  # the batch is two of them
    wait_for(lambda: all(entry.sent > 3 for entry in list(server.core.running.values())))
    with server.http() as http:
        assert http.post("/flush_cache").status_code == 400
        duplicate = http.post("/generate", json={**GENERATE, "rid": "ab-1"})
        assert duplicate.status_code == 400
        assert "ab-1" in duplicate.json()["error"]["message"]
        for rid in ("ab-1", "ab-2", "ab-3", "ab-4", "ab-5", "nosuch"):
            response = http.post("/abort_request", json={"rid": rid})
            assert (response.status_code, response.content) == (200, b"")
    for thread in threads:
        thread.join(60)
    assert {answer.status_code for answer in answers.values()} == {200}
    aborted = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
    assert answers["generate"].json()["meta_info"]["finish_reason"] == aborted
    assert answers["generate"].json()["text"].startswith("The")
    assert [a["meta_info"]["finish_reason"] for a in answers["batch"].json()] == [aborted, aborted]
    assert answers["chat"].json()["choices"][0]["finish_reason"] == "abort"
    assert answers["completion"].json()["choices"][0]["finish_reason"] == "abort"
    assert '"finish_reason":"abort"' in answers["stream"].text
    assert answers["stream"].text.endswith("data: [DONE]\n\n")
    assert answers["prefixed"].json()["meta_info"]["finish_reason"]["type"] == "length"
    wait_for(lambda: server.client.num_open == 0)


def test_abort_all(start_server):
    server = start_server(step_s=0.02)
    connection = send(server, "/generate", GENERATE)
    wait_for(lambda: server.core.generated > 2)
    with server.http() as http:
        assert http.post("/abort_request", json={"abort_all": True}).status_code == 200
    assert b'"type":"abort"' in read_until(connection, b"abort")
    wait_for(lambda: server.client.num_open == 0)
    connection.close()


def test_a_stop_string_frees_the_engine(start_server):
    server = start_server()
    with server.http() as http:
        body = {**CHAT, "stop": "cap"}
        assert http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"] == "The "
    wait_for(lambda: server.client.num_open == 0)
    assert len(server.core.aborted) == 1


def test_many_streams_at_once(start_server):
    server = start_server(max_running_requests=64)
    texts = []

    def ask():
        with (
            server.http() as http,
            http.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as answer,
        ):
            events = [line for line in answer.iter_lines() if line]
            pieces = [json.loads(e[6:])["choices"][0]["delta"].get("content", "") for e in events[:-1]]
            texts.append("".join(pieces))

    threads = [threading.Thread(target=ask) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(texts) == 24
    assert len(set(texts)) == 1
    assert server.client.num_open == 0
