"""Commands by discovery: every file of this folder without a leading underscore registers its own by `@command`.

A command's function declares what only a shell needs (where to print, how); `**options` stands for the parameters
of the library function it calls, which are read from that function's signature and docstring.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from ..errors import ClipworksError
from ._output import check_form
from ._signature import Parameter, parameters


@dataclass(frozen=True)
class Command:
    """A registered command: its name, the function that runs it, the library function whose options it has."""

    name: str
    function: Callable[..., int | None]
    calls: str | None
    hide: tuple[str, ...]
    resume: str
    also: Callable[[], dict[str, Parameter]] | None = None


COMMANDS: dict[str, Command] = {}
_METAVARS = {str: "TEXT", int: "N", float: "X", list[str]: "A,B", list[int]: "N,N", list[float]: "X,X"}


def command(
    calls: str | None = None,
    *,
    name: str | None = None,
    hide: tuple[str, ...] = (),
    resume: str = "",
    also: Callable[[], dict[str, Parameter]] | None = None,
) -> Callable:
    """Register a function of `cli/<file>.py` as a command.

    Parameters
    ----------
    calls : library function behind it, for example "store.embed.embed"; where the decorated function takes
        `**options`, every parameter of it that a shell can write becomes an option (`--batch-size` for
        `batch_size`) and arrives there if the user gave it
    name : name on the command line (default: the function's)
    hide : parameters of the library function that get no option
    resume : what to tell a user who stops it with Ctrl-C
    also : returns further parameters that become options, of what the library function hands on
    """

    def register(function: Callable[..., int | None]) -> Callable[..., int | None]:
        title = name or function.__name__.strip("_").replace("_", "-")
        COMMANDS[title] = Command(title, function, calls, hide, resume, also)
        return function

    return register


def discover() -> dict[str, Command]:
    """Import every command file beside this one and return the commands by name."""
    for file in sorted(Path(__file__).parent.glob("[!_]*.py")):
        if file.stem != "main":
            importlib.import_module(f"{__package__}.{file.stem}")
    return dict(sorted(COMMANDS.items()))


def runner(entry: Command) -> Callable[..., int | None]:
    """Return what typer reads: the command's own parameters, then those of the library function it calls."""
    own = inspect.signature(entry.function)
    hints = typing.get_type_hints(entry.function, include_extras=True)
    library = {**(entry.also() if entry.also else {}), **(parameters(entry.calls) if entry.calls else {})}
    named = [p for p in own.parameters.values() if p.kind != p.VAR_KEYWORD]
    shown = [p.replace(annotation=_with_help(hints[p.name], p, library)) for p in named]
    if len(named) < len(own.parameters):
        taken = {p.name for p in shown} | set(entry.hide)
        shown += [_option(p) for p in library.values() if p.type is not None and p.name not in taken]

    @functools.wraps(entry.function)
    def run(**given: Any) -> int | None:
        check_form(bool(given.get("json")), bool(given.get("csv")))  # before the work, not after it
        # an option that was not given is not passed on: the library's own default holds
        derived = {k: v for k, v in given.items() if k not in own.parameters and v not in (None, [])}
        derived = {k: _split(k, v, library[k].type) if isinstance(v, list) else v for k, v in derived.items()}
        return entry.function(**{k: v for k, v in given.items() if k in own.parameters}, **derived)

    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in shown}
    del run.__wrapped__  # type: ignore[attr-defined]
    return run


def listed(entry: Command) -> Callable[..., None]:
    """Return what the list of commands needs: the name and the first line of the help."""

    def bare() -> None: ...

    bare.__doc__ = entry.function.__doc__
    return bare


def _with_help(annotation: Any, parameter: inspect.Parameter, library: dict[str, Parameter]) -> Any:
    """Give a command's own parameter the library's help where it has none of its own."""
    text = library[parameter.name].help if parameter.name in library else ""
    kind, *extra = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    if extra:
        if not extra[0].help:
            extra[0].help = text
        return annotation
    make = typer.Argument if parameter.default is parameter.empty else typer.Option
    return Annotated[kind, make(help=text)]


def _split(name: str, words: list[str], kind: Any) -> list[Any]:
    """Turn "1,2" and repeated options into one list of the library's type."""
    (of,) = get_args(kind)
    try:
        return [of(word.strip()) for entry in words for word in entry.split(",") if word.strip()]
    except ValueError as error:
        raise ClipworksError(f"{name} must be numbers separated by commas. Got {','.join(words)!r}.") from error


def _option(parameter: Parameter) -> inspect.Parameter:
    kind = list[str] if get_origin(parameter.type) is list else parameter.type
    flag = "--" + parameter.name.strip("_").replace("_", "-")
    names = [f"{flag}/--no-{flag[2:]}"] if kind is bool else [flag]
    if len(parameter.name) == 1:
        names.insert(0, f"-{parameter.name}")
    if get_origin(kind) is Literal and not all(isinstance(v, str) for v in get_args(kind)):
        kind = str
    text = f"{parameter.help} [default: {parameter.default}]" if parameter.default else parameter.help
    option = typer.Option(*names, help=text.strip(), show_default=False, metavar=_METAVARS.get(parameter.type))
    return inspect.Parameter(
        parameter.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )
