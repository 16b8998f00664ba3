"""The verbs `pull`, `config` and `version`, which need no instance."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from ziphius.cli.options import ConfigFile, Json, resolved_from, takes_options


def pull(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A model id (default: the configured one).")
    ] = None,
    revision: Annotated[str | None, typer.Option(metavar="TEXT", help="The hub's branch, tag or commit.")] = None,
) -> None:
    """Fetch a model without starting it.

    A broken or unfinished download is noticed, and what is missing is fetched.
    """
    from ziphius.checkpoint.checkpoint import open_checkpoint
    from ziphius.cli.interrupts import interrupts_once
    from ziphius.cli.output import phases
    from ziphius.installation import ziphius_home

    settings = resolved_from({}, None).config
    wanted = model if model is not None else settings.model
    home = ziphius_home(os.environ)
    with interrupts_once(), phases() as progress:
        checkpoint = open_checkpoint(wanted, home, progress, revision=revision or settings.revision, update=True)
    at = "" if checkpoint.commit is None else f" (commit {checkpoint.commit})"
    print(f"{checkpoint.name} is at {checkpoint.path}{at}")


@takes_options
def config(flags: dict[str, Any], config: ConfigFile = None, json: Json = False) -> None:
    """Show each setting and where its value came from.

    Takes the options of `start`, to see what they would do.
    """
    from ziphius.cli import output

    found = output.settings(resolved_from(flags, config))
    output.print_json(found) if json else output.print_settings(found)


def version() -> None:
    """Print the version."""
    from ziphius.installation import package_version

    print(package_version())
