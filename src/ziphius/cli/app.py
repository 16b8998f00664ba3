"""The verbs: they parse, call one use case and print; no decision is made here, and torch is never imported.

Each verb imports what it needs when it runs, so that `--help` and `status` answer at once.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ziphius.cli import image as cli_image
from ziphius.cli import plan as cli_plan
from ziphius.cli import slurm as cli_slurm
from ziphius.cli.interrupts import interrupts_once
from ziphius.cli.options import (
    ConfigFile,
    EngineArguments,
    Force,
    Json,
    Name,
    resolved_from,
    selected_name,
    takes_changes,
    takes_options,
    with_engine_arguments,
)
from ziphius.errors import ConfigError, InstanceError, StartFailed, ZiphiusError
from ziphius.installation import package_version

if TYPE_CHECKING:
    from ziphius.config import Resolved
    from ziphius.ipc.messages import LoadProgress
    from ziphius.launchers.launcher import Launch
    from ziphius.manager.manager import Manager, Started

_SHOWN_LOG_LINES = 15

app = typer.Typer(
    name="ziphius",
    help="Start, serve and watch a language model behind an OpenAI-compatible API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _manager(force: bool = False) -> Manager:
    from ziphius.installation import ziphius_home
    from ziphius.manager.manager import Manager

    def launch(resolved: Resolved, env: Mapping[str, str]) -> Launch:
        from ziphius.launchers.engines import engine_launcher  # here: most verbs launch nothing

        return engine_launcher(force=force)(resolved, env)

    def tell(line: str) -> None:
        from ziphius.cli.output import note

        note(line)

    return Manager(ziphius_home(os.environ), launch, os.environ, tell)


@app.command()
@takes_options
def start(
    flags: dict[str, Any],
    arguments: EngineArguments = None,
    config: ConfigFile = None,
    force: Force = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the command that would be started.")] = False,
    gpu: Annotated[
        str | None, typer.Option(metavar="TEXT", help="With --dry-run: for a machine with these, as 4xH200.")
    ] = None,
    json: Json = False,
) -> None:
    """Start a server in the background, and wait for it.

    Exit status 0 when it is healthy, also when it was running with the same settings before; else 1.
    """
    resolved = resolved_from(with_engine_arguments(flags, arguments), config)
    if gpu is not None and not dry_run:
        raise ConfigError(f"--gpu {gpu} is for --dry-run: a start is for the GPUs that are here")
    if dry_run:
        _show_command(resolved, force, gpu)
        return
    name = resolved.config.name
    manager = _manager(force)
    with _starting(manager, name) as progress:
        started = manager.start(resolved, progress)
    _show_started(manager, started, json)


def _show_command(resolved: Resolved, force: bool, gpu: str | None) -> None:
    from ziphius.launchers.command_line import command_line
    from ziphius.launchers.engines import engine_launcher, with_absolute_paths
    from ziphius.planner.hardware import parse_gpus
    from ziphius.planner.probe import probe_host

    launcher = engine_launcher(force=force, show_for=probe_host() if gpu is None else parse_gpus(gpu))
    print(command_line(launcher(with_absolute_paths(resolved), os.environ), os.environ))


@app.command()
@takes_changes
def restart(flags: dict[str, Any], arguments: EngineArguments = None, force: Force = False, json: Json = False) -> None:
    """Stop a server and start it again with its settings.

    Options given here replace the ones it had.
    """
    name = selected_name(flags["name"])
    flags = with_engine_arguments(flags, arguments)
    manager = _manager(force)
    with _starting(manager, name) as progress:
        started = manager.restart(name, flags, _waiting(), progress)
    _show_started(manager, started, json)


@app.command()
@takes_options
def serve(
    flags: dict[str, Any],
    arguments: EngineArguments = None,
    config: ConfigFile = None,
    force: Force = False,
    resolved: Annotated[bool, typer.Option("--resolved", hidden=True)] = False,
) -> None:
    """Run the server in the foreground.

    What cannot work is refused first, as by `start`.
    """
    from ziphius.launchers.native import read_resolved

    settings = (
        read_resolved(sys.stdin.buffer) if resolved else resolved_from(with_engine_arguments(flags, arguments), config)
    )
    if settings.config.engine != "native":
        raise typer.Exit(_run_engine(settings, force))
    code = _serve(settings, force, planned=resolved)
    if resolved and code == 0:
        from ziphius.installation import ziphius_home
        from ziphius.manager.instance import Instances

        # Ended on purpose, by whoever signalled it: without this it would count as failed.
        Instances(ziphius_home(os.environ)).mark_stopped(settings.config.name, os.getpid())
    raise typer.Exit(code)


def _run_engine(resolved: Resolved, force: bool) -> int:
    """An engine that is a program of its own, run to its end."""
    from ziphius.cli.output import note
    from ziphius.launchers.engines import engine_launcher
    from ziphius.manager.foreground import run

    launch = engine_launcher(force=force)(resolved, os.environ)
    for line in launch.notes:
        note(line)
    return run(launch, resolved.config.drain_timeout, follows=resolved.config.node_rank > 0)


def _serve(resolved: Resolved, force: bool, planned: bool) -> int:
    """`planned`: by the `start` that it is a part of."""
    import logging

    from ziphius import log
    from ziphius.frontend.serve import serve as run
    from ziphius.manager.foreground import drain_on_signal

    if resolved.config.node_rank == 0:  # the others end when it has
        drain_on_signal()
    log.configure(resolved.config.log_level)
    logger = logging.getLogger("ziphius")
    try:
        if not planned:
            from ziphius.launchers.engines import native_in_foreground

            outlook = native_in_foreground(resolved, os.environ, force=force)
            for line in outlook.notes:
                logger.info(line)
            os.environ.update(outlook.environment)  # its ranks inherit it
        return run(resolved)
    except ZiphiusError as e:
        logger.error(e.message)
        return e.exit_code


@app.command()
def stop(
    name: Name = None,
    drain_timeout: Annotated[
        float | None,
        typer.Option(min=0, metavar="SECONDS", help="Time for running requests (default: the instance's own)."),
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Stop every instance.")] = False,
    forget: Annotated[
        bool, typer.Option("--forget", help="Signal nothing; drop the record of an instance whose machine is gone.")
    ] = False,
) -> None:
    """Let running requests end, then end every process.

    Returns when nothing of the server is left.
    """
    if forget and all_:
        raise ConfigError("--forget is for one instance: give its --name in place of --all")
    manager = _manager()
    if forget:
        manager.forget(selected_name(name))
        return
    names = [s.name for s in manager.statuses() if s.state.alive] if all_ else [selected_name(name)]
    if not names:
        print("nothing is running")
    for each in names:
        before = manager.stop(each, drain_timeout, _waiting())
        if before.state.alive:
            what = f"pid {before.pid}" if before.job is None else f"job {before.job}"
            print(f"{each} is stopped (it was {before.state}, {what})")
        else:
            print(f"{each} was not running" + (f": {before.reason}" if before.reason else ""))


@app.command()
def status(
    name: Name = None,
    all_: Annotated[bool, typer.Option("--all", help="List every instance.")] = False,
    json: Json = False,
) -> None:
    """Say what a server is doing.

    Exit status: 0 running (starting and stopping too), 1 failed, 3 stopped, 4 unknown or unhealthy.
    """
    from ziphius.cli import output as cli_print

    manager = _manager()
    if all_:
        found = manager.statuses()
        cli_print.print_json(found) if json else cli_print.print_statuses(found)
        return
    one = manager.status(selected_name(name))
    cli_print.print_json(one) if json else cli_print.print_status(one)
    raise typer.Exit(one.state.exit_code)


@app.command()
def logs(
    name: Name = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is appended.")] = False,
    lines: Annotated[
        int, typer.Option("--lines", "-n", min=0, metavar="INTEGER", help="How many of its last lines.")
    ] = 50,
) -> None:
    """Show a server's log, also of one that is gone."""
    manager = _manager()
    name = selected_name(name)
    if not follow:
        if not manager.log_path(name).exists():
            raise InstanceError(f"instance {name} has no log: it was never started")
        for line in manager.log_tail(name, lines):
            print(line)
        return
    with contextlib.suppress(KeyboardInterrupt):
        for text in manager.log_follow(name, lines):
            if text:
                print(text, end="", flush=True)


@app.command()
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
        own = _manager().address(selected_name(name))
        url, api_key = own.url, own.api_key or api_key
    client = ChatClient(url, api_key, Sampling(temperature=temperature, max_tokens=max_tokens))
    with contextlib.closing(client):
        raise typer.Exit(talk(client, system))


@app.command()
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
    from ziphius.cli.output import phases
    from ziphius.installation import ziphius_home

    settings = resolved_from({}, None).config
    wanted = model if model is not None else settings.model
    home = ziphius_home(os.environ)
    with interrupts_once(), phases() as progress:
        checkpoint = open_checkpoint(wanted, home, progress, revision=revision or settings.revision, update=True)
    at = "" if checkpoint.commit is None else f" (commit {checkpoint.commit})"
    print(f"{checkpoint.name} is at {checkpoint.path}{at}")


@app.command()
@takes_options
def config(flags: dict[str, Any], config: ConfigFile = None, json: Json = False) -> None:
    """Show each setting and where its value came from.

    Takes the options of `start`, to see what they would do.
    """
    from ziphius.cli import output as cli_print

    found = cli_print.settings(resolved_from(flags, config))
    cli_print.print_json(found) if json else cli_print.print_settings(found)


cli_plan.register(app)
cli_slurm.register(app)
cli_image.register(app)


@app.command()
def version() -> None:
    """Print the version."""
    print(package_version())


@contextlib.contextmanager
def _starting(manager: Manager, name: str) -> Iterator[Callable[[LoadProgress], None]]:
    """Progress while a start waits; before the reason that it failed, the log's last lines."""
    from ziphius.cli.output import note, phases

    try:
        with interrupts_once(), phases() as progress:
            yield progress
    except StartFailed as e:
        lines = manager.log_tail(name, _SHOWN_LOG_LINES)
        if any(e.message not in line for line in lines):  # else they would say the same twice
            note(f"Last lines of {manager.log_path(name)}:")
            for line in lines:
                note(f"  {line}")
        raise StartFailed(f"{name} did not start: {e.message}") from e
    except SystemExit:
        note("interrupted: what was being started is stopped")
        raise


def _waiting() -> Callable[[float], None]:
    """Tells once that a stop takes longer than a moment."""
    from ziphius.cli.output import note

    told = False

    def on_wait(seconds: float) -> None:
        nonlocal told
        if seconds > 1 and not told:
            told = True
            note("waiting for it to end; running requests may finish first ...")

    return on_wait


def _show_started(manager: Manager, started: Started, json: bool) -> None:
    from ziphius.cli import output as cli_print

    if json:
        cli_print.print_json(started.status)
        return
    record = manager.record(started.status.name)
    assert record is not None  # it was written before anything ran
    cli_print.print_started(started, record.resolved.config)


def main() -> None:
    """The one place where an error becomes a line on stderr and an exit status."""
    try:
        app(prog_name="ziphius")
    except ZiphiusError as e:
        print(f"ziphius: {e.message}", file=sys.stderr)
        sys.exit(e.exit_code)
