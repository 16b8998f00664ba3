"""How a plan looks in a terminal: one screen of at most 100 columns; it decides nothing."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from ziphius.planner.doctor import Finding
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
_CELL, _BAR, _WIDTH = 27, 78, 100


def print_plan(plan: Plan, console: Console | None = None) -> None:
    console = console or Console(highlight=False, soft_wrap=True)
    for line in plan_lines(plan):
        console.print(line, soft_wrap=True, highlight=False)


def plan_lines(plan: Plan) -> Iterable[Text]:
    yield from _head(plan)
    yield Text("")
    yield from _table(plan)
    yield Text("")
    yield from _why(plan)
    if plan.shown is not None and plan.shown.weights is not None:
        yield Text("")
        yield from _picture(plan, plan.shown)
    speeds = list(_speeds(plan))
    if speeds:
        yield Text("")
        yield from speeds
    yield Text("")
    yield from _verdict(plan)


def _head(plan: Plan) -> Iterable[Text]:
    model = plan.model
    # A tied head makes one parameter work twice, so a dense model's count may exceed its size.
    active = f", {_count(model.active_parameters)} active" if model.active_parameters < 0.9 * model.parameters else ""
    size = f"{_count(model.parameters)} parameters{active}, {model.layers} layers, context {plan.context_length:,}"
    yield Text.assemble((model.name, "bold"), f"  {size}")
    cache = f"cache {model.kv_bytes_per_token:,} bytes a token" + (
        ", whole on every rank" if model.kv_replicated else ""
    )
    for line in wrapped(f"{describe(plan.host)}; {cache}".split(), _WIDTH):
        yield Text(line)
    for note in plan.notes:
        yield from (Text(line, style="yellow") for line in wrapped(f"note: {note}".split(), _WIDTH))


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.0f} M"


def _table(plan: Plan) -> Iterable[Text]:
    """A row for each size and engine; a size that does not divide the model is one row with the reason."""
    formats = list(dict.fromkeys(c.weights_format for c in plan.candidates))
    yield Text(f"{'TP':>3}  {'engine':<7} " + "".join(f"{f:<{_CELL}}" for f in formats).rstrip(), style="bold")
    rows: dict[tuple[int, str], list[Candidate]] = {}
    for c in plan.candidates:
        rows.setdefault((c.tp, c.engine), []).append(c)
    told: set[int] = set()
    for (tp, engine), cells in rows.items():
        if all(c.verdict == "invalid" for c in cells):
            same = all(c.failures == cells[0].failures for c in plan.candidates if c.tp == tp)
            if not (same and tp in told):
                who = f"{'':<7}" if same else f"{engine:<7}"
                yield Text.assemble(f"{tp:>3}  {who} ", (f"- {_cut(cells[0].reason, 84)}", "red"))
            told.add(tp)
            continue
        by_format = {c.weights_format: c for c in cells}
        row = Text(f"{tp:>3}  {engine:<7} ")
        for f in formats:
            row.append_text(_cell(by_format.get(f)))
        row.rstrip()
        yield row
    yield Text("+ fits, o would but not in this version yet, ~ shorter context, - no; GiB: weights + cache = tokens",
               style="dim")  # fmt: skip


def _cell(c: Candidate | None) -> Text:
    if c is None:
        return Text(" " * _CELL)
    mark, style = _MARKS.get(c.verdict, ("-", "red"))
    if c.verdict in ("fits", "short"):
        if c.not_yet:
            mark, style = "o", "cyan"
        text = f"{c.loaded_bytes / GIB:.1f} + {c.kv_bytes / GIB:.1f} = {_short(c.kv_tokens)}"
        if c.missing_gpus:
            style = "dim"
            text = f"{c.loaded_bytes / GIB:.1f}, {_short(c.kv_tokens)} (+{c.missing_gpus} GPUs)"
    elif c.verdict == "too_big":
        text = f"{c.loaded_bytes / GIB:.1f} of {c.memory_bytes / GIB:.1f}"
        if c.loaded_bytes < c.memory_bytes:
            text = "loads bf16 first" if c.engine == "sglang" else f"{text}: no room"
    elif c.verdict == "invalid":
        text = c.failures[0].message.split(" = ", 1)[-1].split(" (")[0]
    else:
        text = "not possible"
    return Text(f"{_cut(f'{mark} {text}', _CELL - 1):<{_CELL}}", style=style)


def _short(tokens: int) -> str:
    return (
        f"{tokens / 1e6:.2f}M" if tokens >= 1_000_000 else f"{tokens / 1000:.0f}k" if tokens >= 10_000 else str(tokens)
    )


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3].rstrip() + "..."


def _why(plan: Plan) -> Iterable[Text]:
    """One line for each size that the GPUs which are there allow: what fits in it, and what does not, and why."""
    there = max(1, len([g for g in plan.host.gpus if not g.mig]))
    for tp in sorted({c.tp for c in plan.candidates}, reverse=True):
        if tp <= there or plan.request.tp is not None:
            yield _size_line(tp, [c for c in plan.candidates if c.tp == tp])


def _size_line(tp: int, cells: list[Candidate]) -> Text:
    begin = f"TP {tp}  "
    if all(c.verdict == "invalid" for c in cells):
        return Text(_cut(f"{begin}cannot be: {cells[0].reason}", _WIDTH), style="red")
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
        return Text(_cut(f"{begin}does not fit: {reason}", _WIDTH), style="red")
    text = f"{best.weights_format} {'would fit' if best.not_yet else 'fits'}: {best.loaded_bytes / GIB:.1f}"
    text += f" + {best.kv_bytes / GIB:.1f} cache = {_short(best.kv_tokens)} tokens"
    if best.verdict == "short":
        text += ", a shorter context"
    text = f"{begin}needs {needs}; {text}" if needs else f"{begin}{text}: {best.requests:.1f} x that context"
    if best.engine != "native":
        text += f" ({best.engine})"
    return Text(text, style="cyan" if best.not_yet else "green")


def _picture(plan: Plan, shown: Candidate) -> Iterable[Text]:
    drawn = bars(plan)
    longest = max(sum(s.nbytes for s in bar.segments) for bar in drawn)
    groups: list[tuple[list[str], Bar]] = []
    for bar in drawn:
        if groups and groups[-1][1].segments == bar.segments and groups[-1][1].there == bar.there:
            groups[-1][0].append(bar.label)
        else:
            groups.append(([bar.label], bar))
    for labels, bar in groups:
        label = labels[0] if len(labels) == 1 else f"{labels[0]}-{labels[-1].removeprefix('GPU ')}"
        yield Text.assemble(f"{label:<9} ", _drawn(bar, longest), f" {bar.total_bytes / GIB:.1f} GiB")
    words = [f"{shown.engine}, TP {shown.tp}, {shown.weights_format}:", *_legend(groups, shown)]
    yield from (Text(" " * 10 + line) for line in wrapped(words, _WIDTH - 10))


def _drawn(bar: Bar, longest: int) -> Text:
    text = Text()
    done = drawn = 0
    for segment in bar.segments:
        done += segment.nbytes
        upto = round(_BAR * done / longest)
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


def _speeds(plan: Plan) -> Iterable[Text]:
    told = [c for c in plan.candidates if c.roofline and c.verdict in ("fits", "short") and not c.missing_gpus]
    native = [c for c in told if c.engine == "native"] or told
    if not native:
        return
    title = f"Tokens/s at most (roofline: bytes and operations alone; {CONTEXT_TOKENS:,} tokens cached a request)"
    yield Text(title, style="bold")
    batches = [bound.batch for bound in native[0].roofline.decode] if native[0].roofline else []
    yield Text(f"{'':<14}" + "".join(f"{f'batch {b}':>12}" for b in batches) + f"{'prefill':>12}", style="dim")
    for c in native:
        if c.roofline is not None:
            cells = "".join(f"{bound.tokens_per_s:>12,.0f}" for bound in c.roofline.decode)
            yield Text(f"TP {c.tp:<3} {c.weights_format:<7}{cells}{c.roofline.prefill_tokens_per_s:>12,.0f}")


def _verdict(plan: Plan) -> Iterable[Text]:
    best = plan.recommendation
    if best is not None:
        yield Text.assemble(("Recommended: ", "bold green"), f"{best.engine}, TP {best.tp}, {best.weights_format}, "
                            f"context {best.context_length:,}, {best.mem_fraction:.0%} of the free memory; "
                            f"{best.kv_tokens:,} tokens of cache")  # fmt: skip
        yield from _command(best.command)
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
        yield from (Text("  " + line) for line in wrapped(words, _WIDTH - 2))
        if alternative.command:
            yield from _command(alternative.command)


def _command(command: str) -> Iterable[Text]:
    # Quoted arguments must stay whole; those are rare, and a long line does no harm.
    words = [command] if "'" in command else command.split()
    yield from (Text("  " + line, style="bold") for line in wrapped(words, _WIDTH - 2, " \\"))


def print_findings(findings: Iterable[Finding], console: Console | None = None) -> None:
    console = console or Console(highlight=False, soft_wrap=True)
    for finding in findings:
        style = {"ok": "green", "warning": "yellow", "problem": "red"}[finding.status]
        line = Text.assemble((f"{finding.status:<8}", style), f"{finding.name:<22} {finding.detail}")
        console.print(line, soft_wrap=True, highlight=False)
        if finding.remedy is not None:
            console.print(Text(f"{'':<31}-> {finding.remedy}"), soft_wrap=True, highlight=False)
