"""What is refused, with which status, and what it says: fields, sizes, keys, queues, contexts, phases."""

from __future__ import annotations

import json
import time

import pytest

CHAT = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 4}
TEXT = {"prompt": "hi", "temperature": 0, "max_tokens": 4}


def chat(http, **more):
    return http.post("/v1/chat/completions", json={**CHAT, **more})


def refused(response, param, status=400):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["param"] == param, error
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "auto"),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("functions", [{"name": "f"}]),
        ("regex", "a+"),
        ("ebnf", "root ::= a"),
        ("lora_path", "x"),
        ("modalities", ["audio"]),
        ("reasoning_effort", "high"),
        ("service_tier", "priority"),
        ("store", True),
        ("chat_template_kwargs", {"thinking": True}),
        ("custom_logit_processor", "x"),
        ("moderation", {"model": "m"}),
    ],
)
def test_unsupported_chat_fields_are_named(http, field, value):
    error = refused(chat(http, **{field: value}), field)
    assert error["code"] == "unsupported_parameter"
    assert field in error["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", []), ("tools", None), ("tool_choice", "none"), ("response_format", {"type": "text"}), ("user", "u"),
        ("metadata", {"a": "b"}), ("parallel_tool_calls", True), ("service_tier", "auto"), ("store", False),
        ("modalities", ["text"]), ("stop", None), ("stop", []), ("stop", ""), ("logit_bias", None), ("stream", None),
        ("n", None), ("top_logprobs", None), ("seed", None), ("lora_path", ""), ("model", "default"), ("model", None),
        ("prompt_cache_retention", "24h"), ("prompt_cache_options", {"ttl": "1h"}),
    ],
)  # fmt: skip
def test_fields_that_ask_for_nothing_are_taken(http, field, value):
    response = chat(http, **{field: value})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(("field", "value"), [("suffix", "x"), ("best_of", 2), ("response_format", {"type": "x"})])
def test_unsupported_completion_fields_are_named(http, field, value):
    refused(http.post("/v1/completions", json={**TEXT, field: value}), field)


@pytest.mark.parametrize(
    ("field", "value"),
    [("image_data", "x"), ("input_embeds", [[0.0]]), ("lora_path", "x"), ("return_hidden_states", True)],
)
def test_unsupported_generate_fields_are_named(http, field, value):
    refused(http.post("/generate", json={"text": "a", field: value}), field)


def test_unsupported_sampling_params_are_named_with_their_place(http):
    refused(http.post("/generate", json={"text": "a", "sampling_params": {"regex": "a"}}), "sampling_params.regex")
    refused(http.post("/generate", json={"text": "a", "sampling_params": {"nosuch": 1}}), "sampling_params.nosuch")
    refused(http.post("/generate", json={"text": "a", "sampling_params": {"top_p": 2}}), "sampling_params.top_p")


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "wizard", "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{}]}], "messages[1].tool_calls"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": [{"type": "text", "text": "a", "zzz": 1}]}], "messages[0].content[0].zzz"),
        ([{"role": "user", "content": "x", "zzz": 1}], "messages[0].zzz"),
        ([], "messages"),
        ("hi", "messages"),
        (None, "messages"),
    ],
)
def test_bad_messages_are_named(http, messages, param):
    refused(chat(http, messages=messages), param)


def test_an_answer_of_the_client_library_can_be_sent_back(http):
    answer = {"role": "assistant", "content": "x", "refusal": None, "annotations": None, "audio": None,
              "function_call": None, "tool_calls": None, "reasoning_content": None}  # fmt: skip
    assert chat(http, messages=[*CHAT["messages"], answer, *CHAT["messages"]]).status_code == 200


def test_continue_final_message(http, server):
    messages = [*CHAT["messages"], {"role": "assistant", "content": "The capital"}]
    assert chat(http, messages=messages, continue_final_message=True).status_code == 200
    assert bytes(server.core.added[-1].prompt_ids[-11:]) == b"The capital"
    refused(chat(http, continue_final_message=True), "continue_final_message")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1), ("temperature", 1e9), ("temperature", "hot"), ("top_p", 0), ("top_p", 1.5), ("top_k", 0),
        ("top_k", -2), ("min_p", 2), ("frequency_penalty", 3), ("presence_penalty", -3), ("repetition_penalty", 0),
        ("n", 0), ("n", -1), ("n", 129), ("n", 10**30), ("max_tokens", -1), ("max_tokens", 1.5), ("max_tokens", "8"),
        ("max_tokens", 10**30), ("min_tokens", -1), ("min_tokens", 5), ("seed", "x"), ("seed", 1.5), ("stop", 5),
        ("stop", [5]), ("stop", ["a", ""]), ("stop", ["a"] * 100), ("stop", "x" * 5000),
        ("stop_token_ids", [258]), ("stop_token_ids", [-1]), ("logit_bias", {"258": 1}), ("logit_bias", {"x": 1}),
        ("logit_bias", {"-1": 1}), ("logit_bias", {"1": 1e30}), ("logit_bias", [1]), ("stream", "maybe"),
        ("rid", ""), ("rid", "a\nb"), ("rid", "x" * 1000), ("rid", 5), ("nosuch", 1), ("logprobs", 5),
    ],
)  # fmt: skip
def test_bad_values_are_named(http, field, value):
    response = chat(http, **{field: value})
    error = response.json()["error"]
    assert response.status_code == 400, response.text
    assert error["param"].startswith(field), error


@pytest.mark.parametrize("value", [21, -1, 10**9, 10**30])
def test_enormous_top_logprobs(http, value):
    refused(chat(http, logprobs=True, top_logprobs=value), "top_logprobs")
    refused(http.post("/v1/completions", json={**TEXT, "logprobs": value}), "logprobs")
    body = {"text": "a", "return_logprob": True, "top_logprobs_num": value * 10}
    refused(http.post("/generate", json=body), "top_logprobs_num")


def test_token_ids_out_of_range(http):
    for ids in ([258], [-1], [10**30], [1, 2, 999]):
        refused(http.post("/v1/completions", json={**TEXT, "prompt": ids}), "prompt")
        refused(http.post("/generate", json={"input_ids": ids}), "input_ids")


def test_over_the_context_names_both_numbers(http):
    error = refused(http.post("/v1/completions", json={**TEXT, "prompt": "x" * 600}), None)
    assert error["code"] == "context_length_exceeded"
    assert "600" in error["message"]
    assert "512" in error["message"]
    assert http.post("/v1/completions", json={**TEXT, "prompt": "x" * 512}).status_code == 400
    assert http.post("/v1/completions", json={"prompt": "x" * 511, "max_tokens": 1}).status_code == 200
    error = refused(http.post("/v1/completions", json={**TEXT, "max_tokens": 511, "stream": True}), "max_tokens")
    assert "513" in error["message"]


def test_what_cannot_fit_is_refused_before_it_is_encoded(http, server, monkeypatch):
    def encode(*_):
        raise AssertionError("encoded all the same")

    monkeypatch.setattr(server.service.model.tokenizer, "encode", encode)
    for response in (
        http.post("/v1/completions", json={**TEXT, "prompt": "x" * 1_000_000}),
        http.post("/generate", json={"text": "x" * 1_000_000}),
        chat(http, messages=[{"role": "user", "content": "x" * 1_000_000}]),
        chat(http, messages=[{"role": "user", "content": [{"type": "text", "text": "x"}] * 600_000}]),
    ):
        error = refused(response, None)
        assert error["code"] == "context_length_exceeded"
        assert "at least" in error["message"]
        assert "512" in error["message"]
    error = refused(chat(http, messages=CHAT["messages"] * 513), "messages")
    assert "513 messages" in error["message"]
    assert "512 tokens" in error["message"]


def test_a_long_conversation_is_encoded_like_a_short_one(http, server):
    """It goes through a thread."""
    messages = [{"role": "user", "content": ""}] * 256
    refused(chat(http, messages=messages), None)
    refused(chat(http, messages=[*messages, {"role": "wizard", "content": "x"}]), "messages[256].role")


def test_errors_repeat_only_the_beginning_of_what_a_caller_made_up(http):
    long = "x" * 100_000
    for response in (
        chat(http, **{long: 1}),
        chat(http, model=long),
        chat(http, messages=[{"role": long, "content": "x"}]),
        chat(http, messages=[{"role": "user", "content": [{"type": long}]}]),
        chat(http, rid=long),
    ):
        assert response.status_code in (400, 404)
        assert "xxx" in response.text
        assert len(response.text) < 1000


def test_the_prompts_of_a_batch_are_counted_before_their_options_are_read(http, monkeypatch):
    def checked(*_):
        raise AssertionError("read all the same")

    monkeypatch.setattr("ziphius.frontend.sglang_api.checked", checked)
    error = refused(http.post("/generate", json={"text": ["a"] * 9999, "sampling_params": [{}] * 9999}), "n")
    assert "9999 sequences (prompts times n)" in error["message"]
    assert "--max-queued-requests" in error["message"]


def test_unknown_model(http):
    error = refused(chat(http, model="nosuch"), "model", 404)
    assert error["code"] == "model_not_found"
    refused(http.get("/v1/models/org/nosuch"), "model", 404)


def test_unknown_paths_and_methods_have_the_shape_of_errors(http):
    assert http.get("/nosuch").json()["error"]["code"] == "not_found"
    response = http.get("/v1/chat/completions")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert "error" in response.json()


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_other_content_types(http, content_type):
    headers = {"content-type": content_type}
    response = http.post("/v1/chat/completions", content=json.dumps(CHAT), headers=headers)
    refused(response, "content-type")


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"5", b'"x"', b'{"prompt": NaN}', b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 
        b'{"prompt": "a", "regex": ' + b"[" * 5000 + b"]" * 5000,
        b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", b"\xef\xbb\xbf{}", b"\x00\x01",
    ],
)  # fmt: skip
def test_malformed_bodies(http, body):
    headers = {"content-type": "application/json"}
    for path in ("/v1/completions", "/v1/chat/completions", "/generate", "/abort_request"):
        assert http.post(path, content=body, headers=headers).status_code == 400
    assert http.get("/health").status_code == 200


def test_bodies_over_the_limit(start_server):
    with start_server(max_body_bytes=2048).http() as http:
        headers = {"content-type": "application/json"}
        big = json.dumps({**TEXT, "prompt": "x" * 3000}).encode()
        response = http.post("/v1/completions", content=big, headers=headers)
        message = refused(response, None, 413)["message"]
        assert str(len(big)) in message
        assert "2048" in message
        response = http.post("/v1/completions", content=iter([big[:1000], big[1000:]]), headers=headers)
        assert response.request.headers["transfer-encoding"] == "chunked"
        refused(response, None, 413)
        assert http.post("/v1/completions", json=TEXT).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/generate", "/v1/chat/completions", "/", "/nosuch", "/flush_cache"])
def test_without_the_key(start_server, path):
    with start_server(api_key="sk-ключ").http() as http:
        response = http.get(path)
        error = refused(response, None, 401)
        assert error["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
        for value in (b"Bearer wrong", b"Basic abc", b"Bearer", b"\xff\xfe", "Bearer sk-ключ2".encode()):
            assert http.get(path, headers={b"authorization": value}).status_code == 401
        assert http.get("/v1/models", headers={b"authorization": "bearer sk-ключ".encode()}).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/health_generate", "/ready", "/ping", "/status", "/metrics"])
def test_open_without_the_key(start_server, path):
    with start_server(api_key="sk").http() as http:
        assert http.get(path).status_code == 200


def test_browsers_may_ask_first_and_errors_are_readable_to_them(start_server):
    with start_server(api_key="sk").http() as http:
        asking = {"origin": "http://x", "access-control-request-method": "POST",
                  "access-control-request-headers": "authorization"}  # fmt: skip
        assert http.options("/v1/chat/completions", headers=asking).status_code == 200
        response = http.get("/v1/models", headers={"origin": "http://x"})
        assert response.status_code == 401
        assert response.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("stream", [False, True])
def test_queue_full(start_server, stream):
    server = start_server(max_running_requests=1, max_queued_requests=1)
    server.call(server.engine.running.clear)
    with server.http() as http:
        # Two requests take both places; nothing is computed while the engine stands still
        sockets = [server.connect() for _ in range(2)]
        body = json.dumps({**TEXT, "stream": True}).encode()
        head = (
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        )
        for s in sockets:
            s.sendall(head % len(body) + body)
        wait_for(lambda: server.client.num_open == 2)
        response = http.post("/v1/completions", json={**TEXT, "stream": stream})
        error = refused(response, None, 503)
        assert error["code"] == "queue_full"
        assert int(response.headers["retry-after"]) >= 1
        assert response.headers["content-type"] == "application/json"
        refused(http.post("/generate", json={"text": "a", "stream": stream}), None, 503)
        server.call(server.engine.running.set)
        wait_for(lambda: server.client.num_open == 0)
        assert http.post("/v1/completions", json=TEXT).status_code == 200
        for s in sockets:
            s.close()


def test_more_copies_than_will_ever_fit(start_server):
    with start_server(max_running_requests=2, max_queued_requests=1).http() as http:
        refused(chat(http, n=4), "n")
        assert chat(http, n=3).status_code == 200
        refused(http.post("/v1/completions", json={**TEXT, "prompt": ["a"] * 4}), "n")


def test_while_loading(start_server):
    with start_server(ready=False).http() as http:
        response = chat(http)
        error = refused(response, None, 503)
        assert error["code"] == "not_ready"
        assert response.headers["retry-after"]
        health = http.get("/health")
        assert health.status_code == 503
        assert health.json()["phase"] == "starting"
        assert http.get("/ready").status_code == 503
        assert http.get("/health_generate").status_code == 503
        assert http.get("/status").json()["state"] == "loading"
        assert http.get("/metrics").status_code == 200
        assert http.get("/v1/models").json()["data"][0]["max_model_len"] is None


def test_while_draining(start_server):
    server = start_server()
    server.service.state = "draining"
    with server.http() as http:
        assert refused(chat(http), None, 503)["code"] == "shutting_down"
        assert http.get("/health").status_code == 503
        assert http.get("/status").json()["state"] == "draining"


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_numbers_too_large_for_the_wire_do_no_harm(http):
    body = {"messages": CHAT["messages"], "temperature": 0}
    refused(http.post("/v1/chat/completions", json={**body, "min_tokens": 10**30}), "min_tokens")
    refused(http.post("/v1/chat/completions", json={**body, "min_tokens": 500}), "min_tokens")
    for field in ("seed", "top_k"):
        assert http.post("/v1/chat/completions", json={**body, field: 10**30}).status_code == 200
    params = {"sampling_seed": -(10**30), "max_new_tokens": 1}
    assert http.post("/generate", json={"text": "a", "sampling_params": params}).status_code == 200
    assert http.get("/health_generate").status_code == 200
