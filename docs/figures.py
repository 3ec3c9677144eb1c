"""Tables of measured figures in the pages of `TABLES`, written from the benchmarks' JSON files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).parents[1]
NAMES = ("peers", "serving", "reliability", "inspecting", "benchmarking")
PEERS, SERVING, RELIABILITY, INSPECTING, BENCHMARKING = (ROOT / "docs" / f"{name}.md" for name in NAMES)
BEGIN, END = "<!-- measured: written by docs/figures.py -->", "<!-- end -->"
TITLES = ["| what | clipworks | the peer | times as good | from |", "|---|---:|---:|---:|---|"]


@dataclass(frozen=True)
class Row:
    """A comparison: what, with whom, in which file, and the paths of keys at which the figures stand in it."""

    what: str
    peer: str
    file: str
    ours: str
    theirs: str
    unit: str
    ratio: str = ""  # without one it is computed, more being better


def rows() -> list[Row]:
    """Return all comparisons."""
    found = []
    forms = {"exact fp32": "clipworks exact fp32", "torch bf16": "clipworks bf16",
             "OpenVINO int8": "clipworks openvino int8", "ONNX Runtime int8": "clipworks onnxruntime int8"}  # fmt: skip
    for form, ours in forms.items():
        for peer in ("sentence-transformers", "open_clip"):
            what = f"JPEG files to vectors, ViT-B/32, {form}"
            paths = (f"rows/{ours}/images_per_s", f"rows/{peer}/images_per_s")
            found.append(Row(what, peer, "end_to_end", *paths, "images/s", f"rows/{ours}/ratio to {peer}"))
    towers = {
        "images": [("fp32", "clipworks fp32 (exact)"), ("bf16", "clipworks bf16")],
        "texts": [("fp32, all 77 positions", "clipworks fp32, 77 positions"),
                  ("fp32, cut at the end", "clipworks fp32, cut at the end token")],
    }  # fmt: skip
    base = {"images": "transformers fp32 (default)", "texts": "transformers fp32, 77 positions"}
    for kind, forms_of in towers.items():
        one = kind[:-1]
        for form, ours in forms_of:
            paths = tuple(f"{kind}/{name}/ms_per_{one}" for name in (ours, base[kind]))
            ratio = f"{kind}/{ours}/ratio"
            found.append(Row(f"{one} tower alone, {form}", "transformers", "encoder_speed", *paths, "ms", ratio))
    for form, ours in {"": "clipworks", ", float32 throughout": "clipworks, float32 throughout"}.items():
        for count in (1, 8, 100, 500):
            what = f"exact search, 100,000 rows, {count} at once{form}"
            paths = tuple(f"{count} queries/{name}/us_per_query_processor" for name in (ours, "faiss IndexFlatIP"))
            ratio = f"{count} queries/{ours}/ratio_processor"
            found.append(Row(what, "faiss IndexFlatIP", "search_speed", *paths, "µs", ratio))
    released, grid = "the released code's way", "Tip-Adapter's grid, to the same optimum"
    heads = [(grid, released, "tip_adapter/clipworks", "tip_adapter/release"),
             ("logistic probe, penalty by folds", "scikit-learn", "probes/linear_probe", "probes/LogisticRegressionCV"),
             ("ridge in its place", "scikit-learn", "probes/ridge", "probes/LogisticRegressionCV")]  # fmt: skip
    for what, peer, ours, theirs in heads:
        paths = (f"{ours}/seconds_processor", f"{theirs}/seconds_processor")
        found.append(Row(what, peer, "head_speed", *paths, "s", f"{ours}/ratio_processor"))
    for what, peer, ours, theirs in heads[1:]:
        found.append(Row(f"{what}: accuracy", peer, "head_speed", f"{ours}/accuracy", f"{theirs}/accuracy", "%"))
    paths = ("clipworks/cpu_seconds_per_step", "released/cpu_seconds_per_step")
    found.append(
        Row("CoOp's step, images encoded before", released, "prompt_speed", *paths, "s", "times_as_fast_per_step")
    )
    paths = ("clipworks/seconds_processor", "sentence-transformers/seconds_processor")
    what = "near-duplicates among 20,000 vectors, all found"
    found.append(Row(what, "sentence-transformers", "duplicates_speed", *paths, "s", "clipworks/ratio_processor"))
    for kind in ("text", "image"):
        paths = (f"{kind}/together/requests_per_s", f"{kind}/one by one/requests_per_s")
        what = f"server, 8 clients, {kind} queries together"
        found.append(Row(what, "one by one", "server_speed", *paths, "requests/s", f"{kind}/throughput_ratio"))
    return found


def results(file: str) -> dict[str, Any]:
    """What a measurement found."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{file}.json").read_text(encoding="utf-8"))["results"]


def look(found: Any, path: str) -> float:
    """The figure at a path of keys, as they stand in the file; `ViT-B/32` and the like hold the separator."""
    while path:
        key = max((key for key in found if path == key or path.startswith(f"{key}/")), key=len)
        found, path = found[key], path[len(key) + 1 :]
    return float(found)


def figure(value: float) -> str:
    """Three digits that mean something, thousands set apart."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def times(row: Row) -> float:
    """How many times as good as the peer, as the file has it."""
    found = results(row.file)
    return look(found, row.ratio) if row.ratio else look(found, row.ours) / look(found, row.theirs)


def table() -> str:
    """Return the table; what falls behind the peer is in bold."""
    lines = list(TITLES)
    for row in rows():
        ours, theirs = (figure(look(results(row.file), path)) for path in (row.ours, row.theirs))
        ratio = f"{times(row):.2f}"
        ratio = f"**{ratio}**" if times(row) < 1 else ratio
        lines.append(f"| {row.what} | {ours} {row.unit} | {row.peer}: {theirs} | {ratio} | `{row.file}` |")
    return "\n".join(lines)


def served() -> str:
    """Return the table of the server under many clients."""
    lines = [
        "| query | one by one, requests/s | together | ratio | ratio of processor time "
        "| p99 ms, one by one | together | mean batch |",
        "|---" * 8 + "|",
    ]
    for kind in ("text", "image"):
        found = results("server_speed")[kind]
        alone, together = found["one by one"], found["together"]
        rates = (
            alone["requests_per_s"],
            together["requests_per_s"],
            found["throughput_ratio"],
            found["processor_ratio"],
        )
        cells = [*(f"{value:.2f}" for value in rates), *(f"{turn['p99_ms']:.0f}" for turn in (alone, together))]
        lines.append(f"| {kind} | {' | '.join(cells)} | {together['mean_batch']:.1f} |")
    return "\n".join(lines)


def counted() -> str:
    """Return the table of fault tests: how many there are, what they injected, what became of them."""
    lines = ["| # | | tests | injected | failed | not run, or not finished | seconds |", "|---|---" + "|---:" * 5 + "|"]
    found = results("faults")
    for number in map(str, range(1, 21)):
        if number not in found["default"]:
            lines.append(f"| {number} | not counted | | | | | |")
        for part in (part for part in ("default", "slow") if number in found[part]):
            row = found[part][number]
            done = row["passed"] + row["failed"]
            cells = (row["tests"], row["injected"] or "", row["failed"], row["tests"] - done, row["seconds"])
            shown = " | ".join(figure(cell) if isinstance(cell, int | float) else cell for cell in cells)
            lines.append(f"| {number} | {part if part == 'slow' else ''} | {shown} |")
    return "\n".join(lines)


def inspected() -> str:
    """Return the tables of defects on real parts: is a part defective, and where, for the sets that have masks."""
    found = results("anomaly")["mean and spread"]
    return "\n\n".join(by_set(found, metric) for metric in ("image AUROC", "AUPRO"))


def percent(mean_and_spread: list[float]) -> str:
    """Mean and spread of a share."""
    return " ± ".join(f"{100 * value:.1f}" for value in mean_and_spread)


def by_set(found: dict[str, Any], metric: str) -> str:
    """Methods in rows, sets in columns, mean and spread in percent."""
    sets = [title for title, part in found.items() if any(metric in row for row in part.values())]
    ways = dict.fromkeys(way for title in sets for way, row in found[title].items() if metric in row)
    lines = [f"| {metric} | {' | '.join(sets)} |", "|---" + "|---:" * len(sets) + "|"]
    for way in ways:
        rows = (found[title].get(way, {}).get(metric) for title in sets)
        cells = (percent(row) if row else "" for row in rows)
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def stored() -> str:
    """Return the table of few-shot inspection: accuracy over the number of stored images."""
    found = {name: part for name, part in results("inspection_curve").items() if name != "settings"}
    sizes = list(next(iter(next(iter(found.values())).values())))
    lines = [f"| images of each class | {' | '.join(sizes)} |", "|---" + "|---:" * len(sizes) + "|"]
    for name, ways in found.items():
        for way, row in ways.items():
            cells = (" ± ".join(f"{value:.2f}" for value in row[size]["accuracy"]) for size in sizes)
            lines.append(f"| {name}, {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def unknown() -> str:
    """Return the table of unknown classes across data sets."""
    found = results("ood")["mean and spread"]
    measures = [measure for measure in next(iter(found.values())) if measure.endswith("AUROC")]
    titles = [measure.removesuffix(": AUROC") for measure in measures]
    lines = [f"| score | {' | '.join(titles)} | known images refused |", "|---" + "|---:" * (len(titles) + 1) + "|"]
    for way, row in found.items():
        cells = (percent(row[measure]) for measure in (*measures, "refused"))
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def learned() -> str:
    """Return the table of learned prompts and tuned towers: means over the sets of means over the seeds."""
    found, means = results("learned")["clipworks-small"], {}
    for protocol in ("few-shot", "base-to-new"):
        most = max(map(len, found[protocol].values()))
        sets = [part for part in found[protocol].values() if len(part) == most]  # where every method has run
        means[protocol] = {
            method: fmean(fmean(next(iter(part[method].values()))["accuracy"]) for part in sets)
            for method in sets[0]
        }
    lines = ["| method | few-shot | base-to-new |", "|---|---:|---:|"]
    for method in sorted(means["few-shot"], key=lambda m: -means["few-shot"][m]):
        cells = (f"{means[protocol][method]:.1f}" if method in means[protocol] else "" for protocol in means)
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {PEERS: (table,), SERVING: (served,), RELIABILITY: (counted,), INSPECTING: (inspected, stored, unknown),
          BENCHMARKING: (learned,)}  # fmt: skip


def page(path: Path) -> str:
    """Return a page with its tables as the files have them now."""
    before, *places = path.read_text(encoding="utf-8").split(BEGIN)
    told = (f"\n{table()}\n{END}{place.split(END, 1)[1]}" for table, place in zip(TABLES[path], places, strict=True))
    return BEGIN.join([before, *told])


if __name__ == "__main__":
    for path in TABLES:
        path.write_text(page(path), encoding="utf-8")
