"""Approximate indexes: recall, scores, changes, filters, damage, replacement; against plain float64 products."""

import os
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest

from clipworks.cli.main import main
from clipworks.errors import ClipworksError, CollectionError, MissingExtra, UnknownName
from clipworks.store import ann, cover, indexed
from clipworks.store import index as building
from clipworks.store.collection import Collection
from clipworks.store.index import build_index
from clipworks.store.indexed import KINDS, Index, newest, usable
from clipworks.store.search import search, search_many, similar
from clipworks.store.verify import info, verify
from clipworks.store.writer import Writer
from clipworks.types import Features

ROWS, DIM, CENTRES = 2000, 32, 20
HERE = Path(__file__).parent


def clustered(count, seed=0):
    draw = np.random.default_rng(seed)
    middle = np.random.default_rng(9).standard_normal((CENTRES, DIM))
    group = draw.integers(0, CENTRES, count)
    vectors = middle[group] + 0.6 * draw.standard_normal((count, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16), group


VECTORS, GROUP = clustered(ROWS)
NAMES = [f"{i:05d}" for i in np.random.default_rng(3).permutation(ROWS)]
QUERIES = clustered(40, seed=5)[0].astype(np.float64)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A collection with an index of every kind."""
    place = tmp_path_factory.mktemp("index") / "c"
    Collection.create(place, features=Features(VECTORS, NAMES, GROUP.astype(str)))
    for kind in KINDS:
        build_index(place, kind=kind)
    return place


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "c"))


@pytest.fixture(autouse=True)
def no_message(request):
    """A search that falls back says so: no test meets that by accident."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the search is exact")
        yield


def expected(names, vectors, query, k=10, allowed=None):
    """Keys and cosines of the best, in float64."""
    scores = vectors.astype(np.float64) @ (query / np.linalg.norm(query))
    rows = np.arange(len(names)) if allowed is None else np.flatnonzero(allowed)
    best = rows[np.argsort(-scores[rows], kind="stable")[:k]]
    return [names[i] for i in best], scores[best]


def recall(found, names, vectors, allowed=None):
    shares = []
    for ranking, query in zip(found, QUERIES, strict=True):
        keys, _ = expected(names, vectors, query, len(ranking), allowed)
        shares.append(len(set(keys) & set(ranking.keys)) / len(keys))
    return np.mean(shares)


@pytest.mark.parametrize("kind", KINDS)
def test_finds_nearly_all_with_the_scores_of_the_exact_search(whole, kind):
    opened = Collection.open(whole)
    found = search_many(opened, QUERIES, index=kind)
    assert usable(opened, kind).facts["kind"] == kind
    assert recall(found, NAMES, VECTORS) > 0.95
    place = {name: i for i, name in enumerate(NAMES)}
    for ranking, query in zip(found, QUERIES, strict=True):
        exact = VECTORS[[place[key] for key in ranking.keys]].astype(np.float64) @ (query / np.linalg.norm(query))
        np.testing.assert_allclose(ranking.scores, exact, atol=1e-6)
        assert (np.diff(ranking.scores) <= 0).all()
        assert len(set(ranking.keys)) == 10
    alone = [search(opened, query, index=kind).keys for query in QUERIES]
    assert alone == [ranking.keys for ranking in found]
    assert len(search(opened, QUERIES[0], k=ROWS + 5, index=kind)) == ROWS  # more than the index can propose


def test_the_index_is_what_answers(whole, monkeypatch):
    """One that proposes a single row of each query shows through, where enough others are fresh or asked exactly."""
    opened = Collection.open(whole)
    asked = []
    monkeypatch.setattr(ann.Ivf, "search", lambda self, q, *rest: asked.append(rest) or np.zeros((len(q), 1), np.int64))
    assert search(opened, QUERIES[0], k=1, index="ivf").keys == [opened.keys[0]]
    keys, _ = expected(NAMES, VECTORS, QUERIES[0])
    assert search(opened, QUERIES[0], k=10, index="ivf").keys == keys  # too few: answered exactly
    assert len(asked) == 2


@pytest.mark.parametrize("kind", ["ivf", "hnsw", "pq"])
def test_recall_is_that_of_an_independent_count(whole, kind):
    """What the index proposes for vectors beside held-out rows is compared with a sort of all products."""
    opened = Collection.open(whole)
    index = usable(opened, kind)
    held = np.sort(np.random.default_rng(0).choice(ROWS, building.QUERIES, replace=False))
    hits = 0
    for query in building.unseen(opened, held):
        best = set(np.argsort(-(opened.vectors.astype(np.float64) @ query))[:10].tolist())
        near = index.kind.search(query[None], 10 * index.facts["candidates"], index.facts["breadth"], None)
        hits += len(best & set(near[0].tolist()))
    assert index.facts["recall"] == pytest.approx(hits / (10 * len(held)), abs=2e-3)
    assert index.facts["recall"] >= 0.98
    assert index.facts["recall_words"] is None


def test_what_an_index_is_tried_on_is_as_near_as_the_nearest_row(whole):
    opened, rows = Collection.open(whole), np.array([0, 5, 1999])
    vectors = opened.vectors.astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    asked = building.unseen(opened, rows, seed=3)
    np.testing.assert_allclose(np.linalg.norm(asked, axis=1), 1, atol=1e-5)
    for query, row in zip(asked, rows, strict=True):
        others = np.delete(vectors @ vectors[row], row)
        assert vectors[row] @ query == pytest.approx(others.max(), abs=1e-3)
    assert not np.allclose(asked, building.unseen(opened, rows, seed=4), atol=0.1)


def test_held_out_rows_are_not_trained_on_and_memory_is_kept(whole, monkeypatch):
    opened, plans = Collection.open(whole), []
    monkeypatch.setattr(ann.Ivf, "build", classmethod(lambda cls, folder, plan: plans.append(plan) or 1 / 0))
    least = ann.Ivf.size(ROWS, DIM) + building._least_room(DIM)
    for memory in (least, 2 << 30):
        with pytest.raises(ZeroDivisionError):
            build_index(opened, kind="ivf", memory=memory, rebuild=True)
        plan = plans.pop()
        room = memory - ann.Ivf.size(ROWS, DIM)
        assert 3 * plan.sample.nbytes <= room
        assert 4 * max(map(len, plan.blocks())) * 4 * DIM <= room
        assert np.array_equal(np.concatenate(list(plan.blocks())), opened.vectors.astype(np.float32))
        held = np.random.default_rng(0).choice(ROWS, building.QUERIES, replace=False)
        met = {row.tobytes() for row in plan.sample}
        assert len(plan.sample) == ROWS - len(held)
        assert not any(opened.vectors[row].astype(np.float32).tobytes() in met for row in held)
    with pytest.raises(ClipworksError, match=rf"memory must be at least {least:,} bytes for the kind 'ivf'.*pq"):
        build_index(opened, kind="ivf", memory=least - 1)
    assert not list(whole.rglob(".making-*"))


@pytest.mark.parametrize("kind", KINDS)
def test_changes_after_the_index_are_in_the_answer(copy, kind):
    """New and changed rows are found, removed ones are not, another label changes nothing; then it is extended."""
    fresh = clustered(150, seed=7)[0]
    removed, moved = NAMES[:60], NAMES[60:100]
    with Writer(copy) as writer:
        writer.append(writer.build([{"key": f"new{i}"} for i in range(150)], fresh))
        writer.delete(removed)
        writer.merge(writer.build([{"key": key, "label": "moved"} for key in moved], -VECTORS[60:100]))
        writer.merge(writer.build([{"key": key, "label": "named"} for key in NAMES[100:1000]], VECTORS[100:1000]))
    names = [*NAMES[60:], *(f"new{i}" for i in range(150))]
    vectors = np.concatenate([-VECTORS[60:100], VECTORS[100:], fresh])

    def check(opened):
        found = search_many(opened, QUERIES, index=kind)
        assert recall(found, names, vectors) > 0.95
        assert not {key for ranking in found for key in ranking.keys} & set(removed)
        assert search(opened, fresh[3], k=1, index=kind).keys == ["new3"]
        assert search(opened, -VECTORS[70], k=1, index=kind).keys == [NAMES[70]]
        assert NAMES[70] not in search(opened, VECTORS[70], k=20, index=kind).keys

    opened = Collection.open(copy)
    parts = usable(opened, kind).cover
    assert (len(parts.fresh), parts.gone) == (190, 100)
    check(opened)
    report = build_index(copy, kind=kind)
    assert report.done == ("built" if kind == "lance" else "extended")
    assert report.rows == len(names)
    assert len(usable(Collection.open(copy), kind).cover.fresh) == 0
    check(Collection.open(copy))
    assert build_index(copy, kind=kind).done == "up to date"
    assert build_index(copy, kind=kind, recall=0.9).done != "up to date"
    assert build_index(copy, kind="ivf", rebuild=True).done == "built"
    assert len(list((copy / "indexes").iterdir())) == len(KINDS)
    assert usable(Collection.open(copy), "ivf").cover.gone == 0
    assert verify(copy).ok


def test_an_index_far_from_the_collection_is_left_out(copy):
    more = clustered(600, seed=8)[0]
    Collection.open(copy).add(Features(more, [f"new{i}" for i in range(600)]))
    opened = Collection.open(copy)
    keys, _ = expected([*NAMES, *(f"new{i}" for i in range(600))], np.concatenate([VECTORS, more]), QUERIES[0])
    with pytest.warns(UserWarning, match=r"the ivf index of .* is out of date \(23% of the rows are new.*search is ex"):
        assert search(opened, QUERIES[0], index="ivf").keys == keys
    assert search(opened, QUERIES[0], index="ivf").keys == keys  # said once per open collection
    assert build_index(copy).done == "built"


def test_the_table_of_another_encoder_is_noticed(copy):
    from clipworks.store.collection import new_meta
    from clipworks.store.table import make_schema

    with Writer(copy, make_schema(8, "float16", new_meta({})), overwrite=True) as writer:
        writer.append(writer.build([{"key": key} for key in NAMES], VECTORS[:, :8]))
    with pytest.warns(UserWarning, match=r"vectors of length 32\b.*search is exact"):
        assert len(search(copy, np.ones(8), index="pq")) == 10
    assert build_index(copy, kind="pq").done == "built"


@pytest.mark.parametrize("kind", KINDS)
def test_filters(whole, kind):
    opened = Collection.open(whole)
    for wide, where, least in (
        (np.array([name < "01000" for name in NAMES]), "key < '01000'", 0.95),
        (GROUP < CENTRES // 2, {"label": [str(i) for i in range(CENTRES // 2)]}, 0.7),  # none of them near to half
    ):  # fmt: skip
        found = search_many(opened, QUERIES, where=where, index=kind)
        allowed = {name for name, good in zip(NAMES, wide, strict=True) if good}
        assert all(set(ranking.keys) <= allowed and len(ranking) == 10 for ranking in found)
        assert recall(found, NAMES, VECTORS, wide) > least
    for ranking, query in zip(search_many(opened, QUERIES, where={"label": "3"}, index=kind), QUERIES, strict=True):
        assert ranking.keys == expected(NAMES, VECTORS, query, 10, GROUP == 3)[0]  # few: exact
    assert search_many(opened, QUERIES[:1], where={"label": "none"}, index=kind)[0].keys == []
    twin = similar(opened, NAMES[0], k=5, index=kind)
    near = expected(NAMES, VECTORS, VECTORS[0].astype(float), 5, np.arange(ROWS) > 0)[0]
    assert NAMES[0] not in twin.keys
    assert len(set(twin.keys) & set(near)) >= 4


def damaged_copies():
    return [(kind, fault) for kind in KINDS for fault in ("flip", "cut", "gone")]


@pytest.mark.parametrize(("kind", "fault"), damaged_copies())
def test_damage_is_noticed_and_the_search_is_exact(copy, kind, fault):
    folder = newest(copy, kind)
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = path.read_bytes()
    if fault == "flip":
        path.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 16]) + data[len(data) // 2 + 1 :])
    elif fault == "cut":
        path.write_bytes(data[:-10])
    else:
        path.unlink()
    keys, scores = expected(NAMES, VECTORS, QUERIES[1])
    with pytest.warns(UserWarning, match=f"the {kind} index of .* is damaged .*; the search is exact.*index .*{kind}"):
        found = search(copy, QUERIES[1], index=kind)
    assert found.keys == keys
    np.testing.assert_allclose(found.scores, scores, atol=1e-6)
    (damage,) = verify(copy).damage
    assert damage.part.startswith(f"indexes/{folder.name}/")
    assert "nothing is lost" in damage.remedy
    table = {p: p.stat().st_mtime_ns for p in (copy / "items.lance").rglob("*")}
    assert verify(copy, repair=True).repaired
    assert table == {p: p.stat().st_mtime_ns for p in (copy / "items.lance").rglob("*")}  # the table is not touched
    assert verify(copy).ok
    assert newest(copy, kind) is None
    assert build_index(copy, kind=kind).done == "built"


@pytest.mark.parametrize("name", [cover.COVERED, "facts.json"])
def test_damage_beside_the_index(copy, name):
    path = newest(copy, "ivf") / name
    path.write_bytes(path.read_bytes()[:40] + b"x" + path.read_bytes()[41:])
    with pytest.warns(UserWarning, match="is damaged"):
        search(copy, QUERIES[1], index="ivf")
    assert not verify(copy).ok
    assert build_index(copy).done == "built"  # what is damaged is neither kept nor extended
    assert verify(copy).ok


STEPS = ["begun", "covered", "measured", "sealed", "not in place", "in place", "cleared"]


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_a_build_that_dies_at_any_step_leaves_a_whole_index(copy):
    before = newest(copy, "ivf").name
    command = [sys.executable, str(HERE / "killed_index.py"), str(copy), *STEPS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    answers = [line.split() for line in done.stdout.splitlines()]
    assert [code for code, _ in answers] == ["77"] * len(STEPS), done.stderr
    assert [name == before for _, name in answers] == [True] * 5 + [False] * 2
    assert verify(copy).ok
    assert recall(search_many(copy, QUERIES, index="ivf"), NAMES, VECTORS) > 0.95
    assert build_index(copy, rebuild=True).done == "built"
    assert sorted(p.name.split("-")[0] for p in (copy / "indexes").iterdir()) == sorted(KINDS)  # nothing is left


def test_readers_see_the_former_index_or_the_new_one(copy):
    done = threading.Event()

    def replace():
        for _ in range(6):
            build_index(copy, kind="ivf", rebuild=True)
        done.set()

    builder, looks = threading.Thread(target=replace), 0
    builder.start()
    while not done.is_set() or not looks:
        assert usable(Collection(copy), "ivf") is not None  # a message would be an error here
        looks += 1
    builder.join()
    assert newest(copy, "ivf").name.startswith("ivf-000007")


def test_auto_is_exact_where_that_is_fast(whole, copy, monkeypatch):
    assert usable(Collection.open(whole)) is None
    assert usable(Collection.open(whole), "exact") is None
    monkeypatch.setattr(indexed, "EXACT_UP_TO", ROWS * DIM - 1)
    there = indexed.indexes(whole)
    quickest = min(KINDS, key=lambda kind: there[kind]["ms"])
    assert usable(Collection.open(whole)).facts["kind"] == quickest
    shutil.rmtree(copy / "indexes")
    assert usable(Collection.open(copy)) is None
    build_index(copy, kind="hnsw")
    assert usable(Collection.open(copy)).facts["kind"] == "hnsw"
    facts = {"recall": 0.9, "recall_words": None}, {"recall": 0.99, "recall_words": 0.9}, {"recall": 0.95}, {}
    assert [indexed._good(one) for one in facts] == [False, False, True, False]
    with pytest.warns(UserWarning, match="the pq index of .* is not there; the search is exact"):
        search(copy, QUERIES[0], index="pq")


def test_words_are_measured_too_where_the_encoder_is_known(tmp_path):
    from small_store import encoder

    from clipworks.encoders.loading import save

    model = encoder()
    model.loaded_from(str(save(model, tmp_path / "tiny.safetensors")))
    vectors = model.texts([f"number {i} of many" for i in range(1200)])
    made = Collection.create(tmp_path / "c", encoder=model, features=Features(vectors, fingerprint=model.fingerprint))
    report = build_index(made)
    assert report.recall_words >= 0.98
    assert f"({report.recall_words:.3f} for words)" in str(report)


def test_marks_are_sums_of_words_modulo_two_to_the_64():
    vectors = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
    given = cover.marks(vectors)
    factors = [int(x) for x in cover._scramble(np.arange(1, 13, dtype=np.uint64))]
    for row, mark in zip(vectors, given, strict=True):
        words = np.frombuffer(row.tobytes(), "<u2").tolist()
        assert int(mark) == sum(w * f for w, f in zip(words, factors, strict=True)) % 2**64
    assert np.array_equal(cover.marks(vectors, np.array([4, 1])), given[[4, 1]])
    flipped = vectors.copy()
    flipped[:, :2] *= -1
    assert not (cover.marks(flipped) == given).any()
    state = 0x9E3779B97F4A7C15  # the first number of SplitMix64 with seed 0, as published
    assert int(cover._scramble(np.array([1], np.uint64))[0]) == 0xE220A8397B1DCDAF, state


def test_mistakes(whole, tmp_path, monkeypatch):
    small = Collection.create(tmp_path / "s", features=Features(VECTORS[:50]))
    with pytest.raises(ClipworksError, match=r"an index needs at least 1,000 rows, .* has 50"):
        build_index(small)
    with pytest.raises(UnknownName, match=r"kind must be one of .*Did you mean 'hnsw'"):
        build_index(whole, kind="hnws")
    with pytest.raises(UnknownName, match="index must be one of 'auto', 'exact'"):
        search(whole, QUERIES[0], index="fast")
    with pytest.raises(ClipworksError, match=r"recall must lie in \[0.0, 1.0\]"):
        build_index(whole, recall=98)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtra, match=r"pip install 'clipworks\[search\]'"):
        build_index(whole, kind="pq", rebuild=True)
    with pytest.warns(UserWarning, match=r"clipworks\[search\].*search is exact"):
        assert search(whole, QUERIES[0], index="ivf").keys == expected(NAMES, VECTORS, QUERIES[0])[0]
    assert len(search(whole, QUERIES[0], index="lance")) == 10  # needs none


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written(copy):
    (copy / "indexes").chmod(0o500)
    with pytest.raises(CollectionError, match="read-only"):
        build_index(copy, rebuild=True)


def test_on_the_command_line(copy, capsys):
    assert main(["index", str(copy), "--kind", "ivf", "--recall", "0.9"]) == 0
    assert "ivf index of 2,000 rows extended" in capsys.readouterr().out
    assert info(copy)["indexes"]["ivf"].startswith("recall ")
    assert main(["index", str(copy), "--kind", "ivf", "--recall", "0.9", "--json"]) == 0
    assert '"done": "up to date"' in capsys.readouterr().out
    assert main(["similar", str(copy), NAMES[0], "--index", "ivf", "--k", "3", "--csv"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert isinstance(usable(Collection.open(copy), "ivf"), Index)
