"""`ziphius serve` as a process, with real ranks, and what is left of it afterwards."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
from tests.ports import free_port
from tests.shared_memory import SharedMemory

from ziphius.manager import process

_DEADLINE_S = 120.0


class ServeProcess:
    """One `ziphius serve` on the CPU. `prefix` is put before the command (ip netns exec ...)."""

    def __init__(self, model: Path, folder: Path, *options: str, prefix: Sequence[str] = ()) -> None:
        """`folder`: its home and its temporary files; sockets lie there, so its path must be short."""
        self.folder = folder
        kept = {key: value for key, value in os.environ.items() if not key.startswith("ZIPHIUS_")}
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "ziphius", "serve", "--model", str(model), "--threads", "1", *options],
            env={**kept, "ZIPHIUS_HOME": str(folder / "home"), "TMPDIR": str(folder)},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._pids: set[int] = {self.process.pid}
        self._shared = SharedMemory()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _DEADLINE_S
        while True:
            try:
                if condition():
                    return
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline, self.log
            assert self.process.poll() is None, self.log
            time.sleep(0.05)

    def remember(self) -> None:
        """Note its processes and their shared memory, to see later that none is left."""
        main = psutil.Process(self.process.pid)
        family = [main, *main.children(recursive=True)]
        self._pids |= {each.pid for each in family}
        self._shared.look(family)

    def ended(self) -> int:
        """The exit code, once it has ended."""
        code = self.process.wait(_DEADLINE_S)
        self._reader.join(60)
        return code

    def leftovers(self) -> list[str]:
        """Processes, shared memory, folders with sockets, and the port, if anything is still there."""
        left = [f"process {pid}" for pid in self._pids if not _gone(pid)]
        left += self._shared.left()
        return left + [str(path) for path in self.folder.glob("ziphius-*")]

    def close(self) -> None:
        if self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            self.process.kill()
        self.process.wait(60)
        self._reader.join(60)


class RealServer(ServeProcess):
    """One that answers HTTP."""

    def __init__(self, model: Path, folder: Path, *options: str) -> None:
        self.port = free_port()
        settings = ("--port", str(self.port), "--device", "cpu", "--dtype", "float32", "--max-total-tokens", "4096")
        super().__init__(model, folder, *settings, *options)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=_DEADLINE_S, trust_env=False)

    def until_ready(self) -> None:
        self.until(lambda: self.http.get("/health").status_code == 200)
        self.remember()

    @property
    def rank_pids(self) -> list[int]:
        pids: list[int] = self.http.get("/status").json()["engine_pids"]
        return pids

    def generate(self, count: int = 16, stream: bool = False) -> httpx.Response:
        sampling: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_new_tokens": count}
        return self.http.post("/generate", json={"text": "abc", "sampling_params": sampling, "stream": stream})

    def ids(self) -> list[int]:
        answer: list[int] = self.generate().json()["output_ids"]
        return answer

    def leftovers(self) -> list[str]:
        left = super().leftovers()
        try:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", self.port))
        except OSError:
            left.append(f"port {self.port}")
        return left

    def close(self) -> None:
        self.http.close()
        super().close()


class Client(threading.Thread):
    """A request for a long answer, in a thread, and what came of it."""

    def __init__(self, server: RealServer, stream: bool = False, tokens: int = 4000) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._stream = stream
        self._tokens = tokens
        self.begun = threading.Event()
        """Some of a stream has come."""
        self.status = 0
        self.text = ""
        self.start()

    def run(self) -> None:
        url = f"http://127.0.0.1:{self._server.port}/generate"
        sampling = {"temperature": 0, "ignore_eos": True, "max_new_tokens": self._tokens}
        body = {"text": "abc", "sampling_params": sampling, "stream": self._stream}
        with httpx.stream("POST", url, json=body, timeout=_DEADLINE_S, trust_env=False) as answer:
            for text in answer.iter_text():
                self.text += text
                self.begun.set()
            self.status = answer.status_code


def _gone(pid: int) -> bool:
    deadline = time.monotonic() + 60
    while process.identity(pid) is not None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
