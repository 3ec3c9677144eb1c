"""`clipworks describe`: visible features of classes, from a language model or WordNet, into a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import ClipworksError, naming
from ._command import command
from ._output import note, say
from .classify import class_names

NAMES = "Class names, separated by commas, or a text file (.txt) with one name per line."
SOURCE = "Who is asked: a server that speaks OpenAI's protocol, a model on this machine, or WordNet's glosses."
MODEL = "endpoint: the model's name; transformers: its folder or its name on the hub."
OUT = "JSON file to write; names that it holds already are not asked for again."
CACHE = "endpoint: folder that keeps the answers. [default: the file's name and .answers]"
PAIRS = "Ask for the differences of every two classes (for fudd) instead of features."
LOCAL = ("model", "max_tokens")  # of the options of an endpoint, those that a local model has too


@command("zeroshot.endpoint.Endpoint", hide=("model", "cache"), resume="Run it again to go on.")
def describe(
    *,
    names: Annotated[str, typer.Option("--names", metavar="A,B,C", help=NAMES)],
    source: Annotated[Literal["endpoint", "transformers", "wordnet"], typer.Option("--source", help=SOURCE)],
    out: Annotated[str, typer.Option("--out", metavar="JSON", help=OUT)],
    model: Annotated[str | None, typer.Option("--model", metavar="NAME", help=MODEL, show_default=False)] = None,
    wordnet: Annotated[
        str | None, typer.Option("--wordnet", metavar="FILE", help="wordnet: its data.noun.", show_default=False)
    ] = None,
    cache: Annotated[str | None, typer.Option("--cache", metavar="DIR", help=CACHE, show_default=False)] = None,
    device: Annotated[
        str | None, typer.Option("--device", metavar="NAME", help="transformers: cpu, cuda.", show_default=False)
    ] = None,
    pairs: Annotated[bool, typer.Option("--pairs", help=PAIRS)] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Ask again for names in the file.")] = False,
    **options: Any,
) -> int:
    """Write what the classes look like to a file, for classification by description.

    \b
    Nothing is contacted but the server that --url names, or the hub where --model is a name there. The key of the
    server is read from an environment variable.

    \b
    Examples:
      clipworks describe --names hen,duck --source wordnet --wordnet wordnet/data.noun --out birds.json
      clipworks describe --names names.txt --source endpoint --url http://localhost:8000/v1 --model small --out d.json
      clipworks describe --names hen,duck --source transformers --model ./model --pairs --out pairs.json
    """
    from ..zeroshot.description_sources import described_by, told_apart_by, write_descriptions, write_pairs

    given = options | {k: v for k, v in (("model", model), ("wordnet", wordnet), ("device", device)) if v is not None}
    if cache is not None or source == "endpoint":
        given["cache"] = cache or f"{out}.answers"
    wanted = class_names(names)
    if Path(out).is_dir():
        raise ClipworksError(f"out must be a file. {out!r} is a folder.")
    if pairs and source == "wordnet":
        raise ClipworksError("--pairs needs a language model: --source endpoint or transformers. Got 'wordnet'.")
    ask = _source(source, given)
    failures: dict[Any, str]
    try:
        if pairs:
            failures = write_pairs(wanted, told_apart_by(ask), out, overwrite=overwrite)
        else:
            told = ask if source == "wordnet" else described_by(ask)
            failures = write_descriptions(wanted, told, out, overwrite=overwrite)
    finally:  # also where the run is stopped: what was asked has its price
        if hasattr(ask, "usage") and ask.usage.any:
            note(f"{ask.usage}")
    for entry, reason in failures.items():
        note(f"clipworks: left out: {entry if isinstance(entry, str) else ' / '.join(entry)}: {reason}")
    if Path(out).exists():
        say(out)
    return 1 if failures else 0


def _source(kind: str, given: dict[str, Any]) -> Any:
    """What answers: a model called with messages, or WordNet called with a name."""
    if kind == "endpoint":
        from ..zeroshot.endpoint import Endpoint

        _only(kind, given, needed=("url", "model"), unknown=("wordnet", "device"))
        return Endpoint(**given)
    if kind == "transformers":
        from ..zeroshot.description_sources import LocalModel

        _only(kind, given, needed=("model",), unknown=[name for name in given if name not in (*LOCAL, "device")])
        return LocalModel(given.pop("model"), **given)
    from ..zeroshot.descriptions import WordNetGlosses

    _only(kind, given, needed=("wordnet",), unknown=[name for name in given if name != "wordnet"])
    with naming("--wordnet"):
        return WordNetGlosses(given["wordnet"])


def _only(kind: str, given: dict[str, Any], needed: Any, unknown: Any) -> None:
    """Refuse options of another source, and ask for those that this one cannot do without."""
    for name in unknown:
        if name in given:
            raise ClipworksError(f"--{name.replace('_', '-')} is no option of --source {kind}.")
    for name in needed:
        if name not in given:
            raise ClipworksError(f"--source {kind} needs --{name.replace('_', '-')}.")
