"""How a plan looks in a terminal: one screen, 100 columns wide or as wide as the terminal if that is less."""

from __future__ import annotations

import os
from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from ziphius.manager.doctor import Finding
from ziphius.planner.hardware import describe
from ziphius.planner.memory import GIB
from ziphius.planner.picture import Bar, Key, bars
from ziphius.planner.plan import Candidate, Plan
from ziphius.planner.roofline import CONTEXT_TOKENS

# Letter in the bar, style, and a word shorter than the picture's label.
_LETTERS: dict[Key, tuple[str, str, str]] = {
    "taken": ("x", "white on grey42", "taken"),
    "experts": ("E", "white on blue", "experts"),
    "attention": ("A", "black on dark_orange", "attention"),
    "mlp": ("S", "black on green", "shared/dense"),
    "vocabulary": ("V", "white on purple", "vocabulary"),
    "other": ("o", "white on orange4", "other"),
    "cache": ("K", "black on cyan", "cache"),
    "reserve": ("r", "black on khaki3", "reserve"),
    "free": (".", "grey62", "free"),
    "over": ("!", "white on red", "too much"),
}
_MARKS = {"fits": ("+", "green"), "short": ("~", "yellow"), "too_big": ("-", "red"), "unsupported": ("-", "red")}
_NARROWEST, _WIDEST = 80, 100
_CELL, _BEFORE_CELLS, _BESIDE_BAR = 27, 13, 22


def print_plan(plan: Plan, console: Console | None = None) -> None:
    console = console or Console(highlight=False, soft_wrap=True)
    # In a pipe no width has to be kept.
    known = console.is_terminal or "COLUMNS" in os.environ
    width = max(_NARROWEST, min(_WIDEST, console.width)) if known else _WIDEST
    for line in plan_lines(plan, width):
        console.print(line, soft_wrap=True, highlight=False)


def plan_lines(plan: Plan, width: int = _WIDEST) -> Iterable[Text]:
    """The lines of the screen. Only a command may be longer than `width`, so that its paths can be copied."""
    yield from _head(plan, width)
    yield Text("")
    yield from _table(plan, width)
    yield Text("")
    yield from _why(plan, width)
    if plan.shown is not None and plan.shown.weights is not None:
        yield Text("")
        yield from _picture(plan, plan.shown, width)
    speeds = list(_speeds(plan, width))
    if speeds:
        yield Text("")
        yield from speeds
    yield Text("")
    yield from _verdict(plan, width)


def _head(plan: Plan, width: int) -> Iterable[Text]:
    model = plan.model
    # A tied head makes one parameter work twice, so a dense model's count may exceed its size.
    active = f", {_count(model.active_parameters)} active" if model.active_parameters < 0.9 * model.parameters else ""
    size = f"{_count(model.parameters)} parameters{active}, {model.layers} layers, context {plan.context_length:,}"
    if len(model.name) + 2 + len(size) <= width:
        yield Text.assemble((model.name, "bold"), f"  {size}")
    else:
        yield Text(model.name, style="bold")
        yield from map(Text, wrapped(size.split(), width))
    cache = f"cache {model.kv_bytes_per_token:,} bytes a token" + (
        ", whole on every rank" if model.kv_replicated else ""
    )
    yield from map(Text, wrapped(f"{describe(plan.host)}; {cache}".split(), width))
    for note in plan.notes:
        yield from (Text(line, style="yellow") for line in wrapped(f"note: {note}".split(), width))


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.0f} M"


def _table(plan: Plan, width: int) -> Iterable[Text]:
    """A row for each size and engine; a size that does not divide the model is one row with the reason."""
    formats = list(dict.fromkeys(c.weights_format for c in plan.candidates))
    room = min(_CELL, (width - _BEFORE_CELLS + 1) // max(1, len(formats)))
    yield Text(f"{'TP':>3}  {'engine':<7} " + "".join(f"{f:<{room}}" for f in formats).rstrip(), style="bold")
    rows: dict[tuple[int, str], list[Candidate]] = {}
    for c in plan.candidates:
        rows.setdefault((c.tp, c.engine), []).append(c)
    told: set[int] = set()
    for (tp, engine), cells in rows.items():
        if all(c.verdict == "invalid" for c in cells):
            same = all(c.failures == cells[0].failures for c in plan.candidates if c.tp == tp)
            if not (same and tp in told):
                who = f"{'':<7}" if same else f"{engine:<7}"
                yield Text.assemble(f"{tp:>3}  {who} ", (f"- {_cut(cells[0].reason, width - 16)}", "red"))
            told.add(tp)
            continue
        by_format = {c.weights_format: c for c in cells}
        row = Text(f"{tp:>3}  {engine:<7} ")
        for f in formats:
            row.append_text(_cell(by_format.get(f), room))
        row.rstrip()
        yield row
    legend = "+ fits, o would but not in this version yet, ~ shorter context, - no; GiB: weights + cache = tokens"
    broken = [c for c in plan.candidates if c.verdict == "invalid" and c.tp not in told]
    if broken:
        in_blocks = dict.fromkeys(c.weights_format for c in broken if c.tp == broken[0].tp)
        legend += f"; TP {broken[0].tp} in {' and '.join(in_blocks)}: {broken[0].failures[0].message}"
    yield from (Text(line, style="dim") for line in wrapped(legend.split(), width))


def _cell(c: Candidate | None, room: int) -> Text:
    if c is None:
        return Text(" " * room)
    mark, style = _MARKS.get(c.verdict, ("-", "red"))
    if c.verdict in ("fits", "short"):
        if c.not_yet:
            mark, style = "o", "cyan"
        texts = _fitting(c)
        style = "dim" if c.missing_gpus else style
    elif c.verdict == "too_big":
        texts = [f"{c.loaded_bytes / GIB:.1f} of {c.memory_bytes / GIB:.1f}"]
        if c.loaded_bytes < c.memory_bytes:
            texts = ["loads bf16 first"] if c.engine == "sglang" else [f"{texts[0]}: no room", "no room for cache"]
    elif c.verdict == "invalid":
        texts = [c.failures[0].message.split(" = ", 1)[-1].split(" (")[0]]
    else:
        texts = ["not possible"]
    marked = [f"{mark} {text}" for text in texts]
    return Text(f"{next((m for m in marked if len(m) < room), _cut(marked[-1], room - 1)):<{room}}", style=style)


def _fitting(c: Candidate) -> list[str]:
    """The text of a cell for what fits: first for a wide cell, then for a narrow one."""
    loaded, cache, tokens = f"{c.loaded_bytes / GIB:.1f}", f"{c.kv_bytes / GIB:.1f}", _short(c.kv_tokens)
    if c.missing_gpus:
        return [f"{loaded}, {tokens} (+{c.missing_gpus} GPU{'s' * (c.missing_gpus > 1)})",
                f"{loaded}, {tokens} (+{c.missing_gpus})"]  # fmt: skip
    return [f"{loaded} + {cache} = {tokens}", f"{loaded}+{cache} = {tokens}"]


def _short(tokens: int) -> str:
    return (
        f"{tokens / 1e6:.2f}M" if tokens >= 1_000_000 else f"{tokens / 1000:.0f}k" if tokens >= 10_000 else str(tokens)
    )


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3].rstrip() + "..."


def _why(plan: Plan, width: int) -> Iterable[Text]:
    """One line for each tensor-parallel size that the GPUs here allow: what fits, what does not, and why."""
    there = max(1, len([g for g in plan.host.gpus if not g.mig]))
    for tp in sorted({c.tp for c in plan.candidates}, reverse=True):
        if tp <= there or plan.request.tp is not None:
            begin = f"TP {tp:<3}"
            told = _size_line([c for c in plan.candidates if c.tp == tp])
            for i, line in enumerate(wrapped(told.plain.split(), width - len(begin))):
                yield Text((" " * len(begin) if i else begin) + line, style=told.style)


def _size_line(cells: list[Candidate]) -> Text:
    if all(c.verdict == "invalid" for c in cells):
        return Text(f"cannot be: {cells[0].reason}", style="red")
    order = list(dict.fromkeys(c.weights_format for c in cells))
    fitting = [c for c in cells if c.verdict in ("fits", "short")]
    best = min(fitting, key=lambda c: (order.index(c.weights_format), not c.runs, c.engine != "native"), default=None)
    tried = order[: order.index(best.weights_format)] if best is not None else order
    refused = [c for c in cells if c.weights_format in tried and c.verdict == "too_big"]
    refused = [c for c in refused if c.engine == refused[0].engine]
    needs = ", ".join(f"{c.weights_format} {c.loaded_bytes / GIB:.1f}" for c in refused)
    if refused:
        needs += f" of {refused[0].memory_bytes / GIB:.1f} GiB"
    if best is None:
        reason = f"needs {needs}" if needs else cells[0].reason
        return Text(f"does not fit: {reason}", style="red")
    text = f"{best.weights_format} {'would fit' if best.not_yet else 'fits'}: {best.loaded_bytes / GIB:.1f}"
    text += f" + {best.kv_bytes / GIB:.1f} cache = {_short(best.kv_tokens)} tokens"
    if best.verdict == "short":
        text += ", a shorter context"
    text = f"needs {needs}; {text}" if needs else f"{text}: {best.requests:.1f} x that context"
    if best.engine != "native":
        text += f" ({best.engine})"
    if best.missing_gpus:
        are = "is" if best.missing_gpus == 1 else "are"
        return Text(f"{text}; but {best.missing_gpus} of these {best.tp} GPUs {are} not there", style="yellow")
    return Text(text, style="cyan" if best.not_yet else "green")


def _picture(plan: Plan, shown: Candidate, width: int) -> Iterable[Text]:
    drawn = bars(plan)
    longest = max(sum(s.nbytes for s in bar.segments) for bar in drawn)
    groups: list[tuple[list[str], Bar]] = []
    for bar in drawn:
        if groups and groups[-1][1].segments == bar.segments and groups[-1][1].there == bar.there:
            groups[-1][0].append(bar.label)
        else:
            groups.append(([bar.label], bar))
    names = [names[0] if len(names) == 1 else f"{names[0]}-{names[-1].removeprefix('GPU ')}" for names, _ in groups]
    before = max(9, *map(len, names)) + 1
    for name, (_, bar) in zip(names, groups, strict=True):
        room = width - _BESIDE_BAR - (before - 10)
        yield Text.assemble(f"{name:<{before}}", _drawn(bar, longest, room), f" {bar.total_bytes / GIB:.1f} GiB")
    words = [f"{shown.engine}, TP {shown.tp}, {shown.weights_format}:", *_legend(groups, shown)]
    yield from (Text(" " * before + line) for line in wrapped(words, width - before))


def _drawn(bar: Bar, longest: int, room: int) -> Text:
    text = Text()
    done = drawn = 0
    for segment in bar.segments:
        done += segment.nbytes
        upto = round(room * done / longest)
        letter, style, _ = _LETTERS[segment.key]
        text.append(letter * (upto - drawn), style=style)
        drawn = upto
    return text


def _legend(groups: list[tuple[list[str], Bar]], shown: Candidate) -> list[str]:
    fullest = max((bar for _, bar in groups), key=lambda b: len([s for s in b.segments if s.nbytes]))
    told = [s for s in fullest.segments if s.nbytes > GIB // 20]
    words = [f"{_LETTERS[s.key][0]} {_LETTERS[s.key][2]} {s.nbytes / GIB:.1f}" for s in told]
    if shown.tp > 1 and shown.weights is not None and shown.weights.attention_replicated > GIB // 20:
        whole = f" ({shown.weights.attention_replicated / GIB:.1f} on every rank)"
        words = [word + whole if word.startswith("A ") else word for word in words]
    return words


def wrapped(words: list[str], width: int, end: str = "") -> Iterable[str]:
    """`words` (which may be phrases) in lines of at most `width`, all but the last ending in `end`."""
    line = ""
    for word in words:
        if line and len(line) + 1 + len(word) > width - len(end):
            yield line + end
            line = "  " + word if end else word
        else:
            line = f"{line} {word}" if line else word
    if line:
        yield line


def _speeds(plan: Plan, width: int) -> Iterable[Text]:
    told = [c for c in plan.candidates if c.roofline and c.verdict in ("fits", "short") and not c.missing_gpus]
    native = [c for c in told if c.engine == "native"] or told
    if not native:
        return
    title = f"Tokens/s at most (roofline: bytes and operations alone; {CONTEXT_TOKENS:,} tokens cached a request)"
    yield from (Text(line, style="bold") for line in wrapped(title.split(), width))
    batches = [bound.batch for bound in native[0].roofline.decode] if native[0].roofline else []
    yield Text(f"{'':<14}" + "".join(f"{f'batch {b}':>12}" for b in batches) + f"{'prefill':>12}", style="dim")
    for c in native:
        if c.roofline is not None:
            cells = "".join(f"{bound.tokens_per_s:>12,.0f}" for bound in c.roofline.decode)
            yield Text(f"TP {c.tp:<3} {c.weights_format:<7}{cells}{c.roofline.prefill_tokens_per_s:>12,.0f}")


def _verdict(plan: Plan, width: int) -> Iterable[Text]:
    best = plan.recommendation
    if best is not None:
        told = (f"Recommended: {best.engine}, TP {best.tp}, {best.weights_format}, context {best.context_length:,}, "
                f"{best.mem_fraction:.0%} of the free memory; {best.kv_tokens:,} tokens of cache")  # fmt: skip
        yield from (Text(line, style="green") for line in wrapped(told.split(), width))
        yield from _command(best.command, width)
        planned = next((c for c in plan.candidates if c.verdict == "fits" and c.engine == "native"
                        and not c.missing_gpus and c.tp == best.tp and c.weights_format == best.weights_format
                        and c.not_yet), None)  # fmt: skip
        if planned is not None:
            yield Text(f"  native: {planned.not_yet}", style="dim")
        return
    if plan.fits:
        yield Text("It fits, but this version of Ziphius cannot run what fits; nearest changes:", style="bold yellow")
    else:
        yield Text("It does not fit; nearest changes:", style="bold red")
    if not plan.alternatives:
        sizes = ", ".join(map(str, plan.valid_tp))
        yield Text(f"  none; sizes that divide this model are {sizes}" if plan.device == "cuda" else "  none here")
    for alternative in plan.alternatives:
        words = f"{alternative.change}: {alternative.detail}".split()
        yield from (Text("  " + line) for line in wrapped(words, width - 2))
        if alternative.command:
            yield from _command(alternative.command, width)


def _command(command: str, width: int) -> Iterable[Text]:
    # A quoted argument must not be broken. It is rare, and a long line does no harm.
    words = [command] if "'" in command else command.split()
    yield from (Text("  " + line, style="bold") for line in wrapped(words, width - 2, " \\"))


def print_findings(findings: Iterable[Finding], console: Console | None = None) -> None:
    console = console or Console(highlight=False, soft_wrap=True)
    for finding in findings:
        style = {"ok": "green", "warning": "yellow", "problem": "red"}[finding.status]
        line = Text.assemble((f"{finding.status:<8}", style), f"{finding.name:<22} {finding.detail}")
        console.print(line, soft_wrap=True, highlight=False)
        if finding.remedy is not None:
            console.print(Text(f"{'':<31}-> {finding.remedy}"), soft_wrap=True, highlight=False)
