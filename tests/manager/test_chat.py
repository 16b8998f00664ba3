from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import httpx2 as httpx
import pytest

from ziphius.errors import InstanceError
from ziphius.manager.chat import ChatClient, Message, Sampling, talk

if TYPE_CHECKING:
    from conftest import Bench

Asked = Callable[[], list[dict[str, object]]]


@pytest.fixture
def url(bench: Bench) -> str:
    started = bench.manager().start(bench.resolved(model="stand-in", api_key="the-key"), lambda _: None)
    assert started.status.url is not None
    return started.status.url


@pytest.fixture
def client(url: str) -> Iterator[ChatClient]:
    client = ChatClient(url, "the-key", Sampling(temperature=0.5))
    yield client
    client.close()


@pytest.fixture
def asked(url: str) -> Asked:
    return lambda: httpx.get(url + "/asked", trust_env=False).json()  # type: ignore[no-any-return]


def lines(monkeypatch: pytest.MonkeyPatch, *questions: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(q + "\n" for q in questions)))


def test_keeps_the_conversation_until_cleared(
    client: ChatClient, asked: Asked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines(monkeypatch, "one", "two", "/clear", "three", "/exit", "four")
    assert talk(client, "be brief") == 0
    assert capsys.readouterr().out == "one \ntwo \nthree \n"
    bodies = asked()
    said = [[(m["role"], m["content"]) for m in body["messages"]] for body in bodies]  # type: ignore[attr-defined]
    system = ("system", "be brief")
    assert said == [
        [system, ("user", "one")],
        [system, ("user", "one"), ("assistant", "one "), ("user", "two")],
        [system, ("user", "three")],
    ]
    assert {(b["model"], b["stream"], b["temperature"], "max_tokens" in b) for b in bodies} == {
        ("stand-in", True, 0.5, False)
    }


@pytest.mark.parametrize(
    ("question", "reason"),
    [("refuse", r"refused \(400\): not that"), ("a fail", "the engine is gone"), ("a break", "broke off")],
)
def test_a_broken_answer_is_an_error(client: ChatClient, question: str, reason: str) -> None:
    with pytest.raises(InstanceError, match=reason):
        list(client.answer("stand-in", [Message("user", question)]))


def test_a_wrong_key_and_a_missing_server(url: str) -> None:
    with pytest.raises(InstanceError, match=r"refused \(401\): a key is wanted"):
        ChatClient(url, "wrong", Sampling()).model()
    with pytest.raises(InstanceError, match="no answer from"):
        ChatClient("http://127.0.0.1:9", None, Sampling()).model()


def test_a_base_url_as_other_clients_want_it(url: str) -> None:
    with contextlib.closing(ChatClient(url + "/v1/", "the-key", Sampling())) as client:
        assert client.model() == "stand-in"


def test_control_characters_do_not_reach_the_terminal(
    client: ChatClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines(monkeypatch, "a\x1b]0;title\x07b")
    talk(client, None)
    assert capsys.readouterr().out == "a]0;titleb \n"
