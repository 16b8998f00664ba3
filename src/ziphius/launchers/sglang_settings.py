"""Ziphius' options as arguments of SGLang (0.5.23), and the contradictions between them.

Options left at Ziphius' defaults are left to SGLang, whose own defaults suit its scheduler; the exceptions are the
queue's limit and the metrics, because without them an overloaded server looks like a busy one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ziphius.config import Resolved, option_fields, words_of
from ziphius.errors import ConfigError
from ziphius.formats import FORMATS
from ziphius.ranks.layout import rank_layout

_SAME = {
    "context_length": "--context-length",
    "chunked_prefill_size": "--chunked-prefill-size",
    "page_size": "--page-size",
    "max_running_requests": "--max-running-requests",
    "max_total_tokens": "--max-total-tokens",
    "cuda_graph_max_bs": "--cuda-graph-max-bs-decode",
    "log_level": "--log-level",
    "dist_init_addr": "--dist-init-addr",
    "revision": "--revision",
    "load_format": "--load-format",
    "chat_template": "--chat-template",
    "rank_timeout": "--watchdog-timeout",
}
"""Options that are passed on unchanged when the user chose a value."""
_ALWAYS = {"host": "--host", "port": "--port", "max_queued_requests": "--max-queued-requests"}
_OWN = {
    **_SAME,
    **_ALWAYS,
    "model": "--model-path",
    "served_model_name": "--served-model-name",
    "api_key": "--api-key",
    "tp": "--tp-size",
    "mem_fraction": "--mem-fraction-static",
    "dtype": "--dtype",
    "device": "--device",
    "nnodes": "--nnodes",
    "node_rank": "--node-rank",
    "prefix_cache": "--disable-radix-cache",
    "cuda_graphs": "--disable-cuda-graph",
    "deterministic": "--enable-deterministic-inference",
}
"""Ziphius' option -> the flag of SGLang that it decides. That flag may not come after `--`."""
_UNPLANNED = ("load_format", "revision", "chat_template", "rank_timeout")
"""Options that neither the plan nor the status needs: SGLang's flag is refused only when the option is given too."""
_OTHER_SPELLINGS = {
    "--model": "model",
    "--tensor-parallel-size": "tp",
    "--tp": "tp",
    "--nccl-init-addr": "dist_init_addr",
}
_OF_OLDER_VERSIONS = ("--cuda-graph-max-bs",)
"""Flags of SGLang before 0.5.23 that look like abbreviations of a present flag, but are none."""
_OF_ZIPHIUS = ("name", "drain_timeout", "start_timeout", "engine", "runtime", "python", "image", "engine_args",
               "cache_dir", "weights_format", "threads")  # fmt: skip
"""Options that Ziphius itself follows for every engine, and options that become no flag of their own."""
_FORMATS = {row.name: ("--quantization", row.name) if row.dtype is None else ("--dtype", row.dtype)
            for row in FORMATS.values() if row.sglang and row.option}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Planned:
    """What the plan decided that SGLang must be told."""

    mem_fraction: float | None = None
    trust_remote_code: bool = False
    """DeepSeek's checkpoints name their own code in their config."""


def arguments(resolved: Resolved, planned: Planned, model: str) -> tuple[str, ...]:
    """SGLang's arguments, without the API key, which every user could read there. ConfigError for a contradiction.

    `model`: the folder or id as SGLang will see it.
    """
    config = resolved.config
    _refuse_unknown_to_sglang(resolved)
    extra = words_of(config.engine_args or "", "engine_args")
    _refuse_conflicts(resolved, extra)
    words = ["--model-path", model, "--served-model-name", config.served_model_name or model_name(config.model)]
    for name, flag in _ALWAYS.items():
        words += [flag, str(getattr(config, name))]
    words += ["--enable-metrics"]
    if config.tp > 1:
        words += ["--tp-size", str(config.tp)]
    words += _nodes(resolved)
    fraction = config.mem_fraction if config.mem_fraction is not None else planned.mem_fraction
    if fraction is not None:
        words += ["--mem-fraction-static", f"{fraction:g}"]
    for name, flag in _SAME.items():
        if name != "dist_init_addr" and _chosen(resolved, name):
            words += [flag, _shown(getattr(config, name))]
    if not config.prefix_cache:
        words.append("--disable-radix-cache")
    if not config.cuda_graphs:
        words.append("--disable-cuda-graph")
    if config.deterministic:
        words.append("--enable-deterministic-inference")
    if config.device != "auto":
        words += ["--device", config.device]
    words += _precision(resolved)
    if planned.trust_remote_code:
        words.append("--trust-remote-code")
    return (*words, *extra)


def model_name(model: str) -> str:
    """The name in the API when none was given: a folder's name, or the model id."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() or path.is_absolute() else model


def threads_environment(resolved: Resolved) -> tuple[tuple[str, str], ...]:
    """SGLang reads the number of CPU threads from OpenMP's variable."""
    return () if resolved.config.threads is None else (("OMP_NUM_THREADS", str(resolved.config.threads)),)


def _nodes(resolved: Resolved) -> list[str]:
    config = resolved.config
    rank_layout(config)
    if config.dist_init_addr is None:
        return []
    return ["--nnodes", str(config.nnodes), "--node-rank", str(config.node_rank),
            "--dist-init-addr", config.dist_init_addr]  # fmt: skip


def _precision(resolved: Resolved) -> list[str]:
    config = resolved.config
    words = [] if config.dtype == "auto" else ["--dtype", config.dtype]
    if config.weights_format == "auto":
        return words
    if config.weights_format not in _FORMATS:
        raise ConfigError(
            f"weights_format {config.weights_format} is not made by SGLang: give it a checkpoint that is "
            "quantized already, and its method after `--` (as -- --quantization awq)",
            param="weights_format",
        )
    flag, value = _FORMATS[config.weights_format]
    if flag == "--dtype" and words and config.dtype != value:
        raise ConfigError(f"SGLang computes in the type of its weights: dtype {config.dtype} contradicts "
                          f"weights_format {config.weights_format}", param="weights_format")  # fmt: skip
    return words if words[:1] == [flag] else [*words, flag, value]


def _chosen(resolved: Resolved, name: str) -> bool:
    return resolved.origins.get(name, "default") != "default" and getattr(resolved.config, name, None) is not None


def _refuse_unknown_to_sglang(resolved: Resolved) -> None:
    for option in option_fields():
        if option.name not in _OWN and option.name not in _OF_ZIPHIUS and _chosen(resolved, option.name):
            value = getattr(resolved.config, option.name)
            if value != option.default:
                raise ConfigError(
                    f"{option.name} ({resolved.origins[option.name]}) is an option of the native engine; "
                    "SGLang has no such setting",
                    param=option.name,
                )


def _refuse_conflicts(resolved: Resolved, extra: tuple[str, ...]) -> None:
    """Refuse arguments after `--` that an option of Ziphius decides: plan, status and stop would not know them."""
    deciders = {flag: name for name, flag in _OWN.items() if name not in _UNPLANNED or _chosen(resolved, name)}
    deciders |= _OTHER_SPELLINGS
    for word in extra:
        given = word.partition("=")[0]
        flag = given.replace("_", "-")
        if not flag.startswith("--"):
            continue
        if flag == "--config":
            raise ConfigError("--config after `--` could change what Ziphius decides: give its settings one by one")
        name = _decider(flag, deciders)
        if name is not None:
            switched_off = name in ("prefix_cache", "cuda_graphs")
            spelled = ("--no-" if switched_off else "--") + name.replace("_", "-")
            raise ConfigError(f"{given} after `--` is Ziphius' {spelled}: give that one, before `--`", param=name)


def _decider(flag: str, deciders: Mapping[str, str]) -> str | None:
    """The option that decides `flag`, or the flag that it abbreviates: SGLang's parser accepts abbreviations."""
    if flag in deciders or flag in _OF_OLDER_VERSIONS or len(flag) <= len("--xx"):
        return deciders.get(flag)
    return next((name for full, name in deciders.items() if full.startswith(flag)), None)


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
