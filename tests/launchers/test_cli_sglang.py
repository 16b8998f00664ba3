"""The command's verbs with `--engine sglang` and the stand-in: from a shell, as a user sees them."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conftest import SglangBench

DEEPSEEK = Path(__file__).parents[1] / "planner" / "data" / "deepseek-v2.5-1210.json"

LOCAL = ("start", "--engine", "sglang", "--runtime", "local", "--python", sys.executable, "--device", "cpu")


def run(bench: SglangBench, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "ziphius", *words]
    env = {**bench.env, "COLUMNS": "100"}
    return subprocess.run(argv, env=env, input=stdin, capture_output=True, text=True, timeout=120, check=False)


def test_the_five_acts(bench: SglangBench) -> None:
    port = str(bench.resolved().config.port)
    words = [*LOCAL, "--model", str(bench.model), "--port", port, "--", "--stand-in-workers", "1"]
    started = run(bench, *words)
    assert started.returncode == 0, started.stderr
    assert "without a plan" in started.stderr
    again = run(bench, *words)
    assert "runs already" in again.stdout
    status = json.loads(run(bench, "status", "--json").stdout)
    assert (status["state"], status["model"], status["kv_tokens"]) == ("running", "a-model", 5000)
    assert "fired up" in run(bench, "logs").stdout
    assert run(bench, "chat", stdin="hello there\n").stdout == "hello there\n"
    assert run(bench, "stop", "--drain-timeout", "5").returncode == 0
    assert run(bench, "status").returncode == 3


def test_a_dry_run_starts_nothing(bench: SglangBench) -> None:
    (bench.model / "config.json").write_text(DEEPSEEK.read_text())
    asked = ["--engine", "sglang", "--runtime", "apptainer", "--tp", "4", "--model", str(bench.model)]
    done = run(bench, "start", "--dry-run", "--gpu", "4xH200", *asked, "--", "--x", "a b")
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout.splitlines()[-1])
    assert words[words.index("--mem-fraction-static") + 1] == "0.9"
    assert words[-2:] == ["--x", "a b"]
    assert not bench.home.exists()


def test_a_dry_run_of_the_native_engine(bench: SglangBench) -> None:
    done = run(bench, "start", "--dry-run")
    assert done.returncode == 0
    assert "-m ziphius serve --resolved" in done.stdout


def test_what_does_not_fit_is_refused_before_anything_starts(bench: SglangBench) -> None:
    (bench.model / "config.json").write_text(DEEPSEEK.read_text())
    done = run(bench, *LOCAL, "--model", str(bench.model))
    assert done.returncode == 1
    assert "does not fit here" in done.stderr
    assert "--force" in done.stderr


def test_wrong_uses(bench: SglangBench) -> None:
    for words, reason in (
        (["start", "frob"], "unexpected argument frob"),
        (["start", "--", "--x"], "is for --engine sglang"),
        (["start", "--engine", "sglang", "--dry-run"], "--engine sglang wants --model"),
        (["start", "--engine", "sglang", "--model", "a/b", "--dry-run", "--", "--port", "1"], "--port after `--`"),
        (["image", "build", "--from", "no/such"], "docker://no/such"),
    ):
        done = run(bench, *words)
        assert done.returncode == 2, words
        assert reason in done.stderr
    missing = run(bench, "image", "info", "/no/such.sif")
    assert missing.returncode == 1
    assert "ziphius image build" in missing.stderr


def test_a_slurm_script_is_printed(bench: SglangBench) -> None:
    done = run(bench, "slurm", "--nodes", "2", "--gpus-per-node", "4", "--engine", "sglang", "--model", "a/b")
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --nodes=2" in done.stdout
    assert "--exclusive" in done.stderr
    assert not bench.home.exists()
    assert "Slurm" in run(bench, "slurm", "--submit", "--engine", "sglang", "--model", "a/b").stderr


def test_a_machine_without_an_api_says_so(bench: SglangBench) -> None:
    port = str(bench.resolved().config.port)
    nodes = ["--tp", "2", "--nnodes", "2", "--node-rank", "1", "--dist-init-addr", "127.0.0.1:5000"]
    started = run(bench, *LOCAL, "--model", str(bench.model), "--port", port, *nodes)
    assert started.returncode == 0, started.stderr
    assert "machine 1 of 2: the API is machine 0's" in started.stdout
    assert "curl" not in started.stdout
    assert run(bench, "stop").returncode == 0
