"""serve() as a process: binding, loading, signals, draining, and an engine that dies at any moment."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2 as httpx
import psutil
import pytest
import server_fakes as fakes
from tests.ports import free_port

from ziphius.config import resolve
from ziphius.errors import PortInUse
from ziphius.frontend import serve as launch
from ziphius.manager import process

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": fakes.VOCAB_SIZE, "hidden_size": 8,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 8,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 512, "bos_token_id": None,
    "eos_token_id": fakes.EOS, "hidden_act": "silu", "tie_word_embeddings": True, "torch_dtype": "float32",
}  # fmt: skip
ENDLESS = {"text": "a", "sampling_params": {"temperature": 0, "ignore_eos": True, "max_new_tokens": 500}}


class Process:
    """One `serve` and what became of it."""

    def __init__(self, model: Path, behaviour: str = "", drain_timeout: float = 10.0, port: int | None = None) -> None:
        self.port = port or free_port()
        script = Path(__file__).with_name("serve_with_fake_worker.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(self.port), str(model), str(drain_timeout)],
            env={**os.environ, "FAKE_ENGINE": behaviour, "TMPDIR": str(model.parent)},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60, trust_env=False)

    def _read(self) -> None:
        for line in self.process.stderr:
            self.log += line

    def until(self, condition):
        deadline = time.monotonic() + 120
        while True:
            try:
                if condition():
                    return
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)

    def until_ready(self):
        self.until(lambda: self.http.get("/health").status_code == 200)

    def engine_pid(self):
        return self.http.get("/status").json()["engine_pids"][0]

    def ended(self):
        """The exit code; by now nothing of it may be left."""
        code = self.process.wait(120)
        self._reader.join(60)
        return code

    def signal(self, number):
        self.process.send_signal(number)


def gone(pid):
    deadline = time.monotonic() + 60
    while process.identity(pid) is not None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(fakes.tokenizer_json())
    settings = {"eos_token": "<|im_end|>", "chat_template": fakes.TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def start(model):
    started = []

    def begin(*args, **kwargs):
        started.append(Process(model, *args, **kwargs))
        return started[-1]

    yield begin
    for each in started:
        each.http.close()
        if each.process.poll() is None:
            each.process.kill()
        each.process.wait(60)


def leftovers(model):
    return [path for path in model.parent.iterdir() if path.name.startswith("ziphius-")]


def test_a_life(start, model):
    server = start()
    server.until_ready()
    answer = server.http.post("/generate", json={"text": "a", "sampling_params": {"temperature": 0}}).json()
    assert answer["text"] == fakes.REPLY
    assert server.http.get("/v1/models").json()["data"][0]["id"] == "tiny"
    status = server.http.get("/status").json()
    assert (status["state"], status["model"]) == ("ready", "tiny")
    engine = server.engine_pid()
    assert psutil.pid_exists(engine)
    server.signal(signal.SIGTERM)
    assert server.ended() == 0, server.log
    assert gone(engine)
    assert not leftovers(model)
    assert "loading" in server.log
    assert "ready on http://127.0.0.1" in server.log


def test_the_log_begins_with_the_settings_that_were_given(start, model):
    server = start()
    server.until(lambda: server.log.count("\n") > 0)
    first = server.log.splitlines()[0]
    assert "ziphius " in first
    assert f"pid {server.process.pid}, model={model}, port={server.port}, drain_timeout=10.0" in first


def test_the_log_does_not_tell_the_key(monkeypatch, caplog):
    def stop(*_):
        raise PortInUse("taken")

    monkeypatch.setattr(launch, "bind", stop)
    with caplog.at_level("INFO"), pytest.raises(PortInUse):
        launch.serve(resolve({"api_key": "sk-of-mine"}, {}))
    assert "api_key=********" in caplog.text
    assert "sk-of-mine" not in caplog.text


def test_loading_is_told_and_can_be_stopped(start, model):
    server = start("slow")
    server.until(lambda: server.http.get("/health").json()["phase"] == "loading")
    assert server.http.get("/status").json()["progress"]["total"] == 2
    refused = server.http.post("/generate", json=ENDLESS)
    assert refused.status_code == 503
    assert "50%" in refused.json()["error"]["message"]
    engine = server.engine_pid()
    server.signal(signal.SIGINT)
    assert server.ended() == 0
    assert gone(engine)
    assert not leftovers(model)


def test_a_taken_port(start, model):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        server = start(port=other.getsockname()[1])
        assert server.ended() == 1
        assert "PortInUse" in server.log
    assert not leftovers(model)


def test_a_model_that_is_not_there(start, model):
    (model / "config.json").unlink()
    server = start()
    assert server.ended() == 1
    assert "config.json" in server.log


@pytest.mark.parametrize(("behaviour", "reason"), [("fatal", "not enough memory"), ("crash", "SIGKILL")])
def test_an_engine_that_does_not_load(start, model, behaviour, reason):
    server = start(behaviour)
    assert server.ended() == 1
    assert reason in server.log
    assert not leftovers(model)


def test_an_engine_that_is_killed(start):
    server = start()
    server.until_ready()
    answers = []

    def ask(stream):
        with httpx.Client(base_url=server.http.base_url, timeout=60, trust_env=False) as http:
            answers.append(http.post("/generate", json={**ENDLESS, "stream": stream}))

    threads = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
    for thread in threads:
        thread.start()
    server.until(lambda: server.http.get("/status").json()["running"] == 2)
    os.kill(server.engine_pid(), signal.SIGKILL)
    assert server.ended() == 1
    for thread in threads:
        thread.join(60)
    assert sorted(answer.status_code for answer in answers) == [200, 500]
    for answer in answers:
        assert "SIGKILL" in answer.text
        assert "[DONE]" not in answer.text
    assert "SIGKILL" in server.log


def test_a_killed_frontend_takes_its_engine_along(start):
    server = start()
    server.until_ready()
    engine = server.engine_pid()
    server.signal(signal.SIGKILL)
    server.process.wait(60)
    assert gone(engine)


def test_stopping_lets_running_requests_end_and_takes_no_new_ones(start):
    server = start(drain_timeout=60)
    server.until_ready()
    engine = server.engine_pid()
    body = {"text": "a", "sampling_params": {"temperature": 0, "ignore_eos": True, "max_new_tokens": 60}}
    with server.http.stream("POST", "/generate", json={**body, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(engine, signal.SIGSTOP)  # the answer does not end before all of this was seen
        server.signal(signal.SIGTERM)
        with httpx.Client(base_url=server.http.base_url, timeout=60, trust_env=False) as other:
            server.until(lambda: other.get("/status").json()["state"] == "draining")
            assert other.post("/generate", json=body).status_code == 503
        os.kill(engine, signal.SIGCONT)
        told = [line for line in lines if line]
    assert told[-1] == "data: [DONE]"
    assert json.loads(told[-2][6:])["meta_info"]["finish_reason"] == {"type": "length", "length": 60}
    assert server.ended() == 0


def test_stopping_aborts_what_takes_too_long(start):
    server = start(drain_timeout=0.3)
    server.until_ready()
    with server.http.stream("POST", "/generate", json={**ENDLESS, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        server.signal(signal.SIGTERM)
        told = [line for line in lines if line]
    assert told[-1] == "data: [DONE]"
    assert json.loads(told[-2][6:])["meta_info"]["finish_reason"]["type"] == "abort"
    assert server.ended() == 0


def test_a_second_signal_aborts_what_still_runs(start):
    server = start(drain_timeout=600)
    server.until_ready()
    with server.http.stream("POST", "/generate", json={**ENDLESS, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        server.signal(signal.SIGTERM)
        server.until(lambda: "stopping" in server.log)
        server.signal(signal.SIGTERM)
        told = [line for line in lines if line]
    assert told[-1] == "data: [DONE]"
    assert json.loads(told[-2][6:])["meta_info"]["finish_reason"]["type"] == "abort"
    assert server.ended() == 0


def test_a_third_signal_ends_it_at_once(start, model):
    server = start(drain_timeout=600)
    server.until_ready()
    engine = server.engine_pid()
    with server.http.stream("POST", "/generate", json={**ENDLESS, "stream": True}) as response:
        lines = response.iter_lines()  # kept: without it the connection closes
        next(lines)
        os.kill(engine, signal.SIGSTOP)  # the server would wait for its end
        for said in ("stopping", "aborting"):
            server.signal(signal.SIGINT)
            server.until(lambda said=said: said in server.log)
        server.signal(signal.SIGINT)
        assert server.ended() == 128 + signal.SIGINT
    assert gone(engine)
    assert not leftovers(model)
