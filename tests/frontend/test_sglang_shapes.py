"""Real exchanges with SGLang 0.5.23, replayed: the same status, and every field it answers with is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import server_fakes as fakes
from running_server import RunningServer

DATA = json.loads((Path(__file__).parent / "data" / "sglang_exchanges.json").read_text(encoding="utf-8"))

ELSEWHERE = ("aborted_",)
"""Exchanges that need a second one beside them: test_aborts."""

DIFFERENT = {
    # SGLang answers 500, dies, or closes the connection
    "chat_bad_array_body": 400,
    "generate_bad_sampling_params_list_len": 400,
    "generate_bad_empty_text": 400,
    "generate_bad_input_ids_negative": 400,
    "generate_bad_input_ids_out_of_vocab": 400,
    "generate_bad_top_logprobs_huge": 400,
    # SGLang accepts nonsense
    "chat_bad_n_negative": 400,
    "chat_bad_top_logprobs_999": 400,
    "chat_bad_top_logprobs_negative": 400,
    "completions_bad_logprobs_negative": 400,
    "generate_bad_n_0": 400,
    "generate_bad_n_neg": 400,
    "generate_bad_top_logprobs_negative": 400,
    "chat_top_logprobs_without_logprobs": 400,
    # SGLang puts an error into a stream with status 200
    "generate_bad_stream_temperature_negative": 400,
    # SGLang takes any model's name
    "completions_unknown_model": 404,
    "completions_bad_lora_suffix_model": 404,
    # SGLang ignores fields
    "completions_best_of": 400,
    "completions_suffix": 400,
    "completions_unknown_field": 400,
    "generate_bad_unknown_field": 400,
    "generate_custom_labels_priority": 400,
    # OpenAI allows it, to score a prompt
    "completions_max_tokens_0": 200,
    "completions_echo_logprobs_max_tokens_0": 200,
    # Not built yet
    "chat_json_object": 400,
    "chat_json_schema": 400,
    "chat_stream_json_schema": 400,
    "chat_stream_tools_named": 400,
    "chat_stream_tools_required": 400,
    "chat_tools_auto": 400,
    "chat_tools_none": 400,
    "chat_tools_required": 400,
    "chat_tool_result_turn": 400,
    "chat_regex_param": 400,
    "chat_return_meta_info": 400,
    "chat_return_token_ids": 400,
    "completions_json_schema": 400,
    "completions_regex": 400,
    "completions_return_token_ids": 400,
    "generate_ebnf": 400,
    "generate_regex": 400,
    "generate_return_bytes_entropy": 400,
    "generate_stop_regex": 400,
    "generate_token_ids_logprob": 400,
}

NOT_HERE = {
    # Clocks and stores inside SGLang's scheduler
    "storage_prefetch_wait", "storage_staging_wait", "forward_entry_time", "prefill_finished_time", "queue_time",
    "api_server_dispatch_finish_ts", "weight_versions", "response_sent_to_client_ts", "decode_throughput",
    # Embedding models and caches of SGLang's
    "embedding", "cache",
}  # fmt: skip

CASES = sorted(name for name in DATA["exchanges"] if not name.startswith(ELSEWHERE))


@pytest.fixture(scope="module")
def server():
    # A reply with what the exchanges' stop strings and ids wait for
    core = fakes.FakeCore(reply=lambda request: b"\x1e of France five.")
    running = RunningServer(core, 0.0005, True, 60.0, {}, model="smollm2", vocab_size=49152, context=8192)
    yield running
    running.stop()


def send(http, exchange):
    headers = {}
    content = exchange.get("text", "")
    if "json" in exchange:
        content = json.dumps(exchange["json"])
    if content:
        headers["content-type"] = exchange.get("content_type", "application/json")
    return http.request(exchange["method"], exchange["path"], content=content, headers=headers)


@pytest.mark.parametrize("name", CASES)
def test_exchange(http, name):
    exchange = DATA["exchanges"][name]
    response = send(http, exchange)
    assert response.status_code == DIFFERENT.get(name, exchange["status"]), response.text
    if response.status_code >= 400:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
    elif exchange["status"] == 200 and "shape" in exchange:
        covers(response.json(), DATA["shapes"][exchange["shape"][0]], name)
    elif exchange["status"] == 200 and "events" in exchange:
        events = [line[6:] for line in response.text.split("\n") if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        told = [json.loads(event) for event in events[:-1]]
        for number in exchange["events"]:
            assert any(is_covered(event, DATA["shapes"][number]) for event in told), DATA["shapes"][number]


def is_covered(value, shape):
    try:
        covers(value, shape, "")
    except AssertionError:
        return False
    return True


def covers(value, shape, where):
    """Each field of `shape` is in `value`, with a value of its type, or null."""
    if where.endswith("cached_tokens_details") and value is None:
        return  # nothing was cached here
    if isinstance(shape, dict):
        assert isinstance(value, dict), where
        for key, inner in shape.items():
            if key in NOT_HERE:
                continue
            assert key in value, f"{where}.{key}"
            if key == "top_logprobs" and isinstance(inner, list):
                inner = []  # in completions its fields are tokens
            covers(value[key], inner, f"{where}.{key}")
    elif isinstance(shape, list):
        assert isinstance(value, list), where
        if shape:
            assert value, where
            covers(value[0], shape[0], where + "[0]")
    else:
        kinds = {"string": str, "integer": (int, str), "number": (int, float), "boolean": bool, "null": object}
        nullable = where.endswith(("matched_stop", "[0]"))
        assert isinstance(value, kinds[shape]) or (nullable and value is None), where
