"""How results and progress look in a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import msgspec

from ziphius.config import Resolved, ServeConfig, option_fields

if TYPE_CHECKING:  # rich takes long to import, and most verbs do without
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from ziphius.ipc.messages import LoadProgress
    from ziphius.manager.manager import Started
    from ziphius.manager.status import InstanceStatus

_MASK = "********"


def note(text: str) -> None:
    """Print to stderr, for the person at the terminal. stdout is for results only."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def size(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"


def duration(seconds: float) -> str:
    total = int(seconds)
    for length, unit, smaller, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if total >= length:
            return f"{total // length} {unit} {total % length // smaller} {small}"
    return f"{total} s"


def print_status(status: InstanceStatus) -> None:
    reason = f": {status.reason}" if status.reason else ""
    print(f"{status.name} is {status.state}{reason}")
    rows = [("model", status.model), ("url", status.url), ("pid", status.pid)]
    rows.insert(2, ("job", status.job))
    if status.pid is not None and status.uptime_s is not None:
        rows.append(("uptime", duration(status.uptime_s)))
    if status.progress is not None:
        rows.append(("progress", describe(status.progress)))
    elif status.running is not None:
        rows.append(("requests", f"{status.running} running, {status.queued or 0} queued"))
    if status.progress is None and status.generated_tokens_per_s is not None:
        speed = f"{status.generated_tokens_per_s:.1f} tokens/s generated"
        rows.append(("speed", f"{speed}, {status.prompt_tokens_per_s or 0:.1f} tokens/s of prompts"))
    if status.kv_tokens:
        predicted = f" ({status.predicted_kv_tokens:,} predicted)" if status.predicted_kv_tokens else ""
        rows.append(("kv cache", f"{status.kv_tokens_used or 0} of {status.kv_tokens} tokens{predicted}"))
    if status.memory_bytes is not None:
        rows.append(("memory", size(status.memory_bytes)))
    rows.append(("log", status.log))
    for label, value in rows:
        if value is not None:
            print(f"  {label:<9} {value}")


def print_statuses(statuses: Iterable[InstanceStatus]) -> None:
    rows = [("NAME", "STATE", "URL", "MODEL")]
    rows += [(s.name, s.state.value, s.url or "-", s.model or "-") for s in statuses]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]))


def print_started(started: Started, config: ServeConfig) -> None:
    """`config`: the settings that were started."""
    status = started.status
    if config.node_rank > 0:
        print(f"{status.name} runs, as machine {config.node_rank} of {config.nnodes}: the API is machine 0's")
        print(f"  pid    {status.pid}\n  log    {status.log}")
        return
    print(f"{status.name} {'runs already' if started.already else 'runs'} at {status.url}")
    print(f"  model  {status.model}\n  pid    {status.pid}\n  log    {status.log}")
    if status.predicted_kv_tokens and status.kv_tokens:
        from ziphius.planner.measured import TOLERANCE, gap_of  # here: `status` does without it

        gap = gap_of(status.predicted_kv_tokens, status.kv_tokens)
        more = f", more than {TOLERANCE:.0%} off" if abs(gap) > TOLERANCE else ""
        print(f"  cache  {status.kv_tokens:,} tokens; {status.predicted_kv_tokens:,} were predicted ({gap:+.1%}{more})")
    key = "" if config.api_key is None else ' -H "Authorization: Bearer $ZIPHIUS_API_KEY"'
    body = {"model": status.model, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    text = msgspec.json.encode(body).decode().replace("'", "'\\''")
    print(f"Try it:\n  curl {status.url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{text}'")


class Setting(msgspec.Struct):
    """One line of `ziphius config`."""

    name: str
    value: str | int | float | bool | None
    origin: str


def settings(resolved: Resolved) -> list[Setting]:
    """Every value and where it came from; secrets are masked."""
    found = []
    for option in option_fields():
        value = getattr(resolved.config, option.name)
        masked = _MASK if option.metadata["secret"] and value is not None else value
        found.append(Setting(option.name, masked, resolved.origins[option.name]))
    return found


def print_settings(found: list[Setting]) -> None:
    shown = [(s.name, "-" if s.value is None else str(s.value), s.origin) for s in found]
    name_width, value_width = (max(len(row[i]) for row in shown) for i in (0, 1))
    for name, value, origin in shown:
        print(f"{name:<{name_width}}  {value:<{value_width}}  {origin}")


def describe(progress: LoadProgress) -> str:
    """`loading 12 of 30 shards (model.safetensors)`."""
    if progress.unit == "bytes":
        amount = f"{size(progress.done)} of {size(progress.total)}" if progress.total else size(progress.done)
    else:
        amount = f"{progress.done} of {progress.total} {progress.unit}".strip()
    parts = [progress.phase, amount if progress.total or progress.done else "", f"({progress.detail})"]
    return " ".join(part for part in parts if part not in ("", "()"))


class PhaseLines:
    """Progress where there is no terminal: a line when a phase begins."""

    def __init__(self) -> None:
        self._phase = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, progress: LoadProgress) -> None:
        if progress.phase and progress.phase != self._phase:
            self._phase = progress.phase
            note(f"{progress.phase} ..." + (f" ({progress.detail})" if progress.detail else ""))


class PhaseBars:
    """Progress in a terminal: a line per phase, with a bar where the total is known."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        columns = (SpinnerColumn(finished_text="[green]✓"), TextColumn("{task.description}"), BarColumn(24))
        self._bars: Bars = Bars(*columns, TimeElapsedColumn(), console=Console(stderr=True))
        self._task: TaskID | None = None
        self._phase = ""

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            self._finish()
        self._bars.stop()

    def __call__(self, progress: LoadProgress) -> None:
        if not progress.phase:
            return
        if progress.phase != self._phase:
            self._finish()
            self._phase = progress.phase
            self._task = self._bars.add_task("", total=None)
        assert self._task is not None
        # A bar that reaches its total stops its clock, but the phase may go on.
        total = progress.total + 1 if progress.total else None
        self._bars.update(self._task, description=describe(progress), completed=progress.done, total=total)

    def _finish(self) -> None:
        if self._task is not None:
            self._bars.update(self._task, description=self._phase, completed=1, total=1)


def phases() -> PhaseLines | PhaseBars:
    return PhaseBars() if sys.stderr.isatty() else PhaseLines()
