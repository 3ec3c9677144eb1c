"""Context and class against a plain numpy computation, and the facts of the card."""

import itertools

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.zeroshot.classifier import class_vectors
from clipworks.zeroshot.perceptionclip import GENERAL, perceptionclip

NAMES = ["duck", "hen", "wren"]
FACTORS = {"background": ["", "on grass", ["in water", "on a lake"]], "angle": ["upright", "upside-down"]}


class Words:
    """Encodes a sentence as a unit vector from a generator seeded by it; remembers what it was asked."""

    logit_scale = 10.0

    def __init__(self):
        self.asked = []

    def texts(self, sentences):
        self.asked += sentences
        return torch.from_numpy(np.stack([self.vector(s) for s in sentences]))

    @staticmethod
    def vector(sentence):
        v = np.random.default_rng(list(sentence.encode())).normal(size=12)
        return v / np.linalg.norm(v)


def images(n=20):
    rows = np.random.default_rng(1).normal(size=(n, 12))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def soft(a, axis):
    e = np.exp(a - a.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def logits_of(subjects, templates=("a photo of a {}",), factors=FACTORS, scale=10.0):
    """f(y, z) of every image, shape (n, Y, Z), written out."""
    table = []
    for y in subjects:
        for z in itertools.product(*factors.values()):
            sentences = []
            for template in templates:
                for phrases in itertools.product(*[[v] if isinstance(v, str) else v for v in z]):
                    end = "." if template.endswith(".") else ""
                    sentence = template.removesuffix(".").replace("{}", y)
                    for phrase in phrases:
                        sentence += ", " + phrase if phrase else ""
                    sentences.append(Words.vector(sentence + end))
            mean = np.mean(sentences, axis=0)
            table.append(scale * images() @ (mean / np.linalg.norm(mean)))
    return np.stack(table, 1).reshape(len(images()), len(subjects), -1)


@pytest.mark.parametrize("templates", [["a photo of a {}"], ["a photo of a {}.", "art of the {}"]])
@pytest.mark.parametrize("tau", [0.5, 1, 5])
@pytest.mark.parametrize("infer", ["names", "noun"])
@pytest.mark.parametrize("choose", ["all", "best"])
def test_equals_the_formulas(templates, tau, infer, choose):
    found = perceptionclip(images(), NAMES, Words(), FACTORS, templates=templates, tau=tau, infer=infer, noun="bird",
                           choose=choose)  # fmt: skip
    f = logits_of(NAMES, templates)
    if infer == "names":
        joint = np.exp(f / tau)
        context = joint.sum(1) / joint.sum((1, 2))[:, None]
    else:
        context = soft(logits_of(["bird"], templates)[:, 0] / tau, 1)
    np.testing.assert_allclose(found.context_probabilities, context, atol=1e-5)
    weights = context if choose == "all" else np.eye(context.shape[1])[context.argmax(1)]
    expected = sum(weights[:, [z]] * soft(f[:, :, z], 1) for z in range(context.shape[1]))
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-5)
    assert found.labels == [NAMES[i] for i in expected.argmax(1)]


@pytest.mark.parametrize("factors", [{}, {"background": [""]}, {"background": ["on grass"]}])
def test_one_context_is_plain_zero_shot(factors):
    found = perceptionclip(images(), NAMES, Words(), factors)
    template = "a photo of a {}, on grass" if factors == {"background": ["on grass"]} else "a photo of a {}"
    plain = class_vectors(NAMES, Words(), templates=template).numpy()
    np.testing.assert_allclose(found.probabilities, soft(10 * images() @ plain.T, 1), atol=1e-5)
    assert (found.context_probabilities == 1).all()


def test_conditional_and_context_recombine_to_the_joint():
    found = perceptionclip(images(), NAMES, Words(), FACTORS, tau=1)
    f = logits_of(NAMES)
    np.testing.assert_allclose(found.probabilities, soft(np.log(np.exp(f).sum(2)), 1), atol=1e-5)


def test_the_ends_of_tau():
    f = logits_of(NAMES)
    flat = perceptionclip(images(), NAMES, Words(), FACTORS, tau=1e7)
    np.testing.assert_allclose(flat.context_probabilities, 1 / 6, atol=1e-4)
    np.testing.assert_allclose(flat.probabilities, soft(f, 1).mean(2), atol=1e-4)
    sharp = perceptionclip(images(), NAMES, Words(), FACTORS, tau=1e-4)
    best = perceptionclip(images(), NAMES, Words(), FACTORS, tau=1e-4, choose="best")
    np.testing.assert_allclose(sharp.probabilities, best.probabilities, atol=1e-5)
    z = f.max(1).argmax(1)
    np.testing.assert_allclose(best.probabilities, soft(f, 1)[np.arange(20), :, z], atol=1e-5)


@pytest.mark.parametrize("scale", [1, 100, 1e5])
def test_probabilities_sum_to_1_at_any_scale(scale):
    found = perceptionclip(images(), NAMES, Words(), FACTORS, scale=scale)
    np.testing.assert_allclose(found.probabilities.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(found.context_probabilities.sum(1), 1, atol=1e-5)
    for factor, values in FACTORS.items():
        np.testing.assert_allclose(sum(found.factor(factor).values()), 1, atol=1e-5)
        assert len(found.factor(factor)) == len(values)


def test_a_repeated_value_counts_twice_and_a_synonym_of_itself_not_at_all():
    usual = perceptionclip(images(), NAMES, Words(), {"b": ["on grass", "in water"]})
    synonym = perceptionclip(images(), NAMES, Words(), {"b": [["on grass", "on grass"], "in water"]})
    np.testing.assert_allclose(synonym.probabilities, usual.probabilities, atol=1e-6)
    twice = perceptionclip(images(), NAMES, Words(), {"b": ["on grass", "on grass", "in water"]})
    f = logits_of(NAMES, factors={"b": ["on grass", "in water"]})
    weights = np.exp(f).sum(1) * [2, 1]
    weights /= weights.sum(1, keepdims=True)
    np.testing.assert_allclose(twice.factor("b")["on grass"], weights[:, 0], atol=1e-5)
    np.testing.assert_allclose(twice.probabilities, np.einsum("nz,nyz->ny", weights, soft(f, 1)), atol=1e-5)


def test_order_of_values_permutes_contexts_and_leaves_classes():
    usual = perceptionclip(images(), NAMES, Words(), FACTORS)
    turned = perceptionclip(images(), NAMES, Words(), {k: v[::-1] for k, v in FACTORS.items()})
    np.testing.assert_allclose(turned.probabilities, usual.probabilities, atol=1e-5)
    where = [turned.contexts.index(c) for c in usual.contexts]
    np.testing.assert_allclose(turned.context_probabilities[:, where], usual.context_probabilities, atol=1e-5)


def test_the_number_of_sentences():
    encoder = Words()
    perceptionclip(images(), NAMES, encoder, FACTORS)
    assert len(encoder.asked) == len(set(encoder.asked)) == 3 * (1 + 1 + 2) * 2  # names x values with synonyms x angles
    assert "a photo of a hen, upside-down" in encoder.asked
    assert "a photo of a hen, on a lake, upside-down" in encoder.asked


@pytest.mark.parametrize("block", [1, 50, 10**6])
def test_blocks_change_nothing(block, monkeypatch):
    usual = perceptionclip(images(), NAMES, Words(), FACTORS)
    monkeypatch.setattr("clipworks.zeroshot.perceptionclip.BLOCK", block)
    monkeypatch.setattr("clipworks.zeroshot.perceptionclip.CLASSES", 2)
    found = perceptionclip(images(), NAMES, Words(), FACTORS)
    np.testing.assert_allclose(found.probabilities, usual.probabilities, atol=1e-6)


def test_a_spurious_background_misleads_plain_words_and_not_these():
    """Class and background lie in orthogonal directions; the bare name carries the background it is usual with."""
    rng = np.random.default_rng(0)
    u, v = np.eye(8)[:2], np.eye(8)[2:4]
    truth, ground = rng.integers(0, 2, (2, 2000))
    x = u[truth] + 2 * v[ground] + rng.normal(0, 0.2, (2000, 8))  # the background is the stronger signal
    words = {f"{'ab'[y]}, {'lw'[z]}": u[y] + v[z] for y in range(2) for z in range(2)}
    words |= {"a": u[0] + 0.7 * v[0], "b": u[1] + 0.7 * v[1]}

    def worst(found):
        right = found.predictions == truth
        return min(right[(truth == y) & (ground == z)].mean() for y in range(2) for z in range(2))

    plain = perceptionclip(x, ["a", "b"], words, {}, templates="{}", scale=20)
    told = perceptionclip(x, ["a", "b"], words, {"ground": ["l", "w"]}, templates="{}", scale=20)
    assert worst(plain) < 0.15
    assert worst(told) > 0.99
    assert ((told.factor("ground")["w"] > 0.5) == ground).mean() > 0.99


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"infer": "name"}, "Did you mean 'names'"),
        ({"choose": "some"}, "choose must be one of"),
        ({"tau": 0}, "tau must be above 0"),
        ({"scale": -1}, "scale must lie in"),
        ({"factors": ["on grass"]}, "must map a factor"),
        ({"factors": {"b": "on grass"}}, "list of values"),
        ({"factors": {"b": []}}, "list of values"),
        ({"factors": {"b": [[]]}}, "phrases"),
        ({"factors": {"b": [3]}}, r"phrases.*Got 3"),
        ({"limit": 5}, r"at most 5 combinations \(limit\)\. Got 6"),
        ({"names": []}, "at least one"),
        ({"features": images()[:, :4]}, r"shape \(n, 12\)"),
    ],
)
def test_mistakes_are_named(change, message):
    given = {"features": images(), "names": NAMES, "encoder": Words(), "factors": FACTORS, **change}
    with pytest.raises(ClipworksError, match=message):
        perceptionclip(**given)


def test_without_factors_there_are_those_of_any_picture():
    found, told = perceptionclip(images(), NAMES, Words()), perceptionclip(images(), NAMES, Words(), GENERAL)
    np.testing.assert_array_equal(found.probabilities, told.probabilities)
    assert len(found.contexts) == 32
    assert found.contexts[0] == dict.fromkeys(["orientation", "quality", "illumination", "medium"], "")


def test_an_unknown_factor_is_named():
    with pytest.raises(ClipworksError, match="Did you mean 'angle'"):
        perceptionclip(images(), NAMES, Words(), FACTORS).factor("angel")
