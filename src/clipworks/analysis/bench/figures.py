"""Figures as SVG text, drawn here so that a report is one file without libraries: accuracy over shots, and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from .ranking import Ranking
from .summary import Mean

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")
DASHES = ("", "7 3", "2 3")
FONT = 'font-family="system-ui, sans-serif" font-size="12" fill="currentColor"'


def style(place: int) -> tuple[str, str]:
    """Colour and dash of the n-th method; thirty differ."""
    return COLOURS[place % len(COLOURS)], DASHES[place // len(COLOURS) % len(DASHES)]


def curves(
    series: Mapping[str, Mapping[int, Mean]], styles: Mapping[str, int], title: str = "",
    width: int = 640, height: int = 400, label: bool = True,
) -> str:  # fmt: skip
    """Accuracy over shots, one line per method with a whisker of one standard deviation; methods that need words only
    are level lines.

    Parameters
    ----------
    series : method -> shots -> mean
    styles : method -> number of its style, the same in all figures of a report
    title : above the figure
    width, height : in pixels
    label : whether the names stand at the right
    """
    shots = sorted({n for own in series.values() for n in own if n})
    values = [m for own in series.values() for m in own.values()]
    low, high = _range([m.mean - m.spread for m in values], [m.mean + m.spread for m in values])
    left, right, top, bottom = 46, 170 if label else 12, 30, 40

    def x(place: float) -> float:
        return left + (width - left - right) * (place + 0.5) / max(len(shots), 1)

    def y(value: float) -> float:
        return top + (height - top - bottom) * (high - value) / (high - low)

    parts = [f'<text x="{left}" y="18" font-weight="600">{escape(title)}</text>']
    for tick in _ticks(low, high):
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" '
                     f'stroke="currentColor" opacity="0.15"/><text x="{left - 6}" y="{y(tick) + 4:.1f}" '
                     f'text-anchor="end">{tick:g}</text>')  # fmt: skip
    parts += [f'<text x="{x(i):.1f}" y="{height - 20}" text-anchor="middle">{n}</text>' for i, n in enumerate(shots)]
    middle = (left + width - right) / 2
    parts.append(f'<text x="{middle:.0f}" y="{height - 4}" text-anchor="middle" opacity="0.7">images per class</text>')
    ends = []
    for name, own in series.items():
        colour, dash = style(styles[name])
        drawn = f'stroke="{colour}" stroke-dasharray="{dash}"' if dash else f'stroke="{colour}"'
        points = [(x(shots.index(n)), m) for n, m in sorted(own.items()) if n]
        if points:
            for px, mean in points:
                if mean.spread:
                    ends_at = y(mean.mean - mean.spread), y(mean.mean + mean.spread)
                    parts.append(f'<line x1="{px:.1f}" x2="{px:.1f}" y1="{ends_at[0]:.1f}" y2="{ends_at[1]:.1f}" '
                                 f'stroke="{colour}" opacity="0.35"/>')  # fmt: skip
                parts.append(f'<circle cx="{px:.1f}" cy="{y(mean.mean):.1f}" r="2.5" fill="{colour}"/>')
            path = " ".join(f"{px:.1f},{y(mean.mean):.1f}" for px, mean in points)
            parts.append(f'<polyline points="{path}" fill="none" stroke-width="1.8" {drawn}/>')
            ends.append((points[-1][1].mean, name, colour))
        else:
            level = y(own[0].mean)
            parts.append(f'<line x1="{left}" x2="{width - right}" y1="{level:.1f}" y2="{level:.1f}" '
                         f'stroke-width="1.2" {drawn}/>')  # fmt: skip
            ends.append((own[0].mean, name, colour))
    if label:
        places = _apart([y(end[0]) for end in ends], 12.5, top - 10, height - bottom)
        for (_, name, colour), place in zip(ends, places, strict=True):
            parts.append(f'<text x="{width - right + 8}" y="{place + 4:.1f}" font-size="11" '
                         f'style="fill:{colour}">{escape(name)}</text>')  # fmt: skip
    return _svg(width, height, parts)


def rank_diagram(found: Ranking, styles: Mapping[str, int], width: int = 860) -> str:
    """Mean ranks on a line, best at the left; methods that a bar joins are not told apart (Demsar 2006)."""
    names, ranks = found.names, found.ranks
    half = (len(names) + 1) // 2
    left, right, axis = 190, width - 190, 52
    bars = found.alike()
    below = axis + 14 + 9 * len(bars)
    height = below + 17 * half + 16
    last = len(names)

    def x(rank: float) -> float:
        return left + (right - left) * (rank - 1) / max(last - 1, 1)

    parts = [f'<line x1="{left}" x2="{right}" y1="{axis}" y2="{axis}" stroke="currentColor"/>']
    for tick in range(1, last + 1, max(1, last // 10)):
        parts.append(f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{axis - 5}" y2="{axis}" stroke="currentColor"/>'
                     f'<text x="{x(tick):.1f}" y="{axis - 9}" text-anchor="middle">{tick}</text>')  # fmt: skip
    reach = min(x(1 + found.difference), right)
    parts.append(f'<line x1="{left}" x2="{reach:.1f}" y1="18" y2="18" stroke="currentColor" stroke-width="2"/>'
                 f'<text x="{left}" y="12">critical difference {found.difference:.2f}</text>')  # fmt: skip
    for i, (first, final) in enumerate(bars):
        level = axis + 10 + 9 * i
        parts.append(f'<line x1="{x(ranks[first]) - 4:.1f}" x2="{x(ranks[final]) + 4:.1f}" y1="{level}" y2="{level}" '
                     'stroke="currentColor" stroke-width="4" opacity="0.55"/>')  # fmt: skip
    for i, (name, rank) in enumerate(zip(names, ranks, strict=True)):
        on_left = i < half
        level = below + 17 * (i if on_left else last - 1 - i) + 8
        side, anchor, edge = (left - 10, "end", left - 6) if on_left else (right + 10, "start", right + 6)
        colour, _ = style(styles[name])
        parts.append(f'<polyline points="{x(rank):.1f},{axis} {x(rank):.1f},{level} {edge},{level}" fill="none" '
                     f'stroke="{colour}"/><text x="{side}" y="{level + 4}" text-anchor="{anchor}" font-size="11">'
                     f"{escape(name)} {rank:.2f}</text>")  # fmt: skip
    return _svg(width, height, parts)


def _svg(width: int, height: int, parts: Sequence[str]) -> str:
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" {FONT}>{"".join(parts)}</svg>')  # fmt: skip


def _range(lows: Sequence[float], highs: Sequence[float]) -> tuple[float, float]:
    low, high = max(0.0, min(lows)), min(100.0, max(highs))
    space = max(0.06 * (high - low), 0.5)
    return low - space, high + space


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers within the range, about six."""
    step = next(s for s in (0.5, 1, 2, 5, 10, 20, 50) if (high - low) / s <= 7)
    return [float(t) for t in np.arange(np.ceil(low / step) * step, high, step)]


def _apart(places: Sequence[float], least: float, top: float, bottom: float) -> list[float]:
    """Move labels by as little as needed so that each is `least` below the one before, within the figure if they fit.

    >>> _apart([50.0, 48.0, 10.0], 10, 0, 100)
    [58.0, 48.0, 10.0]
    """
    order = np.argsort(places, kind="stable")
    out = np.maximum(np.array(places, float)[order], top)
    steps = least * np.arange(len(out))
    out = np.maximum.accumulate(out - steps) + steps  # down, where the one above is too near
    over = out[-1] - max(bottom, top + steps[-1])
    if over > 0:  # up again, where the last is below the figure
        out = np.minimum.accumulate((np.minimum(out, out[-1] - over) - steps)[::-1])[::-1] + steps
    back = np.empty_like(out)
    back[order] = out
    return back.tolist()
