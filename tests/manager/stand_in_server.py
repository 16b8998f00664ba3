"""A server for the manager's tests: the real one's interface, and every bad habit a server can have; no model.

Run as a program. It reads its config on stdin, as `ziphius serve --resolved` does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from ziphius import log
from ziphius.launchers.native import read_resolved

logger = logging.getLogger("ziphius.stand_in")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--load-seconds", type=float, default=0.0)
    parser.add_argument("--crash", choices=("error", "traceback", "kill"))
    parser.add_argument("--ignore-term", action="store_true")
    parser.add_argument("--drain-seconds", type=float, default=0.0)
    parser.add_argument("--workers", type=int, default=0, help="children that end when their stdin does")
    parser.add_argument("--stubborn-workers", type=int, default=0, help="in their own session, ignoring everything")
    parser.add_argument("--health", type=int, default=200)
    parser.add_argument("--worker", choices=("tied", "stubborn"))
    return parser.parse_args()


def work(kind: str) -> None:
    if kind == "tied":
        sys.stdin.read()
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(60)


def spawn_worker(kind: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, __file__, "--worker", kind], stdin=subprocess.PIPE, start_new_session=kind == "stubborn"
    )


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], options: argparse.Namespace, model: str, api_key: str | None) -> None:
        super().__init__(address, Handler)
        self.options = options
        self.model = model
        self.api_key = api_key
        self.started = time.monotonic()
        self.state = "loading"
        self.asked: list[object] = []


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        logger.info(format, *args)

    def do_GET(self) -> None:
        server = self.server
        if self.path == "/status":
            self._json(200, self._status())
        elif self.path == "/health":
            self._json(server.options.health if server.state == "ready" else 503, {})
        elif self.path == "/v1/models":
            if server.api_key and self.headers.get("Authorization") != f"Bearer {server.api_key}":
                self._json(401, {"error": {"message": "a key is wanted"}})
            else:
                self._json(200, {"object": "list", "data": [{"id": server.model, "object": "model"}]})
        elif self.path == "/asked":
            self._json(200, server.asked)
        else:
            self._json(404, {})

    def do_POST(self) -> None:
        """Answers with the last question's words, one an event; certain words make it misbehave."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        question = body["messages"][-1]["content"]
        if question == "refuse":
            self._json(400, {"error": {"message": "not that", "param": "messages"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self._event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for word in question.split():
            if word == "break":
                return
            if word == "fail":
                self._event({"error": {"message": "the engine is gone"}})
                return
            if word == "endless":
                with contextlib.suppress(OSError):
                    while True:
                        self._event({"choices": [{"index": 0, "delta": {"content": "more "}}]})
                        time.sleep(0.01)
                return
            self._event({"choices": [{"index": 0, "delta": {"content": word + " "}}]})
        self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        self._event({"choices": [], "usage": {"total_tokens": 3}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _status(self) -> dict[str, object]:
        server = self.server
        loaded = time.monotonic() - server.started
        progress = {"phase": "loading", "done": int(loaded * 10), "total": 100, "unit": "shards", "detail": ""}
        return {
            "state": server.state,
            "progress": progress if server.state == "loading" else None,
            "model": server.model,
            "uptime_s": loaded,
            "running": 2,
            "queued": 1,
            "generated_tokens_per_s": 12.5,
            "prompt_tokens_per_s": 3.0,
            "kv_tokens": 1000,
            "kv_tokens_used": 10,
            "engine_pids": [],
            "version": "stand-in",
        }

    def _json(self, code: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _event(self, body: object) -> None:
        self.wfile.write(f"data: {json.dumps(body)}\n\n".encode())
        self.wfile.flush()


def crash(kind: str) -> None:
    if kind == "error":
        logger.error("the weights are too large: 99 GB needed, 1 GB there")
        os._exit(1)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("a bug")


class Terminated(BaseException):
    pass


def terminate(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


def main() -> None:
    options = parse()
    if options.worker:
        work(options.worker)
        return
    config = read_resolved(sys.stdin.buffer).config
    log.configure(config.log_level)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    server = Server((config.host, config.port), options, config.served_model_name or config.model, config.api_key)
    logger.info("listening on port %d", config.port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    workers = [spawn_worker("tied") for _ in range(options.workers)]
    workers += [spawn_worker("stubborn") for _ in range(options.stubborn_workers)]
    with contextlib.suppress(Terminated):
        if not options.ignore_term:
            signal.signal(signal.SIGTERM, terminate)
        time.sleep(options.load_seconds)
        if options.crash:
            crash(options.crash)
        server.state = "ready"
        logger.info("ready")
        while True:
            time.sleep(60)
    if server.state == "ready":
        server.state = "draining"
        time.sleep(options.drain_seconds)
    os._exit(0)  # at once, whatever the request threads are doing


if __name__ == "__main__":
    main()
