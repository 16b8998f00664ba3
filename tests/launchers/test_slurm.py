"""The batch script: what a node runs, what it asks for, that no secret is in it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ziphius.config import Resolved, resolve
from ziphius.errors import ConfigError
from ziphius.launchers.slurm import Allocation, batch_script, for_job


def made(allocation: Allocation, **flags: Any) -> Resolved:
    return for_job(resolve({"engine": "sglang", "model": "owner/name", **flags}, env={}), allocation)


def script(allocation: Allocation, **flags: Any) -> str:
    return batch_script(made(allocation, **flags), allocation, Path("/shared/instances/x"), {"ZIPHIUS_HOME": "/shared"})


def executed(text: str, tmp_path: Path, rank: int = 1) -> list[str]:
    """What the interpreter on a node gets as its arguments, the script run by a real shell with srun made of it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    programs = {
        "scontrol": 'printf "node7\\nnode8\\n"',
        "srun": f'while [ "${{1#--}}" != "$1" ]; do shift; done; SLURM_PROCID={rank} exec "$@"',
    }
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    shown = tmp_path / "python"
    shown.write_text('#!/bin/bash\nprintf "%s\\0" "$@"\n')
    shown.chmod(0o755)
    text = text.replace(sys.executable, str(shown))
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "123"}
    done = subprocess.run(["/bin/bash"], input=text, env=env, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def test_two_nodes_of_four_gpus(tmp_path: Path) -> None:
    text = script(Allocation(nodes=2, gpus_per_node=4, time_limit="1-00:00:00", partition="gpu", account="me"))
    asked = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert asked == [
        "--job-name=ziphius-default", "--nodes=2", "--ntasks-per-node=1", "--output=/shared/instances/x/slurm.log",
        "--open-mode=truncate", "--no-requeue", "--signal=URG@60", "--gpus-per-node=4", "--time=1-00:00:00",
        "--partition=gpu", "--account=me",
    ]  # fmt: skip
    words = executed(text, tmp_path)
    assert words[:5] == ["-m", "ziphius", "serve", "--name", "default"]
    assert words[-6:] == ["--nnodes", "2", "--node-rank", "1", "--dist-init-addr", "node7:20123"]
    assert {"--engine=sglang", "--model=owner/name", "--tp=8", "--host=0.0.0.0"} <= set(words)


def test_settings_arrive_as_they_are(tmp_path: Path) -> None:
    extra = shlex.join(["--json", '{"a": "b, c"}', "$HOME `id`"])
    words = executed(script(Allocation(), engine_args=extra, prefix_cache=False, mem_fraction=0.93), tmp_path)
    assert f"--engine-args={extra}" in words
    assert "--no-prefix-cache" in words
    assert "--mem-fraction=0.93" in words
    assert "--nnodes" not in words


def test_the_api_key_is_not_in_it() -> None:
    text = script(Allocation(), api_key="the-key")
    assert "the-key" not in text
    assert "ZIPHIUS_API_KEY" in text


def test_what_the_user_chose_stays() -> None:
    config = made(Allocation(nodes=2, gpus_per_node=4), tp=4, host="10.0.0.1").config
    assert (config.tp, config.host) == (4, "10.0.0.1")


@pytest.mark.parametrize(
    ("allocation", "flags", "reason"),
    [
        (Allocation(nodes=2), {"tp": 3}, "does not spread"),
        (Allocation(nodes=2), {"nnodes": 2}, "--nnodes is set on each node"),
        (Allocation(nodes=2), {"dist_init_addr": "a:1"}, "--dist-init-addr is set"),
    ],
)
def test_contradictions(allocation: Allocation, flags: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        made(allocation, **flags)


@pytest.mark.parametrize(
    ("more", "asks"), [((), False), (("--mem=0",), False), (("--exclusive",), True), (("--cpus-per-task=32",), True),
                       (("-c", "32"), True)])  # fmt: skip
def test_whether_it_asks_for_cpus(more: tuple[str, ...], asks: bool) -> None:
    assert Allocation(more=more).asks_for_cpus is asks


def test_further_options_are_told_as_they_were_given() -> None:
    assert "\n#SBATCH -p gpu '--comment=a b' --mem 0\n" in script(
        Allocation(more=("-p", "gpu", "--comment=a b", "--mem", "0"))
    )


def test_an_option_of_two_lines_is_refused() -> None:
    with pytest.raises(ConfigError, match="one line"):
        script(Allocation(more=("--comment=a\nrm -rf /",)))
