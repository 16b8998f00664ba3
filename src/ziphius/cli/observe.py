"""The verbs `status`, `logs` and `chat`, which change nothing."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Annotated

import typer

from ziphius.cli.options import Json, Name, selected_name
from ziphius.errors import InstanceError

if TYPE_CHECKING:
    from ziphius.manager.observer import Observer


def status(
    name: Name = None,
    all_: Annotated[bool, typer.Option("--all", help="List every instance.")] = False,
    json: Json = False,
) -> None:
    """Say what a server is doing.

    Exit status: 0 running (starting and stopping too), 1 failed, 3 stopped, 4 unknown or unhealthy.
    """
    from ziphius.cli import output

    observer = _observer()
    if all_:
        found = observer.statuses()
        output.print_json(found) if json else output.print_statuses(found)
        return
    one = observer.status(selected_name(name))
    output.print_json(one) if json else output.print_status(one)
    raise typer.Exit(one.state.exit_code)


def logs(
    name: Name = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is appended.")] = False,
    lines: Annotated[
        int, typer.Option("--lines", "-n", min=0, metavar="INTEGER", help="How many of its last lines.")
    ] = 50,
) -> None:
    """Show a server's log, also of one that is gone."""
    observer = _observer()
    name = selected_name(name)
    if not follow:
        if not observer.log_path(name).exists():
            raise InstanceError(f"instance {name} has no log: it was never started")
        for line in observer.log_tail(name, lines):
            print(line)
        return
    with contextlib.suppress(KeyboardInterrupt):
        for text in observer.log_follow(name, lines):
            if text:
                print(text, end="", flush=True)


def chat(
    name: Name = None,
    url: Annotated[str | None, typer.Option(metavar="URL", help="A server, in place of an instance.")] = None,
    api_key: Annotated[str | None, typer.Option(metavar="KEY", envvar="ZIPHIUS_API_KEY", help="Its key.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message to begin with.")] = None,
    temperature: Annotated[float | None, typer.Option(metavar="NUMBER", help="0 takes the likeliest token.")] = None,
    max_tokens: Annotated[int | None, typer.Option(metavar="INTEGER", help="Longest answer.")] = None,
) -> None:
    """Talk to a server in the terminal.

    From a pipe, each line is a question, and stdout gets the answers only.
    """
    from ziphius.manager.chat import ChatClient, Sampling, talk

    if url is None:
        own = _observer().address(selected_name(name))
        url, api_key = own.url, own.api_key or api_key
    client = ChatClient(url, api_key, Sampling(temperature=temperature, max_tokens=max_tokens))
    with contextlib.closing(client):
        raise typer.Exit(talk(client, system))


def _observer() -> Observer:
    from ziphius.installation import ziphius_home
    from ziphius.manager.observer import Observer

    return Observer(ziphius_home(os.environ))
