"""Start a server with random weights, measure it as clients see it, and stop it: one command for any number of GPUs.

    python benchmarks/served_model.py CONFIG_FOLDER --tp 4 --levels 1 8 32 128:256 --json result.json

For each level (clients[:prompt tokens]) benchmarks/serving.py streams completions; its TPOT is the time of a decode
step with HTTP and scheduling included. Three more things are printed: the seconds from `start` to ready, which depend
on whether Triton's cache is filled; the memory that was predicted and measured, as the server logged it; and the prompt
tokens a second of a burst of prompts. `--layers` keeps only the first layers, for when the GPUs cannot hold the model.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SERVING = Path(__file__).with_name("serving.py")


@dataclass(frozen=True)
class Level:
    clients: int
    prompt_tokens: int = 1024

    @classmethod
    def parse(cls, text: str) -> Level:
        clients, _, prompt = text.partition(":")
        return cls(int(clients), int(prompt or 1024))


@dataclass
class Report:
    config: str
    tp: int
    layers: int
    start_s: float = 0.0
    told: list[str] = field(default_factory=list)
    """The lines of the server's log about memory and start."""
    runs: list[dict[str, Any]] = field(default_factory=list)


def ziphius(env: dict[str, str], *words: str, check: bool = True) -> str:
    argv = [sys.executable, "-m", "ziphius", *words]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise SystemExit(f"ziphius {words[0]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def cut_short(config: Path, layers: int | None, folder: Path) -> tuple[Path, int]:
    """(a folder with the config, its number of layers): a copy with `layers` layers where the model has more."""
    settings = json.loads((config / "config.json").read_text(encoding="utf-8"))
    if layers is None or layers >= settings["num_hidden_layers"]:
        return config, settings["num_hidden_layers"]
    settings["num_hidden_layers"] = layers
    cut = folder / f"{config.name}-{layers}-layers"
    cut.mkdir()
    (cut / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return cut, layers


def measure(url: str, level: Level, output_tokens: int, requests: int) -> dict[str, Any]:
    """serving.py's JSON of one level."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        argv = [
            sys.executable, str(SERVING), "--url", url, "--concurrency", str(level.clients), "--prompt-tokens",
            str(level.prompt_tokens), "--output-tokens", str(output_tokens), "--requests", str(requests),
            "--json", file.name,
        ]  # fmt: skip
        subprocess.run(argv, check=True)
        result: dict[str, Any] = json.loads(Path(file.name).read_text(encoding="utf-8"))
    return result


def run(args: argparse.Namespace, home: Path) -> Report:
    config, layers = cut_short(args.config, args.layers, home)
    env = {**os.environ, "ZIPHIUS_HOME": str(home)}
    report = Report(args.config.name, args.tp, layers)
    started = time.perf_counter()
    start = ["start", "--model", str(config), "--load-format", "dummy", "--port", str(args.port), "--tp", str(args.tp)]
    ziphius(env, *start, *shlex.split(args.start))
    report.start_s = round(time.perf_counter() - started, 1)
    try:
        told = ("predicted", "ready on", "NCCL")
        report.told = [line for line in ziphius(env, "logs").splitlines() if any(word in line for word in told)]
        print(f"from start to ready {report.start_s} s", *report.told, sep="\n", flush=True)
        url = f"http://127.0.0.1:{args.port}"
        for level in args.levels:
            requests = max(args.rounds * level.clients, 2)
            report.runs.append(measure(url, level, args.output_tokens, requests))
        if args.prompts:
            print("prompts alone:", flush=True)
            report.runs.append(measure(url, Level(args.prompts), 1, args.prompts))
    finally:
        print(ziphius(env, "stop", check=False).strip())
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="folder with config.json")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--layers", type=int, help="so many layers of the model only")
    parser.add_argument("--levels", type=Level.parse, nargs="+", default=[Level(1), Level(8), Level(32)])
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2, help="requests of each client")
    parser.add_argument("--prompts", type=int, default=32, help="prompts of 1024 tokens sent at once; 0: none")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--start", default="", help="further options of `ziphius start`, as a shell splits them")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ziphius-bench-") as home:
        report = run(args, Path(home))
    if args.json:
        args.json.write_text(json.dumps(asdict(report), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
