"""serve(): one server's life: it takes the port, loads the model, watches the engine, drains and exits.

Order: the port is taken first, HTTP answers from then on (503 until ready), the checkpoint is opened,
the engine is spawned and watched. Whatever ends first decides how the rest ends.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import logging
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import uvloop

from ziphius.checkpoint.checkpoint import Checkpoint, open_configured
from ziphius.checkpoint.config import ModelConfig
from ziphius.config import Resolved, ServeConfig, option_fields
from ziphius.errors import EngineFailed, ModelError, RankLost, ZiphiusError
from ziphius.frontend.app import build_app
from ziphius.frontend.engine_client import EngineClient, EngineEvents
from ziphius.frontend.listener import bind, http_server
from ziphius.frontend.metrics import Exposition, Metrics
from ziphius.frontend.model import ModelInfo, ServedModel
from ziphius.frontend.service import Service
from ziphius.installation import package_version, ziphius_home
from ziphius.ipc.messages import Fatal, LoadProgress, Ready
from ziphius.ipc.sockets import FrontendChannel, socket_address
from ziphius.planner.admission import admit_model
from ziphius.ranks.failures import Cause
from ziphius.ranks.layout import rank_layout
from ziphius.ranks.node import serve_node
from ziphius.ranks.private_folder import private_folder
from ziphius.ranks.progress_log import ProgressLog
from ziphius.ranks.ranks import Ranks
from ziphius.ranks.workers import kill_children
from ziphius.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_SHUTDOWN_SEND_S = 1.0

_Result = TypeVar("_Result")


def serve(resolved: Resolved) -> int:
    """Run the server until it is told to stop (0) or fails (its error's exit code, mostly 1).

    PortInUse or InstanceError when the port cannot be taken; nothing was started then. Call it in the main
    thread, with logging configured. ConfigError for options that contradict one another.
    """
    config = resolved.config
    _log_settings(resolved)
    if rank_layout(config).node_rank > 0:
        return serve_node(config)
    listener = bind(config.host, config.port)
    folder = private_folder()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_Server(config, listener, folder).run())
    finally:
        listener.close()
        kill_children()
        shutil.rmtree(folder, ignore_errors=True)


def _log_settings(resolved: Resolved) -> None:
    """Write the settings that are not defaults to the log. Secrets are masked."""
    told = [
        f"{option.name}={'********' if option.metadata['secret'] else getattr(resolved.config, option.name)}"
        for option in option_fields()
        if resolved.origins[option.name] != "default"
    ]
    logger.info("ziphius %s, pid %d, %s", package_version(), os.getpid(), ", ".join(told) or "default settings")


class _Server:
    """One run of the server."""

    def __init__(self, config: ServeConfig, listener: socket.socket, folder: Path) -> None:
        self._config = config
        self._listener = listener
        self._folder = folder
        self._stopping = asyncio.Event()
        self._hurried = asyncio.Event()
        """Set by a second signal: requests that still run are aborted, not waited for."""
        self._fatal: Fatal | None = None
        self._failed_code = ZiphiusError.exit_code
        self._ranks: Ranks | None = None
        self._progress_log = ProgressLog()

    async def run(self) -> int:
        """The exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        channel = FrontendChannel(socket_address(self._folder))
        self._client, self._service = self._build(channel)
        http = http_server(build_app(self._service))
        serving = asyncio.create_task(http.serve(sockets=[self._listener]))
        carrying = asyncio.create_task(self._client.run())
        living = asyncio.create_task(self._run_engine())
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({serving, carrying, living, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if stopping.done() and await self._drain(living):
                code = 0
            else:
                self._fail(_reason(serving, carrying, living))
                code = self._failed_code
            http.should_exit = True
            await asyncio.wait({serving})
            living.cancel()  # it may be about to start what is to be stopped
            await self._stop_engine()
            return code
        finally:
            for task in (carrying, living, stopping):
                task.cancel()
            channel.close()

    def _build(self, channel: FrontendChannel) -> tuple[EngineClient, Service]:
        config, metrics = self._config, Metrics()
        events = EngineEvents(self._on_progress, self._on_ready, self._on_fatal)
        # The engine says how many requests run together once it is ready
        client = EngineClient(channel, config.max_queued_requests, metrics, events)
        return client, Service(config, client, metrics, Exposition(metrics))

    async def _run_engine(self) -> str:
        """Open the checkpoint and run the engine on it. Returns the reason why the engine ended."""
        try:
            checkpoint, tokenizer = await _in_daemon_thread(self._open)
        except ZiphiusError as e:
            self._failed_code = e.exit_code
            return e.message
        name = self._config.served_model_name or checkpoint.name
        info = ModelInfo(
            name=name,
            path=str(checkpoint.path),
            architecture=checkpoint.config.architecture,
            model_type=checkpoint.config.model_type,
            vocab_size=checkpoint.config.vocab_size,
            created=int(time.time()),
            sampling=checkpoint.sampling,
        )
        self._service.model = ServedModel(info, tokenizer)
        self._service.metrics.model_name = name
        self._ranks = Ranks(self._config, self._folder, self._on_progress)
        try:
            await self._ranks.start(checkpoint)
        except ZiphiusError as e:
            self._failed_code = e.exit_code
            return e.message
        except OSError as e:
            return f"cannot start the engine: {e.strerror}"
        self._service.engine_pids = self._ranks.pids
        failure = await self._ranks.failure()
        if failure.cause is Cause.GONE and self._fatal is not None and self._fatal.error != RankLost.__name__:
            return self._fatal.message
        return failure.message

    def _open(self, loop: asyncio.AbstractEventLoop) -> tuple[Checkpoint, Tokenizer]:
        def report(progress: LoadProgress) -> None:
            loop.call_soon_threadsafe(self._on_progress, progress)

        def check(config: ModelConfig) -> None:
            admit_model(self._config, config)

        checkpoint = open_configured(self._config, ziphius_home(os.environ), report, check)
        if checkpoint.tokenizer is None:
            raise ModelError(f"{checkpoint.path} has no tokenizer.json")
        at = "" if checkpoint.commit is None else f", commit {checkpoint.commit}"
        logger.info("model %s (%s) from %s%s", checkpoint.name, checkpoint.config.architecture, checkpoint.path, at)
        return checkpoint, Tokenizer.from_files(checkpoint.tokenizer)

    async def _drain(self, living: asyncio.Task[str]) -> bool:
        """Refuse new requests, let running ones end, abort the rest after the deadline or a second signal.

        Returns whether the engine was alive until the end.
        """
        was_ready = self._service.state == "ready"
        self._service.state = "draining"
        count = self._client.num_open
        if not was_ready or not count:
            logger.info("stopping")
            return True
        logger.info("stopping: %d requests may run for up to %g s", count, self._config.drain_timeout)
        idle = asyncio.create_task(self._client.wait_idle())
        hurried = asyncio.create_task(self._hurried.wait())
        timeout = self._config.drain_timeout
        await asyncio.wait({idle, hurried, living}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        hurried.cancel()
        if living.done():
            return False
        if self._client.num_open:
            logger.warning("aborting %d requests", self._client.num_open)
        self._client.abort_all("The server is shutting down.")
        return True

    def _fail(self, reason: str) -> None:
        logger.error("%s", reason)
        self._service.state = "failed"
        self._service.failure = EngineFailed(reason)
        self._client.fail(reason)

    async def _stop_engine(self) -> None:
        if self._ranks is None:
            return
        if self._service.ready is None or self._service.state == "failed":
            kill_children()  # it is still loading and reads no messages, or it is dead or broken
        else:
            with contextlib.suppress(TimeoutError):
                # A send to an engine that has died would wait for ever
                await asyncio.wait_for(self._client.shutdown(), _SHUTDOWN_SEND_S)
        await self._ranks.stop(self._service.failure.message if self._service.failure is not None else "")

    def _on_signal(self, number: int) -> None:
        if not self._stopping.is_set():
            self._stopping.set()
            return
        if self._client.num_open and not self._hurried.is_set():
            self._hurried.set()
            return
        logger.warning("another signal: exiting at once")
        kill_children()
        shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(128 + number)

    def _on_progress(self, progress: LoadProgress) -> None:
        self._service.progress = progress
        self._progress_log(progress)

    def _on_ready(self, ready: Ready) -> None:
        # Objects from start-up stay for ever: the garbage collector need not visit them, so its pauses are short
        gc.collect()
        gc.freeze()
        self._client.capacity = ready.max_running_requests + self._config.max_queued_requests
        self._service.set_ready(ready)
        mib = 1024 * 1024
        logger.info(
            "ready on http://%s:%d, loaded in %.1f s (%s): context %d tokens, KV cache %d tokens, weights %.0f MiB",
            self._config.host, self._config.port, ready.load_seconds, ready.device, ready.context_length,
            ready.kv_tokens, ready.weight_bytes / mib,
        )  # fmt: skip

    def _on_fatal(self, fatal: Fatal) -> None:
        self._fatal = fatal


def _reason(serving: asyncio.Task[None], carrying: asyncio.Task[None], living: asyncio.Task[str]) -> str:
    """Why the server cannot go on: what the first task to end says."""
    if living.done():
        error = living.exception()
        return living.result() if error is None else f"starting the engine failed: {error!r}"
    what, task = ("HTTP", serving) if serving.done() else ("the connection to the engine", carrying)
    error = None if task.cancelled() else task.exception()
    return f"{what} ended" if error is None else f"{what} failed: {error!r}"


async def _in_daemon_thread(work: Callable[[asyncio.AbstractEventLoop], _Result]) -> _Result:
    """Run `work` in a daemon thread: unlike an executor's, it does not delay the exit."""
    loop = asyncio.get_running_loop()
    done: concurrent.futures.Future[_Result] = concurrent.futures.Future()

    def body() -> None:
        try:
            done.set_result(work(loop))
        except BaseException as e:  # noqa: BLE001 - raised again where the result is awaited
            done.set_exception(e)

    threading.Thread(target=body, name="open-checkpoint", daemon=True).start()
    return await asyncio.wrap_future(done)
