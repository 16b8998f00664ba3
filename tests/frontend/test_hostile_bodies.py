"""Random bodies, half right and wholly wrong: every answer is 200 or a 4xx with a reason, and the server lives."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.integers(), st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8), st.sampled_from(["a", "<|im_end|>", "\x00", "é😀", "-1", "257", "258"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(max_size=4) | st.sampled_from(["1", "type"]), inner, max_size=3),
    ),
    max_leaves=6,
)
SAMPLING = [
    "n", "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
    "logit_bias", "stop", "stop_token_ids", "ignore_eos", "skip_special_tokens", "no_stop_trim", "regex",
]  # fmt: skip
OPENAI = [*SAMPLING, "model", "seed", "max_tokens", "min_tokens", "stream", "stream_options", "rid", "user",
          "response_format", "tools", "logprobs", "top_logprobs", "echo", "best_of", "suffix", "nosuch"]  # fmt: skip
GENERATE = ["rid", "return_logprob", "logprob_start_len", "top_logprobs_num", "stream", "input_ids", "text",
          "return_text_in_logprobs", "image_data", "sampling_params", "nosuch"]  # fmt: skip
PARTS = st.fixed_dictionaries({}, optional={"type": st.sampled_from(["text", "image_url"]) | VALUES, "text": VALUES})
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={"role": st.sampled_from(["user", "system", "assistant", "tool"]) | VALUES,
                  "content": st.text(max_size=20) | st.lists(PARTS, max_size=3) | VALUES, "tool_calls": VALUES},
    ),
    max_size=4,
)  # fmt: skip


def bodies(names, required):
    some = st.dictionaries(st.sampled_from(names), VALUES, max_size=4)
    return st.builds(lambda base, more: {**base, **more}, st.fixed_dictionaries(required), some)


CHATS = bodies(
    [*OPENAI, "messages", "max_completion_tokens", "continue_final_message"], {"messages": MESSAGES | VALUES}
)
COMPLETIONS = bodies(OPENAI, {"prompt": st.text(max_size=20) | VALUES})
PARAMS = st.dictionaries(
    st.sampled_from([*SAMPLING, "max_new_tokens", "min_new_tokens", "sampling_seed", "nosuch"]), VALUES, max_size=4
)
GENERATES = st.builds(
    lambda base, params: {**base, "sampling_params": params},
    bodies(GENERATE, {"text": st.text(max_size=20) | st.lists(st.text(max_size=4), max_size=3)}),
    PARAMS | st.lists(PARAMS, max_size=3) | VALUES,
)
RELAXED = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def check(http, path, content):
    response = http.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 200 or 400 <= response.status_code < 500, (content, response.text)
    if response.status_code >= 400:
        assert response.json()["error"]["message"]
    elif path == "/abort_request":
        assert response.content == b""
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith("data: [DONE]\n\n")
    else:
        response.json()


@pytest.fixture(scope="module")
def lively(server):
    yield server
    assert server.client.num_open == 0
    assert server.service.metrics.http_active == 0
    with server.http() as http:
        assert http.get("/health_generate").status_code == 200


@RELAXED
@given(CHATS)
def test_chats(http, lively, body):
    check(http, "/v1/chat/completions", json.dumps(body).encode())


@RELAXED
@given(COMPLETIONS)
def test_completions(http, lively, body):
    check(http, "/v1/completions", json.dumps(body).encode())


@RELAXED
@given(GENERATES)
def test_generates(http, lively, body):
    check(http, "/generate", json.dumps(body).encode())


@RELAXED
@given(
    st.sampled_from(["/v1/chat/completions", "/v1/completions", "/generate", "/abort_request"]), st.binary(max_size=60)
)
def test_bytes(http, lively, path, content):
    check(http, path, content)


@RELAXED
@given(
    st.sampled_from(['{"prompt": "abc", "max_tokens": 3}', '{"text": "abc"}']),
    st.integers(0, 40),
    st.binary(max_size=3),
)
def test_damaged_json(http, lively, good, at, damage):
    data = good.encode()
    check(http, "/v1/completions", data[:at] + damage + data[at:])
    check(http, "/generate", data[:at] + damage + data[at + len(damage) :])


@RELAXED
@given(st.dictionaries(st.sampled_from(["rid", "abort_all", "nosuch"]), VALUES, max_size=3))
def test_aborts(http, lively, body):
    check(http, "/abort_request", json.dumps(body).encode())
