"""Measures the frontend's CPU time for a short request, without a model, and the cost of checking its body.

    pip install -e '.[test]' fastapi pydantic    # the last two only for the lines that compare with them
    python benchmarks/frontend.py --json report.json

The whole HTTP stack runs on a port, in a thread of its own, and only that thread's CPU time counts: not the client's,
and not waiting. The engine is an object in the same thread that hands out one token per turn of the event loop, so
each token is written alone, as with one client on a real engine. Its own part (two messages a token) is counted too.
Every number is the median over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import platform
import statistics
import sys
import time
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "frontend"))

import server_fakes as fakes
from running_server import RunningServer

from ziphius.frontend.openai_bodies import ChatBody
from ziphius.frontend.protocol import parse
from ziphius.frontend.requests import read_json
from ziphius.ipc.messages import AddRequest, Finish, FromEngine, RequestOutput, StepOutput, ToEngine

TOKENS = 32
CHAT = {
    "model": "fake-model",
    "messages": [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is the capital of France?"},
    ],
    "temperature": 0.7, "top_p": 0.9, "max_tokens": TOKENS, "seed": 7, "stop": ["\n\n\n"],
}  # fmt: skip


class ReplayEngine:
    """An engine that answers each request with the same tokens, one a turn of the event loop."""

    def __init__(self) -> None:
        self._messages: asyncio.Queue[FromEngine] = asyncio.Queue()

    async def send(self, message: ToEngine) -> None:
        if not isinstance(message, AddRequest):
            return
        for n in range(TOKENS):
            finish = Finish("length") if n == TOKENS - 1 else None
            output = RequestOutput(rid=message.rid, token_ids=[97 + n % 26], finish=finish)
            self._messages.put_nowait(StepOutput(outputs=[output]))

    async def receive(self) -> FromEngine:
        await asyncio.sleep(0)  # the handler writes the last token first
        return await self._messages.get()


class Frontend:
    """The server, and one client's connection to it."""

    def __init__(self) -> None:
        self.server = RunningServer(fakes.FakeCore(), 0, True, 60.0, {}, engine=ReplayEngine())
        self._connection = http.client.HTTPConnection("127.0.0.1", self.server.port)

    def cpu_s(self, path: str, body: dict[str, Any], requests: int) -> float:
        """CPU seconds of the server's thread for one request, the mean over `requests` of them."""
        data = json.dumps(body).encode()
        before = self.server.call(time.thread_time)
        for _ in range(requests):
            self._connection.request("POST", path, data, {"content-type": "application/json"})
            response = self._connection.getresponse()
            answer = response.read()
            assert response.status == 200, answer
        after = self.server.call(time.thread_time)
        if body.get("stream"):
            assert answer.count(b"data: {") >= TOKENS
        return float(after - before) / requests

    def close(self) -> None:
        self._connection.close()
        self.server.stop()


def median_s(measure: Callable[[], float], rounds: int) -> float:
    return statistics.median(measure() for _ in range(rounds))


def cpu_of(call: Callable[[], object], times: int = 2000) -> float:
    """CPU seconds of one call."""
    before = time.thread_time()
    for _ in range(times):
        call()
    return (time.thread_time() - before) / times


def pydantic_model(struct: type[msgspec.Struct]) -> Any:
    """The same fields as a pydantic model, as strict: no conversion, no unknown field."""
    import pydantic

    made: dict[type, Any] = {}

    def convert(kind: Any) -> Any:
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            return made.get(kind) or make(kind)
        arguments = tuple(convert(argument) for argument in typing.get_args(kind))
        if not arguments:
            return kind
        if isinstance(kind, types.UnionType):
            return typing.Union[arguments]  # noqa: UP007 - of a tuple
        return typing.get_origin(kind)[arguments]

    def make(kind: type[msgspec.Struct]) -> Any:
        hints = typing.get_type_hints(kind)
        fields: dict[str, Any] = {
            field.name: (convert(hints[field.name]), ... if field.required else field.default)
            for field in msgspec.structs.fields(kind)
        }
        settings = pydantic.ConfigDict(strict=True, extra="forbid")
        made[kind] = pydantic.create_model(kind.__name__, __config__=settings, **fields)
        return made[kind]

    return make(struct)


def bodies(rounds: int) -> dict[str, float]:
    """CPU seconds to make a checked body of the request's bytes."""
    data = json.dumps(CHAT).encode()
    found = {
        "msgspec decode": median_s(lambda: cpu_of(lambda: msgspec.json.decode(data, type=ChatBody)), rounds),
        "msgspec decode, and refusal of what is not supported": median_s(
            lambda: cpu_of(lambda: parse(data, ChatBody)), rounds
        ),
    }
    try:
        model = pydantic_model(ChatBody)
    except ImportError:
        return found
    found["pydantic model_validate_json"] = median_s(lambda: cpu_of(lambda: model.model_validate_json(data)), rounds)
    return found


def routes(rounds: int) -> dict[str, float]:
    """CPU seconds of a route that only reads the body, as an ASGI application without HTTP around it."""

    async def read(request: Request) -> Response:
        await read_json(request, ChatBody, 1 << 20)
        return Response()

    apps: dict[str, Any] = {"Starlette, msgspec": Starlette(routes=[Route("/chat", read, methods=["POST"])])}
    try:
        import fastapi

        routed, described = fastapi.FastAPI(), fastapi.FastAPI()
        routed.add_api_route("/chat", read, methods=["POST"])
        model = pydantic_model(ChatBody)

        async def take(body: Any) -> Response:
            return Response()

        take.__annotations__["body"] = model
        described.add_api_route("/chat", take, methods=["POST"])
        apps |= {"FastAPI, msgspec": routed, "FastAPI, pydantic": described}
    except ImportError:
        pass
    data = json.dumps(CHAT).encode()
    return {name: median_s(lambda app=app: asyncio.run(routed_s(app, data)), rounds) for name, app in apps.items()}


async def routed_s(app: Any, data: bytes, times: int = 500) -> float:
    """CPU seconds of one request to `app`."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": data, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        assert message.get("status", 200) == 200, message

    before = time.thread_time()
    for _ in range(times):
        scope = {"type": "http", "method": "POST", "path": "/chat", "raw_path": b"/chat", "query_string": b"",
                 "headers": headers, "http_version": "1.1", "scheme": "http", "root_path": ""}  # fmt: skip
        await app(scope, receive, send)
    return (time.thread_time() - before) / times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--requests", type=int, default=100, help="in a round")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    frontend = Frontend()
    generate = {"text": "abc", "stream": True, "sampling_params": {"temperature": 0, "max_new_tokens": TOKENS}}
    requests: dict[str, tuple[str, dict[str, Any]]] = {
        "chat": ("/v1/chat/completions", CHAT),
        "chat, streamed": ("/v1/chat/completions", {**CHAT, "stream": True}),
        "/generate, streamed": ("/generate", generate),
    }
    taken: dict[str, list[float]] = {name: [] for name in requests}
    for path, body in requests.values():
        frontend.cpu_s(path, body, arguments.requests)  # warm
    for _ in range(arguments.rounds):
        for name, (path, body) in requests.items():
            taken[name].append(frontend.cpu_s(path, body, arguments.requests))
    frontend.close()
    report = {
        f"a request of {TOKENS} tokens": {name: statistics.median(values) for name, values in taken.items()},
        "its body": bodies(arguments.rounds),
        "its route": routes(arguments.rounds),
    }
    for title, numbers in report.items():
        print(f"{title}, µs of CPU:")
        for name, seconds in numbers.items():
            print(f"  {name:55} {1e6 * seconds:8.1f}")
    if arguments.json is not None:
        told = {title: {n: round(1e6 * s, 2) for n, s in numbers.items()} for title, numbers in report.items()}
        host = {"machine": platform.machine(), "python": platform.python_version()}
        arguments.json.write_text(json.dumps({"microseconds": told, **host}, indent=1) + "\n")


if __name__ == "__main__":
    main()
