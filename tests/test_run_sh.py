"""run.sh in a folder of its own, with a Python that only pretends to install."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

RUN_SH = Path(__file__).parents[1] / "run.sh"
TOOLS = ("bash", "cat", "cksum", "cp", "dirname", "env", "flock", "grep", "mkdir", "rm", "sleep", "tail", "tee")

FAKE_PYTHON = """#!/usr/bin/env bash
# A Python of which only what run.sh asks for is there. FAKE says what is wrong with it.
here=$(cd "$(dirname "$0")" && pwd)
case "$*" in
  *version_info\\ \\<*) [ "$FAKE" != old ] ;;
  *version_info*) echo 3.11 ;;
  *ensurepip*) [ "$FAKE" != no-venv ] ;;
  "-m venv --clear "*)
    [ "$FAKE" != broken-venv ] || { echo "ensurepip returned non-zero exit status 1."; exit 1; }
    mkdir -p "$4/bin" && cp "$0" "$4/bin/python" && echo venv >>"$CALLS" ;;
  "-m pip --version") ;;
  "-m pip install "*)
    echo "pip ${@: -1}" >>"$CALLS"
    echo "Collecting torch"
    echo "  Downloading torch-2.whl (180.5 MB)"
    echo "  Downloading small-1.whl (80 kB)"
    sleep "${FAKE_SECONDS:-0}"
    [ "$FAKE" != no-network ] || { echo "ERROR: No matching distribution found for torch"; exit 1; }
    for name in ziphius ruff mypy; do
      printf '#!/usr/bin/env bash\\necho "%s $*"\\n' "$name" >"$here/$name"
      chmod +x "$here/$name" 2>/dev/null || "$REAL_CHMOD" +x "$here/$name"
    done ;;
  "-m pytest"*) echo "pytest ${*:3}" ;;
  *) echo "what is $*?" >&2; exit 9 ;;
esac
"""


@dataclass
class Checkout:
    """A clone's root, the tools on its PATH, and what was called."""

    root: Path
    tools: Path
    calls_file: Path

    def run(self, *words: str, fake: str = "", cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.root / "run.sh"), *words],
            env=self.env(fake, **env),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def env(self, fake: str = "", **env: str) -> dict[str, str]:
        chmod = shutil.which("chmod") or ""
        return {"PATH": str(self.tools), "CALLS": str(self.calls_file), "FAKE": fake, "REAL_CHMOD": chmod, **env}

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    root, tools = tmp_path / "a clone", tmp_path / "tools"
    root.mkdir()
    tools.mkdir()
    shutil.copy(RUN_SH, root)
    (root / "pyproject.toml").write_text("one")
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found is not None, f"{tool} is needed by run.sh"
        (tools / tool).symlink_to(found)
    fake = tools / "python3"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    return Checkout(root, tools, tmp_path / "calls")


def test_installs_once_and_hands_over(checkout: Checkout, tmp_path: Path) -> None:
    first = checkout.run("start", "--model", "a b", cwd=tmp_path)
    assert (first.returncode, first.stdout) == (0, "ziphius start --model a b\n"), first.stderr
    assert checkout.calls == ["venv", f"pip {checkout.root}"]
    assert "Downloading torch-2.whl (180.5 MB)" in first.stderr
    assert "small-1" not in first.stderr
    second = checkout.run("status")
    assert (second.stdout, second.stderr) == ("ziphius status\n", "")
    assert len(checkout.calls) == 2


def test_installs_again_when_the_dependencies_change(checkout: Checkout) -> None:
    checkout.run("status")
    (checkout.root / "pyproject.toml").write_text("two")
    checkout.run("status")
    assert checkout.calls == ["venv", f"pip {checkout.root}", f"pip {checkout.root}"]


def test_a_moved_folder_is_made_anew(checkout: Checkout) -> None:
    checkout.run("status")
    checkout.root = checkout.root.rename(checkout.root.with_name("moved"))
    assert checkout.run("status").returncode == 0
    assert checkout.calls[2:] == ["venv", f"pip {checkout.root}"]


def test_test_installs_the_extra_and_passes_arguments(checkout: Checkout) -> None:
    done = checkout.run("test", "tests/x.py", "-k", "a b")
    assert done.returncode == 0, done.stderr
    assert checkout.calls == ["venv", f"pip {checkout.root}[test]"]
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["ruff", "ruff", "mypy", "pytest"]
    assert done.stdout.splitlines()[-1] == "pytest tests/x.py -k a b"
    checkout.run("status")
    assert len(checkout.calls) == 2


@pytest.mark.parametrize(
    ("fake", "words"),
    [
        ("old", ["Python 3.11 or newer", "apt install python3 python3-venv"]),
        ("no-venv", ["no venv module", "apt install python3-venv", "python3.11-venv"]),
        ("broken-venv", ["ensurepip returned non-zero", "apt install python3-venv"]),
        ("no-network", ["No matching distribution found for torch", "tries again"]),
    ],
)
def test_what_is_missing_is_named(checkout: Checkout, fake: str, words: list[str]) -> None:
    done = checkout.run("start", fake=fake)
    assert (done.returncode, done.stdout) == (1, "")
    for word in words:
        assert word in done.stderr
    assert checkout.run("status").stdout == "ziphius status\n"


def test_no_python_at_all(checkout: Checkout) -> None:
    (checkout.tools / "python3").unlink()
    done = checkout.run("start")
    assert done.returncode == 1
    assert "apt install python3" in done.stderr
    chosen = checkout.run("start", PYTHON="/no/python")
    assert "PYTHON=/no/python is not" in chosen.stderr


def test_an_interrupted_installation_is_done_again(checkout: Checkout) -> None:
    argv = [str(checkout.root / "run.sh"), "status"]
    slow = subprocess.Popen(
        argv, env=checkout.env(FAKE_SECONDS="30"), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert slow.stderr is not None
    while "Downloading" not in slow.stderr.readline():
        pass
    os.killpg(slow.pid, 9)
    slow.communicate()
    assert checkout.run("status").stdout == "ziphius status\n"
    assert checkout.calls == ["venv", f"pip {checkout.root}", f"pip {checkout.root}"]


def test_two_at_once_install_once(checkout: Checkout) -> None:
    argv = [str(checkout.root / "run.sh"), "status"]
    pipe = subprocess.PIPE
    env = checkout.env(FAKE_SECONDS="1")
    both = [subprocess.Popen(argv, env=env, stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in both]
    assert [output for output, _ in outputs] == ["ziphius status\n"] * 2
    assert checkout.calls == ["venv", f"pip {checkout.root}"]
    assert sum("waiting for it" in errors for _, errors in outputs) == 1
