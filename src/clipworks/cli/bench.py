"""`clipworks bench`: which method is best on which set, with how many images, at what cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ClipworksError
from ._command import command
from ._output import Json, emit, note, say

DATA = (
    "A labelled set as NAME=FOLDER, may be given several times. Known names are read in their published layout "
    "(--sets lists them); any other as CoOp's split json, folders per class, a CSV or Parquet table."
)
METHODS = 'Methods, separated by commas: all, names, -NAME to leave one out, or with arguments, "gda(alpha=1.0)".'
REPORT = "Write the report of everything in --out, as this name with .md and .html (without --data: nothing else)."


@command("analysis.bench.run.bench", hide=("data",), resume="The same command goes on; finished runs are not repeated.")
def bench(
    *,
    out: Annotated[str, typer.Option("--out", help="Folder for runs, splits and cached features.")] = "bench",
    data: Annotated[
        list[str] | None, typer.Option("--data", metavar="NAME=FOLDER", help=DATA, show_default=False)
    ] = None,
    methods: Annotated[
        list[str] | None, typer.Option("--methods", metavar="A,B", help=METHODS, show_default=False)
    ] = None,
    report: Annotated[str | None, typer.Option("--report", metavar="NAME", help=REPORT, show_default=False)] = None,
    sets: Annotated[bool, typer.Option("--sets", help="List the known sets with their layouts, and stop.")] = False,
    json: Json = False,
    **options: Any,
) -> int:
    """Measure which method is best on labelled images: from words alone, or from a few images per class.

    \b
    What is measured is one run: a method, a set, a number of shots, a seed. Every run is a file below --out/runs, so a
    stopped benchmark goes on where it was, and further methods, shots or sets are added by naming them. No method sees
    an image of the test while it learns; settings are chosen on the shots alone, by cross-validation (--validation).

    \b
    Protocols (--protocol, one or several):
      few-shot     1, 2, 4, 8, 16 images of every class, the same for all methods, drawn as CoOp draws them
      base-to-new  learn half of the classes, be tested on the other half too (harmonic mean)
      cross        learn the first set, be tested on the others
      domains      leave one domain out (photos, paintings, cartoons: learn sketches from the rest)
      imbalanced   many images of some classes, few of others (--ratio)
      noisy        wrong labels, at random or people's own (--noisy-labels)

    \b
    Examples:
      clipworks bench --data mine=photos --methods classifier,gda,linear_probe --shots 1,4,16 --report results
      clipworks bench --data oxford_pets=pets --data dtd=dtd --jobs 4 --report results
      clipworks bench --data pacs=PACS --protocol domains --methods all,-auto
      clipworks bench --report results                    (nothing is run: the report of what is there)
    """
    if sets:
        return _list_sets()
    if not data and not report:
        raise ClipworksError("data must name at least one labelled set, --data NAME=FOLDER (or give --report alone).")
    done = None
    if data:
        from ..analysis.bench.run import bench as work

        options |= {"methods": methods} if methods else {}
        done = work(data, out=out, **options)
        _tell(done)
    from ..analysis.bench.summary import read_runs, table

    runs = read_runs(Path(out) / "runs")
    emit(table(runs), as_json=json, empty=f"there are no finished runs in {out}")
    if report:
        from ..analysis.bench.report import write_report

        note("report: " + " ".join(str(path) for path in write_report(runs, report)))
    return 1 if done is not None and done.ran and done.failed == done.ran else 0


def _tell(done: Any) -> None:
    for name, reason in done.left_out.items():
        note(f"clipworks: {name} does not take part: {reason}")
    for name, reason in done.not_applicable.items():
        note(f"clipworks: {name} left out: {reason}")
    for error in done.unreadable:
        note(f"clipworks: left out: {error}")
    failed = f", {done.failed} failed (the file of each says why)" if done.failed else ""
    note(f"{done.ran} runs done, {done.skipped} had been done before{failed}: {done.out}")


def _list_sets() -> int:
    from ..data.sets import describe, set_names

    for name in set_names():
        say(f"{name}\n  " + describe(name).replace("\n", "\n  ") + "\n")
    return 0
