"""The report: means as they should be taken, figures that can be read, pages that stand alone."""

import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from clipworks.analysis.bench.figures import _apart, curves, rank_diagram
from clipworks.analysis.bench.ranking import rank
from clipworks.analysis.bench.report import document, html, markdown, write_report
from clipworks.analysis.bench.summary import Mean, curve, read_runs, table
from clipworks.errors import ClipworksError

METHODS = {"classifier": -5.0, "gda": 3.0, "knn": 0.0, "tip<adapter>": 1.0}
SETS = {"cars": 40.0, "pets": 60.0, "dtd": 50.0, "elpv": 70.0}


def write(folder, **config):
    seed, value = config["seed"], config.pop("value")
    given = {"protocol": "few-shot", "model": "small", **config}
    given["setting"] = {"shots": given.pop("shots"), **given.pop("extra", {})}
    name = "-".join(str(v) for v in (given["data"], given["method"].strip("<>"), given["setting"], seed))
    record = {"key": "k", "config": given, "versions": {"numpy": "2.0"}, "git": {"commit": "a" * 40, "clean": True},
              "encoder": "e" * 64, "classes": 10, "date": "2026-01-01T00:00:00+00:00", "summary": value,
              "results": {"test": {"accuracy": value, "images": 100, "calibration_error": 4.0}},
              "cost": {"fit_seconds": 0.5, "microseconds_per_image": 12.0, "peak_mb": None}}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{re.sub('[^a-z0-9]+', '-', name)}.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for data, base in SETS.items():
        for method, lead in METHODS.items():
            for shots in (0,) if method == "classifier" else (1, 4):
                for seed in (1, 2, 3) if shots else (1,):
                    write(folder, data=data, method=method, shots=shots, seed=seed, value=base + lead + shots + seed)
    return read_runs(folder)


def text_of(section):
    return " ".join(part for part in section.parts if isinstance(part, str) and not part.startswith("<svg"))


def test_a_curve_is_the_mean_over_sets_seed_by_seed(runs):
    gda = [run for run in runs if run.method == "gda"]
    found = curve(gda, len(SETS))
    seeds = [np.mean([base + 3 + 4 + seed for base in SETS.values()]) for seed in (1, 2, 3)]
    assert found[4] == Mean(float(np.mean(seeds)), float(np.std(seeds, ddof=1)), 3)
    assert curve([run for run in gda if run.data != "pets"], len(SETS)) == {}, "a mean of other sets is another number"


def test_the_overview_compares_only_what_was_run_on_the_same_sets(runs):
    some = [run for run in runs if run.method != "knn" or run.data != "elpv"]
    overview = document(some)[1]
    rows = {row[0]: row for row in overview.parts[-1].rows}
    assert rows["knn"][1:5] == ["", "", "", ""]
    assert rows["gda"][3] == f"{np.mean(list(SETS.values())) + 3 + 4 + 2:.1f} ± 1.0"
    ranked = next(section for section in document(some) if "luck" in section.title)
    assert "not ranked: knn" in text_of(ranked)


def test_sets_without_the_most_shots_are_not_in_the_mean(runs):
    some = [run for run in runs if run.data != "cars" or run.shots != 4]
    assert "Not in this mean, for want of images: cars" in text_of(document(some)[1])


def test_the_best_of_every_column_is_bold(runs):
    lines = markdown(document(runs), "r").splitlines()
    row = next(line for line in lines if line.startswith("| gda"))
    assert row.count("**") == 4, "best at 1 and at 4 shots"


def test_the_table_of_the_command_line(runs):
    rows = table(runs)
    assert len(rows) == len(SETS) * len(METHODS)
    assert list(rows[0]) == ["model", "protocol", "data", "method", "words", "1 shots", "4 shots", "fit s", "us/image",
                             "MB"]  # fmt: skip


def test_pages_stand_alone_and_escape_names(runs, tmp_path):
    paths = write_report(runs, tmp_path / "found.html")
    assert [path.name for path in paths] == ["found.md", "found.html", "found.svg"]
    page = paths[1].read_text(encoding="utf-8")
    assert "tip&lt;adapter&gt;" in page
    assert "<adapter>" not in page
    assert not re.search(r"<script|<link|<img|@import|url\(|href=", page)
    for svg in [*re.findall(r"<svg.*?</svg>", page, re.S), paths[2].read_text()]:
        ET.fromstring(svg)
    assert "![accuracy over shots](found.svg)" in paths[0].read_text()
    with pytest.raises(ClipworksError, match="at least one finished run"):
        write_report([], tmp_path / "r")


def test_several_protocols_and_settings_are_told_apart(tmp_path):
    for left_out in ("photo", "sketch"):
        for method in ("gda", "knn"):
            write(tmp_path, data="pacs", method=method, shots=4, seed=1, value=50.0, protocol="domains",
                  extra={"left_out": left_out})  # fmt: skip
    write(tmp_path, data="pacs", method="gda", shots=4, seed=1, value=60.0)
    titles = [section.title for section in document(read_runs(tmp_path))]
    assert {"domains with small", "few-shot with small", "pacs, left out photo", "pacs, left out sketch"} <= set(titles)


def test_values_lie_where_the_axis_says():
    """The circle of 60 % lies between the lines of 50 and 70, in proportion."""
    svg = curves({"a": {1: Mean(50, 0, 1), 2: Mean(60, 1, 3), 4: Mean(70, 0, 1)}}, {"a": 0})
    root = ET.fromstring(svg)
    heights = [float(c.get("cy")) for c in root.iter("{http://www.w3.org/2000/svg}circle")]
    assert heights[1] == pytest.approx((heights[0] + heights[2]) / 2, abs=0.1)
    ticks = {t.text: float(t.get("y")) - 4 for t in root.iter("{http://www.w3.org/2000/svg}text") if t.text == "60"}
    assert ticks["60"] == pytest.approx(heights[1], abs=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_labels_never_overlap(seed):
    places = np.random.default_rng(seed).uniform(100, 160, 25).tolist()
    found = np.sort(_apart(places, 12.5, 20, 360))
    assert np.diff(found).min() >= 12.5 - 1e-9
    assert found[0] >= 20
    assert found[-1] <= 360
    assert np.argsort(_apart(places, 12.5, 20, 360)).tolist() == np.argsort(places).tolist()


def test_a_rank_diagram_names_everyone(runs):
    found = rank({f"m{i}": [i + j for j in range(4)] for i in range(7)})
    svg = rank_diagram(found, {f"m{i}": i for i in range(7)})
    texts = [t.text for t in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert [f"m{6 - i} {i + 1:.2f}" in texts for i in range(7)] == [True] * 7
    assert html([]).startswith("<!doctype html>")
