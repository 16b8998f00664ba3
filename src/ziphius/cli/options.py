"""Command-line options made from ServeConfig's declarations. `config.resolve` checks their values."""

from __future__ import annotations

import functools
import inspect
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import Field, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ziphius.config import Resolved, default_config_file, option_fields, option_type, resolve
from ziphius.errors import ConfigError

_METAVARS = {str: "TEXT", int: "INTEGER", float: "NUMBER"}

Name = Annotated[
    str | None, typer.Option("--name", metavar="NAME", help="Which instance (default: the configured name).")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="A TOML file of options, in place of the usual config.toml."),
]

Verb = Callable[..., None]


@dataclass(frozen=True, slots=True)
class VerbWithOptions:
    """A verb that takes an option for each field of ServeConfig and receives them together, as `flags`.

    A flag that was not given is None. Values stay text: they are converted and checked in one place, for
    flags, environment and file alike. The options are made only when this verb runs.
    """

    run: Verb
    show_defaults: bool

    def with_signature(self) -> Verb:
        """The verb as a function with a parameter for each option, which is what typer reads."""
        verb, options = self.run, option_fields()

        @functools.wraps(verb)
        def command(**given: Any) -> None:
            flags = {option.name: given.pop(option.name) for option in options}
            verb(flags=flags, **given)

        own = [p for p in inspect.signature(verb, eval_str=True).parameters.values() if p.name != "flags"]
        parameters = [*own, *(_parameter(option, self.show_defaults) for option in options)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command


def takes_options(verb: Verb) -> VerbWithOptions:
    """Add the options of ServeConfig, with their defaults in the help."""
    return VerbWithOptions(verb, show_defaults=True)


def takes_changes(verb: Verb) -> VerbWithOptions:
    """Add the options of ServeConfig to a verb for which a flag that was not given changes nothing."""
    return VerbWithOptions(verb, show_defaults=False)


def _parameter(option: Field[Any], show_default: bool) -> inspect.Parameter:
    kind, meta = option_type(option.name), option.metadata
    flag = "--" + option.name.replace("_", "-")
    hint: Any = str | None
    if kind is bool:
        flag, hint = f"{flag}/--no-{flag[2:]}", bool | None
    told = f"  [default: {_shown(option.default)}]" if show_default and option.default is not None else ""
    metavar = "[" + "|".join(meta["choices"]) + "]" if meta["choices"] else _METAVARS.get(kind)
    info = typer.Option(flag, help=meta["help"] + told, metavar=metavar, show_default=False)
    return inspect.Parameter(
        option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[hint, info]
    )


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


EngineArguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="-- ARGUMENT", help="For --engine sglang: further arguments of SGLang.", show_default=False),
]
Force = Annotated[bool, typer.Option("--force", help="Start though the plan says no.")]


def with_engine_arguments(flags: dict[str, Any], words: list[str] | None) -> dict[str, Any]:
    """`flags` with the words after `--` appended to the value of --engine-args."""
    if not words:
        return flags
    if "--" not in sys.argv:
        raise ConfigError(f"unexpected argument {words[0]}; what is meant for SGLang stands after `--`")
    before = flags.get("engine_args")
    return {**flags, "engine_args": " ".join([*([before] if before else []), shlex.join(words)])}


def resolved_from(flags: dict[str, Any], config_file: Path | None) -> Resolved:
    """Flags come before the environment, then `config_file` (or the usual file if it exists), then defaults."""
    file = config_file if config_file is not None else default_config_file(os.environ)
    return resolve(flags, os.environ, file)


def selected_name(name: str | None) -> str:
    """The instance that a verb is about: its flag, else the configured name."""
    if name is not None:
        return name
    try:
        return resolved_from({}, None).config.name
    except ConfigError as e:
        raise ConfigError(f"{e.message} (with --name, only start and serve read the configuration)") from e
