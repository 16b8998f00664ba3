"""A chat in the terminal over a server's OpenAI-compatible API."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import httpx2
import msgspec

from ziphius.errors import InstanceError

_HELP = "/clear forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer"
_BROKE_OFF = "the answer broke off: the server is gone"
_CONNECT_TIMEOUT_S = 5.0
# A model's text must not move the cursor or rename the window: all control characters but newline and tab are removed.
_UNSAFE = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None


class _Error(msgspec.Struct):
    message: str = "no reason given"


class _Chunk(msgspec.Struct):
    """One event of a stream, or the body of an error; both may be there."""

    choices: list[_Choice] = []
    error: _Error | None = None


class Message(msgspec.Struct):
    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The sampling parameters that the user chose. None leaves one to the server."""

    temperature: float | None = None
    max_tokens: int | None = None


class ChatClient:
    """One server. Its errors are InstanceErrors whose message can be shown."""

    def __init__(self, url: str, api_key: str | None, sampling: Sampling) -> None:
        url = url.rstrip("/").removesuffix("/v1")  # the base URL that other clients use ends in /v1
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx2.Timeout(None, connect=_CONNECT_TIMEOUT_S)  # an answer may wait in the queue for long
        self._http = httpx2.Client(base_url=url, headers=headers, timeout=timeout, trust_env=False)
        self._url = url
        self._sampling = sampling

    def model(self) -> str:
        """The name of the first model that the server serves."""
        try:
            response = self._http.get("/v1/models")
            if response.status_code != 200:
                raise InstanceError(_refusal(response.status_code, response.content))
            return msgspec.json.decode(response.content, type=_Models).data[0].id
        except httpx2.HTTPError as e:
            raise InstanceError(f"no answer from {self._url}: {e or type(e).__name__}") from e
        except (msgspec.DecodeError, msgspec.ValidationError, IndexError) as e:
            raise InstanceError(f"{self._url} does not answer like an OpenAI-compatible server") from e

    def answer(self, model: str, messages: list[Message]) -> Iterator[str]:
        """The answer to `messages`, piece by piece. Closing the iterator drops the request."""
        body = {"model": model, "messages": messages, "stream": True}
        for name in ("temperature", "max_tokens"):
            if (value := getattr(self._sampling, name)) is not None:
                body[name] = value
        content = msgspec.json.encode(body)
        headers = {"Content-Type": "application/json"}
        try:
            with self._http.stream("POST", "/v1/chat/completions", content=content, headers=headers) as response:
                if response.status_code != 200:
                    raise InstanceError(_refusal(response.status_code, response.read()))
                yield from _pieces(response.iter_lines())
        except httpx2.RemoteProtocolError as e:
            raise InstanceError(_BROKE_OFF) from e
        except httpx2.HTTPError as e:
            raise InstanceError(f"the connection to {self._url} broke: {e or type(e).__name__}") from e

    def close(self) -> None:
        self._http.close()


def _pieces(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        try:
            chunk = msgspec.json.decode(data, type=_Chunk)
        except (msgspec.DecodeError, msgspec.ValidationError) as e:
            raise InstanceError(f"the server sent an event that cannot be read: {e}") from e
        if chunk.error is not None:
            raise InstanceError(f"the server broke off: {chunk.error.message}")
        for choice in chunk.choices:
            if choice.delta is not None and choice.delta.content:
                yield choice.delta.content
    raise InstanceError(_BROKE_OFF)


def _refusal(code: int, body: bytes) -> str:
    try:
        error = msgspec.json.decode(body, type=_Chunk).error
    except (msgspec.DecodeError, msgspec.ValidationError):
        error = None
    # Another kind of server may answer with a web page.
    said = error.message if error is not None else " ".join(body[:500].decode(errors="replace").split())[:200]
    return f"the server refused ({code}): {said}"


def talk(client: ChatClient, system: str | None) -> int:
    """Answer questions from stdin, one a line, on stdout until stdin ends. Returns the exit status.

    In a terminal an error ends only the question; in a pipe it ends the chat, with 1.
    """
    interactive = sys.stdin.isatty()
    model = client.model()
    if interactive:
        import readline  # noqa: F401  (line editing and history for input)

        print(f"{model}: {_HELP}")
    start = [Message("system", system)] if system else []
    messages = list(start)
    for question in _questions(interactive):
        if question in ("/exit", "/quit"):
            break
        if question == "/clear":
            messages = list(start)
        elif question in ("/help", "/?"):
            print(_HELP)
        else:
            messages.append(Message("user", question))
            try:
                messages.append(Message("assistant", _print_answer(client, model, messages)))
            except InstanceError as e:
                messages.pop()
                print(f"ziphius: {e.message}", file=sys.stderr)
                if not interactive:
                    return 1
    return 0


def _questions(interactive: bool) -> Iterator[str]:
    while True:
        try:
            line = input("> " if interactive else "")
        except (EOFError, KeyboardInterrupt):
            if interactive:
                print()
            return
        if line.strip():
            yield line.strip()


def _print_answer(client: ChatClient, model: str, messages: list[Message]) -> str:
    """Show the answer while it arrives, and return it. Ctrl-C stops it and returns what has arrived."""
    said: list[str] = []
    pieces = client.answer(model, messages)
    try:
        for piece in pieces:
            said.append(piece)
            sys.stdout.write(piece.translate(_UNSAFE))
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stdout.write(" [stopped]")
    finally:
        print(flush=True)
    return "".join(said)
