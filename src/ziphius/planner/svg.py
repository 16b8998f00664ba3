"""svg: a plan as a picture, in which each GPU is a bar of what fills it."""

from __future__ import annotations

import textwrap
from xml.sax.saxutils import escape

from ziphius.planner.hardware import describe
from ziphius.planner.memory import GIB
from ziphius.planner.picture import LABELS, Bar, Key, bars
from ziphius.planner.plan import Plan

COLORS: dict[Key, str] = {
    "taken": "#8c8c8c",
    "experts": "#3b6fb6",
    "attention": "#e08a2e",
    "mlp": "#6aa84f",
    "vocabulary": "#8e63a8",
    "other": "#b5651d",
    "cache": "#2aa6a6",
    "reserve": "#d9d3b8",
    "free": "#f4f4f4",
    "over": "#cc3333",
}
_WIDTH, _LEFT, _BAR_WIDTH, _BAR_HEIGHT, _STEP = 960, 90, 840, 30, 44
_HEAD, _LINE, _LINE_CHARACTERS = 28, 20, 118
_FONT = 'font-family="system-ui, sans-serif"'


def svg(plan: Plan) -> str:
    """A whole SVG document. All bars have one scale; a segment shows its name and size under the mouse pointer."""
    drawn = bars(plan)
    longest = max((sum(s.nbytes for s in bar.segments) for bar in drawn), default=1) or 1
    lines = [line for text in _under_the_title(plan) for line in textwrap.wrap(text, _LINE_CHARACTERS)]
    top = _HEAD + _LINE * len(lines) + 24
    height = top + _STEP * len(drawn) + 64
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        _text(16, _HEAD, _title(plan), size=18, weight="bold"),
    ]
    parts += [_text(16, _HEAD + 2 + _LINE * i, line) for i, line in enumerate(lines, 1)]
    for i, bar in enumerate(drawn):
        parts += _bar(bar, top + i * _STEP, longest)
    parts += _legend(drawn, top + _STEP * len(drawn) + 22)
    return "\n".join([*parts, "</svg>", ""])


def _title(plan: Plan) -> str:
    shown = plan.shown
    if shown is None:
        return plan.model.name
    return f"{plan.model.name}: {shown.engine}, TP {shown.tp}, {shown.weights_format}"


def _under_the_title(plan: Plan) -> list[str]:
    shown = plan.shown
    if shown is None:
        return [describe(plan.host), "no size divides this model"]
    missing = f"; {shown.missing_gpus} of these GPUs would have to be added" if shown.missing_gpus else ""
    not_yet = f" ({shown.not_yet})" if shown.not_yet else ""
    return [f"on {describe(plan.host)}{missing}", shown.reason + not_yet]


def _bar(bar: Bar, y: int, longest: int) -> list[str]:
    parts = [_text(16, y + 14, bar.label), _text(16, y + 28, f"{bar.total_bytes / GIB:.1f} GiB", size=11)]
    x = float(_LEFT)
    for segment in bar.segments:
        width = _BAR_WIDTH * segment.nbytes / longest
        tip = f"{LABELS[segment.key]}: {segment.nbytes / GIB:.2f} GiB"
        if segment.nbytes:
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR_HEIGHT}" fill="{COLORS[segment.key]}">'
                f"<title>{escape(tip)}</title></rect>"
            )
        if width > 44 and segment.key not in ("free", "reserve"):
            parts.append(_text(x + 5, y + 20, f"{segment.nbytes / GIB:.1f}", fill="white", size=12))
        x += width
    end = _LEFT + _BAR_WIDTH * bar.total_bytes / longest
    dash = "" if bar.there else ' stroke-dasharray="5 4"'
    parts.append(f'<rect x="{_LEFT}" y="{y}" width="{end - _LEFT:.1f}" height="{_BAR_HEIGHT}" '
                 f'fill="none" stroke="#333"{dash}/>')  # fmt: skip
    return parts


def _legend(drawn: tuple[Bar, ...], y: int) -> list[str]:
    """What the colours mean, with the sizes in the fullest bar."""
    fullest = max(drawn, key=lambda bar: len([s for s in bar.segments if s.nbytes]), default=None)
    sizes = {segment.key: segment.nbytes for segment in fullest.segments} if fullest is not None else {}
    seen = {segment.key for bar in drawn for segment in bar.segments if segment.nbytes}
    parts: list[str] = []
    x = 16.0
    for key in (key for key in LABELS if key in seen):
        label = LABELS[key] + (f" {sizes[key] / GIB:.1f}" if sizes.get(key) else "")
        width = 34 + 6.8 * len(label)
        if x + width > _WIDTH:
            x, y = 16.0, y + 18
        parts.append(f'<rect x="{x:.0f}" y="{y - 10}" width="12" height="12" fill="{COLORS[key]}" stroke="#999"/>')
        parts.append(_text(x + 17, y, label, size=12))
        x += width
    return [*parts, _text(16, y + 20, "numbers in GiB", size=11)]


def _text(x: float, y: float, text: str, *, size: int = 14, fill: str = "#222", weight: str = "normal") -> str:
    style = f'{_FONT} font-size="{size}" fill="{fill}" font-weight="{weight}"'
    return f'<text x="{x:.0f}" y="{y:.0f}" {style}>{escape(text)}</text>'
