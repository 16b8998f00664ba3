"""ServeConfig: every option, declared once, and where each value came from."""

from __future__ import annotations

import difflib
import math
import os
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ziphius.errors import ConfigError
from ziphius.formats import OPTION_CHOICES

DEFAULT_MODEL = "SmolLM2-135M-Instruct"


def _option(default: Any, help: str, *, choices: tuple[str, ...] = (), low: float | None = None,
            high: float | None = None, secret: bool = False) -> Any:  # fmt: skip
    meta = {"help": help, "choices": choices, "low": low, "high": high, "secret": secret}
    return field(default=default, metadata=meta)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """The resolved settings of one instance. Frozen: nothing changes after `resolve`."""

    model: str = _option(DEFAULT_MODEL, "A model id of the Hugging Face hub (OWNER/NAME), a local folder or file.")
    revision: str | None = _option(None, "Branch, tag or commit of the hub's model (default: main).")
    load_format: str = _option("auto", "Where weights come from; dummy: random ones, without files.",
                               choices=("auto", "dummy"))  # fmt: skip
    load_threads: int = _option(4, "Threads that read the weights' files.", low=1, high=64)
    chat_template: str | None = _option(None, "A Jinja file in place of the model's own chat template.")
    name: str = _option("default", "Name of this instance; several names run side by side.")
    host: str = _option("127.0.0.1", "Address to listen on.")
    port: int = _option(30000, "Port to listen on.", low=1, high=65535)
    served_model_name: str | None = _option(None, "Model name in the API (default: from --model).")
    api_key: str | None = _option(None, "Require this key as a bearer token.", secret=True)
    engine: str = _option("native", "Ziphius' own engine, or real SGLang.", choices=("native", "sglang"))
    runtime: str = _option("auto", "What SGLang runs in: an image where there is one or Apptainer, else a Python.",
                           choices=("auto", "local", "apptainer", "docker"))  # fmt: skip
    python: str | None = _option(None, "A Python that has SGLang, for --runtime local (default: this one).")
    image: str | None = _option(None, "SGLang's image: a SIF for apptainer (default: ./sglang.sif), a name for docker.")
    engine_args: str | None = _option(None, "Further arguments for SGLang, as a shell would split them; also after --.")
    cache_dir: str | None = _option(None, "Node-local folder for what SGLang compiles in an image (default: in /tmp).")
    device: str = _option("auto", "Where to compute.", choices=("auto", "cpu", "cuda"))
    dtype: str = _option("auto", "Type of activations and cache: float32 on a CPU, bfloat16 on a GPU.",
                         choices=("auto", "float32", "bfloat16", "float16"))  # fmt: skip
    weights_format: str = _option("auto", "How linear weights are held: int8 on a CPU, like --dtype otherwise.",
                                  choices=OPTION_CHOICES)  # fmt: skip
    context_length: int | None = _option(None, "Longest prompt + answer in tokens (default: the model's).", low=1)
    max_running_requests: int | None = _option(None, "Requests computed together (default: 32 on a CPU, 128 on a GPU).",
                                               low=1, high=4096)  # fmt: skip
    max_queued_requests: int = _option(512, "Requests waiting; one more is answered 503.", low=0)
    max_total_tokens: int | None = _option(None, "Size of the KV cache in tokens (default: from memory).", low=1)
    mem_fraction: float | None = _option(None, "Share of the device's memory for weights and KV cache.",
                                         low=0.01, high=0.99)  # fmt: skip
    page_size: int = _option(16, "Tokens in a page of the KV cache.", low=1, high=1024)
    chunked_prefill_size: int | None = _option(None, "Prompt tokens computed in one step, over all requests (default: "
                                               "512 on a CPU, 8192 on a GPU).", low=1)  # fmt: skip
    cuda_graphs: bool = _option(True, "Replay decode steps on a GPU as CUDA graphs.")
    cuda_graph_max_bs: int | None = _option(None, "Largest batch captured as a CUDA graph (default: every batch).",
                                            low=1)  # fmt: skip
    deterministic: bool = _option(False, "On a GPU: the same tokens at temperature 0 whatever else is in the batch; "
                                  "slower.")  # fmt: skip
    prefix_cache: bool = _option(True, "Keep finished requests' pages for prompts that start alike.")
    threads: int | None = _option(None, "CPU threads of the engine, all ranks here together (default: the cores).",
                                  low=1, high=1024)  # fmt: skip
    tp: int = _option(1, "Tensor parallelism: how many ranks share the model, each on a GPU of its own.",
                      low=1, high=1024)  # fmt: skip
    nnodes: int = _option(1, "Machines that the ranks are spread over.", low=1, high=1024)
    node_rank: int = _option(0, "Which of the machines this is; 0 has the HTTP API and decides.", low=0, high=1023)
    dist_init_addr: str | None = _option(None, "HOST:PORT of machine 0, where the others join it.")
    rank_timeout: float = _option(60.0, "Seconds of silence after which a rank counts as hung, and the server ends.",
                                  low=1)  # fmt: skip
    max_body_bytes: int = _option(32 * 1024 * 1024, "Largest request body.", low=1024)
    drain_timeout: float = _option(30.0, "Seconds that stop lets running requests finish.", low=0)
    start_timeout: float = _option(3600.0, "Seconds that start waits for health.", low=1)
    log_level: str = _option("info", "How much to log.", choices=("debug", "info", "warning", "error"))


@dataclass(frozen=True, slots=True)
class Resolved:
    """A config and, for each of its fields, where the value came from."""

    config: ServeConfig
    origins: Mapping[str, str]
    """Field name -> `flag`, `environment ZIPHIUS_X`, `file PATH` or `default`."""


def option_fields() -> tuple[Field[Any], ...]:
    """The declared options in order; `metadata` has help, choices, low, high and secret."""
    return fields(ServeConfig)


def option_type(name: str) -> type:
    """The plain type of an option: `int | None` gives int."""
    hint = get_type_hints(ServeConfig)[name]
    plain = [t for t in get_args(hint) if t is not type(None)]
    return plain[0] if plain else hint  # type: ignore[no-any-return]


def env_name(name: str) -> str:
    return "ZIPHIUS_" + name.upper()


_NOT_OPTIONS = ("ZIPHIUS_HOME", "ZIPHIUS_RUN_ID")
"""`ziphius.installation` and the manager read these variables. The test suite uses ZIPHIUS_TEST_*."""


def default_config_file(env: Mapping[str, str]) -> Path | None:
    """`config.toml` in ZIPHIUS_HOME, else in XDG_CONFIG_HOME/ziphius, else in ~/.config/ziphius; None if absent."""
    if env.get("ZIPHIUS_HOME"):
        folder = Path(env["ZIPHIUS_HOME"]).expanduser()
    elif Path(env.get("XDG_CONFIG_HOME", "")).is_absolute():
        folder = Path(env["XDG_CONFIG_HOME"]) / "ziphius"
    elif env.get("HOME"):
        folder = Path(env["HOME"]) / ".config" / "ziphius"
    else:
        return None
    path = folder.absolute() / "config.toml"
    return path if os.path.exists(path) else None


def resolve(flags: Mapping[str, Any], env: Mapping[str, str] | None = None, file: Path | None = None) -> Resolved:
    """Flag > environment > file > default. A flag that is None was not given.

    ConfigError names the key, its limit and the value; for an unknown key, the nearest known one.
    """
    env = os.environ if env is None else env
    known = {f.name for f in option_fields()}
    _refuse_unknown_variables(env, known)
    from_file = _read_file(file, known) if file is not None else {}
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for option in option_fields():
        name = option.name
        if flags.get(name) is not None:
            raw, origin = flags[name], "flag"
        elif env_name(name) in env:
            raw, origin = env[env_name(name)], f"environment {env_name(name)}"
        elif name in from_file:
            raw, origin = from_file[name], f"file {file}"
        else:
            assert option.default is not MISSING
            raw, origin = option.default, "default"
        values[name] = raw if origin == "default" else _checked(option, raw, origin)
        origins[name] = origin
    unknown_flags = set(flags) - known
    if unknown_flags:
        raise ConfigError(_unknown("option", sorted(unknown_flags)[0], known))
    return Resolved(ServeConfig(**values), origins)


def override(base: Resolved, flags: Mapping[str, Any]) -> Resolved:
    """`base` with the given flags on top, checked; every other value keeps its origin. A flag of None was not given."""
    given = {name: value for name, value in flags.items() if value is not None}
    config = resolve({**asdict(base.config), **given}, env={}).config
    return Resolved(config, {**base.origins, **dict.fromkeys(given, "flag")})


def words_of(text: str, option: str) -> tuple[str, ...]:
    """`text` as a shell splits it. ConfigError, which names the option, when a quotation does not end."""
    try:
        return tuple(shlex.split(text))
    except ValueError as e:
        raise ConfigError(f"{option} cannot be split into words: {e}: {text!r}", param=option) from e


def _refuse_unknown_variables(env: Mapping[str, str], known: set[str]) -> None:
    names = {env_name(name) for name in known}
    for key in sorted(env):
        if key.startswith("ZIPHIUS_") and not key.startswith("ZIPHIUS_TEST_") and key not in {*names, *_NOT_OPTIONS}:
            raise ConfigError(_unknown("environment variable", key, names), param=key)


def _read_file(path: Path, known: set[str]) -> dict[str, Any]:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"cannot read the config file {path}: {e.strerror}") from e
    except ValueError as e:
        raise ConfigError(f"{path} is not valid TOML: {e}") from e
    named = {key.replace("-", "_"): value for key, value in data.items()}
    for key in named:
        if key not in known:
            raise ConfigError(_unknown(f"key in {path}", key, known), param=key)
    return named


def _unknown(what: str, key: str, known: set[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"unknown {what}: {key}" + (f"; did you mean {near[0]}?" if near else "")


_WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def _checked(option: Field[Any], raw: Any, origin: str) -> Any:
    name, kind, meta = option.name, option_type(option.name), option.metadata
    value = _converted(raw, kind)
    if value is None:
        finite = "a finite " if kind is float else ""
        raise ConfigError(f"{name} ({origin}) must be {finite}{kind.__name__}, not {raw!r}", param=name)
    if value == "":
        # Mostly a script's variable that was never set. An empty host would mean every address, an empty key no key.
        raise ConfigError(f"{name} ({origin}) must not be empty", param=name)
    if meta["choices"] and value not in meta["choices"]:
        raise ConfigError(f"{name} ({origin}) must be one of {', '.join(meta['choices'])}, not {value!r}", param=name)
    if meta["low"] is not None and value < meta["low"]:
        raise ConfigError(f"{name} ({origin}) must be at least {meta['low']:g}, not {value}", param=name)
    if meta["high"] is not None and value > meta["high"]:
        raise ConfigError(f"{name} ({origin}) must be at most {meta['high']:g}, not {value}", param=name)
    return value


def _converted(raw: Any, kind: type) -> Any:
    """`raw` as `kind`, or None when it cannot be converted."""
    if kind is bool:
        return raw if isinstance(raw, bool) else _WORDS.get(str(raw).lower())
    if isinstance(raw, bool) or not isinstance(raw, (str, int, float)):
        return None
    if kind is str:
        return raw if isinstance(raw, str) else None
    try:
        number = kind(raw)
    except (TypeError, ValueError, OverflowError):  # OverflowError: an infinite number in a file
        return None
    if isinstance(raw, float) and kind is int and raw != number:
        return None
    # Settings are kept as JSON, which has finite numbers only.
    return number if kind is int or math.isfinite(number) else None
