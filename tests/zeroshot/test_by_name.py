"""Every classifier by its name: the answers of the method itself, in the order of the names, with reasons."""

import json

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.heads.common import Head
from clipworks.registry import get_method, methods
from clipworks.types import Features
from clipworks.zeroshot.by_name import NONE, classifiers, decide, nearest_shots
from clipworks.zeroshot.classifier import class_vectors
from clipworks.zeroshot.sentences import softmax

NAMES = ["wren", "ant", "cat"]  # not in alphabetical order
TOLD = {"wren": ["small wings", "a beak"], "ant": ["six legs"], "cat": ["soft fur", "a long tail"]}
PAIRS = [{"names": ["ant", "wren"], "sentences": [["an ant, with six legs", "a wren, with wings"]]}]
FACTORS = {"place": ["outdoors", "indoors"]}


class Words:
    """A sentence is the direction of the class that it names or describes, with some of the rest of its words."""

    dim, logit_scale, fingerprint = 12, 20.0, ""

    def texts(self, sentences):
        rows = []
        for sentence in sentences:
            row = np.random.default_rng(list(sentence.encode())).normal(size=12) * 0.1
            row[[i for i, n in enumerate(NAMES) if any(said in sentence for said in (n, *TOLD[n]))]] += 1
            rows.append(row / np.linalg.norm(row))
        return torch.tensor(np.array(rows), dtype=torch.float32)


def images(n=30, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    x = np.eye(12)[y] + 0.25 * rng.normal(size=(n, 12))
    labels = np.array(NAMES)[y]
    return Features(x.astype(np.float32), [f"{seed}/{i}.jpg" for i in range(n)], labels)


@pytest.fixture
def told(tmp_path):
    """What each method asks to be told, as files."""
    files = {"descriptions": TOLD, "pairs": PAIRS, "factors": FACTORS}
    for name, value in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    return lambda name: tmp_path / f"{name}.json"


def needs(name):
    return {"classify_by_description": "descriptions", "description_selection": "descriptions", "fudd": "pairs",
            "perceptionclip": "factors"}.get(name)  # fmt: skip


def learns(name):
    if name == "description_selection":
        return True
    kind = get_method(f"heads/{name}") if classifiers()[name] == "heads" else None
    return isinstance(kind, type) and issubclass(kind, Head) and kind.labelled


QUICK = [n for n in classifiers() if n not in ("ranking_adapter", "auto")]


@pytest.mark.parametrize("name", QUICK)
def test_every_method_sorts_well_and_gives_reasons(name, told):
    options = {}
    if needs(name):
        options["descriptions"] = told(needs(name))
    if learns(name):
        options["shots"] = images(18, seed=1)
    seen = images()
    found = decide(seen, NAMES, Words(), name, explain=True, **options)
    assert found.method == name
    assert found.keys == seen.keys
    assert found.names[:3] == NAMES
    np.testing.assert_allclose(found.probabilities.sum(1), 1, atol=1e-4)
    known = [i for i, label in enumerate(found.labels) if label != NONE]
    assert len(known) > 20
    assert np.mean([found.labels[i] == seen.labels[i] for i in known]) > 0.9
    assert len(found.reasons) == 30
    assert all(found.reasons)
    row = found.as_rows()[0]
    assert (row["key"], row["label"], row["why"]) == ("0/0.jpg", found.labels[0], found.reasons[0])


def test_the_names_are_found_by_the_registry():
    assert set(classifiers()) == ({"zero_shot"} | {m.name for m in methods("zeroshot")} - {"classifier"}
                                  | {m.name for m in methods("heads")})  # fmt: skip


def test_zero_shot_is_the_softmax_of_scaled_cosines():
    words = class_vectors(NAMES, Words(), templates="a {}").numpy()
    x = images().vectors
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    found = decide(images(), NAMES, Words(), templates="a {}", explain=True)
    np.testing.assert_allclose(found.probabilities, softmax(20 * unit @ words.T), atol=1e-5)
    cosine = unit[1] @ words.T
    assert found.reasons[1].startswith(f"words: ant ({cosine[1]:.2f}), next ")


def test_a_heads_columns_are_brought_into_the_order_of_the_names():
    from clipworks.heads.ridge import Ridge

    shots, seen = images(18, seed=1), images()
    words = Features(class_vectors(NAMES, Words()).numpy(), labels=np.array(NAMES))

    def unit(features):
        rows = features.vectors / np.linalg.norm(features.vectors, axis=1, keepdims=True)
        return Features(rows, features.keys, features.labels)

    head = Ridge(text=words).fit(unit(shots))
    assert head.classes_.tolist() == ["ant", "cat", "wren"]
    found = decide(seen, NAMES, Words(), "ridge", shots=shots)
    np.testing.assert_allclose(found.probabilities, head.predict_proba(unit(seen))[:, [2, 0, 1]], atol=1e-5)


def test_auto_brings_its_leaderboard():
    found = decide(images(), NAMES, Words(), "auto", shots=images(9, seed=1), budget=0, explain=True)
    assert found.method == "auto: zero_shot"
    assert found.reasons[0].startswith("words: ")  # the shots had no say
    assert {t.method for t in found.leaderboard} >= {"zero_shot", "ridge", "gda"}
    assert found.why
    without = decide(images(), NAMES, Words(), "auto", explain=True)
    plain = decide(images(), NAMES, Words())
    assert without.labels == plain.labels
    assert without.why == "there are no shots: the words alone decide."


def test_a_class_without_shots_is_named_and_a_way_out_with_it():
    shots = images(18, seed=1)
    some = Features(shots.vectors[shots.labels != "cat"], labels=shots.labels[shots.labels != "cat"])
    with pytest.raises(ClipworksError, match=r"method 'ridge'\. Got none of 'cat'; method 'auto'"):
        decide(images(), NAMES, Words(), "ridge", shots=some)
    found = decide(images(), NAMES, Words(), "auto", shots=some, budget=0)
    assert "cat" in found.labels


def test_the_nearest_shots_are_named():
    shots = Features(np.eye(3, dtype=np.float32), ["a.jpg", "b.jpg", "c.jpg"], np.array(["x", "y", "z"]))
    (said,) = nearest_shots(np.array([[0.6, 0.0, 0.8]]), shots)
    assert said == "like c.jpg (z, 0.80), a.jpg (x, 0.60), b.jpg (y, 0.00)"


def test_descriptors_that_fired_are_named(told):
    found = decide(images(), NAMES, Words(), "classify_by_description", descriptions=told("descriptions"), explain=True)
    known = {d for own in TOLD.values() for d in own}
    for label, why in zip(found.labels, found.reasons, strict=True):
        fired = [part.rsplit(" (", 1)[0] for part in why.split(", ")]
        assert set(fired) <= set(TOLD[label]) | {"no descriptor fired alone"}
    assert known & set("".join(found.reasons).replace(")", " (").split(" ("))


def test_open_set_answers_none_of_these():
    away = np.zeros((1, 12), np.float32)
    away[0, 7] = 1
    seen = Features(np.concatenate([images().vectors, away]), labels=None)
    found = decide(seen, NAMES, Words(), "open_set", explain=True)
    assert found.names[-1] == NONE
    assert found.labels[-1] == NONE
    assert found.reasons[-1].endswith("too far")


def test_contrasts_of_plain_descriptions_serve_for_pairs(told):
    found = decide(images(), NAMES, Words(), "fudd", descriptions=told("descriptions"), explain=True)
    assert "which has six legs" in found.reasons[1]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("rigde", {}, "Did you mean 'ridge'"),
        ("ridge", {}, "learns from labelled images: give shots"),
        ("ranking_adapter", {"shots": images()}, "must be a classifier"),
        ("fudd", {}, "give descriptions"),
        ("waffleclip", {"shots": images()}, "shots must be left out for method 'waffleclip'"),
        ("ridge", {"shots": images(), "descriptions": TOLD}, "descriptions must be left out"),
        ("ridge", {"shots": images(), "scale": 3.0}, "scale must be left out"),
        ("gda", {"shots": images(), "budget": 3.0}, "budget must be left out"),
        ("waffleclip", {"templates": "imagenet"}, "templates must be one sentence"),
        ("zero_shot", {"shots": images()}, "shots must be left out"),
        ("fudd", {"descriptions": "no.json"}, "must be a JSON file"),
    ],
)
def test_mistakes_are_named(method, options, message):
    with pytest.raises(ClipworksError, match=message):
        decide(images(), NAMES, Words(), method, **options)
    with pytest.raises(ClipworksError, match="at least 2 classes"):
        decide(images(), NAMES[:1], Words())


def test_no_image_gives_an_empty_result():
    empty = Features(np.empty((0, 12), np.float32))
    assert decide(empty, NAMES, Words(), "ridge", shots=images()).as_rows() == []
