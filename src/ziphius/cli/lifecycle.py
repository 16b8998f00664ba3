"""The verbs `start`, `restart`, `serve` and `stop`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
from ziphius.errors import ConfigError, StartFailed, ZiphiusError

if TYPE_CHECKING:
    from ziphius.config import Resolved
    from ziphius.ipc.messages import LoadProgress
    from ziphius.launchers.launcher import Launch
    from ziphius.manager.manager import Manager, Started

_SHOWN_LOG_LINES = 15


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

        # Somebody ended it on purpose, with a signal. Without this it would count as failed.
        Instances(ziphius_home(os.environ)).mark_stopped(settings.config.name, os.getpid())
    raise typer.Exit(code)


def _run_engine(resolved: Resolved, force: bool) -> int:
    """Run an engine that is a separate program until it ends. Returns its exit status."""
    from ziphius.cli.output import note
    from ziphius.launchers.engines import engine_launcher
    from ziphius.manager.foreground import run

    launch = engine_launcher(force=force)(resolved, os.environ)
    for line in launch.notes:
        note(line)
    return run(launch, resolved.config.drain_timeout, follows=resolved.config.node_rank > 0)


def _serve(resolved: Resolved, force: bool, planned: bool) -> int:
    """Run the native engine. `planned`: the `start` that spawned this process has made the plan already."""
    import logging

    from ziphius import log
    from ziphius.frontend.serve import serve as run
    from ziphius.manager.foreground import drain_on_signal

    if resolved.config.node_rank == 0:  # the other machines end when machine 0 has ended
        drain_on_signal()
    log.configure(resolved.config.log_level)
    logger = logging.getLogger("ziphius")
    try:
        if not planned:
            from ziphius.launchers.engines import native_in_foreground

            start_plan = native_in_foreground(resolved, os.environ, force=force)
            for line in start_plan.notes:
                logger.info(line)
            os.environ.update(start_plan.environment)  # its ranks inherit it
        return run(resolved)
    except ZiphiusError as e:
        logger.error(e.message)
        return e.exit_code


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


@contextlib.contextmanager
def _starting(manager: Manager, name: str) -> Iterator[Callable[[LoadProgress], None]]:
    """Show progress while a start waits. When it fails, show the log's last lines before the reason."""
    from ziphius.cli.output import note, phases

    try:
        with interrupts_once(), phases() as progress:
            yield progress
    except StartFailed as e:
        lines = manager.log_tail(name, _SHOWN_LOG_LINES)
        if any(e.message not in line for line in lines):  # otherwise the log's lines would only repeat the reason
            note(f"Last lines of {manager.log_path(name)}:")
            for line in lines:
                note(f"  {line}")
        raise StartFailed(f"{name} did not start: {e.message}") from e
    except SystemExit:
        note("interrupted: what was being started is stopped")
        raise


def _waiting() -> Callable[[float], None]:
    """A callback that says once that a stop takes longer than a second."""
    from ziphius.cli.output import note

    told = False

    def on_wait(seconds: float) -> None:
        nonlocal told
        if seconds > 1 and not told:
            told = True
            note("waiting for it to end; running requests may finish first ...")

    return on_wait


def _show_started(manager: Manager, started: Started, json: bool) -> None:
    from ziphius.cli import output

    if json:
        output.print_json(started.status)
        return
    record = manager.record(started.status.name)
    assert record is not None  # the record was written before anything ran
    output.print_started(started, record.resolved.config)
