"""How the command line finds a verb: it imports the module of the verb that was asked for, and no other."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from ziphius.cli.options import Verb, VerbWithOptions


class VerbCommand(TyperCommand):
    """One verb. It converts only the values that need it."""

    def get_params(self, ctx: Any) -> Any:
        """click's parameters of this command, `--help` among them."""
        return _converting_if_needed(super().get_params(ctx))


def _converting_if_needed(parameters: list[Any]) -> list[Any]:
    """`parameters`, changed so that a value which needs no conversion is left alone.

    typer converts values with pydantic, whose import takes longer than the rest of `ziphius status`. An option that
    was not given has no value to convert, and text stays as it is.
    """
    for parameter in parameters:
        if not parameter.required and "process_value" not in vars(parameter):
            parameter.process_value = _if_needed(parameter)
    return parameters


def _if_needed(parameter: Any) -> Callable[[Any, Any], Any]:
    """What replaces `parameter.process_value`."""
    convert = parameter.process_value
    takes_many = parameter.nargs != 1 or getattr(parameter, "multiple", False)
    # Where a version of typer has no such attribute, its conversion does the same, only later.
    is_text = getattr(getattr(parameter, "type_descriptor", None), "annotation", None) is str

    def process_value(context: Any, value: Any) -> Any:
        if (value is None and not takes_many) or (is_text and isinstance(value, str)):
            return value if parameter.callback is None else parameter.callback(context, parameter, value)
        return convert(context, value)

    return process_value


class LazyGroup(TyperGroup):
    """The verbs of the application. `modules` names the module of each, which has a verb or a group of that name."""

    def __init__(self, modules: Mapping[str, str], **attributes: Any) -> None:
        # A misspelt verb is compared with these names.
        super().__init__(commands={name: TyperCommand(name) for name in modules}, **attributes)
        self._modules = modules

    def get_params(self, ctx: Any) -> Any:
        """click's parameters of the application itself: `--help` alone."""
        return _converting_if_needed(super().get_params(ctx))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command with its options, or None when there is no such verb."""
        return _command(self._found(cmd_name)) if cmd_name in self._modules else None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """List the verbs. This needs their docstrings, but not their options."""
        limit = formatter.width - 6 - max(map(len, self._modules))
        commands = [TyperCommand(name, help=_help(self._found(name))) for name in self._modules]
        with formatter.section("Commands"):
            formatter.write_dl([(command.name, command.get_short_help_str(limit)) for command in commands])

    def _found(self, name: str) -> Verb | VerbWithOptions | typer.Typer:
        found: Verb | VerbWithOptions | typer.Typer = getattr(importlib.import_module(self._modules[name]), name)
        return found


def _help(verb: Verb | VerbWithOptions | typer.Typer) -> str | None:
    if isinstance(verb, typer.Typer):
        return str(verb.info.help)
    return inspect.getdoc(verb.run if isinstance(verb, VerbWithOptions) else verb)


def _command(verb: Verb | VerbWithOptions | typer.Typer) -> Any:
    if isinstance(verb, typer.Typer):
        return typer.main.get_command(verb)
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(cls=VerbCommand)(verb.with_signature() if isinstance(verb, VerbWithOptions) else verb)
    return typer.main.get_command(single)
