"""The follow-up look against a plain numpy computation image by image, and the facts of the card."""

import itertools

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.zeroshot.classifier import class_vectors
from clipworks.zeroshot.descriptions import PairDescriptions, contrasts
from clipworks.zeroshot.fudd import fudd

NAMES = ["wren", "lark", "crow", "gull", "duck", "hen"]
PAIRS = {
    (a, b): [(f"a {a} alone", f"a {b} alone")]
    + [(f"a {a} with mark {i}, unlike {b}", f"a {b} with mark {i}, unlike {a}") for i in range(1 + len(a + b) % 3)]
    for a, b in itertools.combinations(NAMES, 2)
    if (a, b) != ("lark", "gull")
}  # fmt: skip


class Words:
    """Encodes a sentence as a unit vector from a generator seeded by it."""

    def texts(self, sentences):
        return torch.from_numpy(np.stack([self.vector(s) for s in sentences]))

    @staticmethod
    def vector(sentence):
        v = np.random.default_rng(list(sentence.encode())).normal(size=12)
        return v / np.linalg.norm(v)


def images(n=60):
    rows = np.random.default_rng(1).normal(size=(n, 12))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def oracle(x, k, pairs=PAIRS):
    """One image at a time, straight from the algorithm."""
    z = np.array([x @ Words.vector(f"a photo of a {n}.") for n in NAMES])
    inside = np.argsort(-z)[:k]
    scores = np.full(len(NAMES), -np.inf)
    for a in inside:
        sentences = set()
        for b in inside:
            if a == b:
                continue
            if (NAMES[a], NAMES[b]) in pairs:
                sentences |= {two[0] for two in pairs[NAMES[a], NAMES[b]]}
            elif (NAMES[b], NAMES[a]) in pairs:
                sentences |= {two[1] for two in pairs[NAMES[b], NAMES[a]]}
            else:
                sentences.add(f"a photo of a {NAMES[a]}.")
        mean = np.mean([Words.vector(s) for s in sentences or {f"a photo of a {NAMES[a]}."}], axis=0)
        scores[a] = x @ mean / np.linalg.norm(mean)
    return scores


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6, 10])
def test_equals_the_algorithm(k):
    found = fudd(images(), NAMES, Words(), PAIRS, k=k)
    expected = np.stack([oracle(x, k) for x in images()])
    np.testing.assert_allclose(found.scores, expected, atol=1e-6)
    assert found.labels == [NAMES[i] for i in expected.argmax(1)]
    assert found.candidates.shape == (60, min(k, 6))


def plain_scores():
    return images() @ class_vectors(NAMES, Words(), templates="simple").numpy().T


def test_one_candidate_is_plain_zero_shot():
    assert (fudd(images(), NAMES, Words(), PAIRS, k=1).predictions == plain_scores().argmax(1)).all()


@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_without_sentences_the_second_look_is_the_first(k):
    found = fudd(images(), NAMES, Words(), {}, k=k)
    np.testing.assert_allclose(found.first, plain_scores(), atol=1e-6)
    inside = np.isfinite(found.scores)
    assert (inside.sum(1) == k).all()
    np.testing.assert_allclose(found.scores[inside], plain_scores()[inside], atol=1e-6)
    assert (found.predictions == plain_scores().argmax(1)).all()


def test_all_candidates_give_one_classifier_for_all_images():
    found = fudd(images(), NAMES, Words(), PAIRS, k=len(NAMES))
    assert len(found.said) == 1
    classes = np.linalg.lstsq(images(), found.scores, rcond=None)[0].T  # linear in the image
    np.testing.assert_allclose(images() @ classes.T, found.scores, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(classes, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("k", [2, 3])
def test_the_prediction_is_a_candidate(k):
    found = fudd(images(), NAMES, Words(), PAIRS, k=k)
    assert all(p in c for p, c in zip(found.predictions, found.candidates, strict=True))
    truth = np.random.default_rng(2).integers(0, 6, 60)
    inside = [t in c for t, c in zip(truth, found.candidates, strict=True)]
    assert np.mean(found.predictions == truth) <= np.mean(inside)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_each_pair_of_candidates_is_asked_for_once(k):
    asked = []

    def ask(a, b):
        asked.append((a, b))
        return []

    one = images(1)
    found = fudd(one, NAMES, Words(), ask, k=k)
    assert len(asked) == k * (k - 1) // 2
    inside = {NAMES[c] for c in found.candidates[0]}
    assert {frozenset(p) for p in asked} == {frozenset(p) for p in itertools.combinations(inside, 2)}
    asked.clear()
    fudd(images(), NAMES, Words(), ask, k=k)
    assert len(asked) == len({frozenset(p) for p in asked})


def test_which_class_is_named_first_does_not_matter():
    turned = {(b, a): [(y, x) for x, y in told] for (a, b), told in PAIRS.items()}
    usual = fudd(images(), NAMES, Words(), PAIRS, k=3)
    for other in (turned, PairDescriptions(PAIRS), PairDescriptions(turned)):
        assert np.array_equal(fudd(images(), NAMES, Words(), other, k=3).scores, usual.scores)


def test_repeated_and_reordered_sentences_change_nothing():
    other = {key: told[::-1] + told for key, told in PAIRS.items()}
    usual = fudd(images(), NAMES, Words(), PAIRS, k=3).scores
    assert np.array_equal(fudd(images(), NAMES, Words(), other, k=3).scores, usual)


def test_the_sentences_of_a_decision_can_be_read():
    found = fudd(images(), NAMES, Words(), PAIRS, k=2)
    row = next(i for i, c in enumerate(found.candidates) if set(c.tolist()) == {0, 1})
    told = found.sentences(row)
    assert told == {"wren": sorted({a for a, _ in PAIRS["wren", "lark"]}),
                    "lark": sorted({b for _, b in PAIRS["wren", "lark"]})}  # fmt: skip


class Attributes:
    """Sees the attributes that a sentence names."""

    def texts(self, sentences):
        known = ("wings", "spotted", "plain")
        return torch.tensor([[0.2] + [float(a in s) for a in known] for s in sentences])


def test_differences_decide_where_what_is_common_cannot():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 200)
    x = np.stack([np.full(200, 0.2), np.ones(200), truth == 1, truth == 0], axis=1) + rng.normal(0, 0.05, (200, 4))
    common = {("a", "b"): [("an a with wings", "a b with wings")]}
    assert np.ptp(fudd(x, ["a", "b"], Attributes(), common).scores, axis=1).max() < 1e-6  # chance
    table = {"a": ["wings", "plain breast"], "b": ["wings", "spotted breast"]}
    for told in ({("a", "b"): [("a plain a", "a spotted b")]}, contrasts(table)):
        assert (fudd(x, ["a", "b"], Attributes(), told).predictions == truth).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k must lie in"),
        ({"names": ["a", "a"]}, "distinct"),
        ({"pairs": 3}, "pairs must be a mapping"),
        ({"pairs": {("wren", "lark"): [("only one",)]}}, "one sentence for each"),
        ({"pairs": lambda a, b: ["xy"]}, "one sentence for each"),
        ({"pairs": lambda a, b: [("x",)]}, "one sentence for each"),
        ({"pairs": lambda a, b: [("x", " ")]}, "one sentence for each"),
        ({"features": images()[:, :3]}, r"shape \(n, 12\)"),
        ({"template": "bird"}, "exactly once"),
    ],
)
def test_mistakes_are_named(change, message):
    given = {"features": images(), "names": NAMES, "encoder": Words(), "pairs": PAIRS, **change}
    with pytest.raises(ClipworksError, match=message):
        fudd(**given)
