"""/generate: SGLang's shape, batches, copies, log-probabilities, the cumulative stream."""

from __future__ import annotations

import json

import pytest

REPLY = "The capital of France is Paris."
GREEDY = {"temperature": 0, "max_new_tokens": 4}


def generate(http, **body):
    response = http.post("/generate", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def events(http, **body):
    response = http.post("/generate", json={**body, "stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = [line[6:] for line in response.text.split("\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_one_prompt_is_an_object_and_its_rid_is_kept(http):
    answer = generate(http, text="ab", sampling_params=GREEDY, rid="mine-1")
    assert answer["text"] == "The "
    assert answer["output_ids"] == [ord(c) for c in "The "]
    meta = answer["meta_info"]
    assert meta["id"] == "mine-1"
    assert meta["finish_reason"] == {"type": "length", "length": 4}
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (2, 4)
    assert meta["e2e_latency"] >= meta["first_token_latency"] >= 0


def test_defaults(http):
    answer = generate(http, text="ab")
    assert answer["meta_info"]["completion_tokens"] == 128


def test_a_default_is_cut_to_the_context_but_a_wish_is_not(http):
    ids = [1] * 500
    assert generate(http, input_ids=ids)["meta_info"]["completion_tokens"] == 12
    response = http.post("/generate", json={"input_ids": ids, "sampling_params": {"max_new_tokens": 128}})
    assert response.status_code == 400
    assert "628" in response.json()["error"]["message"]
    assert "512" in response.json()["error"]["message"]


def test_batches_and_copies_are_arrays_with_copies_adjacent(http):
    assert len(generate(http, text=["a"], sampling_params=GREEDY)) == 1
    answers = generate(http, text=["a", "bcd"], sampling_params={**GREEDY, "n": 2}, rid="group")
    assert [a["meta_info"]["prompt_tokens"] for a in answers] == [1, 1, 3, 3]
    assert [a["meta_info"]["id"] for a in answers] == ["group_0", "group_1", "group_2", "group_3"]
    answers = generate(
        http, text=["a", "b"], sampling_params=[{**GREEDY, "max_new_tokens": 2}, GREEDY], rid=["r1", "r2"]
    )
    assert [a["text"] for a in answers] == ["Th", "The "]
    assert [a["meta_info"]["id"] for a in answers] == ["r1", "r2"]
    assert generate(http, text=[]) == []


def test_the_stream_repeats_everything(http):
    told = events(http, text="a", sampling_params=GREEDY)
    assert [e["text"] for e in told] == ["T", "Th", "The", "The "]
    assert [len(e["output_ids"]) for e in told] == [1, 2, 3, 4]
    assert [e["meta_info"]["completion_tokens"] for e in told] == [1, 2, 3, 4]
    assert [e["meta_info"]["finish_reason"] for e in told] == [None, None, None, {"type": "length", "length": 4}]
    assert "index" not in told[0]
    assert "e2e_latency" not in told[0]["meta_info"]
    assert "e2e_latency" in told[-1]["meta_info"]


def test_streams_of_several_have_an_index(http):
    told = events(http, text=["a", "b"], sampling_params={**GREEDY, "n": 2})
    last = {e["index"]: e["text"] for e in told}
    assert last == {0: "The ", 1: "The ", 2: "The ", 3: "The "}


def test_a_stop_string_is_trimmed_unless_told(http):
    stop = {"temperature": 0, "stop": "France"}
    answer = generate(http, text="a", sampling_params=stop)
    assert answer["text"] == "The capital of "
    assert bytes(answer["output_ids"]) == b"The capital of France"
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": "France"}
    answer = generate(http, text="a", sampling_params={**stop, "no_stop_trim": True})
    assert answer["text"] == "The capital of France"
    for event in events(http, text="a", sampling_params=stop):
        assert "F" not in event["text"]


def test_min_new_tokens_lets_earlier_stop_strings_pass(http):
    params = {"temperature": 0, "stop": ["a"], "min_new_tokens": 7}
    assert generate(http, text="x", sampling_params=params)["text"] == "The capit"


def test_a_stop_token_is_trimmed_and_named(http):
    answer = generate(http, text="a", sampling_params={"temperature": 0, "stop_token_ids": [ord("e")]})
    assert answer["text"] == "Th"
    assert answer["output_ids"] == [ord(c) for c in "The"]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": ord("e")}


def test_the_end_token_shows_only_when_asked(http):
    answer = generate(http, text="a", sampling_params={"temperature": 0})
    assert (answer["text"], answer["output_ids"][-1]) == (REPLY, 257)
    both = {"temperature": 0, "skip_special_tokens": False, "no_stop_trim": True}
    assert generate(http, text="a", sampling_params=both)["text"] == REPLY + "<|im_end|>"
    assert generate(http, text="a", sampling_params={**both, "no_stop_trim": False})["text"] == REPLY


def test_a_stop_string_that_is_a_special_token_is_found_although_invisible(http):
    params = {"temperature": 0, "stop": ["<|im_end|>"], "ignore_eos": True}
    answer = generate(http, text="a", sampling_params=params)
    assert answer["text"] == REPLY
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": "<|im_end|>"}


def test_logprobs(http):
    answer = generate(
        http, text="abc", sampling_params=GREEDY, return_logprob=True, logprob_start_len=0, top_logprobs_num=2,
        return_text_in_logprobs=True,
    )  # fmt: skip
    meta = answer["meta_info"]
    assert meta["input_token_logprobs"] == [[None, 97, "a"], [-0.5, 98, "b"], [-0.5, 99, "c"]]
    assert meta["input_top_logprobs"][0] is None
    assert meta["input_top_logprobs"][1] == [[-0.5, 98, "b"], [-1.5, 99, "c"]]
    assert [entry[2] for entry in meta["output_token_logprobs"]] == ["T", "h", "e", " "]
    assert len(meta["output_top_logprobs"]) == meta["output_token_logprobs_length"] == 4
    plain = generate(http, text="abc", sampling_params=GREEDY, return_logprob=True)["meta_info"]
    assert plain["input_token_logprobs"] == []
    assert plain["output_token_logprobs"][0] == [-0.5, ord("T"), None]
    later = generate(http, text="abc", sampling_params=GREEDY, return_logprob=True, logprob_start_len=2)["meta_info"]
    assert later["input_token_logprobs"] == [[-0.5, 99, None]]


def test_logprobs_of_a_batch_and_of_a_stream(http):
    answers = generate(http, text=["a", "b"], sampling_params=GREEDY, return_logprob=[True, False])
    assert "output_token_logprobs" in answers[0]["meta_info"]
    assert "output_token_logprobs" not in answers[1]["meta_info"]
    told = events(http, text="a", sampling_params=GREEDY, return_logprob=True, top_logprobs_num=1)
    assert [len(e["meta_info"]["output_token_logprobs"]) for e in told] == [1, 2, 3, 4]
    assert [len(e["meta_info"]["output_top_logprobs"]) for e in told] == [1, 2, 3, 4]


def test_text_cut_within_a_character_is_withheld(start_server):
    server = start_server()
    server.core.reply = lambda request: "h\u00e9\u20ac\U0001f600!".encode()
    with server.http() as http:
        told = events(http, text="a", sampling_params={"temperature": 0})
        assert told[-1]["text"] == "hé€😀!"
        assert all("\ufffd" not in e["text"] for e in told)
        cut = generate(http, text="a", sampling_params={"temperature": 0, "max_new_tokens": 2})
        assert cut["text"] == "h\ufffd"


def test_several_tokens_in_one_output_change_nothing(start_server):
    server = start_server()
    server.core.tokens_per_output = 5
    with server.http() as http:
        answer = generate(http, text="a", sampling_params={"temperature": 0, "stop": "ap"})
        assert answer["text"] == "The c"
        assert bytes(answer["output_ids"]) == b"The cap"
        assert answer["meta_info"]["completion_tokens"] == 7


def test_cached_tokens_are_told(http):
    generate(http, text="cache me", sampling_params=GREEDY)
    again = generate(http, text="cache me", sampling_params=GREEDY)
    assert again["meta_info"]["cached_tokens"] == 7


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_both_methods(http, method):
    assert http.request(method, "/generate", json={"text": "a", "sampling_params": GREEDY}).status_code == 200


def test_prompt_token_ids(http):
    answer = generate(http, text="ab", sampling_params=GREEDY, return_prompt_token_ids=True)
    assert answer["prompt_token_ids"] == [97, 98]
