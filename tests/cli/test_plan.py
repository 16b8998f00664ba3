"""The verbs as a person types them: what they print, and their exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ziphius.cli.plan import doctor, plan
from ziphius.cli.verbs import VerbCommand
from ziphius.planner.hardware import read_host


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("ZIPHIUS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
    for verb in (plan, doctor):
        app.command(cls=VerbCommand)(verb)
    return lambda *words: CliRunner().invoke(app, list(map(str, words)))


@pytest.fixture
def v25_folder(tmp_path: Path, data: Path) -> Path:
    folder = tmp_path / "DeepSeek-V2.5-1210"
    folder.mkdir()
    (folder / "config.json").write_bytes((data / "deepseek-v2.5-1210.json").read_bytes())
    return folder


def test_one_screen_tells_why(run, v25_folder: Path) -> None:
    done = run("plan", v25_folder, "--gpu", "4xH200")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert len(lines) <= 45
    command = next(i for i, line in enumerate(lines) if "Recommended" in line)
    assert max(map(len, lines[:command])) <= 100
    text = done.stdout
    assert "4 x NVIDIA H200, 143,771 MiB each" in text
    assert "69,120 bytes a token" in text
    by_size: dict[str, str] = {}
    for line in lines:
        if line.startswith("TP "):  # the speeds further down begin alike
            by_size.setdefault(line.split()[1], line)
    assert "bf16 fits" in by_size["4"] or "bf16 would fit" in by_size["4"]
    assert "vocabulary 102,400 = 3 x 34,133 + 1; heads 128 = 3 x 42 + 2" in by_size["3"]
    assert "needs bf16 220.2 of 138.6 GiB; fp8" in by_size["2"]
    assert "int4" in by_size["1"]
    assert "GPU 0-3   EEEE" in text
    assert "Tokens/s at most" in text


@pytest.mark.parametrize("name", ["1xh200", "2xh200", "8xh100", "mixed", "busy", "mig", "cpu-only"])
@pytest.mark.parametrize("columns", [80, 100])
def test_lines_keep_to_the_terminal(
    run, v25_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch, name: str, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    done = run("plan", v25_folder, "--host-file", data / f"host-{name}.json")
    assert not [line for line in done.stdout.splitlines() if len(line) > columns and "/" not in line]


def test_the_broken_block_and_the_missing_gpus_are_named(run, v25_folder: Path) -> None:
    told = " ".join(run("plan", v25_folder, "--gpu", "4xH200").stdout.split())
    assert "TP 8 in fp8 and int4: expert width 1,536 / 8 = 192 = 1 x 128 + 64" in told
    told = " ".join(run("plan", v25_folder, "--gpu", "H200", "--tp", "4").stdout.split())
    assert "but 3 of these 4 GPUs are not there" in told
    assert "more GPUs: 3 more GPUs beside 1 x NVIDIA H200" in told


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--gpu", "4xH200"], 0),
        (["--gpu", "4xH200", "--tp", "4", "--engine", "sglang"], 0),
        (["--gpu", "4xH200", "--tp", "3"], 1),
        (["--gpu", "2xH200", "--weights-format", "bf16"], 1),
        (["--gpu", "2xH200", "--weights-format", "fp8"], 1),
        (["--gpu", "2xH200", "--weights-format", "fp8", "--engine", "native"], 1),
        (["--gpu", "1xH200", "--weights-format", "int4"], 1),
        (["--gpu", "1xH200", "--weights-format", "int4", "--context-length", "163840", "--mem-fraction", "0.9"], 1),
        (["--gpu", "4xFoo"], 2),
        (["--gpu", "4xH200", "--host-file", "x.json"], 2),
        (["--host-file", "/nowhere.json"], 2),
        (["--gpu", "4xH200", "--engine", "vllm"], 2),
        (["--gpu", "4xH200", "--weights-format", "fp3"], 2),
        (["--gpu", "4xH200", "--tp", "0"], 2),
        (["--gpu", "4xH200", "--mem-fraction", "1.5"], 2),
        (["--gpu", "4xH200", "--context-length", "1000000"], 2),
        (["--gpu", "4xH200", "--svg", "/nowhere/plan.svg"], 2),
    ],
)
def test_exit_status(run, v25_folder: Path, words: list[str], status: int) -> None:
    done = run("plan", v25_folder, *words)
    assert done.exit_code == status, done.output
    if status == 2:
        assert done.stderr.strip()


def test_what_fits_but_cannot_be_run_is_said_and_has_no_command(run, v25_folder: Path) -> None:
    words = ("plan", v25_folder, "--gpu", "2xH200", "--weights-format", "fp8", "--engine", "native")
    done = run(*words)
    assert (done.exit_code, "It fits, but this version of Ziphius cannot run what fits" in done.stdout) == (1, True)
    done = run(*words, "--json")
    made = json.loads(done.stdout)
    assert (done.exit_code, made["fits"], made["recommendation"]) == (1, True, None)
    assert done.stderr == "ziphius: it fits, but this version of Ziphius cannot run what fits\n"


def test_a_model_that_cannot_be_read_is_bad_input(run, v25_folder: Path) -> None:
    assert run("plan", v25_folder / "nothing", "--gpu", "H200").exit_code == 2
    config = v25_folder / "config.json"
    config.write_text(config.read_text().replace('"kv_lora_rank"', '"kv_lora_rang"'))
    done = run("plan", v25_folder, "--gpu", "H200")
    assert done.exit_code == 2
    assert "kv_lora_rank is missing" in done.stderr


def test_json(run, v25_folder: Path) -> None:
    done = run("plan", v25_folder / "config.json", "--gpu", "4xH200", "--json")
    plan = json.loads(done.stdout)
    assert plan["fits"]
    assert plan["valid_tp"] == [1, 2, 4, 8, 16, 32, 64, 128]
    four = next(c for c in plan["candidates"] if (c["engine"], c["tp"], c["weights_format"]) == ("native", 4, "bf16"))
    assert four["verdict"] == "fits"
    assert sum(four["weights"].values()) == four["loaded_bytes"]
    assert four["weights"]["attention_replicated"] == 1_297_612_800
    three = next(c for c in plan["candidates"] if c["tp"] == 3)
    assert three["failures"][0] == {
        "dimension": "vocab_size",
        "size": 102_400,
        "divisor": 3,
        "remainder": 1,
        "message": "vocabulary 102,400 = 3 x 34,133 + 1",
    }
    assert plan["recommendation"]["command"]


def test_svg(run, v25_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "plan.svg"
    assert run("plan", v25_folder, "--gpu", "4xH200", "--svg", target).exit_code == 0
    assert target.read_text().startswith("<svg")


@pytest.mark.parametrize("name", ["1xh200", "8xh100", "mixed", "busy", "mig", "no-gpu", "cpu-only"])
def test_recorded_hosts_print(run, v25_folder: Path, data: Path, name: str) -> None:
    done = run("plan", v25_folder, "--host-file", data / f"host-{name}.json")
    assert done.exit_code in (0, 1)
    assert "DeepSeek-V2.5-1210" in done.stdout
    assert not [line for line in done.stdout.splitlines() if len(line) > 110 and "--model" not in line]


def test_doctor(run, tmp_path: Path) -> None:
    recorded = tmp_path / "host.json"
    done = run("doctor", "--record", recorded)
    assert done.exit_code in (0, 1)
    assert "/dev/shm" in done.stdout
    assert read_host(recorded).origin == "recorded"
    findings = json.loads(run("doctor", "--json").stdout)
    assert {"name", "status", "detail", "remedy"} == set(findings[0])
    assert run("doctor", "--record", "/nowhere/host.json").exit_code != 0


def test_torch_is_not_imported(v25_folder: Path) -> None:
    script = (
        "import sys\nfrom ziphius.cli.app import main\n"
        "try:\n    main()\nfinally:\n    heavy = {'torch', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    for words in (["plan", str(v25_folder), "--gpu", "4xH200"], ["doctor"]):
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=60)
        assert "Error" not in done.stderr, done.stderr
