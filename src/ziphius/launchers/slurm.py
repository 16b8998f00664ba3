"""A batch script for Slurm: one `ziphius serve` on each node of a job."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ziphius.checkpoint.locate import local_path
from ziphius.config import Resolved, option_fields
from ziphius.errors import ConfigError
from ziphius.installation import ziphius_home

DRAIN_SIGNAL = "URG"
"""The signal, by Slurm's name, that tells `ziphius serve` to drain. Slurm sends a signal to every process of a job:
SIGTERM would end the ranks in the middle of their requests, and they ignore this one."""
_SPARE_S = 30
"""Seconds between the end of the drain and the time limit."""
_OF_THE_SCRIPT = ("nnodes", "node_rank", "dist_init_addr")
_FIRST_PORT, _PORTS = 20000, 10000


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """What the job asks Slurm to give it."""

    nodes: int = 1
    gpus_per_node: int = 0
    time_limit: str | None = None
    """In sbatch's format: 2-00:00:00."""
    partition: str | None = None
    account: str | None = None
    more: tuple[str, ...] = ()
    """Further options of sbatch."""

    @property
    def asks_for_cpus(self) -> bool:
        """Whether the options ask for CPUs. Else Slurm may give a task one CPU, and the memory that goes with it."""
        return any(word.startswith(("--exclusive", "--cpus-per-", "-c")) for word in self.more)


def for_job(resolved: Resolved, allocation: Allocation) -> Resolved:
    """The settings on the nodes: all GPUs unless --tp is given, and an address that other machines can reach."""
    config, origins = resolved.config, dict(resolved.origins)
    for name in _OF_THE_SCRIPT:
        if origins.get(name, "default") != "default":
            raise ConfigError(f"--{name.replace('_', '-')} is set on each node by the job's script", param=name)
    changes: dict[str, Any] = {}
    if origins.get("host") == "default":
        changes["host"] = "0.0.0.0"
    if origins.get("tp") == "default" and allocation.gpus_per_node:
        changes["tp"] = allocation.nodes * allocation.gpus_per_node
    if allocation.nodes > 1 and changes.get("tp", config.tp) % allocation.nodes:
        raise ConfigError(f"tp {config.tp} does not spread evenly over {allocation.nodes} nodes", param="tp")
    path = local_path(config.model)
    if path is not None:
        changes["model"] = str(path)
    return Resolved(replace(config, **changes), {**origins, **dict.fromkeys(changes, "slurm")})


def batch_script(resolved: Resolved, allocation: Allocation, folder: Path, env: Mapping[str, str]) -> str:
    """`resolved`: from `for_job`. `folder`: the instance's, which every node must see. The script holds no secret."""
    config = resolved.config
    lines = ["#!/bin/bash", *_directives(resolved, allocation, folder)]
    lines += [f"# Submitted by hand, it wants its folder: mkdir -p {shlex.quote(str(folder))}", "set -u"]
    lines += ['head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)']
    lines += [f"meet=$head:$(({_FIRST_PORT} + SLURM_JOB_ID % {_PORTS}))"]
    lines += [f"export ZIPHIUS_HOME={shlex.quote(str(ziphius_home(env)))}"]
    if config.api_key is not None:
        lines += ["# The API key comes in the job's environment, as ZIPHIUS_API_KEY."]
    serve = shlex.join([sys.executable, "-m", "ziphius", "serve", *_flags(resolved)])
    if allocation.nodes > 1:
        serve += f' --nnodes {allocation.nodes} --node-rank "$SLURM_PROCID" --dist-init-addr "$1"'
    # When one task ends, all end: a part of a model is useless. Ranks and threads share all CPUs of the job.
    step = ["srun", "--cpu-bind=none", "--kill-on-bad-exit=1", "--wait=30", "--open-mode=truncate",
            f"--output={folder}/node-%t.log"]  # fmt: skip
    lines += [f'exec {shlex.join(step)} /bin/sh -c {shlex.quote("exec " + serve)} ziphius "$meet"']
    return "\n".join(lines) + "\n"


def _directives(resolved: Resolved, allocation: Allocation, folder: Path) -> list[str]:
    config = resolved.config
    options = [
        f"--job-name=ziphius-{config.name}",
        f"--nodes={allocation.nodes}",
        "--ntasks-per-node=1",
        f"--output={shlex.quote(str(folder))}/slurm.log",
        "--open-mode=truncate",
        # Slurm must not start the model again by itself, hours later.
        "--no-requeue",
        # `ziphius serve` then refuses new requests and finishes those that run; no other process reacts to this signal.
        f"--signal={DRAIN_SIGNAL}@{math.ceil(config.drain_timeout) + _SPARE_S}",
    ]
    if allocation.gpus_per_node:
        options.append(f"--gpus-per-node={allocation.gpus_per_node}")
    for name, value in (("time", allocation.time_limit), ("partition", allocation.partition),
                        ("account", allocation.account)):  # fmt: skip
        if value is not None:
            options.append(f"--{name}={value}")
    if allocation.more:
        options.append(shlex.join(allocation.more))  # on one line, because an option and its value may be two words
    for option in options:
        if "\n" in option:
            raise ConfigError(f"an option of sbatch must be one line, not {option!r}")
    return [f"#SBATCH {option}" for option in options]


def _flags(resolved: Resolved) -> list[str]:
    """The chosen options as words for `ziphius serve`, without secrets and without what the script sets."""
    words = ["--name", resolved.config.name]
    for option in option_fields():
        name, value = option.name, getattr(resolved.config, option.name)
        if name in ("name", *_OF_THE_SCRIPT) or option.metadata["secret"] or value is None:
            continue
        if resolved.origins.get(name, "default") == "default":
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        else:
            # With `=`, because a value may begin with a dash.
            words.append(f"{flag}={value:g}" if isinstance(value, float) else f"{flag}={value}")
    return words
