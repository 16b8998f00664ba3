"""What the benchmarks reach into; and the load generator as a process against a server with a stand-in engine."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))
SERVING = BENCHMARKS[0].with_name("serving.py")
sys.path.insert(0, str(Path(__file__).with_name("frontend")))

import server_fakes as fakes  # noqa: E402
from running_server import MODEL, RunningServer  # noqa: E402

CONTEXT = 4096
"""Beyond the 110 words, a token a letter, with which the size of a word is measured."""


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_uses_public_names_of_the_engine(path: Path) -> None:
    """It would go on with an old name after a change, and no test runs it on a GPU."""
    private, offline = [], []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            if not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                private.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.ImportFrom):
            private += [f"line {node.lineno}: {name.name}" for name in node.names if name.name.startswith("_")]
            offline += [node.lineno] if node.module == "ziphius.llm" else []
    assert private == []
    assert offline == [], "the offline interface stands above the engine; a benchmark needs the engine alone"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    running = RunningServer(fakes.FakeCore(), 0.001, True, 60.0, {}, context=CONTEXT)
    yield running
    running.stop()


def run(url: str, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(SERVING), "--url", url, *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_a_level_is_measured_and_written(server: RunningServer, tmp_path: Path, api: str) -> None:
    target = tmp_path / "new" / "report.json"
    done = run(
        server.url, "--api", api, "--concurrency", "2", "--requests", "4", "--prompt-tokens", "300",
        "--output-tokens", "8", "--json", str(target), "--note", "a test",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(target.read_text())
    assert report["note"] == "a test"
    assert report["arguments"]["concurrency"] == [2]
    assert "api_key" not in report["arguments"]
    (level,) = report["runs"]
    assert (level["concurrency"], level["rate"]) == (2, None)
    assert (level["requests"], level["failed"], level["errors"]) == (4, 0, [])
    assert level["output_tokens_mean"] == 8
    assert level["prompt_tokens_mean"] == pytest.approx(300, rel=0.3)
    assert level["output_tok_s"] == pytest.approx(4 * 8 / level["wall_s"])
    for spread in ("ttft_s", "tpot_s", "itl_s", "stream_tok_s"):
        assert 0 < level[spread]["p50"] <= level[spread]["p90"] <= level[spread]["p99"]
    assert "2 clients" in done.stdout
    assert "0 failed" in done.stdout


def test_arrivals_at_a_rate(server: RunningServer, tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    done = run(server.url, "--rate", "100", "--requests", "3", "--output-tokens", "2", "--json", str(target))
    assert done.returncode == 0, done.stderr
    (level,) = json.loads(target.read_text())["runs"]
    assert (level["concurrency"], level["rate"], level["requests"], level["failed"]) == (None, 100, 3, 0)


def test_what_fails_is_counted_and_told(server: RunningServer, tmp_path: Path) -> None:
    """More tokens than the server's context holds: the request that sizes prompts passes, the measured ones do not."""
    target = tmp_path / "report.json"
    done = run(
        server.url, "--model", MODEL, "--concurrency", "1", "--requests", "2", "--warmup", "0",
        "--output-tokens", str(10 * CONTEXT), "--json", str(target),
    )  # fmt: skip
    assert done.returncode == 1
    (level,) = json.loads(target.read_text())["runs"]
    assert (level["requests"], level["failed"]) == (2, 2)
    assert "HTTP 400" in level["errors"][0]
    assert "HTTP 400" in done.stderr


def test_no_server_is_one_line() -> None:
    done = run("http://127.0.0.1:9", "--requests", "1")
    assert done.returncode == 1
    assert "http://127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_frontend_is_measured_and_written(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    argv = [sys.executable, str(SERVING.with_name("frontend.py")), "--rounds", "1", "--requests", "2", "--json"]
    done = subprocess.run([*argv, str(target)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(target.read_text())["microseconds"]
    assert set(told["a request of 32 tokens"]) == {"chat", "chat, streamed", "/generate, streamed"}
    assert all(taken > 0 for numbers in told.values() for taken in numbers.values())
    assert "chat, streamed" in done.stdout
