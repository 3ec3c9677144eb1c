"""The entry point `clipworks`: builds the commands, turns errors into one line on stderr and into exit codes.

Exit codes: 0 done, 1 the data is at fault (damage, nothing usable), 2 the user's mistake, 130 stopped by Ctrl-C or
by SIGTERM; what was done until then is kept, and a second signal stops at once.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer

from .. import __version__
from ..errors import BadImage, BadWeights, ClipworksError, CollectionError, closest
from ._command import discover, listed, runner

HELP = """Embed images, search them by words, classify them without training, adapt and examine CLIP models.

\b
Begin:
  clipworks embed photos --out photos.collection
  clipworks search photos.collection "a red bicycle" --sheet found.png
  clipworks classify photos.collection --names cat,dog,bird
\b
Everything runs offline with the model inside the package. `clipworks COMMAND --help` shows the options of one
command, `clipworks doctor` what this machine has.
"""


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"clipworks {__version__}")
        raise typer.Exit()


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def build_app(command: str | None = None) -> typer.Typer:
    """Return the typer application; with `command`, only that one reads its options, the others are listed."""
    app = typer.Typer(help=HELP, rich_markup_mode=None, pretty_exceptions_enable=False,
                      context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})  # fmt: skip
    app.callback()(_root)
    for entry in discover().values():
        app.command(entry.name)(runner(entry) if command in (None, entry.name) else listed(entry))
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    commands = discover()
    name = words[0] if words and words[0] in commands else ""
    if words and not words[0].startswith("-") and not name:
        known = ", ".join(commands)
        return _fail(f"command must be one of {known}. Got {words[0]!r}.{closest(words[0], commands)}", 2)
    warnings.showwarning = _warn  # type: ignore[assignment]
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # a file name that the terminal cannot show must not stop the work
            stream.reconfigure(errors="backslashreplace")
    try:
        with _stoppable():
            code = build_app(name)(args=words, prog_name="clipworks", standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if os.environ.get("CLIPWORKS_DEBUG"):
            raise
        return _explain(error, name)
    if code == 130:
        return _fail(f"stopped. {commands[name].resume if name else ''}", code)
    return code


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM stop a command as Ctrl-C does: what it has done is kept."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread, where signals cannot be set
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _explain(error: Exception, command: str) -> int:
    if hasattr(error, "format_message"):  # the option parser's own: a wrong option or value
        hint = f" See: clipworks {command} --help" if command else " See: clipworks --help"
        return _fail(f"{_with_closest(error.format_message())}{hint}", 2)
    if isinstance(error, BadImage | BadWeights | CollectionError):
        return _fail(str(error), 1)
    if isinstance(error, ClipworksError | FileNotFoundError | FileExistsError | IsADirectoryError | PermissionError):
        return _fail(str(error), 2)
    if isinstance(error, OSError):
        return _fail(str(error), 1)
    return _fail(f"unexpected {type(error).__name__}: {error} (CLIPWORKS_DEBUG=1 shows where)", 1)


def _with_closest(message: str) -> str:
    """The option parser's message as a sentence; where a value is none of several, with the closest of them."""
    message = message.replace("Value error, ", "").rstrip(".") + "."
    found = re.search(r"'([^']*)' is not one of (.*)", message)
    return message + (closest(found[1], re.findall(r"'([^']*)'", found[2])) if found else "")


def _fail(message: str, code: int) -> int:
    print("clipworks: " + " ".join(message.split()), file=sys.stderr)
    return code


def _warn(message: Any, category: Any, *_: Any) -> None:
    if not issubclass(category, DeprecationWarning):
        print(f"clipworks: warning: {' '.join(str(message).split())}", file=sys.stderr)
