"""Auto: what is compared, on which images, by which rule, within which time; and that it is zero-shot without shots."""

import time

import numpy as np
import pytest
from few_shots import assert_sklearn_accepts, shots, softmax

from clipworks.errors import ClipworksError
from clipworks.heads import auto
from clipworks.heads.auto import Auto, ZeroShot, candidates, deviation, settings
from clipworks.heads.common import Choice, Head, fold_numbers
from clipworks.heads.gda import GDA
from clipworks.heads.linear_probe import LinearProbe
from clipworks.heads.nearest_mean import NearestMean
from clipworks.heads.ridge import Ridge
from clipworks.registry import get_method, methods
from clipworks.types import Features

QUICK = ("zero_shot", "nearest_mean", "ridge", "gda")


class Told(Head):
    """Gets exactly the rows right whose first entry is in `knows`; remembers what it was fitted on."""

    knows: tuple = ()
    pause = 0.0

    def __init__(self, text=None, alpha=None):
        self.text, self.alpha = text, alpha

    def _learn(self, given) -> Choice:
        type(self).seen.append(given)
        time.sleep(self.pause)
        self.map_ = {0.0: 0}
        return self._choice()

    def _scores(self, x):
        return np.zeros((len(x), len(self.classes_)))

    def predict(self, x):
        number = np.asarray(x)[:, 0].round().astype(int)
        right = np.isin(number, self.knows)
        return np.where(right, number % 2, 1 - number % 2)


def told(name, knows, effort, pause=0.0, steady=False):
    own = {"knows": tuple(knows), "effort": effort, "pause": pause, "steady": steady, "seen": []}
    return type(name, (Told,), own)


@pytest.fixture
def compare(monkeypatch):
    """Auto on 40 numbered images of two classes, among heads that know some of them."""

    def run(heads, **options):
        monkeypatch.setattr(auto, "candidates", lambda: dict(heads))
        fit = {k: options.pop(k) for k in ("groups", "validation") if k in options}
        x = np.column_stack([np.arange(40.0), np.ones(40)])
        return Auto(text=np.eye(2), **options).fit(x, np.arange(40) % 2, **fit)

    return run


def test_without_shots_it_is_zero_shot():
    x, _, words = shots()
    names = np.array(["wren", "ant", "cat", "bee", "dog", "elk"])
    head = Auto(text=Features(words, labels=names)).fit()
    assert (head.chosen_, head.why_) == ("zero_shot", "there are no shots: the words alone decide.")
    assert head.classes_.tolist() == sorted(names)
    order = np.argsort(names)
    np.testing.assert_allclose(head.predict_proba(x), softmax(100 * x @ words[order].T), atol=1e-9)
    plain = Auto(text=words).fit(None)
    np.testing.assert_array_equal(plain.predict(x), (x @ words.T).argmax(1))
    assert head.leaderboard_[0].as_row()["accuracy"] is None


def test_with_one_shot_per_class_nothing_can_be_compared():
    x, y, words = shots(per_class=1)
    head = Auto(text=words, methods=QUICK).fit(x, y)
    assert head.chosen_ == "zero_shot"
    assert "no class has two images" in head.why_
    every = Auto(text=words).fit(x, y)
    assert (every.chosen_, every.best_.alpha_) == ("linear_probe", LinearProbe(text=words).fit(x, y).alpha_)
    assert "equal say" in every.why_
    without = Auto(methods=["nearest_mean", "ridge"]).fit(x, y)
    assert without.chosen_ == "nearest_mean"
    np.testing.assert_array_equal(without.predict(x), y)


def test_a_steady_head_within_two_standard_errors_of_the_best(compare):
    """Against the rule in plain numpy, on heads that know given images."""
    heads = {"zero": told("zero", range(20), 0), "near": told("near", range(4, 38), 1, steady=True),
             "low": told("low", range(30), 1, steady=True), "top": told("top", range(2, 40), 2)}  # fmt: skip
    found = compare(heads)
    line = {t.method: t for t in found.leaderboard_}
    assert [t.accuracy for t in found.leaderboard_] == [38 / 40, 34 / 40, 30 / 40, 20 / 40]
    fold = fold_numbers(np.arange(40) % 2, np.arange(40), 5)
    for name, kind in heads.items():
        right = np.isin(np.arange(40), kind.knows).astype(float)
        lead = np.isin(np.arange(40), heads["top"].knows) - right
        each = [right[fold == k].mean() for k in range(5)]
        assert line[name].error == pytest.approx(np.std(each, ddof=1) / 5**0.5)
        assert line[name].behind == pytest.approx(lead.mean())
        assert line[name].behind_error == pytest.approx(np.std(lead, ddof=1) / 40**0.5)
    assert line["near"].behind > 2 * line["near"].behind_error  # 0.1 against 0.096
    assert (found.chosen_, found.why_) == ("top", "top is the most accurate on 40 shots held out (0.950).")
    heads["near"] = told("near", range(2, 37), 1, steady=True)  # now behind by 0.075 with an error of 0.042
    found = compare(heads)
    assert found.chosen_ == "near"
    assert "cannot be told from the most accurate on 40 shots held out, top (0.950)" in found.why_
    heads["more"] = told("more", range(2, 38), 1, steady=True)  # as steady, and better
    assert compare(heads).chosen_ == "more"
    for kind in heads.values():
        kind.steady = False
    assert compare(heads).chosen_ == "top"
    heads["even"] = told("even", range(38), 1)  # as accurate as the best, and of less effort
    assert compare(heads).chosen_ == "even"


def test_zero_shot_is_the_floor(compare):
    """What is steady and within the noise of the best, but below the words, is not taken."""
    heads = {"zero_shot": told("zero", range(34), 0), "weird": told("weird", range(7, 40), 1, steady=True),
             "top": told("top", range(36), 2)}  # fmt: skip
    found = compare(heads)
    line = {t.method: t for t in found.leaderboard_}
    assert line["weird"].behind < 2 * line["weird"].behind_error
    assert line["weird"].accuracy < line["zero_shot"].accuracy
    assert found.chosen_ == "top"
    del heads["zero_shot"]
    assert compare(heads).chosen_ == "weird"


def test_zero_shot_gives_way_to_any_head_that_is_ahead_and_to_none_that_is_level(compare):
    heads = {"zero_shot": told("zero", range(34), 0), "ahead": told("ahead", range(3, 38), 3)}
    found = compare(heads)
    line = {t.method: t for t in found.leaderboard_}
    assert 0 < line["zero_shot"].behind < line["zero_shot"].behind_error
    assert found.chosen_ == "ahead"
    heads["ahead"] = told("level", range(3, 37), 3, steady=True)
    level = compare(heads)
    assert level.chosen_ == "zero_shot"
    assert level.why_ == "no head is more accurate on 40 shots held out than the words alone (0.850)."


@pytest.mark.parametrize("seed", range(4))
def test_it_is_never_below_zero_shot_on_the_folds(seed):
    x, y, words = shots(per_class=4, noise=2.0, word_noise=0.3 + 0.5 * seed, seed=seed)
    head = Auto(text=words, methods=QUICK).fit(x, y)
    line = {t.method: t for t in head.leaderboard_}
    assert line[head.chosen_].accuracy >= line["zero_shot"].accuracy
    assert {t.note for t in head.leaderboard_} == {"", "chosen"}


def test_a_fold_is_never_fitted_on_what_it_is_compared_on_and_views_stay_together(compare):
    spy = told("spy", range(40), 1)
    groups = np.arange(40) // 4 * 2 + np.arange(40) % 2  # two views of each image
    compare({"spy": spy}, groups=groups)
    *folds, last = spy.seen
    assert len(folds) == 5
    assert len(last.y) == 40
    held = [np.setdiff1d(np.arange(40), part.x[:, 0]).astype(int) for part in folds]
    assert sorted(np.concatenate(held)) == list(range(40))
    for part, out in zip(folds, held, strict=True):
        assert not set(groups[out]) & set(groups[part.x[:, 0].astype(int)])
        assert len(np.unique(part.groups)) == len(part.y) // 2  # the head's own folds know the views too


def test_the_chosen_head_is_fitted_on_all_shots():
    x, y, words = shots(per_class=8, noise=1.2, word_noise=3.0)
    held = shots(noise=1.2, draw=1)[0]
    head = Auto(text=words, methods=["zero_shot", "gda"]).fit(x, y)
    plain = GDA(text=words).fit(x, y)
    assert head.chosen_ == "gda"
    np.testing.assert_allclose(head.predict_proba(held), plain.predict_proba(held), atol=1e-12)
    np.testing.assert_allclose(head.logits(held), plain.logits(held), atol=1e-9)
    assert head.leaderboard_[0].settings == {"alpha": plain.alpha_}
    assert head.leaderboard_[0].seconds > 0
    assert "gda is the most accurate" in head.why_


def test_figures_are_those_of_the_heads_by_hand():
    x, y, words = shots(per_class=5, noise=1.6)
    names = np.array(["f", "e", "d", "c", "b", "a"])  # sorted, they are in another order than the words
    text = Features(words, labels=names)
    head = Auto(text=text, methods=QUICK).fit(x, names[y])
    line, fold = {t.method: t for t in head.leaderboard_}, fold_numbers(5 - y, np.arange(len(y)), 5)
    for name, kind in (("ridge", Ridge), ("nearest_mean", NearestMean), ("zero_shot", ZeroShot)):
        each = [kind(text=text).fit(x[fold != k], names[y][fold != k]).score(x[fold == k], names[y][fold == k])
                for k in range(5)]  # fmt: skip
        assert line[name].accuracy == pytest.approx(np.mean(each))


def test_the_temperature_of_zero_shot_is_fitted_on_the_shots():
    x, y, words = shots(per_class=8, noise=2.0)
    head = ZeroShot(text=words).fit(x, y)
    assert head.temperature_ != 1
    np.testing.assert_allclose(head.logits(x), 100 * x @ words.T, atol=1e-9)
    assert settings(head) == {}


def test_validation_images_are_compared_on_instead():
    x, y, words = shots(per_class=3, noise=1.5)
    held, own, _ = shots(per_class=10, noise=1.5, draw=1)
    head = Auto(text=words, methods=QUICK).fit(x, y, validation=(held, own))
    line = {t.method: t for t in head.leaderboard_}
    assert line["ridge"].accuracy == Ridge(text=words).fit(x, y).score(held, own)
    right = (held @ words.T).argmax(1) == own
    assert line["zero_shot"].accuracy == right.mean()
    assert line["zero_shot"].error == pytest.approx(np.std(right, ddof=1) / 60**0.5)


def test_the_budget_stops_new_heads_and_new_folds(compare):
    heads = {"zero": told("zero", range(10), 0), "slow": told("slow", range(40), 1, pause=0.2),
             "late": told("late", range(40), 2)}  # fmt: skip
    found = compare(heads, budget=0.3)
    notes = {t.method: t.note for t in found.leaderboard_}
    assert notes["zero"] == "chosen"
    assert notes["slow"].startswith("stopped after ")
    assert notes["late"].startswith("not begun: the budget of 0.3 s")
    assert len(heads["slow"].seen) <= 2
    assert not heads["late"].seen
    assert compare(heads, budget=0).chosen_ == "zero"
    assert compare({"slow": told("slow", range(40), 1)}, budget=0).chosen_ == "slow"  # one is always tried


def test_little_effort_comes_first(compare):
    order = []
    heads = {n: told(n, range(40), e) for n, e in (("c", 3), ("a", 2), ("b", 0))}
    for kind in heads.values():
        kind._learn = lambda self, given, kind=kind: order.append(kind.__name__) or self._choice()
    compare(heads)
    assert order[:15] == ["b"] * 5 + ["a"] * 5 + ["c"] * 5


def test_a_head_that_fails_is_reported_and_stops_nothing(compare):
    class Broken(Told):
        effort, seen = 1, []

        def _learn(self, given):
            raise RuntimeError("out of luck")

    found = compare({"good": told("good", range(30), 1), "broken": Broken})
    assert found.chosen_ == "good"
    assert found.leaderboard_[-1].note == "RuntimeError: out of luck"
    with pytest.raises(ClipworksError, match=r"broken: RuntimeError: out of luck"):
        compare({"broken": Broken})


def test_a_class_without_shots_leaves_the_heads_that_know_words():
    x, y, words = shots(per_class=6)
    head = Auto(text=words, methods=[*QUICK, "cross_modal"]).fit(x[y != 2], y[y != 2])
    assert head.chosen_ in ("zero_shot", "cross_modal")
    notes = {t.method: t.note for t in head.leaderboard_}
    assert "Got none of 2" in notes["ridge"]
    assert head.classes_.tolist() == list(range(6))


def test_candidates_are_all_registered_heads_that_shots_and_words_are_enough_for():
    found = candidates()
    assert next(iter(found)) == "zero_shot"
    registered = {m.name: get_method(f"heads/{m.name}") for m in methods("heads")}
    heads = {n for n, kind in registered.items() if isinstance(kind, type) and issubclass(kind, Head)}
    assert set(found) - {"zero_shot"} == {n for n in heads if registered[n].labelled} - {"auto"}
    assert {"nearest_mean", "knn", "ridge", "gda", "linear_probe", "cross_modal", "few_shot_inspection"} <= set(found)
    assert not {"nola", "ranking_adapter", "auto"} & set(found)
    assert all(kind.effort in (1, 2, 3) for name, kind in found.items() if name != "zero_shot")


def test_a_head_that_needs_more_is_no_candidate(monkeypatch):
    class Needs(Told):
        def __init__(self, captions, text=None, alpha=None):
            super().__init__(text, alpha)

    monkeypatch.setattr(auto, "get_method", lambda name: {"heads/ridge": Needs}.get(name, get_method(name)))
    assert "ridge" not in candidates()
    assert "gda" in candidates()


def test_the_standard_error():
    values = np.random.default_rng(0).normal(size=30)
    assert deviation(values) == pytest.approx(values.std(ddof=1) / 30**0.5)
    assert deviation(values[:1]) == 0


def test_what_cannot_be_used_is_named():
    x, y, words = shots()
    for call, message in (
        (lambda: Auto().fit(), "text must be given where there are no shots"),
        (lambda: Auto(methods=["ridg"]).fit(x, y), "Did you mean 'ridge'"),
        (lambda: Auto(methods=["zero_shot"]).fit(x, y), "needs no words"),
        (lambda: Auto(budget=-1).fit(x, y), "budget must lie in"),
        (lambda: Auto(folds=1).fit(x, y), "folds must lie in"),
        (lambda: Auto(text=words).fit(x[:1], y[:1]), "minimum of 2"),
        (lambda: Auto().fit(x, np.zeros(len(x), int)), "at least 2 classes"),
        (lambda: Auto(text=words).fit(np.full_like(x, np.nan), y), "NaN"),
    ):
        with pytest.raises(ClipworksError, match=message):
            call()


def test_scikit_learn_accepts_it():
    assert_sklearn_accepts(Auto(methods=["nearest_mean", "ridge"]))
