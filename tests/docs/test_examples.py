"""Every example of every page runs.

Pages that show what commands print (docs/commands.md, the quick-starts) are run with the bundled model and compared by
tests/contracts/test_docs.py. All others are run here, block after block, with a toy in the place of every model, with
stand-ins for the reader's data and with fewer steps (`stand_ins`). What is not run is listed below, with the reason.
"""

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest
import stand_ins
import torch

from clipworks.cli import _command
from clipworks.encoders import loading
from clipworks.registry import get_method
from clipworks.segment import dinoiser_heads
from clipworks.training import distill, finetune, loop

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SHOWN = [DOCS / "commands.md", *sorted((DOCS / "quickstart").glob("*.md"))]
PAGES = [page for page in [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))] if page not in SHOWN]

PARSED = {  # commands whose options go through their own parser, and no further
    "torchrun": "starts eight processes; tests/training/test_gather.py runs two and four",
    "--engine ray": "Ray takes half a minute to start; tests/store/test_engine_ray.py runs it",
    "clipworks export": "calibrates and times for minutes; tests/encoders/test_runtime.py and docs/commands.md run it",
    "s3://": "there is no such store here; tests/store/test_object_store.py publishes to files and searches them",
    "--encoder fast": "the encoder is what `export` above would have made",
    "CLIPWORKS_TOKEN": "listens on every address of the machine; tests/server/test_server_abuse.py asks it",
    "clipworks bench --data": "measures for hours; docs/commands.md and docs/quickstart/research.md run smaller ones",
    "--source endpoint": "asks a language model behind an address; tests/zeroshot/test_description_sources.py has one",
}
LEFT = {  # commands of other programs
    "apt-get": "fetches 1 GB of pictures",
    "dpkg": "unpacks them",
}
COMPILED = {  # blocks of Python whose syntax is checked, and no more
    "Endpoint(": "asks a language model behind an address; tests/zeroshot/test_description_sources.py has one",
    "WordNetGlosses(": "reads WordNet, which is not shipped; tests/zeroshot/test_descriptions.py writes some of it",
}
COLLECTIONS = {  # pages that search a collection which another page made: how many rows theirs must have
    "docs/indexes.md": 1000,
    "docs/runtimes.md": 12,
    "docs/scale.md": 12,
    "docs/searching.md": 12,
    "docs/serving.md": 12,
}


def part_of_docs(name):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


examples = part_of_docs("examples")


def label(page):
    return page.relative_to(ROOT).as_posix()


def reason(text, table):
    return next((why for part, why in table.items() if part in text), "")


@pytest.fixture(scope="session")
def own_data(tmp_path_factory):
    place = tmp_path_factory.mktemp("own") / "data"
    place.mkdir()
    stand_ins.folder(place)
    return place


@pytest.fixture(scope="session")
def toy_weights(tmp_path_factory):
    return stand_ins.weights(tmp_path_factory.mktemp("weights") / "toy")


@pytest.fixture
def desk(own_data, toy_weights, tmp_path, monkeypatch):
    """A folder with the reader's files, in which no weights but the toy's and nothing behind a network are there."""
    shutil.copytree(own_data, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "BUNDLED", toy_weights)
    weights = toy_weights / "clipworks-small.safetensors"
    for name in ("cached", "download"):
        monkeypatch.setattr(loading.hub, name, lambda repository: weights)
    monkeypatch.setattr(_command, "COMMANDS", dict(_command.discover()))
    stand_ins.published(monkeypatch)
    for function in (loop.train, distill.distill, finetune.finetune, dinoiser_heads.learn):
        stand_ins.fewer(function, monkeypatch)
    return weights


def command(line, given=examples.command):
    """Run a command of a page, or let it be parsed."""
    if reason(line, PARSED):
        examples.parsed(line)
        return 0, ""
    return (0, "") if reason(line, LEFT) else given(stand_ins.shorter(line))


@pytest.mark.parametrize("page", [page for page in PAGES if examples.examples(page)], ids=label)
def test_examples_run(page, desk, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(examples, "command", command)
    if page.parent.parent.name == "methods":
        stand_ins.fewer(get_method(f"{page.parent.name}/{page.stem}"), monkeypatch)
    if rows := COLLECTIONS.get(label(page)):
        stand_ins.collection(Path("photos.collection"), str(desk), rows)
    with examples.player(change=stand_ins.shorten) as player:
        player.names.update(stand_ins.THERE.get(label(page), {}))
        for example in examples.examples(page):
            if example.kind == "python":
                stand_ins.pictures_of(example.text)
                if reason(example.text, COMPILED):
                    continue
            made = player.run(example)
            assert made.count("(exit code") == example.text.count("(exit code"), made


def test_no_example_is_overlooked():
    """No fenced block that looks like an example is taken for something else, and none stands where it is not seen."""
    for page in [*PAGES, *SHOWN]:
        text = page.read_text(encoding="utf-8")
        found = examples.examples(page)
        assert text.count("```python") == sum(example.language == "python" for example in found), label(page)
        spans = {example.span for example in found}
        for block in examples.FENCE.finditer(text):
            if block.span(2) not in spans and block.group(1) != "text":
                assert not re.search(r"^(\$ )?([A-Z_]+=\S* )?(clipworks|torchrun|pip|make) ", block.group(2), re.M), (
                    f"{label(page)}: {block.group(2)}"
                )


def test_what_is_not_run_is_on_some_page_and_its_reason_names_tests_that_are_there():
    found = [example for page in PAGES for example in examples.examples(page)]
    lines = [line for example in found if example.kind == "commands" for line in examples.commands(example.text)]
    for part in [*PARSED, *LEFT]:
        assert any(part in line for line in lines), f"no command has {part!r} any more"
    for part in COMPILED:
        assert any(part in example.text for example in found), f"no example has {part!r} any more"
    named = re.findall(r"(?:docs|tests)/[\w/.]+", " ".join([*PARSED.values(), *COMPILED.values()]))
    assert [path for path in named if not (ROOT / path).is_file()] == []


def test_a_wrong_option_of_a_command_that_is_only_parsed_is_found():
    examples.parsed("torchrun --nproc-per-node 8 -m clipworks train pairs.csv --out run  # comment")
    for wrong in ("clipworks train pairs.csv --out run --epoch 3", "clipworks trane pairs.csv", "clipworks train"):
        with pytest.raises(Exception, match=r"(?i)no such option|missing|trane"):
            examples.parsed(wrong)
