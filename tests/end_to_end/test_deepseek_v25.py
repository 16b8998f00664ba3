"""DeepSeek-V2.5 as its user runs it, scaled down: fetched from a stand-in hub by `./run.sh start --tp 2`, then used.

What it answers is held against the same checkpoint run by one rank in this process; then ranks die and hang.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import openai
import pytest
from tests.checkpoint.stand_in_hub import GOOD_TOKEN, Fault, StandInHub
from tests.end_to_end.conftest import (
    Installation,
    Server,
    alive,
    clean_environment,
    stopped_afterwards,
    wait_until,
)
from tests.end_to_end.small_v25 import SHARDS, write_small_v25
from tests.ports import free_port
from tests.shared_memory import SharedMemory

from ziphius import LLM
from ziphius.ipc.messages import SamplingParams

MODEL = "deepseek-ai/DeepSeek-V2.5-1210"
ROOT = Path(__file__).parents[2]
BEGIN, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
QUESTION = "用中文回答：what is 2 + 2? 😀"
PREFIXES, SUFFIX = ("def add(a, b):\n    return ", ""), "\n\nprint(add(1, 2))\n"
ANSWER_TOKENS = 24
SETTINGS = (
    *("--model", MODEL, "--tp", "2", "--device", "cpu", "--dtype", "float32", "--threads", "1"),
    *("--context-length", "4096", "--max-total-tokens", "8192", "--rank-timeout", "6"),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_v25(tmp_path_factory.mktemp("hub") / "v2.5")


@pytest.fixture
def hub(checkpoint: Path) -> Iterator[StandInHub]:
    stand_in = StandInHub()
    repository = stand_in.repository(MODEL)
    repository.commit({path.name: path.read_bytes() for path in checkpoint.iterdir()})
    repository.gated = True
    with stand_in.serving():
        yield stand_in


@pytest.fixture
def clone(hub: StandInHub) -> Iterator[Installation]:
    """A clone of the repository in which run.sh has installed already, and a user with a token."""
    with tempfile.TemporaryDirectory(prefix="ze-") as folder:  # not tmp_path: a Unix socket's path must be short
        root, home = Path(folder, "clone"), Path(folder, "home")
        installed = root / ".venv" / "bin"
        installed.mkdir(parents=True)
        for name in ("run.sh", "pyproject.toml"):
            shutil.copy(ROOT / name, root)
        for name in ("python", "ziphius"):
            (installed / name).symlink_to(Path(sys.executable).with_name(name))
        with (root / "pyproject.toml").open() as project:
            checksum = subprocess.run(["cksum"], stdin=project, capture_output=True, text=True, check=True).stdout
        (root / ".venv" / ".installed-").write_text(f"{root} {checksum}")
        temporary = Path(folder, "t")
        temporary.mkdir()
        own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": GOOD_TOKEN, "TMPDIR": str(temporary)}
        made = Installation(home, clean_environment(home) | own, (str(root / "run.sh"),))
        with stopped_afterwards(made):
            yield made


class Expected:
    """One rank's answers."""

    def __init__(self, folder: Path) -> None:
        llm = LLM(str(folder), dtype="float32", device="cpu", threads=1, context_length=4096, max_total_tokens=8192)
        greedy = SamplingParams(temperature=0.0, max_new_tokens=ANSWER_TOKENS, seed=0)
        middles = [f"{BEGIN}<｜fim▁begin｜>{prefix}<｜fim▁hole｜>{SUFFIX}<｜fim▁end｜>" for prefix in PREFIXES]
        chat, *fims = llm.generate([f"{BEGIN}{USER}{QUESTION}{ASSISTANT}", *middles], greedy)
        self.chat, self.chat_prompt_tokens = chat.text, len(chat.prompt_ids)
        self.fims = [fim.text for fim in fims]
        assert len(set(chat.token_ids)) > 8, "an answer that repeats one token tells little"
        assert len({chat.text, *self.fims}) == 1 + len(PREFIXES)


def test_from_the_hub_to_answers_and_through_faults(clone: Installation, hub: StandInHub, checkpoint: Path) -> None:
    expected = Expected(checkpoint)
    server = _first_start(clone, hub)
    _answers(server, expected)
    _a_killed_rank_ends_it(server)
    hub.down = True  # what was fetched is enough
    server = clone.start(*SETTINGS)
    _answers(server, expected)
    _a_stopped_rank_ends_it(server)
    clone.run("start", "--port", str(server.port), *SETTINGS)
    _answers(server, expected)
    tree = _Tree(server)
    clone.run("stop")
    assert clone.run("status", check=False).returncode == 3
    _nothing_is_left(server, tree)


def _first_start(clone: Installation, hub: StandInHub) -> Server:
    """It says what is wrong with the token and with --tp; then it fetches, over a connection that breaks, and runs."""
    told = clone.run("start", "--port", str(free_port()), *SETTINGS, check=False, HF_TOKEN="")
    assert told.returncode == 1
    assert f"{MODEL} is gated: ask for access at {hub.url}/{MODEL}" in told.stderr.splitlines()[-1]
    for verb in ("start", "serve"):
        refused = clone.run(verb, "--port", str(free_port()), *SETTINGS, "--tp", "3", check=False)
        assert refused.returncode == 2
        assert "3 ranks (--tp) cannot share this model: vocabulary 102,400 = 3 x 34,133 + 1; heads 8" in refused.stderr
    assert hub.counts() == {}, "no weights for nothing"

    cut = 4_000_000
    hub.faults[SHARDS[0]] = Fault(after=cut)
    server = clone.start(*SETTINGS)
    ranges = [request.range for request in hub.gets(SHARDS[0]) if "/cdn/" in request.path]
    assert ranges == [None, f"bytes={cut}-"]
    assert hub.counts() == {SHARDS[0]: 2, SHARDS[1]: 1, SHARDS[2]: 1}
    assert len(server.live()["engine_pids"]) == 2
    return server


def _answers(server: Server, expected: Expected) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60)
    assert [model.id for model in client.models.list()] == [MODEL]
    messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": QUESTION}]
    whole = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=ANSWER_TOKENS)
    assert whole.choices[0].message.content == expected.chat
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == expected.chat_prompt_tokens
    stream = client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, max_tokens=ANSWER_TOKENS, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected.chat
    for prefix, fim in zip(PREFIXES, expected.fims, strict=True):
        middle = client.completions.create(
            model=MODEL, prompt=prefix, suffix=SUFFIX, temperature=0, max_tokens=ANSWER_TOKENS
        )
        assert middle.choices[0].text == fim


class _Tree:
    """A server's processes and their shared memory."""

    def __init__(self, server: Server) -> None:
        self.processes = server.tree()
        self.shared = SharedMemory()
        self.shared.look(self.processes)


class _LongAnswer(threading.Thread):
    """A stream that the server will not end well, and the error that ends it."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self._client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60, max_retries=0)
        self.error = ""
        self.start()
        wait_until(lambda: server.live()["running"] == 1, "the request runs")

    def run(self) -> None:
        try:
            stream = self._client.completions.create(
                model=MODEL, prompt="Once", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
            )
            for _ in stream:
                pass
        except openai.APIError as error:
            self.error = error.message

    def ended(self) -> str:
        self.join(60)
        assert not self.is_alive(), "a client hangs"
        return self.error


def _a_killed_rank_ends_it(server: Server) -> None:
    tree, client, rank = _Tree(server), _LongAnswer(server), server.live()["engine_pids"][1]
    os.kill(rank, signal.SIGKILL)
    _ended_with(server, client, f"rank 1: the engine process {rank} was ended by SIGKILL")
    _nothing_is_left(server, tree)


def _a_stopped_rank_ends_it(server: Server) -> None:
    tree, client, rank = _Tree(server), _LongAnswer(server), server.live()["engine_pids"][1]
    os.kill(rank, signal.SIGSTOP)
    _ended_with(server, client, f"rank 1 (process {rank}) has not answered for")
    _nothing_is_left(server, tree)


def _ended_with(server: Server, client: _LongAnswer, reason: str) -> None:
    assert reason in client.ended()
    # While it ends it may still answer, and say that it is unhealthy.
    wait_until(lambda: server.installation.run("status", check=False).returncode != 4, "the server has ended")
    status = server.installation.run("status", check=False)
    assert status.returncode == 1, status.stdout
    assert reason in server.installation.run("logs", "-n", "20").stdout


def _nothing_is_left(server: Server, tree: _Tree) -> None:
    wait_until(lambda: not any(alive(process) for process in tree.processes), "every process has ended")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", server.port))
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health", timeout=5)
    assert list(Path(server.installation.env["TMPDIR"]).glob("ziphius-*")) == []
    assert tree.shared.left() == []
