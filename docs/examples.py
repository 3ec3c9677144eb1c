"""The examples of the pages: found, run in the order of the page, and what commands print written down.

An example is a fenced block of Python, or of commands. Those of a page share one folder and one set of names.
Of commands, `clipworks` is run; of what installs or measures (`pip install`, `make`, `python FILE`) it is looked up
whether extra, target or file are there. What cannot be run in a test is listed in tests/docs/test_examples.py.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import io
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from clipworks.cli.main import build_app
from clipworks.cli.main import main as clipworks

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
LOOKED_UP = ("pip", "make", "python")
SETTING = re.compile(r"[A-Z_]+=\S* ")  # an environment variable before a command
ADDRESS = "127.0.0.1:8000"


class Wrong(AssertionError):
    """An example that does not do what its page says."""


@dataclass(frozen=True)
class Example:
    """A fenced block: where it stands, its language and its lines."""

    page: str
    line: int
    language: str
    text: str
    span: tuple[int, int]

    @property
    def kind(self) -> str:
        """`python`, `doctest`, `commands`, or nothing for what is no example (a tree of files, an output)."""
        if self.language == "python":
            return "doctest" if ">>> " in self.text else "python"
        if self.language in ("console", "sh", "bash"):
            return "commands"
        words = [SETTING.sub("", line).split()[0] for line in commands(self.text) if line.split()]
        return "commands" if not self.language and words and set(words) <= {"clipworks", "torchrun", *LOOKED_UP} else ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def examples(page: Path) -> list[Example]:
    """Every example of a page."""
    text = page.read_text(encoding="utf-8")
    name = page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name
    blocks = (
        Example(name, text.count("\n", 0, block.start()) + 1, block.group(1), block.group(2), block.span(2))
        for block in FENCE.finditer(text)
    )
    return [block for block in blocks if block.kind]


def commands(text: str) -> list[str]:
    """The commands of a block; where lines have a prompt, the others are what was printed."""
    lines = text.replace("\\\n", "\\\0").split("\n")
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    return [line.replace("\\\0", "\\\n") for line in lines if line and not line.startswith("#")]


def command(line: str) -> tuple[int, str]:
    """Run one command in this process: its exit code, and what it printed; `| head -n N` is understood."""
    words = shlex.split(line.replace("\\\n", " "), comments=True)
    if Path(words[0]).name in LOOKED_UP:
        return look_up(words), ""
    if words[0] != "clipworks":
        raise Wrong(f"{words[0]!r} is not run here: {line}")
    lines = int(words[-1]) if words[-4:-1] == ["|", "head", "-n"] else None
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = clipworks(words[1:] if lines is None else words[1:-4])
    return (0 if lines else code), "\n".join(output.getvalue().rstrip().splitlines()[:lines])


def parsed(line: str) -> None:
    """Give the options of a `clipworks` command to its own parser and go no further; a wrong one is an error."""
    words = shlex.split(line.replace("\\\n", " "), comments=True)
    name, *options = words[words.index("clipworks") + 1 :]
    group: Any = typer.main.get_command(build_app(name))
    group.commands[name].make_context(name, options)


def look_up(words: list[str]) -> int:
    """Check that the extra, the target or the file is there that a command names."""
    if Path(words[0]).name == "pip":
        declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        named = re.findall(r"clipworks\[([\w,]+)\]", " ".join(words))
        missing = [extra for extras in named for extra in extras.split(",") if f"\n{extra} = [" not in declared]
    elif words[0] == "make":
        targets = (ROOT / "Makefile").read_text(encoding="utf-8")
        missing = [word for word in words[1:] if f"\n{word}:" not in targets and "=" not in word]
    else:
        missing = [word for word in words[1:2] if word != "-m" and not (ROOT / word).is_file()]
    if missing:
        raise Wrong(f"there is no {', '.join(missing)}: {shlex.join(words)}")
    return 0


def shown(line: str) -> str:
    """One command with its prompt, and what it printed, as a page has it."""
    code, output = command(line)
    note = f"(exit code {code})" if code else ""
    return "\n".join(part for part in (f"$ {line}", output, note) if part)


class Player:
    """Runs the examples of one page, one after the other.

    Parameters
    ----------
    change : called with the syntax tree of every block of Python before it runs, and the names that there are
    """

    def __init__(self, change: Callable[[ast.Module, dict[str, Any]], None] | None = None) -> None:
        self.names: dict[str, Any] = {"__name__": "__example__"}
        self.change = change
        self._server: subprocess.Popen[bytes] | None = None
        self._port = 0

    def run(self, example: Example) -> str:
        """Run one example and return the block as it should read: with the outputs of its commands as they are now."""
        if example.kind == "commands":
            return self._commands(example)
        if example.kind == "doctest":
            self._doctest(example)
        else:
            self._python(example)
        return example.text

    def _python(self, example: Example) -> None:
        tree = ast.parse(example.text.replace(ADDRESS, f"127.0.0.1:{self._port}"), str(example))
        ast.increment_lineno(tree, example.line)
        if self.change:
            self.change(tree, self.names)
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(tree, example.page, "exec"), self.names)

    def _doctest(self, example: Example) -> None:
        flags = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
        test = doctest.DocTestParser().get_doctest(example.text, self.names, str(example), example.page, example.line)
        said: list[str] = []
        if doctest.DocTestRunner(optionflags=flags).run(test, out=said.append, clear_globs=False).failed:
            raise Wrong("".join(said))
        self.names.update(test.globs)

    def _commands(self, example: Example) -> str:
        prompted = "$ " in example.text
        parts = []
        for line in commands(example.text):
            if line.startswith("clipworks serve ") and not prompted:
                self._serve(line)
            elif prompted:
                parts.append(shown(line))
            else:
                code, output = command(line)
                if code:
                    raise Wrong(f"{example}: {line}\n{output}\n(exit code {code})")
        return "\n".join(parts) + "\n" if prompted else example.text

    def _serve(self, line: str) -> None:
        """Start a server that the following examples may ask; it ends with the page."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        words = shlex.split(line, comments=True)[1:]
        start = [sys.executable, "-m", "clipworks", *words, "--port", str(self._port)]
        self._server = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(1800):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self._port}/readyz"):
                return
            if self._server.poll() is not None:
                break
            time.sleep(0.1)
        raise Wrong(f"the server did not start: {line}")

    def close(self) -> None:
        """Stop the server, if there is one."""
        if self._server is not None:
            self._server.terminate()
            self._server.wait(30)


@contextlib.contextmanager
def player(**options: Any) -> Iterator[Player]:
    """A `Player` that is closed at the end."""
    made = Player(**options)
    try:
        yield made
    finally:
        made.close()


def played(page: Path) -> str:
    """Return a page with the outputs of its commands as they are now; everything on it is run in this folder."""
    text, end, parts = page.read_text(encoding="utf-8"), 0, []
    with player() as one:
        for example in examples(page):
            parts += [text[end : example.span[0]], one.run(example)]
            end = example.span[1]
    return "".join(parts) + text[end:]


def plain(text: str) -> str:
    """A text without numbers and widths: scores and times differ a little between machines."""
    return re.sub(r"[ \t-]+", " ", re.sub(r"\d+(\.\d+)?", "0", text))
