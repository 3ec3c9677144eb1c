"""VisDiff's ranking against scikit-learn and scipy, planted and absent differences, and what is refused."""

import json

import numpy as np
import pytest
from scipy.stats import false_discovery_control, mannwhitneyu, ttest_ind
from sklearn.metrics import roc_auc_score

from clipworks.errors import ClipworksError
from clipworks.retrieval.visdiff import (
    auroc,
    benjamini_hochberg,
    judged,
    mixed,
    parse_phrases,
    propose,
    proposed_by,
    visdiff,
)

RNG = np.random.default_rng(0)
WORDS = np.linalg.qr(RNG.normal(size=(32, 32)))[0][:12]
NAMES = [f"thing {'abcdefghijkl'[i]}" for i in range(12)]


def sets(share, n=200, seed=1, strength=0.6):
    """Two sets of noise; `share` of the first carries word 3."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(n, 32)), rng.normal(size=(n, 32))
    a[: round(share * n)] += strength * np.sqrt(32) * WORDS[3]
    return a, b


def test_auroc_is_that_of_scikit_learn_and_of_mann_and_whitney():
    a, b = RNG.integers(0, 6, 40) / 5, RNG.integers(0, 5, 31) / 5  # many ties
    truth = np.r_[np.ones(40), np.zeros(31)]
    assert auroc(a, b) == pytest.approx(roc_auc_score(truth, np.r_[a, b]), abs=1e-12)
    assert auroc(a, b) == pytest.approx(mannwhitneyu(a, b).statistic / (40 * 31), abs=1e-12)
    assert auroc(a, b) == pytest.approx(1 - auroc(b, a), abs=1e-12)
    assert auroc(np.exp(3 * a), np.exp(3 * b)) == auroc(a, b)


def test_every_statistic_against_libraries():
    a, b = sets(0.3)
    found = visdiff(a, b, NAMES, WORDS, threshold=0.1)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    for i, name in enumerate(NAMES):
        place = found.phrases.index(name)
        x, y = unit(a) @ WORDS[i], unit(b) @ WORDS[i]
        assert found.auroc[place] == pytest.approx(
            roc_auc_score(np.r_[np.ones(200), np.zeros(200)], np.r_[x, y]), abs=1e-4
        )
        assert found.difference[place] == pytest.approx(x.mean() - y.mean(), abs=1e-6)
        assert found.delta[place] == pytest.approx((x > 0.1).mean() - (y > 0.1).mean(), abs=1e-9)
        assert found.p[place] == pytest.approx(ttest_ind(x, y, equal_var=False).pvalue, rel=1e-3)
    assert (np.diff(found.auroc) <= 0).all()
    np.testing.assert_allclose(found.q, false_discovery_control(found.p), rtol=1e-9)


def test_benjamini_and_hochberg_against_scipy():
    p = RNG.random(50) ** 3
    np.testing.assert_allclose(benjamini_hochberg(p), false_discovery_control(p), rtol=1e-12)


def test_identical_sets_do_not_differ():
    a, _ = sets(0)
    found = visdiff(a, a, NAMES, WORDS)
    assert (found.auroc == 0.5).all()
    assert np.allclose(found.p, 1)
    assert not found.significant.any()


def test_halves_of_one_set_are_at_the_level_before_correction_and_below_it_after():
    rng = np.random.default_rng(5)
    text = rng.normal(size=(200, 64))
    raw, kept = [], []
    for _ in range(5):
        x = rng.normal(size=(400, 64))
        found = visdiff(x[:200], x[200:], [f"p{i}x" for i in range(200)], text)
        raw.append((found.p < 0.05).mean())
        kept.append(found.significant.mean())
    assert 0.02 < np.mean(raw) < 0.09
    assert np.mean(kept) < 0.01


def test_a_planted_difference_is_first_and_grows_with_its_share():
    areas = []
    for share in (0.25, 0.5, 0.75, 1.0):
        found = visdiff(*sets(share), NAMES, WORDS)
        assert found.phrases[0] == NAMES[3]
        assert found.significant[0]
        areas.append(found.auroc[0])
    assert (np.diff(areas) > 0).all()
    assert propose(*sets(0.5), WORDS, 1).tolist() == [3]


def test_purity_mixes_without_loss():
    one, other = list(range(40)), list(range(40, 80))
    assert mixed(one, other, 1.0) == (one, other)
    a, b = mixed(one, other, 0.75)
    assert len(a) == len(b) == 40
    assert not set(a) & set(b)
    assert sorted(a + b) == list(range(80))
    assert len(set(a) - set(one)) == 10
    first, second = sets(1.0, n=400)
    half = mixed(list(first), list(second), 0.5)
    found = visdiff(np.array(half[0]), np.array(half[1]), NAMES, WORDS)
    assert found.auroc[found.phrases.index(NAMES[3])] == pytest.approx(0.5, abs=0.06)


def test_scale_and_order_do_not_matter_and_a_sample_is_the_same_each_time():
    a, b = sets(0.5)
    first = visdiff(a, b, NAMES, WORDS)
    again = visdiff(7 * a[::-1], b[RNG.permutation(200)], NAMES, 3 * WORDS)
    assert first.phrases == again.phrases
    np.testing.assert_allclose(first.auroc, again.auroc, atol=2e-4)
    some = [visdiff(a, b, NAMES, WORDS, most=50, seed=s).auroc for s in (0, 0, 1)]
    assert np.array_equal(some[0], some[1])
    assert not np.array_equal(some[0], some[2])


def test_a_judge():
    assert judged([1, 0, 2, 0, 0]) == (0.5, 1.0)
    assert judged([0, 0, 0, 0, 0, 2]) == (0.0, 0.0)
    with pytest.raises(ClipworksError, match="some of 0, 1 and 2"):
        judged([3])


def test_a_model_proposes_from_captions():
    asked = []

    def model(messages):
        asked.append(messages[0]["content"])
        return json.dumps(["snow", "a Dog", f"round {len(asked)}"])

    found = proposed_by(model, [f"white {i}" for i in range(50)], [f"green {i}" for i in range(50)], captions=5)
    assert found == ["snow", "a Dog", "round 1", "round 2", "round 3"]
    assert all(q.count("- white") == 5 and q.count("- green") == 5 for q in asked)
    assert len(set(asked)) == 3
    assert parse_phrases("1. snow\n2) ice\n- 'fog'\n\n") == ["snow", "ice", "fog"]
    assert parse_phrases('Here: ["a", 3, "b."]') == ["a", "b"]
    with pytest.raises(ClipworksError, match="must hold captions"):
        proposed_by(model, [], ["a"])


def test_rows_and_what_cannot_be_trusted():
    a, b = sets(1.0)
    found = visdiff(a, b, [*NAMES[:11], "two dogs, not a cat"], WORDS)
    rows = found.as_rows()
    assert rows[0]["phrase"] == NAMES[3]
    assert all(row["auroc"] > 0.5 and row["q"] < 0.05 for row in rows)
    assert len(found.as_rows(None)) == 12
    assert {r["phrase"] for r in found.as_rows(None) if r["unsure"]} == {"two dogs, not a cat"}


def test_mistakes_are_named():
    a, b = sets(0.5, n=5)
    with pytest.raises(ClipworksError, match="first must hold at least 1 vector"):
        visdiff(a[:0], b, NAMES, WORDS)
    with pytest.raises(ClipworksError, match=r"one vector per phrase \(2\)\. Got 12"):
        visdiff(a, b, NAMES[:2], WORDS)
    with pytest.raises(ClipworksError, match="'x' occurs twice"):
        visdiff(a, b, ["x", "x"], WORDS[:2])
    with pytest.raises(ClipworksError, match="second must be a matrix of shape"):
        visdiff(a, b[:, :5], NAMES, WORDS)
    with pytest.raises(ClipworksError, match="same size"):
        mixed([1], [1, 2], 0.5)
