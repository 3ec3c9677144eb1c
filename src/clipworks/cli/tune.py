"""`clipworks tune`: the methods of `prompts/` and `tuning/` from a shell."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

from ..errors import ClipworksError
from ._command import command
from ._output import Json, emit, facts, note
from ._signature import Parameter, parameters, united
from .classify import class_names, words

AREAS = ("prompts", "tuning")
METHOD = "Name of the method: `clipworks methods prompts` and `clipworks methods tuning` list them."
NAMES = "Class names, separated by commas, or a text file (.txt) with one name per line (default: the labels)."


def targets() -> dict[str, str]:
    """Name -> class of every method that can be tuned with."""
    from ..registry import methods

    classes = [info for area in AREAS for info in methods(area) if info.object[0].isupper()]
    return {info.name: f"{info.area}.{info.name}.{info.object}" for info in classes}


def settings() -> dict[str, Parameter]:
    """The settings of all methods together."""
    return united(targets(), leave=("names", "encoder", "seed"))


@command("tuning.tune.tune", hide=("data",), also=settings)
def tune(
    data: Annotated[str, typer.Argument(help="Folder with a subfolder per class, table or list of labelled images.")],
    *,
    method: Annotated[str, typer.Option("--method", metavar="NAME", help=METHOD)],
    out: Annotated[str, typer.Option("--out", metavar="FILE", help="File for what was learned.")],
    names: Annotated[str | None, typer.Option("--names", metavar="A,B,C", help=NAMES, show_default=False)] = None,
    probe_names: Annotated[
        str | None, typer.Option("--probe-names", metavar="A,B,C", help="The same for --probe.", show_default=False)
    ] = None,
    json: Json = False,
    **options: Any,
) -> None:
    """Teach a model classes from a few images of each: learned prompts, adapters, fine-tuning.

    \b
    --shots images of every class are drawn to learn; the others are measured before (by the words of the classes) and
    after. --probe is a set that the model was good at: the table shows what was forgotten. In brackets behind a setting
    stand the methods that have it, with their defaults.

    \b
    Examples:
      clipworks tune flowers --method clip_svd --shots 16 --out flowers.safetensors --probe pets
      clipworks tune flowers --method lora --rank 4 --parts q,k,v,o --out flowers.safetensors
      clipworks tune pairs.csv --method long_clip --out long.safetensors
    """
    from ..tuning.tune import tune as work

    own = _own(method, options)
    for key, given in (("names", names), ("probe_names", probe_names)):
        if given:
            own[key] = class_names(given)
    found = work(data, method, out=out, **own)
    for entry in found.left_out:
        note(f"clipworks: left out: image {entry['key']!r}: {entry['reason']}")
    if json:
        return facts(found.as_dict(), as_json=True)
    emit(found.as_rows(), empty="nothing was measured: draw fewer --shots, or give --validation or --probe")
    note(f"{found.images} images learned, {found.held_out} held out; written: {found.out}, {_report(found.out)}")


def _own(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options in the types of the method that is meant: where methods disagree, the shell gives text."""
    target = targets().get(method.rpartition("/")[2].replace("-", "_"))
    known = parameters(target) if target else {}
    return {name: _typed(name, value, known[name].type) if name in known else value for name, value in options.items()}


def _typed(name: str, value: Any, kind: Any) -> Any:
    if not isinstance(value, str) or kind is str:
        return value
    if get_origin(kind) is list:
        (of,) = get_args(kind)
        return [_typed(name, word, of) for word in words(value)]
    try:
        return value.lower() in ("true", "yes", "1") if kind is bool else kind(value)
    except (TypeError, ValueError):
        raise ClipworksError(f"{name} must be {getattr(kind, '__name__', kind)}. Got {value!r}.") from None


def _report(out: str) -> str:
    return str(Path(out).with_suffix(".json"))
