"""Stands in for SGLang's server: its arguments, log lines, routes and bad habits; no model. Standard library only."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAILURES = {
    "memory": "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static. self.server_args=...",
    "unknown": "RuntimeError: something that nobody has seen before",
}


def parse() -> tuple[argparse.Namespace, list[str]]:
    argv = sys.argv[1:]
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in ("--model-path", "--served-model-name", "--host", "--config", "--stand-in-fail"):
        parser.add_argument(flag)
    parser.add_argument("--port", type=int)
    parser.add_argument("--api-key")
    parser.add_argument("--stand-in-load-seconds", type=float, default=0.0)
    parser.add_argument("--stand-in-workers", type=int, default=0)
    parser.add_argument("--stand-in-ignore-term", action="store_true")
    parser.add_argument("--stand-in-hang-in-health", action="store_true")
    options, others = parser.parse_known_args(argv)
    if options.config:
        with open(options.config, encoding="utf-8") as file:
            options.api_key = json.load(file)["api-key"]
    return options, others


def log(text: str) -> None:
    print(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def fork_worker() -> None:
    """A rank that has a session of its own and cannot be asked to end, as a hanging one."""
    if os.fork() == 0:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        while True:
            time.sleep(60)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        log(f'INFO:     127.0.0.1:1 - "{self.command} {self.path} HTTP/1.1" {args[1]}')

    def do_GET(self) -> None:
        server = self.server
        if self.path == "/health":
            if server.options.stand_in_hang_in_health and server.asked:
                time.sleep(30)
            self._answer(200 if server.ready else 503, "")
        elif self.path == "/metrics/":
            labels = '{model_name="x",tp_rank="0"}'
            values = {"num_running_reqs": 1, "num_queue_reqs": 2, "max_total_num_tokens": 5000, "num_used_tokens": 37}
            lines = [f"sglang:{name}{labels} {value}.0" for name, value in values.items()]
            self._answer(200, "# HELP x\n" + "\n".join([*lines, f"sglang:gen_throughput{labels} 12.5"]))
        elif self.path == "/v1/models":
            key = server.options.api_key
            if key and self.headers.get("Authorization") != f"Bearer {key}":
                self._answer(401, '{"error": "Unauthorized"}')
            else:
                self._answer(200, json.dumps({"data": [{"id": server.options.served_model_name}]}))
        elif self.path == "/seen":
            self._answer(200, json.dumps(seen(server)))
        else:
            self._answer(404, "{}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked = True
        event = {"choices": [{"index": 0, "delta": {"content": body["messages"][-1]["content"]}}]}
        self._answer(200, f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n", "text/event-stream")

    def _answer(self, code: int, text: str, kind: str = "text/plain") -> None:
        data = text.encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, options: argparse.Namespace, others: list[str]) -> None:
        super().__init__((options.host, options.port), Handler)
        self.options = options
        self.others = others
        self.ready = False
        self.asked = False


def seen(server: Server) -> dict[str, object]:
    """What the process finds around it."""
    writable = {}
    for folder in ("/", os.environ.get("TRITON_CACHE_DIR", "/no"), server.options.model_path):
        try:
            path = os.path.join(folder, f".written-{os.getpid()}")
            with open(path, "w") as file:
                file.write("x")
            os.unlink(path)
            writable[folder] = True
        except OSError:
            writable[folder] = False
    listing = os.listdir(server.options.model_path) if os.path.isdir(server.options.model_path) else None
    return {"env": dict(os.environ), "argv": sys.argv[1:], "others": server.others, "writable": writable,
            "model": listing, "pid": os.getpid()}  # fmt: skip


def main() -> None:
    options, others = parse()
    log(f"server_args={{'api_key': {options.api_key!r}}}")
    for _ in range(options.stand_in_workers):
        fork_worker()
    stop = threading.Event()
    if options.stand_in_ignore_term:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
    log("Load weight begin. avail mem=138.00 GB")
    shards = 4
    for number in range(1, shards + 1):
        stop.wait(options.stand_in_load_seconds / shards)
        sys.stderr.write(
            f"\rLoading safetensors checkpoint shards: {25 * number:>3}% Completed | {number}/{shards} [00:01<00:00]"
        )
        sys.stderr.flush()
    sys.stderr.write("\n")
    log("Load weight end. elapsed=1.57 s, type=X, avail mem=26.00 GB, mem usage=112.00 GB.")
    if options.stand_in_fail:
        print("Traceback (most recent call last):\n" + FAILURES[options.stand_in_fail], file=sys.stderr, flush=True)
        os._exit(1)
    log("KV Cache is allocated. dtype: torch.bfloat16, #tokens: 5000, KV size: 17.90 GB")
    server = Server(options, others)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    log("max_total_num_tokens=5000, chunked_prefill_size=8192")
    log("INFO:     Uvicorn running on http://x (Press CTRL+C to quit)")
    server.ready = True
    log("The server is fired up and ready to roll!")
    while not stop.wait(60):
        pass
    log("SIGTERM received. signum=None frame=None. Draining requests and shutting down...")
    with contextlib.suppress(OSError):
        server.server_close()
    os._exit(0)


if __name__ == "__main__":
    main()
