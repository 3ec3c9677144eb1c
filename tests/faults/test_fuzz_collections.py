"""Mutated files of a collection: the right rows, or an error that names the collection and what to do; nothing else.

Every kind of file is spoiled: bytes overwritten, cut and doubled, and JSON whose checks are right again although it
says something else. The answer is always compared with the collection's own, row by row.
"""

import json
import shutil
import warnings
import zlib

import numpy as np
import pyarrow as pa
import pytest
from fuzzing import edited_json, edits, run
from hypothesis import strategies as st

from clipworks.errors import CollectionError
from clipworks.store import derived, indexed
from clipworks.store.collection import Collection
from clipworks.store.journal import Journal, table_files
from clipworks.store.search import search
from clipworks.store.table import META, make_schema, read_meta
from clipworks.store.verify import verify
from clipworks.types import Features

ROWS, DIM = 24, 8
QUERY = np.ones(DIM, np.float32)
KINDS = ["data", "_versions", "_transactions", "checksums.txt", "rows.arrow", "vectors.npy", "facts.json",
         "writer.lock"]  # fmt: skip


def features(start, count):
    draw = np.random.default_rng(start)
    vectors = draw.standard_normal((count, DIM)).astype(np.float32)
    keys = [f"photo {i:03}" for i in range(start, start + count)]
    labels = [("cat", "dog")[i % 2] for i in range(count)]
    return Features(vectors, keys, np.array(labels), [f"the {i}th" for i in range(count)], "of some encoder")


def answers(place):
    """All that a reader asks for."""
    opened = Collection(place)
    found = search(opened, QUERY, k=7, columns=["label", "caption"])
    cats = [opened.keys[row] for row in opened.where({"label": "cat"})]
    columns = [opened.column(name) for name in ("key", "digest", "label", "caption")]
    return columns, opened.vectors.tobytes(), cats, found.keys, found.scores.tolist(), found.columns, opened.fingerprint


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A collection of two commits, with the files a reader makes, and its answers."""
    place = tmp_path_factory.mktemp("whole") / "c"
    made = Collection.create(place, dim=DIM, features=features(0, ROWS // 2))
    made.add(features(ROWS // 2, ROWS // 2))
    return place, answers(place)


def files(place, kind):
    return sorted(p for p in place.rglob("*") if p.is_file() and kind in (p.name, p.parent.name))


def asked(place, right):
    """The right answers, or an error that says where and what to do."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = answers(place)
    except CollectionError as error:
        said = str(error)
        if str(place) not in said or not ("clipworks verify" in said or "clipworks embed" in said):
            raise AssertionError(f"says not where, or not what to do: {said}") from error
        raise
    assert found == right


def fuzz(whole, tmp_path, drawn, spoil, count):
    """Spoil a fresh copy with each drawn value and ask it."""
    place, right = whole
    copy = tmp_path / "c"

    def work(given):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(place, copy)
        spoil(copy, given)
        asked(copy, right)

    return run(drawn, work, count, CollectionError, seconds=5.0)


def bytes_of(whole, tmp_path, kind, bare, count):
    """Mutants of the bytes of one kind of file, with or without the copy for searching."""
    place, _ = whole
    names = [p.relative_to(place) for p in files(place, kind)]

    def mutants(name):
        return edits((place / name).read_bytes(), 3).map(lambda data: (name, data))

    def spoil(copy, given):
        (copy / given[0]).write_bytes(given[1])
        if bare:
            shutil.rmtree(copy / "snapshot")

    return fuzz(whole, tmp_path, st.sampled_from(names).flatmap(mutants), spoil, count)


def spoiled(kinds):
    return [(kind, bare) for kind in kinds for bare in (False, True) if not (bare and kind in KINDS[4:7])]


@pytest.mark.parametrize(("kind", "bare"), spoiled(KINDS))
def test_bytes(whole, tmp_path, kind, bare):
    found = bytes_of(whole, tmp_path, kind, bare, 6)
    assert found.total() >= 5
    if kind in KINDS[4:]:  # derived, or only a name: made anew, nothing is refused
        assert found["refused"] == 0
    if kind == "data" and bare:  # every byte is covered, and there is no copy to answer from
        assert found["read"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "bare"), spoiled(KINDS))
def test_many_bytes(whole, tmp_path, kind, bare):
    assert bytes_of(whole, tmp_path, kind, bare, 1500).total() > 1000


def test_files_that_are_gone_empty_or_folders(whole, tmp_path):
    place, right = whole
    refused = 0
    for path in sorted(p.relative_to(place) for p in place.rglob("*") if p.is_file()):
        for way in ("gone", "empty", "folder"):
            copy = tmp_path / "c"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(place, copy)
            (copy / path).unlink()
            if way == "empty":
                (copy / path).touch()
            elif way == "folder":
                (copy / path).mkdir()
            try:
                asked(copy, right)
            except CollectionError:
                refused += 1
    assert refused


@pytest.mark.parametrize("name", ["!.manifest", "x.manifest", ".manifest", "0.manifest", "99.manifest"])
def test_files_that_nobody_wrote(whole, tmp_path, name):
    place, right = whole
    shutil.copytree(place, tmp_path / "c")
    (tmp_path / "c" / "items.lance" / "_versions" / name).write_text("not one of ours")
    if not name[0].isdigit():
        return asked(tmp_path / "c", right)
    with pytest.raises(CollectionError):  # Lance takes it for a version of an older kind, and refuses to mix them
        asked(tmp_path / "c", right)


# -- JSON that says something else, with its checks made right ---------------------------------------------------------


def seal_line(entry):
    text = json.dumps(entry).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


@pytest.mark.parametrize("count", [15, pytest.param(3000, marks=pytest.mark.slow)])
def test_lines_of_the_checksums(whole, tmp_path, count):
    place, _ = whole
    entries = [json.loads(line[9:]) for line in (place / "checksums.txt").read_bytes().splitlines()]

    def spoil(copy, given):
        lines = given if isinstance(given, list) else [given]
        (copy / "checksums.txt").write_bytes(b"".join(map(seal_line, lines)))

    found = fuzz(whole, tmp_path, edited_json([*entries, {"cleaning": True}]), spoil, count)
    assert found["read"]
    assert found["refused"] or count < 100


@pytest.mark.parametrize("name", ["/etc/passwd", "../../secret", "items.lance/../../secret", "other", "", 7, None, []])
def test_checksums_speak_of_the_table_only(tmp_path, name):
    (tmp_path / "checksums.txt").write_bytes(seal_line({"file": name, "bytes": 3, "sha256": "0" * 64}))
    found = Journal.read(tmp_path)
    assert (found.files, found.broken) == ({}, [1])


@pytest.mark.parametrize("count", [15, pytest.param(3000, marks=pytest.mark.slow)])
def test_the_record_of_the_copy_for_searching(whole, tmp_path, count):
    place, _ = whole
    (path,) = files(place, "facts.json")
    name = path.relative_to(place)
    kept = json.loads(path.read_text().splitlines()[0])

    def spoil(copy, given):
        text = json.dumps(given)
        (copy / name).write_text(f"{text}\n{derived._digest(text)}\n")

    found = fuzz(whole, tmp_path, edited_json(kept).filter(lambda given: _same_norm(given, kept)), spoil, count)
    assert found["refused"] == 0


def _same_norm(given, kept):
    """Whether the length of the longest vector is still right, or nothing that could be one."""
    norm = given.get("norm") if isinstance(given, dict) else None
    return norm == kept["norm"] or not isinstance(norm, int | float | str)


META_JSON = {"format": 1, "clipworks": "0", "created": "", "encoder": {
    "fingerprint": "f", "name": "n", "source": None, "precision": "fp32", "weights": "w",
    "config": {"vision": {"image_size": 16}}}}  # fmt: skip


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_metadata(tmp_path, count):
    def work(given):
        schema = pa.schema([], metadata={META: json.dumps(given).encode()})
        encoder = read_meta(schema, tmp_path / "c")["encoder"]
        for name in ("fingerprint", "name", "source"):  # as readers use them
            assert isinstance((encoder.get(name) or "")[:12], str)
        encoder.get("config", {}).get("vision", {}).get("image_size")

    found = run(edited_json(META_JSON), work, count, CollectionError)
    assert found["read"]
    assert found["refused"]
    assert read_meta(make_schema(4, "float16", META_JSON), tmp_path) == META_JSON


INDEX = {"format": 1, "kind": "ivf", "version": "0", "dim": DIM, "rows": ROWS, "seed": 0, "asked": 0.98, "recall": 0.99,
         "recall_words": None, "ms": 1.0, "exact_ms": 2.0, "breadth": 4, "candidates": 2, "files": {}}  # fmt: skip


@pytest.mark.parametrize("count", [20, pytest.param(3000, marks=pytest.mark.slow)])
def test_the_record_of_an_index(whole, tmp_path, count):
    """It tells nothing, or numbers; the search is exact and right in either case."""
    place, right = whole
    folder = place / "indexes" / "ivf-0"
    folder.mkdir(parents=True)
    opened = Collection(place)

    def work(given):
        text = json.dumps(given)
        (folder / "facts.json").write_text(f"{text}\n{derived._digest(text)}\n")
        found = indexed.indexes(place)["ivf"]
        if found:  # what readers do with it
            assert "nan" not in f"{found['recall']:.3f} {found['rows']:,}"
            indexed._good(found)
        indexed.OPEN.pop(opened, None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert search(opened, QUERY, k=7, index="ivf").keys == right[3]

    try:
        assert run(edited_json(INDEX), work, count)["read"]
    finally:
        shutil.rmtree(place / "indexes")


def test_verify_names_every_spoiled_file(whole, tmp_path):
    """A flipped bit in any file that holds something is found by name."""
    place, _ = whole
    draw = np.random.default_rng(0)
    for path in [*table_files(place), *(str(p.relative_to(place)) for p in files(place, "vectors.npy"))]:
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        shutil.copytree(place, tmp_path / "c")
        data = bytearray((place / path).read_bytes())
        data[draw.integers(len(data))] ^= 1 << int(draw.integers(8))
        (tmp_path / "c" / path).write_bytes(data)
        found = {damage.part for damage in verify(tmp_path / "c").damage}
        assert any(part.split("/")[-1] == path.split("/")[-1] for part in found), (path, found)
