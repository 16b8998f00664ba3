"""A plan as a picture: each GPU a bar of what fills it; a string of SVG, written by the caller."""

from __future__ import annotations

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
_TOP = 74
_FONT = 'font-family="system-ui, sans-serif"'


def svg(plan: Plan) -> str:
    """A whole SVG document. Bars share one scale; hovering over a segment tells its name and size."""
    drawn = bars(plan)
    longest = max((sum(s.nbytes for s in bar.segments) for bar in drawn), default=1) or 1
    height = _TOP + _STEP * len(drawn) + 60
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        _text(16, 28, _title(plan), size=18, weight="bold"),
        _text(16, 52, _subtitle(plan)),
    ]
    for i, bar in enumerate(drawn):
        parts += _bar(bar, _TOP + i * _STEP, longest)
    parts += _legend(drawn, _TOP + _STEP * len(drawn) + 24)
    return "\n".join([*parts, "</svg>", ""])


def _title(plan: Plan) -> str:
    shown = plan.shown
    if shown is None:
        return f"{plan.model.name} on {describe(plan.host)}"
    return f"{plan.model.name}: {shown.engine}, TP {shown.tp}, {shown.weights_format} on {describe(plan.host)}"


def _subtitle(plan: Plan) -> str:
    return plan.shown.reason if plan.shown is not None else "no size divides this model"


def _bar(bar: Bar, y: int, longest: int) -> list[str]:
    parts = [_text(16, y + 20, bar.label)]
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
    seen = {segment.key for bar in drawn for segment in bar.segments if segment.nbytes}
    parts: list[str] = []
    x = 16.0
    for key in (key for key in LABELS if key in seen):
        width = 28 + 6.6 * len(LABELS[key])
        if x + width > _WIDTH:
            x, y = 16.0, y + 18
        parts.append(f'<rect x="{x:.0f}" y="{y - 10}" width="12" height="12" fill="{COLORS[key]}" stroke="#999"/>')
        parts.append(_text(x + 17, y, LABELS[key], size=12))
        x += width
    return [*parts, _text(16, y + 22, "numbers in GiB", size=11)]


def _text(x: float, y: float, text: str, *, size: int = 14, fill: str = "#222", weight: str = "normal") -> str:
    style = f'{_FONT} font-size="{size}" fill="{fill}" font-weight="{weight}"'
    return f'<text x="{x:.0f}" y="{y:.0f}" {style}>{escape(text)}</text>'
