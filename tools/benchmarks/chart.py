"""A chart of lines, drawn as SVG: one line a series, its values on a logarithmic axis."""

import math
from collections.abc import Mapping
from html import escape
from pathlib import Path

_WIDTH, _LEFT, _RIGHT, _TOP, _HEIGHT = 760, 70, 20, 40, 300  # of the whole; the margins; of the plot itself
_LINE = 20  # of the legend
_COLOURS = ("#0b6e4f", "#3a86ff", "#8338ec", "#d00000", "#f48c06")


def draw(path: Path, title: str, x_title: str, series: Mapping[str, Mapping[int, float]]) -> None:
    """Write a chart.

    Args:
        path: of the SVG.
        title, x_title: what is drawn, and over what.
        series: by its name, the values by x. The x are spread evenly, whatever lies between them.
    """
    xs = sorted({x for points in series.values() for x in points})
    values = [v for points in series.values() for v in points.values() if v > 0]
    if not values:
        return
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    bottom = _TOP + _HEIGHT

    def place(x: int, value: float) -> tuple[float, float]:
        across = (xs.index(x) + 0.5) / len(xs) * (_WIDTH - _LEFT - _RIGHT)
        return _LEFT + across, bottom - (math.log10(value) - low) / (high - low) * _HEIGHT

    parts = [_text(_LEFT, 24, title, size=16)]
    for power in range(low, high + 1):
        _, y = place(xs[0], 10.0**power)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#ddd"/>')
        parts.append(_text(_LEFT - 8, y + 4, f"{10.0**power:,.0f}", anchor="end"))
    for x in xs:
        parts.append(_text(place(x, 10.0**low)[0], bottom + 18, f"{x:,}", anchor="middle"))
    parts.append(_text(_WIDTH - _RIGHT, bottom + 36, x_title, anchor="end"))
    for number, (name, points) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        spots = [place(x, value) for x, value in sorted(points.items()) if value > 0]
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
        parts.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.extend(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in spots)
        y = bottom + 56 + number * _LINE
        parts.append(f'<circle cx="{_LEFT + 6}" cy="{y - 4}" r="5" fill="{colour}"/>')
        parts.append(_text(_LEFT + 20, y, name))
    height = bottom + 56 + len(series) * _LINE
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif">'
    path.write_text("\n".join([head, '<rect width="100%" height="100%" fill="#fff"/>', *parts, "</svg>", ""]))


def _text(x: float, y: float, words: str, *, size: int = 13, anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"'
    return f'<text {place} fill="#222">{escape(words)}</text>'
