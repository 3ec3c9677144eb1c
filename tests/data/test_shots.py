"""Draws of shots: CoOp's own, and what must hold of all of them."""

import dataclasses
import json
import random
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipworks.data.item import Item
from clipworks.data.labelled import LabelledSet
from clipworks.data.shots import (
    Split,
    base_and_new,
    draw,
    few_shots,
    long_tail,
    subset,
    symmetric_noise,
    with_parts,
)
from clipworks.errors import ClipworksError


def made(y, domains=None, parts=None):
    items = [Item(f"{i}.jpg", np.zeros((4, 4, 3), np.uint8)) for i in range(len(y))]
    names = [f"class {c}" for c in range(max(y) + 1)]
    return LabelledSet("made", items, np.array(y), names, parts or {}, None if domains is None else np.array(domains))


def as_coop_does(pairs, held, shots, seed):
    """CoOp's `generate_fewshot_dataset`, first for training and then for validation, as its code reads."""
    random.seed(seed)
    out = []
    for rows, count in ((pairs, shots), (held, min(shots, 4))):
        by_label = defaultdict(list)
        for row, label in rows:
            by_label[label].append(row)
        out.append([r for own in by_label.values() for r in (random.sample(own, count) if len(own) >= count else own)])
    return out


@pytest.mark.parametrize("shots", [1, 2, 8])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_draw_is_that_of_coop(shots, seed):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 5, 200)
    order = rng.permutation(200)
    data = made(y.tolist(), parts={"train": order[:120], "validation": order[120:160], "test": order[160:]})
    train, held = few_shots(data, shots, seed)
    expected = as_coop_does([(r, y[r]) for r in order[:120]], [(r, y[r]) for r in order[120:160]], shots, seed)
    assert [train.tolist(), held.tolist()] == expected


def test_a_class_with_fewer_images_gives_all_and_some_labels_are_never_drawn():
    labels = np.array([0, 0, 0, 1, -1, 1])
    found = draw(labels, np.arange(6), 3, random.Random(0))
    assert sorted(found) == [0, 1, 2, 3, 5]
    assert sorted(draw(labels, np.arange(6), [1, 2], random.Random(0)))[1:] == [3, 5]


def test_a_set_without_parts_is_split_by_class():
    data = with_parts(made([0] * 20 + [1] * 10))
    shares = {part: np.bincount(data.y[rows]).tolist() for part, rows in data.parts.items()}
    assert shares == {"train": [10, 5], "validation": [4, 2], "test": [6, 3]}
    assert sorted(np.concatenate(list(data.parts.values()))) == list(range(30))
    again = with_parts(made([0] * 20 + [1] * 10))
    other = with_parts(made([0] * 20 + [1] * 10), seed=1)
    assert all(np.array_equal(data.parts[p], again.parts[p]) for p in data.parts)
    assert any(not np.array_equal(data.parts[p], other.parts[p]) for p in data.parts)
    assert with_parts(data) is data


def test_domains_are_split_alike_where_they_can_be():
    many = with_parts(made([0] * 20, ["a"] * 10 + ["b"] * 10))
    assert [sorted(many.domains[rows].tolist()) for rows in many.parts.values()] == [
        ["a"] * n + ["b"] * n for n in (5, 2, 3)
    ]
    one_each = with_parts(made([0] * 10 + [1] * 10, [f"style {i % 10}" for i in range(20)]))
    assert np.bincount(one_each.y[one_each.parts["test"]]).tolist() == [3, 3]


def test_a_set_without_test_images_says_so():
    with pytest.raises(ClipworksError, match=r"to train and to test on\. Got train only"):
        with_parts(made([0, 1], parts={"train": np.array([0, 1])}))


def test_a_subset_depends_on_rows_and_seed_alone():
    rows = np.arange(100)[::-1]
    assert subset(rows, None).tolist() == subset(rows, 100).tolist() == list(range(100))
    assert subset(rows, 10).tolist() == subset(np.arange(100), 10).tolist()
    assert len(set(subset(rows, 10).tolist())) == 10


def test_halves_of_the_classes():
    assert [part.tolist() for part in base_and_new(4)] == [[0, 1], [2, 3]]
    assert [part.tolist() for part in base_and_new(1)] == [[0], []]


def test_a_long_tail_falls_from_shots_to_shots_over_ratio():
    counts = long_tail(9, 16, 16, seed=3)
    assert sorted(counts) == [1, 1, 2, 3, 4, 6, 8, 11, 16]  # 16 * 16 ** (-k / 8), rounded
    assert long_tail(9, 16, 16, seed=3) == counts != long_tail(9, 16, 16, seed=4)
    assert set(long_tail(5, 8, 1, seed=0)) == {8}


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 7), st.floats(0, 1), st.integers(0, 99))
def test_symmetric_noise_changes_that_share_and_never_to_the_same(classes, rate, seed):
    labels = np.arange(300) % classes
    told = symmetric_noise(labels, classes, rate, seed)
    assert (told != labels).sum() == round(rate * 300)
    assert set(told) <= set(range(classes))


def test_symmetric_noise_is_even():
    labels = np.zeros(30000, int)
    counts = np.bincount(symmetric_noise(labels, 4, 0.6, 0), minlength=4)
    np.testing.assert_allclose(counts, [12000, 6000, 6000, 6000], atol=400)


SPLIT = Split("pets", "few-shot", {"shots": 1}, 1, ["cat", "ox"], [("a.jpg", "cat")], [], {"test": [("b.jpg", "ox")]})


def test_a_split_comes_back_as_it_was():
    assert Split.from_json(SPLIT.to_json()) == SPLIT
    assert json.loads(SPLIT.to_json())["sha256"] == SPLIT.digest


@pytest.mark.parametrize("change", [{"seed": 2}, {"train": [("c.jpg", "cat")]}, {"tests": {"test": []}}])
def test_the_hash_covers_everything(change):
    other = dataclasses.replace(SPLIT, **change)
    assert other.digest != SPLIT.digest
    forged = json.loads(other.to_json()) | {"sha256": SPLIT.digest}
    with pytest.raises(ClipworksError, match="as it was written"):
        Split.from_json(json.dumps(forged))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sha256": "x", "data": 1}'])
def test_what_is_no_split(text):
    with pytest.raises(ClipworksError, match="as `to_json` writes it"):
        Split.from_json(text)
