"""Classification by description against a plain numpy computation, and the facts of the card."""

import itertools

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.zeroshot.classifier import class_vectors
from clipworks.zeroshot.classify_by_description import classify_by_description

NAMES = ["hen", "cat", "tiger"]
TOLD = {"hen": ["a red comb", "feathers"], "cat": ["whiskers", "often grey", "used to people", "soft fur"], "tiger": []}
PHRASES = {
    "hen": ["hen, which is a red comb", "hen, which has feathers"],
    "cat": ["cat, which has whiskers", "cat, which often grey", "cat, which is used to people",
            "cat, which has soft fur"],
    "tiger": ["tiger"],
}  # fmt: skip


class Words:
    """Encodes a sentence as a unit vector from a generator seeded by it."""

    def texts(self, sentences):
        return torch.from_numpy(np.stack([self.vector(s) for s in sentences]))

    @staticmethod
    def vector(sentence):
        v = np.random.default_rng(list(sentence.encode())).normal(size=16)
        return v / np.linalg.norm(v)


def images(n=30, seed=0):
    rows = np.random.default_rng(seed).normal(size=(n, 16))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def oracle(x, template="{}", renormalise=False):
    scores = np.zeros((len(x), len(NAMES)))
    for c, name in enumerate(NAMES):
        vectors = [Words.vector(template.replace("{}", p)) for p in PHRASES[name]]
        if renormalise:
            mean = np.mean(vectors, axis=0)
            scores[:, c] = x @ mean / np.linalg.norm(mean)
        else:
            scores[:, c] = np.mean([x @ v for v in vectors], axis=0)
    return scores


@pytest.mark.parametrize("template", ["{}", "a photo of a {}."])
@pytest.mark.parametrize("aggregate", ["similarities", "vectors"])
def test_equals_the_formula(template, aggregate):
    found = classify_by_description(images(), NAMES, Words(), TOLD, template=template, aggregate=aggregate)
    expected = oracle(images(), template, aggregate == "vectors")
    np.testing.assert_allclose(found.scores, expected, atol=1e-6)
    assert found.labels == [NAMES[i] for i in expected.argmax(1)]


@pytest.mark.parametrize("aggregate", ["similarities", "vectors"])
def test_without_descriptions_it_is_plain_zero_shot(aggregate):
    found = classify_by_description(images(), NAMES, Words(), {}, template="a photo of a {}.", aggregate=aggregate)
    plain = class_vectors(NAMES, Words(), templates="simple").numpy()
    np.testing.assert_allclose(found.scores, images() @ plain.T, atol=1e-6)


def test_order_and_repetition_of_descriptors_change_nothing():
    usual = classify_by_description(images(), NAMES, Words(), TOLD).scores
    other = {name: items[::-1] + items for name, items in TOLD.items()}
    np.testing.assert_allclose(classify_by_description(images(), NAMES, Words(), other).scores, usual, atol=1e-6)


def test_the_two_means_can_decide_differently():
    """Two opposed descriptors make a short mean: low by similarities, long again once it is renormalised."""
    table = {"a, which has p": [1, 0.9], "a, which has q": [1, -0.9], "b": [0.9, 0.5]}
    x = np.array([[1.0, 0.0]])
    by = {kind: classify_by_description(x, ["a", "b"], table, {"a": ["p", "q"]}, aggregate=kind)
          for kind in ("similarities", "vectors")}  # fmt: skip
    assert by["similarities"].labels == ["b"]
    assert by["vectors"].labels == ["a"]
    mean = np.mean([np.array([1, 0.9]), np.array([1, -0.9])], axis=0) / np.hypot(1, 0.9)
    np.testing.assert_allclose(by["vectors"].scores[0, 0], by["similarities"].scores[0, 0] / np.linalg.norm(mean), 1e-6)


def test_explanations_add_up_to_the_decision():
    found = classify_by_description(images(), NAMES, Words(), TOLD)
    for row in range(30):
        told = found.explain(row)
        order = np.argsort(-found.scores[row])
        assert (told.name, told.against) == (NAMES[order[0]], NAMES[order[1]])
        similarities = [e.similarity for e in told.evidence]
        assert similarities == sorted(similarities, reverse=True)
        assert min(similarities) - 1e-6 <= found.scores[row].max() <= max(similarities) + 1e-6
        np.testing.assert_allclose(np.mean(similarities), found.scores[row].max(), atol=1e-6)
        lead = found.scores[row, order[0]] - found.scores[row, order[1]]
        np.testing.assert_allclose(np.mean([e.margin for e in told.evidence]), lead, atol=1e-6)
        for e, phrase in itertools.product(told.evidence, PHRASES[told.name]):
            if phrase.endswith(e.descriptor):
                np.testing.assert_allclose(e.similarity, images()[row] @ Words.vector(phrase), atol=1e-6)
        assert told.fired == [e.descriptor for e in told.evidence if e.similarity > found.scores[row, order[1]]]
        assert told.as_rows()[0]["descriptor"] == told.evidence[0].descriptor


def test_any_class_can_be_explained_against_any():
    found = classify_by_description(images(), NAMES, Words(), TOLD)
    told = found.explain(-1, "cat", against="tiger")
    assert (told.name, told.against) == ("cat", "tiger")
    assert sorted(e.descriptor for e in told.evidence) == sorted(TOLD["cat"])
    lead = found.scores[-1, 1] - found.scores[-1, 2]
    np.testing.assert_allclose(np.mean([e.margin for e in told.evidence]), lead, atol=1e-6)
    assert [e.descriptor for e in found.explain(0, "tiger").evidence] == ["tiger"]
    alone = classify_by_description(images(1), ["hen"], Words(), TOLD).explain(0)
    assert alone.against is None
    assert [e.margin for e in alone.evidence] == [e.similarity for e in alone.evidence]


class Attributes:
    """Knows attributes, and no class name."""

    KNOWN = ("stripes", "whiskers", "feathers", "wheels")

    def texts(self, sentences):
        return torch.tensor([[0.1] + [float(a in s) for a in self.KNOWN] for s in sentences])


@pytest.mark.parametrize("subject", [None, "thing"])
def test_a_class_is_found_by_its_features_when_its_name_means_nothing(subject):
    told = {"zorb": ["stripes", "whiskers"], "quax": ["feathers", "stripes"], "blim": ["wheels"]}
    x = np.array([[0, 1, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 1.0]])
    found = classify_by_description(x, list(told), Attributes(), told, subject=subject)
    assert found.labels == ["zorb", "quax", "blim"]
    assert sorted(found.explain(0).fired) == ["stripes", "whiskers"]
    blind = classify_by_description(x, list(told), Attributes(), {})
    assert np.ptp(blind.scores, axis=1).max() < 1e-6  # names alone tell nothing


def test_a_subject_takes_the_names_away():
    told = {"hen": ["a comb"], "cat": ["fur"]}
    found = classify_by_description(images(), ["hen", "cat"], Words(), told, subject="animal")
    expected = [Words.vector("animal, which is a comb"), Words.vector("animal, which has fur")]
    np.testing.assert_allclose(found.scores, images() @ np.stack(expected).T, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": []}, "at least one class name"),
        ({"aggregate": "sum"}, "aggregate must be one of"),
        ({"template": "a photo"}, "templates"),
        ({"subject": "animal"}, "describe every class.*'tiger'"),
        ({"features": images()[:, :3]}, r"features must be a matrix of shape \(n, 16\)"),
        ({"descriptions": {"dog": ["ears"]}}, "at least one of the names"),
        ({"encoder": None}, "encoder must have"),
    ],
)
def test_mistakes_are_named(change, message):
    given = {"features": images(), "names": NAMES, "encoder": Words(), "descriptions": TOLD, **change}
    with pytest.raises(ClipworksError, match=message):
        classify_by_description(**given)


def test_mistakes_in_explaining_are_named():
    found = classify_by_description(images(2), NAMES, Words(), TOLD)
    for change, message in (({"row": 2}, "2 images. Got 2"), ({"row": 0, "name": "cet"}, "Did you mean 'cat'")):
        with pytest.raises(ClipworksError, match=message):
            found.explain(**change)
