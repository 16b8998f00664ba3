"""The server driven by the real `openai` client."""

from __future__ import annotations

import openai
import pytest

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
REPLY = "The capital of France is Paris."


@pytest.fixture(scope="module")
def client(server):
    with server.openai() as client:
        yield client


def test_chat(client):
    answer = client.chat.completions.create(model="fake-model", messages=MESSAGES, temperature=0)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", REPLY, "stop")
    assert answer.model == "fake-model"
    assert answer.usage.completion_tokens == len(REPLY) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_stream_with_usage(client):
    stream = client.chat.completions.create(
        model="fake-model", messages=MESSAGES, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == REPLY
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(REPLY) + 1
    assert len({c.id for c in chunks}) == 1


def test_chat_without_max_tokens_runs_to_the_context(client):
    answer = client.chat.completions.create(
        model="fake-model", messages=MESSAGES, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == 512


def test_n_counts_the_prompt_once_and_copies_differ(client):
    answer = client.chat.completions.create(model="fake-model", messages=MESSAGES, n=3, max_tokens=8, seed=5)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert len({c.message.content for c in answer.choices}) == 3
    one = client.chat.completions.create(model="fake-model", messages=MESSAGES, max_tokens=8, seed=5)
    assert answer.usage.prompt_tokens == one.usage.prompt_tokens
    assert answer.usage.completion_tokens == 24


def test_n_stream(client):
    stream = client.chat.completions.create(
        model="fake-model", messages=MESSAGES, n=2, max_tokens=6, temperature=0, stream=True
    )
    texts = {0: "", 1: ""}
    finishes = {}
    for chunk in stream:
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            finishes[choice.index] = choice.finish_reason
    assert texts == {0: REPLY[:6], 1: REPLY[:6]}
    assert finishes == {0: "length", 1: "length"}


def test_the_same_seed_gives_the_same_answer(client):
    def ask(seed):
        answer = client.chat.completions.create(model="fake-model", messages=MESSAGES, max_tokens=16, seed=seed)
        return answer.choices[0].message.content

    assert ask(7) == ask(7)
    assert ask(7) != ask(8)
    assert ask(-3) == ask(-3)
    assert ask(2**63) == ask(2**63)
    assert ask(None) != ask(None)


def test_stop(client):
    answer = client.chat.completions.create(model="fake-model", messages=MESSAGES, temperature=0, stop=["Paris", " of"])
    assert answer.choices[0].message.content == "The capital"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].matched_stop == " of"


def test_stop_in_a_stream_is_never_seen_in_part(client):
    stream = client.chat.completions.create(
        model="fake-model", messages=MESSAGES, temperature=0, stop="France is not", stream=True
    )
    assert "".join(c.choices[0].delta.content or "" for c in stream) == REPLY
    stream = client.chat.completions.create(
        model="fake-model", messages=MESSAGES, temperature=0, stop="France is Paris", stream=True
    )
    pieces = [c.choices[0].delta.content or "" for c in stream]
    assert "".join(pieces) == "The capital of "


def test_logprobs(client):
    answer = client.chat.completions.create(
        model="fake-model", messages=MESSAGES, temperature=0, max_tokens=3, logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content
    assert [entry.token for entry in content] == ["T", "h", "e"]
    assert content[0].bytes == [ord("T")]
    assert content[0].logprob == -0.5
    assert [top.token for top in content[0].top_logprobs] == ["T", "U"]


def test_logprobs_in_a_stream_are_all_told(client):
    stream = client.chat.completions.create(
        model="fake-model", messages=MESSAGES, temperature=0, logprobs=True, stream=True
    )
    tokens = [e.token for c in stream if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert "".join(tokens) == REPLY + "<|im_end|>"


def test_completion(client):
    answer = client.completions.create(model="fake-model", prompt="Say", temperature=0)
    assert answer.choices[0].text == REPLY[:16]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == 3


def test_completion_stream_with_usage(client):
    stream = client.completions.create(
        model="fake-model",
        prompt="Say",
        temperature=0,
        max_tokens=4,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == REPLY[:4]
    assert chunks[-1].usage.total_tokens == 7


def test_completion_batches(client):
    answer = client.completions.create(model="fake-model", prompt=["a", "bc"], n=2, temperature=0, max_tokens=2)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == 3
    answer = client.completions.create(model="fake-model", prompt=[[65, 66], [67]], temperature=0, max_tokens=2)
    assert answer.usage.prompt_tokens == 3
    answer = client.completions.create(model="fake-model", prompt=[65, 66], temperature=0, max_tokens=2)
    assert answer.usage.prompt_tokens == 2


def test_completion_echo_and_logprobs(client):
    answer = client.completions.create(
        model="fake-model", prompt="ab", temperature=0, max_tokens=2, echo=True, logprobs=2
    )
    choice = answer.choices[0]
    assert choice.text == "abTh"
    assert choice.logprobs.tokens == ["a", "b", "T", "h"]
    assert choice.logprobs.token_logprobs == [None, -0.5, -0.5, -0.5]
    assert choice.logprobs.text_offset == [0, 1, 2, 3]
    assert choice.logprobs.top_logprobs[0] is None
    assert set(choice.logprobs.top_logprobs[1]) == {"b", "c"}


def test_completion_can_score_a_prompt_alone(client):
    answer = client.completions.create(
        model="fake-model", prompt="ab", temperature=0, max_tokens=0, echo=True, logprobs=1
    )
    choice = answer.choices[0]
    assert choice.text == "ab"
    assert choice.logprobs.tokens == ["a", "b"]
    assert answer.usage.completion_tokens == 0


def test_models(client):
    assert [model.id for model in client.models.list()] == ["fake-model"]
    assert client.models.retrieve("fake-model").id == "fake-model"


def test_errors_reach_the_client_as_its_own_types(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="nosuch", messages=MESSAGES)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="fake-model", messages=MESSAGES, temperature=-1)
    assert caught.value.param == "temperature"
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nosuch")


def test_a_wrong_key_is_an_authentication_error(start_server):
    server = start_server(api_key="sk-right")
    with server.openai("sk-wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    with server.openai("sk-right") as client:
        assert client.models.list().data


def test_an_engine_that_breaks_in_a_stream_raises_in_the_client(start_server):
    server = start_server()
    server.core.fail_after = 3
    with server.openai() as client:
        stream = client.chat.completions.create(model="fake-model", messages=MESSAGES, temperature=0, stream=True)
        with pytest.raises(openai.APIError, match="the fake engine broke"):
            list(stream)
