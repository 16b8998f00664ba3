"""SGLang as an engine: what one of the runtimes must run for a resolved config."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import msgspec

from ziphius.checkpoint.hub_cache import hub_cache, hub_home
from ziphius.checkpoint.locate import local_path
from ziphius.config import DEFAULT_MODEL, Resolved
from ziphius.errors import ConfigError
from ziphius.installation import instances_folder, ziphius_home
from ziphius.launchers.apptainer import Apptainer, find_program
from ziphius.launchers.docker import Docker
from ziphius.launchers.image import DEFAULT_SOURCE
from ziphius.launchers.launcher import Launch, PrivateFile
from ziphius.launchers.local import Local
from ziphius.launchers.runtime import Runtime, SglangServer, default_compiled, needed_folders
from ziphius.launchers.sglang_plan import SglangStartPlan
from ziphius.launchers.sglang_settings import Planned, arguments, threads_environment

DEFAULT_IMAGE = "sglang.sif"
Planner = Callable[[Resolved, Mapping[str, str]], SglangStartPlan]


class Sglang:
    """A launcher. `planner` gives the memory fraction, or refuses the start.

    `only_show`: the command is only shown, perhaps for another machine, so nothing needs to exist here.
    """

    def __init__(self, planner: Planner, *, only_show: bool = False) -> None:
        self._planner = planner
        self._only_show = only_show

    def __call__(self, resolved: Resolved, env: Mapping[str, str]) -> Launch:
        if resolved.config.model == DEFAULT_MODEL:
            raise ConfigError(
                f"--engine sglang wants --model, a hub id or a Hugging Face folder: {DEFAULT_MODEL} is a GGUF file",
                param="model",
            )
        runtime = choose_runtime(resolved, env)
        if not self._only_show:
            runtime.require(env)
        arguments(resolved, Planned(), resolved.config.model)  # report a contradiction before any plan
        start_plan = self._planner(resolved, env)
        launch = runtime.launch(_server(resolved, env, start_plan), env)
        return replace(launch, predicted_kv_tokens=start_plan.predicted_kv_tokens, notes=start_plan.notes)


def choose_runtime(resolved: Resolved, env: Mapping[str, str]) -> Runtime:
    """The runtime that was asked for. `auto`: an image if there is one, or Apptainer is here; else local."""
    config = resolved.config
    kind = config.runtime
    if kind == "auto":
        kind = _kind_that_is_there(resolved, env)
    if kind != "local" and config.python is not None:
        raise ConfigError(f"--python is for --runtime local; {kind} runs the image's own", param="python")
    if kind == "local":
        if config.image is not None:
            raise ConfigError("--image is for --runtime apptainer and docker", param="image")
        return Local(config.python)
    if kind == "docker":
        return Docker(config.image or DEFAULT_SOURCE.removeprefix("docker://"))
    return Apptainer(Path(config.image or DEFAULT_IMAGE).expanduser().absolute())


def _kind_that_is_there(resolved: Resolved, env: Mapping[str, str]) -> str:
    config = resolved.config
    if config.python is not None:
        return "local"
    there = config.image is not None or os.path.exists(DEFAULT_IMAGE) or find_program(env) is not None
    return "apptainer" if there else "local"


def _server(resolved: Resolved, env: Mapping[str, str], start_plan: SglangStartPlan) -> SglangServer:
    config = resolved.config
    model = local_path(config.model)
    reads = () if model is None else needed_folders(config.model)
    if config.chat_template is not None and os.path.isfile(config.chat_template):
        reads = (*reads, Path(config.chat_template).absolute())
    variables = dict(threads_environment(resolved))
    token = hub_home(env).absolute() / "token"
    if token.exists() and not env.get("HF_TOKEN"):  # a user who has logged in to the hub has the token in a file
        reads, variables["HF_TOKEN_PATH"] = (*reads, token), str(token)
    return SglangServer(
        name=config.name,
        arguments=arguments(resolved, start_plan.planned, config.model if model is None else str(model)),
        variables=variables,
        secrets=_secrets(resolved, env),
        reads=reads,
        hub_cache=hub_cache(env).absolute(),
        compiled=_compiled(resolved, env),
        gpus=start_plan.gpus,
    )


def _compiled(resolved: Resolved, env: Mapping[str, str]) -> Path:
    config = resolved.config
    path = Path(config.cache_dir).expanduser().absolute() if config.cache_dir else default_compiled(env)
    if ":" in str(path):
        raise ConfigError(f"a folder for caches must have no colon in its path: {path}", param="cache_dir")
    return path


def _secrets(resolved: Resolved, env: Mapping[str, str]) -> PrivateFile | None:
    """The API key in a file that only its owner reads. JSON is YAML."""
    config = resolved.config
    if config.api_key is None:
        return None
    # The nodes of a job share this folder, and start at once.
    file = "sglang.yaml" if config.nnodes == 1 else f"sglang-node-{config.node_rank}.yaml"
    path = instances_folder(ziphius_home(env)) / config.name / file
    return PrivateFile(path, msgspec.json.encode({"api-key": config.api_key}).decode() + "\n", "api-key: ********")
