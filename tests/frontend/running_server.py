"""A server on a free port, in a thread of its own, with a fake engine behind the real HTTP stack."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from typing import Any

import httpx2 as httpx
import openai
import server_fakes as fakes
import uvloop

from ziphius.config import ServeConfig
from ziphius.frontend.app import build_app
from ziphius.frontend.engine_client import EngineClient, EngineEvents, EngineTransport
from ziphius.frontend.listener import HttpServer, bind, http_server
from ziphius.frontend.metrics import Exposition, Metrics
from ziphius.frontend.model import ModelInfo, ServedModel
from ziphius.frontend.service import Service
from ziphius.ipc.messages import Ready
from ziphius.tokenizer.tokenizer import Tokenizer

MODEL = "fake-model"


class RunningServer:
    """One server and its handles. `call` runs a function in the server's thread."""

    def __init__(self, core: fakes.FakeCore, step_s: float, ready: bool, write_timeout_s: float,
                 settings: dict[str, Any], model: str = MODEL, vocab_size: int = fakes.VOCAB_SIZE,
                 context: int = fakes.CONTEXT, engine: EngineTransport | None = None) -> None:  # fmt: skip
        """`engine`: in the place of a FakeEngine with `core`."""
        self.engine: Any = engine or fakes.FakeEngine(core, step_s)
        self.model, self._vocab_size, self._context = model, vocab_size, context
        self.core = core
        self._settings = settings
        self._ready = ready
        self._write_timeout_s = write_timeout_s
        self._listener = bind("127.0.0.1", 0)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._started.wait(60)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        config = ServeConfig(**self._settings)
        metrics = Metrics(model_name=self.model)
        events = EngineEvents(lambda progress: None, self._on_ready, lambda fatal: None)
        capacity = (config.max_running_requests or 32) + config.max_queued_requests
        self.client = EngineClient(self.engine, capacity, metrics, events)
        self.service = Service(config, self.client, metrics, Exposition(metrics))
        self.service.write_timeout_s = self._write_timeout_s
        info = ModelInfo(self.model, "/models/fake", "LlamaForCausalLM", "llama", self._vocab_size, 1_700_000_000)
        self.service.model = ServedModel(info, Tokenizer.from_files(fakes.tokenizer_files()))
        if self._ready:
            self.service.set_ready(fakes.ready_message(self._vocab_size, self._context))
        self._http: HttpServer = http_server(build_app(self.service))
        self._http.config.timeout_graceful_shutdown = 1
        carrying = asyncio.create_task(self.client.run())
        self.loop.call_later(0.01, self._started.set)
        await self._http.serve(sockets=[self._listener])
        carrying.cancel()

    def _on_ready(self, ready: Ready) -> None:
        self.service.set_ready(ready)

    def call(self, function: Callable[[], Any]) -> Any:
        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(60)

    def http(self, **kwargs: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, trust_env=False, **kwargs)

    def openai(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key=key, max_retries=0, timeout=120)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def stop(self) -> None:
        self._http.should_exit = True
        self._thread.join(60)
        self._listener.close()
        assert not self._thread.is_alive()
