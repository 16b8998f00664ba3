"""Which engine a config asks for, and its launcher."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ziphius.config import Resolved
from ziphius.errors import ConfigError
from ziphius.formats import format_named
from ziphius.launchers import native, sglang
from ziphius.launchers.launcher import Launch, Launcher
from ziphius.launchers.native_plan import NativeStartPlan, plan_native
from ziphius.launchers.sglang_plan import SglangStartPlan, plan_start
from ziphius.planner.hardware import Host
from ziphius.planner.probe import probe_host

_OF_SGLANG = ("runtime", "python", "image", "engine_args", "cache_dir")


def engine_launcher(*, force: bool = False, show_for: Host | None = None) -> Launcher:
    """Launches whatever engine a config names. `force`: a plan that says no is only a note.

    `show_for`: the machine for which a command is shown, when it is not to be started.
    """

    def planned(resolved: Resolved, env: Mapping[str, str]) -> SglangStartPlan:
        return plan_start(resolved, env, force=force, probe=probe_host if show_for is None else lambda: show_for)

    def launch(resolved: Resolved, env: Mapping[str, str]) -> Launch:
        if resolved.config.engine == "sglang":
            return sglang.Sglang(planned, only_show=show_for is not None)(resolved, env)
        refuse_other_engines_options(resolved)
        return _native(resolved, env, force, show_for)

    return launch


def _native(resolved: Resolved, env: Mapping[str, str], force: bool, show_for: Host | None) -> Launch:
    launch = native.native(resolved, env)
    if show_for is None:
        start_plan = plan_native(resolved, env, force=force, probe=probe_host)
    else:  # assume that another machine's torch can use its GPUs
        start_plan = plan_native(resolved, env, force=force, probe=lambda: show_for, torch_cuda=True)
    return replace(
        launch,
        env={**launch.env, **start_plan.environment},
        predicted_kv_tokens=start_plan.predicted_kv_tokens,
        notes=start_plan.notes,
    )


def native_in_foreground(resolved: Resolved, env: Mapping[str, str], *, force: bool) -> NativeStartPlan:
    """The checks of `start` before it launches the native engine, for a caller that runs it without a launch.

    On other machines than the first they are left to the first one.
    """
    refuse_other_engines_options(resolved)
    if resolved.config.node_rank > 0:
        return NativeStartPlan()
    return plan_native(resolved, env, force=force, probe=probe_host)


def refuse_other_engines_options(resolved: Resolved) -> None:
    """ConfigError for a given option that the native engine does not have."""
    config = resolved.config
    if config.engine == "sglang":
        return
    asked = format_named(config.weights_format)
    if asked is not None and not asked.native:
        raise ConfigError(f"weights_format {config.weights_format} is for --engine sglang", param="weights_format")
    for name in _OF_SGLANG:
        if resolved.origins.get(name, "default") != "default":
            spelled = "what stands after `--`" if name == "engine_args" else f"--{name.replace('_', '-')}"
            raise ConfigError(f"{spelled} is for --engine sglang", param=name)


def with_absolute_paths(resolved: Resolved) -> Resolved:
    """Make relative paths absolute, because a restart from another folder must find them."""
    config = resolved.config
    changes: dict[str, Any] = {}
    if config.engine == "sglang" and config.runtime in ("auto", "apptainer"):
        image = config.image or (sglang.DEFAULT_IMAGE if config.python is None else None)
        if image is not None and os.path.exists(image):
            changes["image"] = os.path.abspath(image)
    for name in ("python", "cache_dir", "chat_template"):
        value = getattr(config, name)
        # A program without a slash is looked up on the PATH. SGLang knows some chat templates by name.
        is_path = value is not None and (name == "cache_dir" or os.sep in value or os.path.exists(value))
        if is_path:
            changes[name] = str(Path(value).expanduser().absolute())
    return replace(resolved, config=replace(config, **changes)) if changes else resolved
