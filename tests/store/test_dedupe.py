"""`dedupe` against plain pairs of cosines and a search for connected groups."""

import numpy as np
import pytest
from small_store import DIM, encoder, folder

from clipworks.errors import ClipworksError
from clipworks.store.collection import Collection
from clipworks.store.dedupe import _links, dedupe
from clipworks.store.embed import embed
from clipworks.types import Features


def oracle(vectors, threshold):
    """Connected groups of two and more rows, by following links from row to row."""
    unit = vectors.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    linked = unit @ unit.T >= threshold
    left, groups = set(range(len(unit))), []
    while left:
        reached, todo = set(), [left.pop()]
        while todo:
            row = todo.pop()
            reached.add(row)
            more = {other for other in left if linked[row, other]}
            left -= more
            todo += more
        if len(reached) > 1:
            groups.append(sorted(reached))
    return sorted(groups, key=lambda g: (-len(g), g))


def clusters(n, seed=0):
    draw = np.random.default_rng(seed)
    middle = draw.standard_normal((n // 4, DIM))[draw.integers(0, n // 4, n)]
    return (middle + 0.03 * draw.standard_normal((n, DIM))).astype(np.float32)


@pytest.mark.parametrize("threshold", [0.9, 0.995, 0.999])
def test_groups_are_the_connected_ones(tmp_path, threshold):
    vectors = clusters(300)
    features = Features(vectors, [f"{i:03}" for i in range(300)])
    made = Collection.create(tmp_path / "c", features=features, dtype="float32")
    groups = dedupe(made, threshold=threshold, memory=1 << 20)
    assert [[int(k) for k in g.keys] for g in groups] == oracle(vectors, threshold)
    for group in groups:
        rows = vectors[[int(k) for k in group.keys]].astype(np.float64)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        np.testing.assert_allclose(group.scores, rows @ rows[0], atol=1e-5)
        assert not group.identical  # vectors without files


@pytest.mark.parametrize("memory", [1 << 16, 1 << 20, 1 << 28])
def test_every_pair_is_found_in_blocks_of_any_size(memory):
    vectors = clusters(500, 1)
    first, second = _links(vectors, np.arange(500), 0.99, memory)
    unit = vectors.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    expected = np.argwhere(np.triu(unit @ unit.T >= 0.99, 1))
    assert sorted(zip(first, second, strict=True)) == [tuple(pair) for pair in expected.tolist()]


def test_chains_belong_together(tmp_path):
    angles = np.deg2rad([0, 10, 20, 90])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    made = Collection.create(tmp_path / "c", features=Features(vectors, list("abcd")), dtype="float32")
    (group,) = dedupe(made, threshold=np.cos(np.deg2rad(11)))
    assert group.keys == ["a", "b", "c"]
    np.testing.assert_allclose(group.scores, np.cos(np.deg2rad([0, 10, 20])), atol=1e-6)


def test_identical_files_are_told_from_alike_ones(tmp_path):
    photos = folder(tmp_path / "photos", 6, captions=False)
    for name in ("copy", "again"):
        (photos / "a" / f"{name}.png").write_bytes((photos / "a/002.png").read_bytes())
    embed(photos, tmp_path / "c", encoder=encoder())
    (group,) = dedupe(tmp_path / "c", threshold=0.99999)
    assert group.keys == ["a/002.png", "a/again.png", "a/copy.png"]
    assert group.identical
    groups = dedupe(tmp_path / "c", threshold=0.99999)
    assert groups.extras() == ["a/again.png", "a/copy.png"]
    assert [row["group"] for row in groups.as_rows()] == [1, 1, 1]
    some = dedupe(tmp_path / "c", threshold=0.99999, where="key <> 'a/002.png'")
    assert some[0].keys == ["a/again.png", "a/copy.png"]
    assert dedupe(tmp_path / "c", where="key = 'a/002.png'") == []


def test_mistakes(tmp_path):
    made = Collection.create(tmp_path / "c", dim=DIM)
    assert dedupe(made) == []
    with pytest.raises(ClipworksError, match=r"threshold must lie in \[-1\.0, 1\.0\]"):
        dedupe(made, threshold=1.5)
    with pytest.raises(ClipworksError, match="memory must lie in"):
        dedupe(made, memory=5)
