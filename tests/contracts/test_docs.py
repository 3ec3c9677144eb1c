"""The generated pages are up to date, and every example of the command line does what the page says."""

import importlib.util
import re
from pathlib import Path

import pytest

from clipworks.cli._command import discover
from clipworks.registry import MethodInfo, methods

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("docs_build", DOCS / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_methods_is_up_to_date(build):
    assert build.TABLE.read_text(encoding="utf-8") == build.methods_page(methods()), "run: make docs"


def test_the_table_says_what_holds(build):
    one = MethodInfo("losses", "a", "card-a", "MR", "a", "One.")
    found = [one, MethodInfo("heads", "b", "card-b", "M", "B", "Two.")]
    lines = [line for line in build.methods_page(found).splitlines() if line.startswith("| [")]
    assert lines == [
        "| [b](heads/b.md) | Two | yes |  |  | card-b |",
        "| [a](losses/a.md) | One | yes | yes |  | card-a |",
    ]


def test_every_command_has_an_executed_example(build):
    found = build.examples.examples(DOCS / "commands.md")
    shown = {line.split()[1] for example in found for line in build.examples.commands(example.text)}
    assert shown >= set(discover())


SHOWN = [DOCS / "commands.md", *sorted((DOCS / "quickstart").glob("*.md"))]


@pytest.mark.parametrize("page", SHOWN, ids=lambda p: p.name)
def test_the_examples_print_what_the_page_says(build, page):
    if not build.MODEL.exists():
        pytest.skip("the bundled model is not in this checkout")
    assert build.alike(page.read_text(encoding="utf-8"), build.page_with_outputs(page)), "run: make docs"


def test_an_example_is_compared_without_its_numbers(build):
    assert build.alike("  1  a.jpg  0.134  2.1 s", "  1  a.jpg  0.135  13.0 s")
    assert not build.alike("1  a.jpg", "1  b.jpg")


def test_examples_are_run_and_their_output_is_written(build, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = ["clipworks methods losse\nold output", "clipworks --version", "clipworks models | head -n 1"]
    block = "```console\n" + "".join(f"$ {line}\n" for line in lines) + "```\n"
    page = f"Text.\n\n{block}\n```text\nkept\n```\n"
    (tmp_path / "page.md").write_text(page)
    made = build.examples.played(tmp_path / "page.md")
    assert "old output" not in made
    assert "$ clipworks methods losse\nclipworks: area must be" in made
    assert "(exit code 2)\n$ clipworks --version\nclipworks 0." in made
    assert re.search(r"\| head -n 1\nname +source.*\n```\n\n```text\nkept\n```\n$", made)
    (tmp_path / "page.md").write_text(made)
    assert build.examples.played(tmp_path / "page.md") == made


PAGES = [*sorted(DOCS.parent.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)


def anchors(page):
    """The names that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.M)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


def lost(page):
    """Links of a page to files, or to headings, that are not there."""
    links = LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8")))
    for path, _, anchor in (link.partition("#") for link in links if not re.match(r"\w+:", link)):
        target = page.parent / path if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            yield f"{path}#{anchor}" if anchor else path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS.parent).as_posix())
def test_links_lead_somewhere(page):
    assert list(lost(page)) == []


def test_a_lost_link_is_found(tmp_path):
    (tmp_path / "b.md").write_text("# One `two`, three\n```text\n# no heading\n```\n")
    good = "[x](b.md#one-two-three) [y](#here) [z](https://example.org/none)"
    (tmp_path / "a.md").write_text(f"# Here\n{good} [d](c.md) [e](b.md#no-heading) [f](#there)\n")
    assert list(lost(tmp_path / "a.md")) == ["c.md", "b.md#no-heading", "#there"]


def test_every_guide_is_in_the_list_of_guides():
    listed = LINK.findall((DOCS / "README.md").read_text(encoding="utf-8"))
    guides = {page.relative_to(DOCS).as_posix() for page in [*DOCS.glob("*.md"), *(DOCS / "quickstart").glob("*.md")]}
    assert guides - set(listed) == {"README.md"}


def test_tables_of_figures_are_those_of_the_measurements(build):
    for page in build.figures.TABLES:
        assert page.read_text(encoding="utf-8") == build.WRITTEN[page](), "run: make docs"
    (said,) = re.findall(r"^\| text \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) ", build.figures.SERVING.read_text(), re.M)
    found = build.figures.results("server_speed")["text"]
    assert [float(value) for value in said] == [
        round(found["one by one"]["requests_per_s"], 2), round(found["together"]["requests_per_s"], 2),
        found["throughput_ratio"],
    ]  # fmt: skip


def test_figures_beside_other_libraries_are_those_of_the_measurements(build):
    text = build.figures.PEERS.read_text(encoding="utf-8")
    table = re.findall(r"^\| (.+?) \| ([\d.,]+) \S+ \| .+?: ([\d.,]+) \| \**([\d.]+)\** \| `(\w+)` \|$", text, re.M)
    rows = build.figures.rows()
    assert len(table) == len(rows) > 25
    for (what, ours, theirs, ratio, file), row in zip(table, rows, strict=True):
        assert (what, file) == (row.what, row.file)
        mine, other = float(ours.replace(",", "")), float(theirs.replace(",", ""))
        quotient = mine / other if row.unit in ("images/s", "requests/s", "%") else other / mine
        assert float(ratio) == pytest.approx(quotient, rel=0.05), what  # medians of ratios are not ratios of medians


def test_faults_of_the_page_are_those_that_were_counted(build):
    text = build.figures.RELIABILITY.read_text(encoding="utf-8")
    told, counted = text.split(build.figures.BEGIN)
    files = {number: set(re.findall(r"(?:tests|benchmarks)/[\w/]+\.py", where))
             for number, where in re.findall(r"^\| (\d+) \| [^|]+ \| ([^|]+) \|", told, re.M)}  # fmt: skip
    assert list(files) == [str(number) for number in range(1, 21)]
    found = build.figures.results("faults")
    assert set(re.findall(r"^\| (\d+) \| not counted", counted, re.M)) == set(files) - set(found["default"])
    for part in ("default", "slow"):
        for number, row in found[part].items():
            assert set(row["files"]) <= files[number], number
            assert row["passed"] > row["failed"], number
            name = part if part == "slow" else ""
            cells = rf"^\| {number} \| {name} \| ([\d,]+) \| ([\d,]*) \| (\d+) \|"
            shown = re.search(cells, counted, re.M).groups()
            assert [int(cell.replace(",", "") or 0) for cell in shown] == [
                row["tests"], row["injected"], row["failed"]]  # fmt: skip
    assert not [path for paths in files.values() for path in paths if not (DOCS.parent / path).is_file()]


def test_readme_names_the_two_commands_and_real_functions():
    import clipworks

    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    makefile = (DOCS.parent / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test"):
        assert f"make {target} " in text
        assert f"\n{target}: " in makefile
    for name in set(re.findall(r"\bclipworks\.(\w+)\(", text)):
        assert hasattr(clipworks, name)
    for name in set(re.findall(r"^\$ clipworks (\w+)", text, re.M)):
        assert name in discover()
