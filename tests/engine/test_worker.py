"""The worker as a process: what it says, and that it ends when it should."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ziphius.config import ServeConfig
from ziphius.ipc.messages import AddRequest, Fatal, FromEngine, LoadProgress, Ready, Shutdown, StepOutput
from ziphius.ipc.sockets import FrontendChannel, socket_address
from ziphius.ranks.spec import WorkerSpec, encode_spec, worker_command, worker_environment

Add = Callable[..., AddRequest]
_DEADLINE_S = 120


class Worker:
    """A spawned worker and the frontend's end of its channel."""

    def __init__(self, model: Path, **options: Any) -> None:
        # Not tmp_path: a Unix socket's path must be short.
        self._folder = tempfile.TemporaryDirectory(prefix="zw-")
        self._options = options
        self._model = model
        self._seen: list[FromEngine] = []
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Worker:
        settings: dict[str, Any] = {"dtype": "float32", "max_total_tokens": 2048, "threads": 1} | self._options
        config = ServeConfig(**settings)
        address = socket_address(Path(self._folder.name))
        self.process = subprocess.Popen(
            worker_command(),
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **worker_environment(config)},
        )
        assert self.process.stdin is not None
        self.process.stdin.write(encode_spec(WorkerSpec(config=config, model_path=str(self._model), address=address)))
        self.process.stdin.flush()
        return self

    async def receive_until(self, channel: FrontendChannel, kind: type) -> Any:
        """The next message of a kind; what came before it goes to `seen`."""
        while True:
            message = await asyncio.wait_for(channel.receive(), _DEADLINE_S)
            self._seen.append(message)
            if isinstance(message, kind):
                return message

    @property
    def seen(self) -> list[FromEngine]:
        return self._seen

    def channel(self) -> FrontendChannel:
        return FrontendChannel(socket_address(Path(self._folder.name)))

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(timeout=_DEADLINE_S)

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stderr):
                assert pipe is not None
                pipe.close()
        self._folder.cleanup()


@pytest.fixture
def make_worker() -> Iterator[Callable[..., Worker]]:
    workers: list[Worker] = []

    def make(model: Path, **options: Any) -> Worker:
        workers.append(Worker(model, **options))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


def test_it_loads_answers_ignores_ctrl_c_and_shuts_down(
    llama: Any, make_worker: Callable[..., Worker], add: Add
) -> None:
    async def talk() -> None:
        worker = make_worker(llama.folder, max_running_requests=1)
        channel = worker.channel()
        worker.start()
        ready = await worker.receive_until(channel, Ready)
        assert (ready.context_length, ready.kv_tokens, ready.device) == (512, 2048, "cpu")
        phases = list(dict.fromkeys(m.phase for m in worker.seen if isinstance(m, LoadProgress)))
        assert phases == ["starting", "loading", "cache", "warm-up"]
        assert worker.process is not None
        worker.process.send_signal(signal.SIGINT)
        ids = [5, 6, 7, 8]
        await channel.send(add("a", ids, max_new_tokens=12))
        answer: list[int] = []
        finish = None
        while finish is None:
            step = await worker.receive_until(channel, StepOutput)
            for output in step.outputs:
                answer += output.token_ids
                finish = output.finish
        assert answer == llama.generate(ids, 12)
        # One after another: more than it computes before it hears that it is to end.
        open_rids = {f"b{number}" for number in range(8)}
        for rid in sorted(open_rids):
            await channel.send(add(rid, ids, max_new_tokens=500))
        await worker.receive_until(channel, StepOutput)
        await channel.send(Shutdown())
        while open_rids:
            step = await worker.receive_until(channel, StepOutput)
            for output in step.outputs:
                if output.finish is not None:
                    open_rids.remove(output.rid)
                    finish = output.finish
        assert finish.kind == "abort"
        assert worker.wait() == 0
        channel.close()

    asyncio.run(talk())


@pytest.mark.parametrize("moment", ["loading", "idle", "busy"])
def test_it_dies_with_its_parent(llama: Any, make_worker: Callable[..., Worker], add: Add, moment: str) -> None:
    """The end of the pipe is all the worker learns of its parent's death."""

    async def talk() -> None:
        worker = make_worker(llama.folder)
        channel = worker.channel()
        worker.start()
        await worker.receive_until(channel, LoadProgress if moment == "loading" else Ready)
        if moment == "busy":
            await channel.send(add("a", [5, 6, 7], max_new_tokens=500))
            await worker.receive_until(channel, StepOutput)
        assert worker.process is not None
        assert worker.process.stdin is not None
        assert worker.process.poll() is None
        worker.process.stdin.close()
        assert worker.wait() == 1
        channel.close()

    asyncio.run(talk())


def test_sigterm_ends_it(llama: Any, make_worker: Callable[..., Worker]) -> None:
    async def talk() -> None:
        worker = make_worker(llama.folder)
        channel = worker.channel()
        worker.start()
        await worker.receive_until(channel, Ready)
        assert worker.process is not None
        worker.process.terminate()
        assert worker.wait() == -signal.SIGTERM
        channel.close()

    asyncio.run(talk())


def test_what_went_wrong_is_told_by_name(llama: Any, tmp_path: Path, make_worker: Callable[..., Worker]) -> None:
    (tmp_path / "config.json").write_bytes((llama.folder / "config.json").read_bytes())

    async def fatal(model: Path, **options: Any) -> tuple[Fatal, int]:
        worker = make_worker(model, **options)
        channel = worker.channel()
        worker.start()
        message = await worker.receive_until(channel, Fatal)
        code = worker.wait()
        channel.close()
        return message, code

    message, code = asyncio.run(fatal(tmp_path / "nothing here"))
    assert (message.error, code) == ("ModelNotFound", 1)
    message, code = asyncio.run(fatal(tmp_path))
    assert (message.error, code) == ("CheckpointError", 1)
    assert "safetensors" in message.message
    message, code = asyncio.run(fatal(llama.folder, context_length=300, max_total_tokens=200))
    assert (message.error, code) == ("DoesNotFit", 1)
    assert "--context-length" in message.message


@pytest.mark.parametrize("line", [b"", b"\n", b'{"model_path": 3}\n'])
def test_without_a_spec_it_says_so(line: bytes) -> None:
    done = subprocess.run(worker_command(), input=line, capture_output=True, timeout=_DEADLINE_S, check=False)
    assert done.returncode == 2
    assert b"no WorkerSpec on stdin" in done.stderr
    assert b"Traceback" not in done.stderr
