"""Real SGLang on this machine's CPU, in a Python and in an image: what a user does, one after another."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import psutil
import pytest
from tests.ports import free_port

from ziphius.launchers.sglang_log import lines_of, read_state
from ziphius.manager import process

ON_A_CPU = (
    "--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--disable-overlap-schedule",
    "--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled", "--skip-server-warmup",
    "--sleep-on-idle",
)  # fmt: skip


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"slow_tests_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


QUESTION = "What is the capital of France?"
KEY = "the-key-of-this-test"


@dataclass(frozen=True)
class User:
    """Someone at a shell."""

    env: dict[str, str]
    home: Path

    def __call__(self, *words: str, stdin: str = "", wanted: int | None = 0) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "ziphius", *words]
        done = subprocess.run(argv, env=self.env, input=stdin, capture_output=True, text=True, timeout=400, check=False)
        assert wanted in (None, done.returncode), (done.stdout, done.stderr)
        return done

    def status(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self("status", "--json", wanted=None).stdout)
        return told


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two small layers with random weights, and a tokenizer with a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "two-layers"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=256, eos_token_id=257, pad_token_id=257,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
                "chat_template": template}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    home = tmp_path / "home"
    env = {name: value for name, value in os.environ.items() if not name.startswith("ZIPHIUS_")}
    env |= {"ZIPHIUS_HOME": str(home), "SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1",
            "NO_COLOR": "1"}  # fmt: skip
    user = User(env, home)
    yield user
    user("stop", "--drain-timeout", "0", wanted=None)


def start_words(python: str, model: Path, port: int, *more: str) -> list[str]:
    own = ["--engine", "sglang", "--runtime", "local", "--python", python, "--model", str(model), "--port", str(port),
           "--device", "cpu", "--dtype", "float32", "--max-total-tokens", "4096", "--max-running-requests", "4",
           "--threads", "1", "--api-key", KEY]  # fmt: skip
    return ["start", *own, *more, "--", *ON_A_CPU]


def wait_until(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def phases(log: str) -> list[str]:
    """What one is told who reads the log with every line."""
    lines = lines_of(log)
    seen = [read_state("\n".join(lines[:count])).progress.phase for count in range(1, len(lines) + 1)]
    return list(dict.fromkeys(seen))


def test_the_acts_of_a_user(user: User, sglang_python: str, model: Path) -> None:
    port = free_port()
    started = user(*start_words(sglang_python, model, port))
    # A phase of this small model may be over before anybody looks.
    told = [line.split(" ...")[0] for line in started.stderr.splitlines() if " ..." in line]
    in_the_log = phases((user.home / "instances/default/server.log").read_text())
    assert in_the_log == ["starting", "joining", "loading", "cache", "warm-up"]
    assert [phase for phase in in_the_log if phase in told] == told, started.stderr
    assert told
    assert f"http://127.0.0.1:{port}" in started.stdout

    status = user.status()
    assert (status["state"], status["model"], status["kv_tokens"]) == ("running", "two-layers", 4096)
    pids = [status["pid"], *(p.pid for p in psutil.Process(status["pid"]).children(recursive=True))]
    assert len(pids) > 2
    for pid in pids:
        assert KEY not in " ".join(psutil.Process(pid).cmdline())

    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY)
    answer = client.chat.completions.create(
        model="two-layers", messages=[{"role": "user", "content": QUESTION}], max_tokens=5, temperature=0
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    body = {"text": "one two", "sampling_params": {"max_new_tokens": 3, "temperature": 0}}
    native = httpx.post(
        f"http://127.0.0.1:{port}/generate", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=60
    )
    assert native.json()["meta_info"]["completion_tokens"] == 3
    assert httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=60).status_code == 401
    assert user("chat", "--max-tokens", "4", "--temperature", "0", stdin=QUESTION + "\n").stdout

    log = user("logs", "-n", "1000").stdout
    assert "max_total_num_tokens=4096" in log
    assert KEY not in log

    assert "is stopped" in user("stop").stdout
    assert [pid for pid in pids if process.identity(pid) is not None] == []
    socket.create_server(("127.0.0.1", port)).close()
    assert user.status()["state"] == "stopped"


def test_a_killed_rank_is_a_failure_that_leaves_nothing(user: User, sglang_python: str, model: Path) -> None:
    user(*start_words(sglang_python, model, free_port()))
    main = psutil.Process(user.status()["pid"])
    pids = [main.pid, *(p.pid for p in main.children(recursive=True))]
    ranks = [p for p in main.children(recursive=True) if "schedul" in " ".join(p.cmdline())]
    assert ranks
    os.kill(ranks[0].pid, signal.SIGKILL)
    wait_until(lambda: user.status()["state"] == "failed")
    assert "was ended by signal 9" in user.status()["reason"]
    user("stop", wanted=None)
    wait_until(lambda: not [pid for pid in pids if process.identity(pid) is not None])


def test_a_killed_server_is_told_as_that(user: User, sglang_python: str, model: Path) -> None:
    """And not by an exception that its log has of the start, which it outlived."""
    words = start_words(sglang_python, model, free_port())
    user(*words)
    status = user.status()
    pids = [status["pid"], *(p.pid for p in psutil.Process(status["pid"]).children(recursive=True))]
    os.kill(status["pid"], signal.SIGKILL)
    wait_until(lambda: user.status()["state"] == "failed")
    assert "it was killed" in user.status()["reason"]
    user("stop", wanted=None)
    assert [pid for pid in pids if process.identity(pid) is not None] == []


def test_a_wrong_argument_is_explained(user: User, sglang_python: str, model: Path) -> None:
    words = [*start_words(sglang_python, model, free_port()), "--frobnicate"]
    done = user(*words, wanted=1)
    assert "SGLang does not know --frobnicate" in done.stderr


@pytest.fixture(scope="module")
def sglang_image(
    sglang_python: str, apptainer_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """That very SGLang in a SIF: half a GB, half a minute."""
    root_of = load(Path(__file__).with_name("python_root.py"))
    folder = tmp_path_factory.mktemp("sglang-image")
    root = root_of.make_root(folder / "root", of=Path(sglang_python).resolve(), programs=("lscpu",))
    environment = Path(sglang_python).absolute().parents[1]
    inside = root / "opt" / "sglang"
    inside.parent.mkdir(parents=True)
    # Linked, where the disk is the same: it is as large as all of the rest.
    if subprocess.run(["cp", "-al", environment, inside], capture_output=True, check=False).returncode:
        subprocess.run(["cp", "-a", environment, inside], check=True)
    root_of.point_to_interpreter(inside, Path(sglang_python))
    root_of.add_libraries(root, inside)
    program = root / "usr" / "local" / "bin" / "python3"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text('#!/bin/sh\nexec /opt/sglang/bin/python "$@"\n')
    program.chmod(0o755)
    image = folder / "sglang.sif"
    words = [sys.executable, "-m", "ziphius", "image", "build", "--from", str(root), "--out", str(image), "--json"]
    built = subprocess.run(words, env=apptainer_env, capture_output=True, text=True, timeout=400, check=False)
    assert built.returncode == 0, built.stderr
    assert json.loads(built.stdout)["sglang_version"].startswith("0.5.")
    yield image
    shutil.rmtree(folder)


def test_the_same_sglang_in_an_image(
    user: User, sglang_image: Path, model: Path, apptainer_env: dict[str, str], tmp_path: Path
) -> None:
    inside = User({**user.env, **apptainer_env}, user.home)
    port = free_port()
    own = ["--engine", "sglang", "--image", str(sglang_image), "--model", str(model), "--port", str(port), "--device",
           "cpu", "--cache-dir", str(tmp_path / "jit"), "--dtype", "float32", "--max-total-tokens", "4096",
           "--threads", "1"]  # fmt: skip
    inside("start", *own, "--", *ON_A_CPU)
    status = inside.status()
    assert (status["state"], status["kv_tokens"]) == ("running", 4096)
    pids = [status["pid"], *(p.pid for p in psutil.Process(status["pid"]).children(recursive=True))]
    body = {"text": "one two", "sampling_params": {"max_new_tokens": 3, "temperature": 0}}
    answer = httpx.post(f"http://127.0.0.1:{port}/generate", json=body, timeout=60)
    assert answer.json()["meta_info"]["completion_tokens"] == 3
    assert inside("chat", "--max-tokens", "4", stdin=QUESTION + "\n").stdout
    inside("stop")
    assert [pid for pid in pids if process.identity(pid) is not None] == []
