"""Every registered method, by discovery: its three files, what they say, and that its examples run."""

import ast
import doctest
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from clipworks.registry import AREAS, MethodInfo, get_method, methods

ROOT = Path(__file__).parents[2]
CARDS = ROOT.parent / "shared" / "methods"
SECTIONS = ("Parameters", "Inputs", "Relations", "References", "Examples")
PAPER = re.compile(r"[A-Z][\w'’-]+.{0,120}?\b(19|20)\d\d\b", re.S)  # an author and a year

every_method = pytest.mark.parametrize("info", methods(), ids=lambda m: f"{m.area}/{m.name}")


def source(info: MethodInfo) -> Path:
    return ROOT / "src" / "clipworks" / info.area / f"{info.name}.py"


def page(info: MethodInfo) -> Path:
    return ROOT / "docs" / "methods" / info.area / f"{info.name}.md"


def sections(docstring: str) -> dict[str, str]:
    """Title -> body of a NumPy docstring."""
    parts = re.split(r"^(\w[\w ]*)\n-{3,}\n", inspect.cleandoc(docstring), flags=re.M)
    return {title: body.strip() for title, body in zip(parts[1::2], parts[2::2], strict=True)}


def test_some_methods_are_registered_and_no_name_is_taken_twice():
    names = [(m.area, m.name) for m in methods()]
    assert names
    assert len(set(names)) == len(names)
    assert {m.area for m in methods()} <= set(AREAS)


def test_a_file_is_one_method():
    """A second decorated object in a file, or one outside the areas, would not be found by the registry."""
    found = {}
    for path in sorted((ROOT / "src" / "clipworks").rglob("*.py")):
        count = len(re.findall(r"^@method\(", path.read_text(encoding="utf-8"), re.M))
        if count:
            found[f"{path.parent.name}/{path.stem}"] = count
    assert found == {f"{m.area}/{m.name}": 1 for m in methods()}


@every_method
def test_three_files(info):
    assert page(info).is_file()
    test = ROOT / "tests" / info.area / f"test_{info.name}.py"
    assert test.is_file()
    assert "assert" in test.read_text(encoding="utf-8")
    assert len(source(info).read_text(encoding="utf-8").splitlines()) < 400


@every_method
def test_the_object_is_what_the_registry_read_from_its_source(info):
    found = get_method(f"{info.area}/{info.name}")
    assert found.__name__ == info.object
    assert found.__clipworks_method__ == {"card": info.card, "level": info.level}
    assert "M" in info.level
    assert info.level == "".join(letter for letter in "MRP" if letter in info.level)


@every_method
def test_the_file_opens_with_claim_formula_paper_and_differences(info):
    opening = ast.get_docstring(ast.parse(source(info).read_text(encoding="utf-8"))) or ""
    first, _, rest = opening.partition("\n")
    assert first.strip() == info.summary
    assert first.rstrip().endswith(".")
    for word in ("Claim:", "Formula:", "Differs from"):
        assert word in rest, f"{word} is missing"
    assert re.search(r"^Papers?: ", rest, re.M)
    assert PAPER.search(rest)


@every_method
def test_docstring_sections(info):
    found = get_method(f"{info.area}/{info.name}")
    given = sections(found.__doc__)
    missing = [title for title in SECTIONS if not given.get(title)]
    assert not missing
    if inspect.isfunction(found):
        assert given.get("Returns")
    assert PAPER.search(given["References"])
    signature = inspect.signature(found.__init__ if inspect.isclass(found) else found)
    documented = re.findall(r"^([\w, *]+?) : ", given["Parameters"], re.M)
    names = {name.strip().lstrip("*") for entry in documented for name in entry.split(",")}
    assert names == {p for p in signature.parameters if p != "self"}


@every_method
def test_the_example_is_short_and_runs(info):
    module = importlib.import_module(f"clipworks.{info.area}.{info.name}")
    found = getattr(module, info.object)
    examples = doctest.DocTestFinder(recurse=False).find(found, info.object, module=module)[0].examples
    assert 1 <= sum(e.source.count("\n") for e in examples) <= 6
    assert doctest.testmod(module).failed == 0


@every_method
def test_the_doc_page_names_paper_and_level_and_its_example_is_python(info):
    text = page(info).read_text(encoding="utf-8")
    assert text.startswith(f"# {info.area}/{info.name}\n")
    assert PAPER.search(text.partition("\n")[2])
    level = re.search(r"\*\*Level\.\*\* ([MRP]+)\b", text)
    assert level, "the page must say **Level.** and its letters"
    assert level.group(1) == info.level
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert blocks, "the page must show its use in Python"
    for block in blocks:
        code = "".join(e.source for e in doctest.DocTestParser().get_examples(block)) if ">>>" in block else block
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("clipworks"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


@every_method
def test_links_of_the_doc_page_lead_somewhere(info):
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page(info).read_text(encoding="utf-8")):
        assert (page(info).parent / target).exists(), target


@every_method
def test_a_higher_level_has_a_committed_result(info):
    """R and P are claims about numbers: the page names the JSON files under benchmarks/results that hold them."""
    named = re.findall(r"benchmarks/results/[\w./-]+\.json", page(info).read_text(encoding="utf-8"))
    for name in named:
        entry = json.loads((ROOT / name).read_text(encoding="utf-8"))
        assert {"seed", "versions", "git", "results"} <= set(entry), name
    assert named or info.level == "M"


@pytest.mark.skipif(not CARDS.is_dir(), reason="the cards are not beside the checkout")
@pytest.mark.shared_data
@every_method
def test_the_card_exists(info):
    assert (CARDS / f"{info.card}.md").is_file()


def test_no_method_imports_an_optional_library():
    """All methods in one fresh interpreter: what only an extra brings must not be imported before it is used."""
    code = """
import importlib, json, sys
from clipworks.registry import methods
for m in methods():
    importlib.import_module(f"clipworks.{m.area}.{m.name}")
roots = {name.split(".")[0] for name in sys.modules}
print(json.dumps(sorted(roots)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    optional = {"transformers", "accelerate", "faiss", "simplejpeg", "matplotlib", "av", "datasets", "webdataset",
                "peft", "torchvision", "timm", "open_clip", "fastapi", "onnx", "onnxruntime", "openvino"}  # fmt: skip
    assert not optional & set(json.loads(done.stdout))
