"""Protocols: who may learn from what. No image of a test is ever learned from, whatever the protocol."""

import numpy as np
import pytest

from clipworks.analysis.bench.protocols import Grid, protocols, trials
from clipworks.data.item import Item
from clipworks.data.labelled import LabelledSet
from clipworks.errors import ClipworksError, UnknownName

GRID = Grid(shots=[1, 4], seeds=[1, 2])


def made(name="made", classes=5, each=20, domains=0, noisy=False):
    n = classes * each
    items = [Item(f"{name}/{i}.jpg", np.zeros((4, 4, 3), np.uint8)) for i in range(n)]
    data = LabelledSet(name, items, np.arange(n) % classes, [f"{name} {c}" for c in range(classes)])
    if domains:
        data.domains = np.array([f"domain {i // classes % domains}" for i in range(n)])
    if noisy:
        data.noisy["worse"] = np.where(np.arange(n) % 3 == 0, (data.y + 1) % classes, data.y)
    return data


def all_trials():
    plain, styled = made("plain", noisy=True), made("styled", each=24, domains=3)
    return {name: list(trials(name, [styled] if name == "domains" else [plain, styled], GRID)) for name in protocols()}


TRIALS = all_trials()
EVERY = [pytest.param(t, id=f"{t.protocol}-{t.data.name}-{t.setting}-{t.seed}") for own in TRIALS.values() for t in own]


def test_the_six_protocols():
    assert list(protocols()) == ["base-to-new", "cross", "domains", "few-shot", "imbalanced", "noisy"]
    with pytest.raises(UnknownName, match="Did you mean 'few-shot'"):
        trials("fewshot", [made()], GRID)


@pytest.mark.parametrize("trial", EVERY)
def test_what_is_tested_is_never_learned_from(trial):
    seen = {trial.data.items[row].key for rows in (trial.rows, trial.validation[0]) for row in rows}
    for test in trial.tests.values():
        assert not seen & {test.data.items[row].key for row in test.rows}
        assert [test.classes[c] for c in test.y] == [test.data.classes[c] for c in test.data.y[test.rows]]
    assert not set(trial.rows) & set(trial.validation[0])
    assert len(set(trial.rows)) == len(trial.rows)


@pytest.mark.parametrize("trial", EVERY)
def test_labels_are_right_but_where_they_are_wrong_on_purpose(trial):
    told = [trial.classes[c] for c in trial.y]
    true = [trial.data.classes[c] for c in trial.data.y[trial.rows]]
    if trial.protocol != "noisy":
        assert told == true
    elif trial.setting["shots"]:
        assert told != true or trial.setting["shots"] == 1
    assert trial.split().train == [(trial.data.items[r].key, name) for r, name in zip(trial.rows, told, strict=True)]


@pytest.mark.parametrize("trial", EVERY)
def test_every_class_has_its_shots(trial):
    shots = trial.setting["shots"]
    counts = np.bincount(trial.y, minlength=len(trial.classes))
    if trial.protocol == "imbalanced" and shots:
        assert (counts.min(), counts.max()) == (1, shots)
    else:
        assert set(counts) == {shots}


def test_all_combinations_are_there_once():
    found = [(t.data.name, t.setting["shots"], t.seed) for t in TRIALS["few-shot"]]
    assert sorted(found) == sorted((d, k, s) for d in ("plain", "styled") for k in (0, 1, 4) for s in (1, 2))
    assert len({t.split().digest for t in TRIALS["few-shot"]}) == len(found)


def test_base_and_new_share_no_class():
    for trial in TRIALS["base-to-new"]:
        base, new = trial.tests["base"], trial.tests["new"]
        assert (len(base.classes), len(new.classes)) == (3, 2)
        assert trial.classes == base.classes
        assert not set(base.classes) & set(new.classes)


def test_cross_learns_the_first_set_alone():
    for trial in TRIALS["cross"]:
        assert trial.data.name == "plain"
        assert list(trial.tests) == ["styled"]


def test_the_left_out_domain_is_tested_whole_and_not_seen():
    found = {t.setting["left_out"] for t in TRIALS["domains"]}
    assert found == {"domain 0", "domain 1", "domain 2"}
    for trial in TRIALS["domains"]:
        domains = trial.data.domains
        assert set(domains[trial.tests["test"].rows]) == {trial.setting["left_out"]}
        assert len(trial.tests["test"].rows) == 40
        for rows in (trial.rows, trial.validation[0]):
            assert trial.setting["left_out"] not in set(domains[rows])


def test_noise_of_people_and_at_random():
    kinds = {(t.data.name, t.setting["noise"]) for t in TRIALS["noisy"]}
    random = {(name, f"symmetric {p}") for name in ("plain", "styled") for p in ("20%", "40%")}
    assert kinds == random | {("plain", "human worse")}
    for trial in TRIALS["noisy"]:
        if trial.setting["noise"] == "human worse" and trial.setting["shots"]:
            np.testing.assert_array_equal(trial.y, trial.data.noisy["worse"][trial.rows])
        assert not len(trial.validation[0])


def test_a_cap_on_test_images_is_the_same_for_all():
    grid = Grid(shots=[1], seeds=[1, 2, 3], most=7)
    tests = [t.tests["test"].rows.tolist() for t in trials("few-shot", [made()], grid)]
    assert all(rows == tests[0] for rows in tests)
    assert len(tests[0]) == 7


def test_shots_that_a_set_does_not_have_are_passed_over():
    assert {t.setting["shots"] for t in trials("few-shot", [made(each=8)], Grid(shots=[4, 5], seeds=[1]))} == {0, 4}


@pytest.mark.parametrize(
    ("name", "sets", "says"),
    [
        ("base-to-new", [made(classes=3)], "needs 4 classes"),
        ("cross", [made()], "others to test on"),
        ("domains", [made()], "needs a set with domains"),
    ],
)
def test_a_set_that_does_not_fit_says_why(name, sets, says):
    with pytest.raises(ClipworksError, match=says):
        list(trials(name, sets, GRID))
