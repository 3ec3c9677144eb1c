"""Description selection against a plain computation image by image, and the facts of the card."""

import numpy as np
import pytest

from clipworks.errors import ClipworksError
from clipworks.zeroshot.description_selection import DescriptionSelection

C, D, DIM = 5, 14, 10


def rows(n, seed):
    made = np.random.default_rng(seed).normal(size=(n, DIM))
    return made / np.linalg.norm(made, axis=1, keepdims=True)


TEXT, POOL, SHOTS, IMAGES = rows(C, 0), rows(D, 1), rows(4 * C, 2), rows(50, 3)
LABELS = np.repeat(np.arange(C), 4)[np.random.default_rng(4).permutation(4 * C)]
ASSIGNED = [[d for d in range(D) if d % C == c] for c in range(C)]
NAMED = np.stack([rows(D, 10 + c) for c in range(C)])


def similarity():
    table = np.zeros((D, C))
    for d in range(D):
        for c in range(C):
            table[d, c] = np.mean([x @ POOL[d] for x, y in zip(SHOTS, LABELS, strict=True) if y == c])
    return table


def oracle(x, k, m, weight=0.0, assigned=ASSIGNED, named=None, reduce=np.mean):
    table = similarity()
    inside = sorted(range(C), key=lambda c: -(x @ TEXT[c]))[:k]
    scores, kept = np.full(C, -np.inf), {}
    for a in inside:
        leads = {d: np.mean([table[d, a] - table[d, b] for b in inside if b != a] or [table[d, a]]) for d in range(D)}
        good = [d for d in range(D) if all(table[d, a] >= table[d, b] for b in inside)]
        good = sorted(good, key=lambda d: -leads[d]) or assigned[a] or sorted(leads, key=lambda d: -leads[d])
        kept[a] = good[:m]
        vectors = [POOL[d] if named is None else named[a, d] for d in kept[a]]
        scores[a] = weight * x @ TEXT[a] + reduce([x @ v for v in vectors])
    return scores, kept


@pytest.mark.parametrize(("k", "m"), [(1, 5), (2, 1), (2, 3), (3, 5), (4, 2), (5, 3), (9, 5)])
@pytest.mark.parametrize("weight", [0, 0.5, 20])
def test_equals_the_algorithm(k, m, weight):
    found = DescriptionSelection(TEXT, POOL, assigned=ASSIGNED, k=k, m=m, weight=weight).fit(SHOTS, LABELS)
    expected, kept = zip(*[oracle(x, k, m, weight) for x in IMAGES], strict=True)
    np.testing.assert_allclose(found.decision_function(IMAGES), expected, atol=1e-6, rtol=1e-6)
    assert found.predict(IMAGES).tolist() == np.argmax(expected, axis=1).tolist()
    assert found.selected(IMAGES) == list(kept)


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_named_sentences_are_selected_without_names(reduce):
    found = DescriptionSelection(TEXT, POOL, assigned=ASSIGNED, named=NAMED, reduce=reduce).fit(SHOTS, LABELS)
    expected = [oracle(x, 3, 5, named=NAMED, reduce=getattr(np, reduce))[0] for x in IMAGES]
    np.testing.assert_allclose(found.decision_function(IMAGES), expected, atol=1e-6)


def test_without_assigned_ones_the_largest_leads_step_in():
    """One class leads nowhere: every description is likest the other two."""
    text, pool = np.eye(3), np.array([[1.0, 0.2, 0.1], [0.1, 0.3, 1.0]])
    found = DescriptionSelection(text, pool, m=1).fit(np.eye(3), [0, 1, 2])
    assert found.selected(np.eye(3)[:1]) == [{0: [0], 1: [1], 2: [1]}]
    told = DescriptionSelection(text, pool, m=1, assigned=[[], [0, 1], []]).fit(np.eye(3), [0, 1, 2])
    assert told.selected(np.eye(3)[:1]) == [{0: [0], 1: [0], 2: [1]}]


@pytest.mark.parametrize("settings", [{"k": 1}, {"weight": 1e6}, {"weight": 1e6, "k": 5}])
def test_one_candidate_and_a_huge_weight_are_plain_zero_shot(settings):
    found = DescriptionSelection(TEXT, POOL, **settings).fit(SHOTS, LABELS)
    assert (found.predict(IMAGES) == (IMAGES @ TEXT.T).argmax(1)).all()


def test_one_labelled_image_per_class_gives_the_plain_similarities():
    found = DescriptionSelection(TEXT, POOL).fit(SHOTS[:C][::-1], np.arange(C)[::-1])
    np.testing.assert_allclose(found.means_, POOL @ SHOTS[:C].T, atol=1e-6)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_kept_descriptions_are_best_for_their_class_and_for_no_other(k):
    found = DescriptionSelection(TEXT, POOL, k=k, m=D).fit(SHOTS, LABELS)
    led = 0
    for kept in found.selected(IMAGES):
        among = similarity()[:, list(kept)]
        winner = np.array(list(kept))[among.argmax(1)]
        for a, chosen in kept.items():
            if (winner == a).any():
                assert set(chosen) == set(np.flatnonzero(winner == a))
                led += 1
    assert led > 50


def test_a_description_alike_to_everything_is_selected_as_before():
    """A direction common to all images raises a row of S by a constant; length 1 again scales its leads."""

    def wide(a, last):
        return np.hstack([a, np.full((len(a), 1), float(last))])

    alike = wide(POOL, 0)
    alike[2, -1] = 3
    usual, other = (
        DescriptionSelection(wide(TEXT, 0), pool, m=D).fit(wide(SHOTS, 1), LABELS) for pool in (wide(POOL, 0), alike)
    )
    assert (other.means_[2] > usual.means_[2].max() + 0.3).all()
    kept = [[(a, set(chosen), [d for d in chosen if d != 2]) for a, chosen in s.items()]
            for s in (*usual.selected(wide(IMAGES, 1)), *other.selected(wide(IMAGES, 1)))]  # fmt: skip
    assert kept[:50] == kept[50:]
    assert any(2 in chosen for s in kept for _, chosen, _ in s)


def test_more_than_all_admitted_is_all():
    few, many = (DescriptionSelection(TEXT, POOL, assigned=ASSIGNED, m=m).fit(SHOTS, LABELS) for m in (D, 10 * D))
    assert np.array_equal(few.decision_function(IMAGES), many.decision_function(IMAGES))


@pytest.fixture(scope="module")
def birds():
    """Four classes in two pairs; pairs differ by one attribute each, names tell only the pair."""
    rng = np.random.default_rng(0)
    attributes = np.eye(12)[4:8]
    y = rng.integers(0, 4, 1000)
    x = np.eye(12)[y // 2] + attributes[y] + rng.normal(0, 0.3, (1000, 12))
    text = np.eye(12)[[0, 0, 1, 1]] + rng.normal(0, 0.01, (4, 12))
    return x, y, text, np.vstack([np.eye(12)[8:12], attributes])  # four useless descriptions first


def test_selection_finds_the_attribute_that_tells_classes_apart(birds):
    x, y, text, pool = birds
    found = DescriptionSelection(text, pool, k=2, m=1).fit(x[:200], y[:200])
    assert np.mean([all(s[a] == [4 + a] for a in s) for s in found.selected(x[200:])]) > 0.95
    assert (found.predict(x[200:]) == y[200:]).mean() > 0.9
    assert ((x[200:] @ text.T).argmax(1) == y[200:]).mean() < 0.6  # the names alone


def test_a_random_pool_is_at_chance_within_the_candidates(birds):
    x, y, text, _ = birds
    noise = np.zeros((40, 12))
    noise[:, 8:] = np.random.default_rng(5).normal(size=(40, 4))  # directions that no class has
    found = DescriptionSelection(text, noise, k=2).fit(x[:200], y[:200]).predict(x[200:])
    inside = y[200:] // 2 == found // 2
    assert abs((found == y[200:])[inside].mean() - 0.5) < 0.08


def test_names_are_labels():
    names = ["a", "b", "c", "d", "e"]
    found = DescriptionSelection(TEXT, POOL, names=names).fit(SHOTS, [names[i] for i in LABELS])
    numbered = DescriptionSelection(TEXT, POOL).fit(SHOTS, LABELS)
    assert found.predict(IMAGES).tolist() == [names[i] for i in numbered.predict(IMAGES)]
    assert set(found.selected(IMAGES[:1])[0]) <= set(names)


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        ({"k": 0}, {}, "k must lie in"),
        ({"m": 0}, {}, "m must lie in"),
        ({"weight": -1}, {}, "weight must lie in"),
        ({"reduce": "sum"}, {}, "reduce must be one of"),
        ({"pool": POOL[:, :3]}, {}, r"pool must be a matrix of shape \(n, 10\)"),
        ({"assigned": [[0]]}, {}, r"one list per class \(5\)"),
        ({"assigned": [[0]] * 4 + [[14]]}, {}, r"positions in pool, 0 \.\. 13"),
        ({"named": NAMED[:, :2]}, {}, "named must be finite, of shape"),
        ({"names": ["a"]}, {}, r"one entry per row of text \(5\)"),
        ({}, {"labels": LABELS + 1}, "labels must be one of"),
        ({}, {"labels": LABELS * 0}, r"every class at least once\. Missing: \[1, 2"),
        ({}, {"labels": LABELS[:-1]}, "one entry per vector"),
        ({}, {"features": SHOTS[:, :-1]}, r"shape \(n, 10\)"),
    ],
)
def test_mistakes_are_named(settings, given, message):
    given = {"features": SHOTS, "labels": LABELS, **given}
    with pytest.raises(ClipworksError, match=message):
        DescriptionSelection(**{"text": TEXT, "pool": POOL, **settings}).fit(**given)
