"""The verbs `plan` and `doctor`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ziphius.cli.options import ConfigFile, Json, resolved_from
from ziphius.errors import ConfigError, ModelError
from ziphius.formats import plan_choices

if TYPE_CHECKING:
    from ziphius.planner.hardware import Host
    from ziphius.planner.plan import Plan

_BAD_INPUT = 2


def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a folder, a config.json or a .gguf file.")],
    gpu: Annotated[str | None, typer.Option(metavar="TEXT", help="Plan for these, as 4xH200 or 2xH100,2xL40S.")] = None,
    host_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Plan for a recorded host (JSON).")] = None,
    engine: Annotated[str | None, typer.Option(metavar="[native|sglang]", help="Only this engine.")] = None,
    tp: Annotated[int | None, typer.Option(min=1, max=1024, help="Only this tensor-parallel size.")] = None,
    weights_format: Annotated[
        str | None, typer.Option(metavar=f"[{'|'.join(plan_choices())}]", help="Only this weights format.")
    ] = None,
    mem_fraction: Annotated[
        float | None, typer.Option(min=0.01, max=0.99, help="Share of free GPU memory for weights and cache.")
    ] = None,
    context_length: Annotated[
        int | None, typer.Option(min=1, help="Longest prompt + answer in tokens (default: the model's).")
    ] = None,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the plan into an SVG file.")] = None,
    json: Json = False,
) -> None:
    """Say what fits and why, before anything is started.

    Exit status: 0 something fits that this version can run, 1 nothing does, 2 bad input.
    """
    from ziphius.planner.plan import PlanRequest

    request: dict[str, Any] = {
        "engine": _one_of("engine", engine, ("native", "sglang")),
        "tp": tp,
        "weights_format": _one_of("weights-format", weights_format, plan_choices()),
        "mem_fraction": mem_fraction,
        "context_length": context_length,
    }
    try:
        made = _make_plan(model, _host(gpu, host_file), PlanRequest(**request))
        if svg is not None:
            _write_svg(made, svg)
    except (ConfigError, ModelError) as e:
        # Every error in the question has status 2, because 1 is the answer "it does not fit".
        print(f"ziphius: {e.message}", file=sys.stderr)
        raise typer.Exit(_BAD_INPUT) from None
    if json:
        from ziphius.cli.output import print_json

        print_json(made)
        if made.fits and made.recommendation is None:  # the screen of `print_plan` says so too
            print("ziphius: it fits, but this version of Ziphius cannot run what fits", file=sys.stderr)
    else:
        from ziphius.cli.plan_output import print_plan

        print_plan(made)
    raise typer.Exit(0 if made.recommendation is not None else 1)


def _one_of(option: str, value: str | None, choices: tuple[str, ...]) -> str | None:
    if value is not None and value not in choices:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(choices)}", param_hint=f"--{option}")
    return value


def _host(gpu: str | None, host_file: Path | None) -> Host:
    from ziphius.planner.hardware import parse_gpus, read_host

    if gpu is not None and host_file is not None:
        raise ConfigError("give --gpu or --host-file, not both")
    if gpu is not None:
        return parse_gpus(gpu)
    if host_file is not None:
        return read_host(host_file)
    from ziphius.planner.probe import probe_host

    return probe_host()


def _make_plan(model: str, host: Host, request: Any) -> Plan:
    from ziphius.planner.find_model import find_model
    from ziphius.planner.planner import build_plan

    return build_plan(find_model(model, os.environ), host, request)


def _write_svg(made: Plan, path: Path) -> None:
    from ziphius.planner.svg import svg

    try:
        path.write_text(svg(made), encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"cannot write {path}: {e.strerror}") from e


def doctor(
    config: ConfigFile = None,
    record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write this host down, for `plan --host-file` elsewhere.")
    ] = None,
    json: Json = False,
) -> None:
    """Look for what would keep a server from running well. Exit status: 0, or 1 when there is a problem."""
    from ziphius.installation import ziphius_home
    from ziphius.manager.doctor import collect, judge
    from ziphius.planner.probe import probe_host

    settings = resolved_from({}, config).config
    host = probe_host()
    if record is not None:
        _record(host, record)
    findings = judge(collect(host, os.environ, ziphius_home(os.environ), (settings.host, settings.port)))
    if json:
        from ziphius.cli.output import print_json

        print_json(findings)
    else:
        from ziphius.cli.plan_output import print_findings

        print_findings(findings)
    raise typer.Exit(1 if any(f.status == "problem" for f in findings) else 0)


def _record(host: Host, path: Path) -> None:
    import msgspec

    recorded = msgspec.structs.replace(host, origin="recorded")
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(recorded), indent=2) + b"\n")
    except OSError as e:
        raise ConfigError(f"cannot write {path}: {e.strerror}") from e
