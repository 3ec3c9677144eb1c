"""The report of a benchmark as Markdown and as one HTML file without outside assets."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ...atomic import write_text
from ...errors import ClipworksError
from .figures import curves, rank_diagram
from .ranking import interval, rank
from .summary import Mean, Run, costs, curve, grouped

WORDS = (
    "What is shown for few-shot: accuracy on the test images. base-to-new: harmonic mean of old and new classes. "
    "cross: mean of the other sets. domains: accuracy on the domain left out. imbalanced: mean over the classes. "
    "noisy: accuracy against the right labels."
)
STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1060px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; margin: .6rem 0 1.2rem; }
th, td { padding: .22rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td.best { font-weight: 700; }
.scroll { overflow-x: auto; }
figure { margin: .5rem 0; display: inline-block; }
svg { max-width: 100%; height: auto; }
p.note { opacity: .75; font-size: 13px; }
"""


@dataclass
class Table:
    """Rows of cells; `best` marks cells (row, column) that are shown bold."""

    columns: list[str]
    rows: list[list[str]]
    best: set[tuple[int, int]] = field(default_factory=set)


@dataclass
class Section:
    """A heading and what stands below it: paragraphs, tables, figures (SVG)."""

    title: str
    level: int
    parts: list[str | Table]


def write_report(runs: Sequence[Run], name: str | os.PathLike, notes: Sequence[str] = ()) -> list[Path]:
    """Write NAME.md, NAME.html and, for the Markdown, NAME.svg; returns their paths.

    Parameters
    ----------
    runs : as `read_runs` gives them
    name : path without ending (an ending .md or .html is dropped)
    notes : further paragraphs below the title
    """
    if not runs:
        raise ClipworksError("report needs at least one finished run. Got none.")
    base = Path(name)
    base = base.with_suffix("") if base.suffix in (".md", ".html") else base
    sections = document(runs, notes)
    figures = [p for s in sections for p in s.parts if isinstance(p, str) and p.startswith("<svg")]
    texts = {base.with_name(base.name + ".md"): markdown(sections, base.name),
             base.with_name(base.name + ".html"): html(sections),
             base.with_name(base.name + ".svg"): figures[0] if figures else ""}  # fmt: skip
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)


def document(runs: Sequence[Run], notes: Sequence[str] = ()) -> list[Section]:
    """What the report says, independent of its form."""
    styles = {name: i for i, name in enumerate(sorted({run.method for run in runs}))}
    sections = [Section("Benchmark", 1, [*notes, _about(runs), WORDS])]
    for (model, protocol), own in grouped(runs, "model", "protocol").items():
        sections.append(_overview(model, protocol, own, styles))
        if (ranked := _ranked(own, styles)) is not None:
            sections.append(ranked)
        blocks = grouped(own, "data", "setting")
        for (data, setting), block in blocks.items() if len(blocks) > 1 else ():
            title = f"{data}, {setting}" if setting else data
            series = {method: curve(g) for (method,), g in grouped(block, "method").items()}
            sections.append(Section(title, 3, [curves(series, styles, title), _table(block)]))
    sections.append(_origin(runs))
    return sections


def _about(runs: Sequence[Run]) -> str:
    seeds = sorted({run.seed for run in runs if run.shots})
    sets = sorted({run.data for run in runs})
    return (f"{len(runs)} runs: {len({r.method for r in runs})} methods on {len(sets)} sets ({', '.join(sets)}), seeds "
            f"{', '.join(map(str, seeds)) or 'none'}. Accuracies are in percent, mean ± standard deviation over seeds. "
            "Settings were chosen without test images.")  # fmt: skip


def _overview(model: str, protocol: str, runs: Sequence[Run], styles: dict[str, int]) -> Section:
    """Average over the sets that have every number of shots: figure and table with intervals and costs."""
    shots = {run.shots for run in runs if run.shots}
    whole = {block for block, own in grouped(runs, "data", "setting").items() if shots <= {r.shots for r in own}}
    kept = [run for run in runs if (run.data, run.setting) in whole] or list(runs)
    count = len({(run.data, run.setting) for run in kept})
    series = {method: found for (method,), own in grouped(kept, "method").items() if (found := curve(own, count))}
    title = f"{protocol}, mean of {count} sets" if count > 1 else f"{protocol}, {kept[0].data}"
    left_out = sorted({run.data for run in runs} - {run.data for run in kept})
    parts: list[str | Table] = [f"Not in this mean, for want of images: {', '.join(left_out)}."] if left_out else []
    parts += [curves(series, styles, title, width=760, height=460), _table(kept, count)]
    return Section(f"{protocol} with {model}", 2, parts)


def _table(runs: Sequence[Run], blocks: int = 1) -> Table:
    """Methods down, shots across, best of every column bold, then what it costs at the most shots.

    Of several blocks (sets) their mean; a method without a number for one of them has none there.
    """
    shots = sorted({run.shots for run in runs})
    columns = ["method", *("words" if n == 0 else str(n) for n in shots)]
    columns += ["mean, 95 % interval"] if blocks > 1 else []
    columns += ["fit s", "µs / image", "MB", "ECE"]
    rows, means = [], []
    own = sorted(grouped(runs, "method").items(), key=lambda pair: (-len(_blocks(pair[1])), -_overall(pair[1])))
    for (method,), group in own:
        found = curve(group, blocks)
        means.append([found[n].mean if n in found else np.nan for n in shots])
        row = [method, *(str(found[n]) if n in found else "" for n in shots)]
        if blocks > 1 and len(_blocks(group)) < blocks:
            row.append("")
        elif blocks > 1:
            low, high = interval([values for _, values in _blocks(group).items()])
            row.append(f"{_overall(group):.1f} [{low:.1f}, {high:.1f}]")
        cost = costs(group)
        row += [_number(cost[name]) for name in ("fit s", "us/image", "MB")]
        rows.append([*row, _number(_calibration(group))])
    best = set()
    for j, column in enumerate(np.array(means).T if means else ()):
        if shots[j] and np.isfinite(column).sum() > 1:
            best |= {(int(i), j + 1) for i in np.flatnonzero(column >= np.nanmax(column) - 0.05)}
    return Table(columns, rows, best)


def _ranked(runs: Sequence[Run], styles: dict[str, int]) -> Section | None:
    """Ranks over sets; None where there are too few, or too few methods that ran on all."""
    values = {method: {block: float(np.mean(v)) for block, v in _blocks(own).items()}
              for (method,), own in grouped(runs, "method").items()}  # fmt: skip
    blocks = sorted({block for own in values.values() for block in own})
    whole = {method: [own[b] for b in blocks] for method, own in values.items() if len(own) == len(blocks)}
    if len(blocks) < 3 or len(whole) < 2:
        return None
    found = rank(whole)
    missing = sorted(set(values) - set(whole))
    order = ", ".join(f"{name} {value:.2f}" for name, value in zip(found.names, found.ranks, strict=True))
    text = (
        f"Mean rank over {found.blocks} sets (1 is best; of the mean over shots and seeds): {order}. Friedman's test "
        f"in Iman and Davenport's form: F = {found.statistic:.2f}, p = {found.p:.2g}. Methods that a bar joins are "
        f"nearer than Nemenyi's critical difference of {found.difference:.2f} at 5 % and are not told apart."
    )
    text += f" Not on all sets, and not ranked: {', '.join(missing)}." if missing else ""
    return Section("Which differences are more than luck", 3, [text, rank_diagram(found, styles)])


def _origin(runs: Sequence[Run]) -> Section:
    """What the numbers were made with."""
    facts = [run.facts for run in runs]
    versions = sorted({f"{k} {v}" for f in facts for k, v in f["versions"].items()})
    commits = sorted({f"{f['git']['commit'][:12]}{'' if f['git']['clean'] else ' with changes'}" for f in facts
                      if f.get("git")})  # fmt: skip
    encoders = sorted({f"{Path(f['config']['model']).stem} {f['encoder'][:12]}" for f in facts})
    dates = sorted(f["date"] for f in facts)
    sizes = Table(["set", "classes", "test images"], [
        [data, str(_classes(own)), str(max(int(v["images"]) for r in own for v in r.results.values()))]
        for (data,), own in grouped(runs, "data").items()])  # fmt: skip
    lines = [f"Encoders: {', '.join(encoders)}.", f"Code: {', '.join(commits) or 'an installed package'}.",
             f"Versions: {', '.join(versions)}.", f"Dates: {dates[0]} to {dates[-1]}.",
             "Every run is a JSON file with its configuration, seed, split hash, data hash, versions and costs. A cost "
             "is the median over runs at the most shots, in processor time of one thread; methods from words encode "
             "their sentences as they answer; MB is the rise of the peak memory during the run; ECE is the calibration "
             "error in percent over 15 bins."]  # fmt: skip
    return Section("Origin", 2, [sizes, *lines])


def _classes(runs: Sequence[Run]) -> str:
    return str(runs[0].facts.get("classes", ""))


def _blocks(runs: Iterable[Run]) -> dict[tuple[str, str], list[float]]:
    """Set (and setting) -> for every seed the mean over shots."""
    out = {}
    for block, own in grouped(runs, "data", "setting").items():
        out[block] = [float(np.mean([r.value for r in g])) for g in grouped(own, "seed").values()]
    return out  # type: ignore[return-value]


def _overall(runs: Iterable[Run]) -> float:
    return float(np.mean([np.mean(values) for values in _blocks(runs).values()]))


def _calibration(runs: Sequence[Run]) -> float | None:
    most = max(run.shots for run in runs)
    known = [value["calibration_error"] for run in runs if run.shots == most for value in run.results.values()
             if "calibration_error" in value]  # fmt: skip
    return Mean.of(known).mean if known else None


def _number(value: float | None) -> str:
    """Three digits that count: 0.00123, 1.23, 123."""
    if value is None:
        return ""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def markdown(sections: Sequence[Section], name: str) -> str:
    """The document as Markdown; of the figures only the first, as a file beside it."""
    out, shown = [], False
    for section in sections:
        out.append(f"{'#' * section.level} {section.title}")
        for part in section.parts:
            if isinstance(part, Table):
                bold = [[f"**{c}**" if (i, j) in part.best else c for j, c in enumerate(row)]
                        for i, row in enumerate(part.rows)]  # fmt: skip
                rows = [part.columns, ["---", *["---:"] * (len(part.columns) - 1)], *bold]
                out.append("\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows))
            elif not part.startswith("<svg"):
                out.append(part)
            elif not shown:
                out.append(f"![accuracy over shots]({name}.svg)")
                shown = True
    return "\n\n".join(out) + "\n"


def html(sections: Sequence[Section]) -> str:
    """The document as one HTML file."""
    body = []
    for section in sections:
        body.append(f"<h{section.level}>{escape(section.title)}</h{section.level}>")
        for part in section.parts:
            if isinstance(part, Table):
                body.append(_html_table(part))
            elif part.startswith("<svg"):
                body.append(f"<figure>{part}</figure>")
            else:
                body.append(f'<p class="note">{escape(part)}</p>')
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Benchmark</title>\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<style>{STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n")  # fmt: skip


def _html_table(table: Table) -> str:
    def cell(i: int, j: int, text: Any) -> str:
        mark = ' class="best"' if (i, j) in table.best else ""
        return f"<td{mark}>{escape(str(text))}</td>"

    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = ["".join(cell(i, j, text) for j, text in enumerate(row)) for i, row in enumerate(table.rows)]
    lines = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
