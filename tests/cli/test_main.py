"""The frame of the command line: discovery, quick start, exit codes, one-line errors, pipes, Ctrl-C."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import pytest
import typer

from clipworks.cli import _command
from clipworks.cli import main as cli
from clipworks.cli._command import command, discover
from clipworks.errors import BadImage, BadWeights, ClipworksError, CollectionError, need
from clipworks.registry import methods


@pytest.fixture
def spare(monkeypatch):
    """A table of commands that a test may add to."""
    monkeypatch.setattr(_command, "COMMANDS", dict(discover()))


def test_every_file_of_the_folder_brings_its_commands():
    files = {f.stem for f in Path(cli.__file__).parent.glob("[!_]*.py")} - {"main"}
    modules = {entry.function.__module__.rsplit(".", 1)[1] for entry in discover().values()}
    assert modules == files


def test_help_lists_every_command_without_importing_torch_and_quickly():
    code = (
        "import sys; from clipworks.cli.main import main; c = main(['--help']); sys.exit(c or 'torch' in sys.modules)"
    )
    best = 9.0
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        best = min(best, time.perf_counter() - started)
    assert done.returncode == 0, done.stderr
    listed = done.stdout.split("Commands:")[1]
    assert all(f"  {name} " in listed for name in discover())
    assert best < 1.5  # 0.2 s on a quiet machine; the bound only catches a heavy import


@pytest.mark.parametrize("name", sorted(discover()))
def test_help_of_every_command_teaches_by_example_without_importing_torch(name):
    code = (
        "import sys; from clipworks.cli.main import main; c = main(sys.argv[1:]); sys.exit(c or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, name, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Examples:" in done.stdout
    assert f"clipworks {name}" in done.stdout


def test_no_arguments_print_the_help(capsys):
    assert cli.main([]) == 0
    assert "Usage: clipworks" in capsys.readouterr().out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("clipworks ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serch"], "command must be one of"),
        (["modells"], "Did you mean 'models'?"),
        (["methods", "--jsn"], "No such option"),
        (["methods", "losse"], "Did you mean 'losses'?"),
        (["methods", "--json", "--csv"], "one of --json and --csv"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(words, message, capsys):
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ClipworksError("a\nb"), 2),
        (FileNotFoundError(2, "No such file", "x"), 2),
        (BadImage("x.jpg", "truncated"), 1),
        (BadWeights("w"), 1),
        (CollectionError("damaged"), 1),
        (OSError(28, "No space left on device"), 1),
        (ZeroDivisionError("oops"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_become_one_line_and_an_exit_code(spare, error, code, capsys, monkeypatch):
    @command(resume="Run it again.")
    def broken() -> None:
        """Fail."""
        raise error

    assert cli.main(["broken"]) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.count("\n") <= 2  # the option parser prints an empty line on Ctrl-C
    assert ("Run it again." in err) == (code == 130)
    if code != 130:
        monkeypatch.setenv("CLIPWORKS_DEBUG", "1")
        with pytest.raises(type(error)):
            cli.main(["broken"])


def test_a_missing_extra_names_its_command(spare, capsys):
    @command()
    def broken() -> None:
        """Fail."""
        need("no_such_library", "fast")

    assert cli.main(["broken"]) == 2
    assert "pip install 'clipworks[fast]'" in capsys.readouterr().err


def test_the_returned_number_is_the_exit_code_and_warnings_are_one_line(spare, capsys):
    @command()
    def careful() -> int:
        """Warn."""
        import warnings

        warnings.warn("two\nlines", stacklevel=2)
        return 1

    assert cli.main(["careful"]) == 1
    assert capsys.readouterr().err == "clipworks: warning: two lines\n"


def test_options_come_from_the_library_and_only_given_ones_arrive(spare, capsys):
    arrived = {}

    @command("zeroshot.classifier.class_vectors", hide=("encoder",))
    def vectors(names: str, *, out: Annotated[str, typer.Option(help="Own.")] = "x", **options) -> None:
        """Try."""
        arrived.update(options, names=names, out=out)

    assert cli.main(["vectors", "cat", "--chunk", "7"]) == 0
    assert arrived == {"names": "cat", "out": "x", "chunk": 7}
    assert cli.main(["vectors", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "distinct class names in words" in text  # the argument's help comes from the docstring too
    assert "[default: 4096]" in text
    assert "--encoder" not in text
    assert cli.main(["vectors", "cat", "--chunk", "many"]) == 2


def test_a_reader_that_stops_early_is_no_error():
    # more than a pipe holds, so that the writer meets the closed end
    code = "from clipworks.cli._output import emit; emit([{'n': i, 'text': 'x' * 90} for i in range(5000)])"
    done = subprocess.run(
        f'{sys.executable} -c "{code}" | head -n 1', shell=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["n", "text"]
    assert done.stderr == ""


def test_methods_json_is_what_the_registry_holds(capsys):
    assert cli.main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["area"], r["name"]) for r in rows] == [(m.area, m.name) for m in methods()]
    assert all({"area", "name", "card", "level"} <= set(r) for r in rows)
    assert rows


def test_doctor_reports_as_json_and_says_what_installs_what_is_missing(capsys):
    code = cli.main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == (1 if found["problems"] else 0)
    assert {"device", "precision", "versions", "missing", "model", "python"} <= set(found)
    assert "torch" in found["versions"]
    assert all(how.startswith("pip install 'clipworks[") for how in found["missing"].values())


def test_a_name_the_terminal_cannot_show_is_no_error():
    code = "from clipworks.cli.main import main; import sys; sys.exit(main(['methods', 'caf\\udce9']))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, timeout=60
    )
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
