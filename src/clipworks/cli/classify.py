"""`clipworks classify`: images into classes that are given by their names, by a few labelled images, or by both."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ClipworksError, closest
from ._classified import show
from ._command import command
from ._output import Csv, Json, Sheet, check_sheet, note

SOURCE = "A collection, or images: folder, table, list, archive, video."
NAMES = "Class names, separated by commas, or a text file (.txt) with one name per line; default: the shots' labels."
SHOTS = "A few labelled images: a folder with one folder per class, a table with a label column, a collection."
PER_CLASS = 5  # images of each class on a sheet
TEMPLATES = (
    "Sentence with {} for the name, name of a set (default, simple, name, imagenet), or a text file (.txt) with one "
    "sentence per line; may be given several times. [default: default]"
)


@command("zeroshot.classify.classify")
def classify(
    source: Annotated[str, typer.Argument(metavar="COLLECTION|SOURCE", help=SOURCE)],
    *,
    names: Annotated[str | None, typer.Option("--names", metavar="A,B,C", help=NAMES)] = None,
    shots: Annotated[str | None, typer.Option("--shots", metavar="SOURCE", help=SHOTS)] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print what speaks for each class; of auto the leaderboard too.")
    ] = False,
    templates: Annotated[
        list[str] | None, typer.Option("--templates", metavar="TEXT", help=TEMPLATES, show_default=False)
    ] = None,
    top: Annotated[int, typer.Option("--top", metavar="N", min=1, help="Classes shown per image.")] = 1,
    counts: Annotated[bool, typer.Option("--counts", help="Print images per class, not per image.")] = False,
    sheet: Sheet = None,
    json: Json = False,
    csv: Csv = False,
    **options: Any,
) -> int:
    """Sort images into classes by the names of the classes, or by a few labelled images.

    \b
    With names alone nothing is trained. With --shots, --method auto compares all methods on the shots and takes the
    best, or a probe with words that may be as good; `clipworks methods heads` and `zeroshot` list them.

    \b
    Examples:
      clipworks classify photos --names cat,dog,bird --sheet classes.png
      clipworks classify photos.collection --names names.txt --templates "a photo of a {}, a type of pet." --csv
      clipworks classify photos --names cat,dog,bird --shots labelled --explain
      clipworks classify photos --shots labelled --method ridge
      clipworks classify photos --names hen,cat --method classify_by_description --descriptions told.json --explain
    """
    from ..zeroshot.classify import classify as work

    check_sheet(sheet)
    if templates:
        options["templates"] = _templates(templates)
    result = work(source, _names(names), shots=shots, explain=explain, **options)
    show(result, top=top, counts=counts, explain=explain, as_json=json, as_csv=csv)
    if sheet:
        from ..plot.sheet import classification_sheet, save_sheet

        below = f"{len(result.keys):,} images of {source}"
        page = classification_sheet(result, _pictures(source, result), note=below, per_class=PER_CLASS)
        note(f"sheet: {save_sheet(page, sheet)}")
    return 1 if result.errors and not result.keys else 0


def _names(given: str | None) -> list[str] | None:
    """At least two class names, or None where the shots have them."""
    if given is None:
        return None
    found = lines(given) if given.endswith(".txt") else [word.strip() for word in given.split(",")]
    if len(found) == 1:
        raise ClipworksError(f"names must hold at least 2 classes to choose between. Got {found[0]!r} alone.")
    return found


def words(text: str) -> list[str]:
    """Split "cat, dog" into names."""
    return [word.strip() for word in text.split(",") if word.strip()]


def class_names(given: str) -> list[str]:
    """The names of "cat, dog", or of a text file's lines."""
    return lines(given) if given.endswith(".txt") else words(given)


def lines(path: str, argument: str = "names") -> list[str]:
    """The lines of a text file that hold something."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ClipworksError(f"a text file must be in UTF-8. Got {path!r}, which is not: {error}.") from error
    except OSError as error:
        beside = [p.name for p in Path(path).parent.glob("*.txt")]
        raise ClipworksError(f"{argument} must be in a text file that can be read. Got {path!r}: {error.strerror}."
                             + closest(Path(path).name, beside)) from None  # fmt: skip
    return [line.strip() for line in text.splitlines() if line.strip()]


def _templates(given: list[str]) -> list[str]:
    """Sentences of all options together; names of sets and text files stand for theirs."""
    from ..zeroshot.templates import resolve_templates

    found = (lines(e, "templates") if e.endswith(".txt") else resolve_templates(e) for e in given)
    return [template for entry in found for template in entry]


def _pictures(source: str, result: Any) -> Any:
    """The pictures of the images that a sheet shows: the surest of every class."""
    from ..plot.pictures import pictures, source_pictures
    from ..store.collection import Collection
    from ..store.table import is_collection

    best = result.probabilities.argmax(1)
    keys = []
    for index in range(len(result.names)):
        members = [i for i in (-result.probabilities[:, index]).argsort(kind="stable") if best[i] == index]
        keys += [result.keys[i] for i in members[:PER_CLASS]]
    return pictures(Collection.open(source), keys) if is_collection(Path(source)) else source_pictures(source, keys)
