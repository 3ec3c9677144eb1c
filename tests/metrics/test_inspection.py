"""Inspection figures against scikit-learn, and the learning curve against what it must be."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score, roc_auc_score

from clipworks.errors import ClipworksError
from clipworks.heads.few_shot_inspection import FewShotInspection
from clipworks.metrics.inspection import inspection_report, learning_curve


def test_equals_scikit_learn():
    rng = np.random.default_rng(0)
    truth = rng.random(200) < 0.3
    score = np.clip(0.3 * truth + rng.random(200), 0, 1)
    called = score > 0.6
    assert inspection_report(truth, score, 0.6) == pytest.approx({
        "accuracy": accuracy_score(truth, called),
        "sensitivity": recall_score(truth, called),
        "specificity": recall_score(~truth, ~called),
        "precision": precision_score(truth, called),
        "f1": f1_score(truth, called),
        "auc": roc_auc_score(truth, score),
    })  # fmt: skip


def test_what_cannot_be_divided_is_not_a_number():
    found = inspection_report([0, 0], [0.1, 0.2])
    assert found["specificity"] == 1
    assert np.isnan([found[k] for k in ("sensitivity", "precision", "auc")]).all()


@pytest.mark.parametrize(("defective", "score"), [([], []), ([1, 0], [0.5]), ([1, 0], [0.5, float("nan")])])
def test_mistakes_are_named(defective, score):
    with pytest.raises(ClipworksError, match="score must"):
        inspection_report(defective, score)


def test_the_learning_curve_draws_evenly_and_never_from_the_test_images():
    rng = np.random.default_rng(0)
    y = np.repeat(["good", "scratch"], [300, 60])
    x = rng.normal(size=(360, 6)) + 2 * (y == "scratch")[:, None]
    seen = []

    class Spy(FewShotInspection):
        def fit(self, x, y, **more):
            seen.append((x, y))
            return super().fit(x, y, **more)

    test_x, test_y = x[::3] + 0.01, y[::3]
    rows = learning_curve(Spy(), x, y, test_x, test_y, sizes=(5, 50, 100), repeats=4)
    assert [r["per_class"] for r in rows] == [5, 50]  # there are not 100 scratches
    assert [np.unique(own, return_counts=True)[1].tolist() for _, own in seen] == [[5, 5]] * 4 + [[50, 50]] * 4
    accuracies = [float(np.mean(FewShotInspection().fit(*s).predict(test_x) == test_y)) for s in seen]
    assert [r["accuracy"] for r in rows] == pytest.approx([np.mean(accuracies[:4]), np.mean(accuracies[4:])])
    assert [r["deviation"] for r in rows] == pytest.approx([np.std(accuracies[:4]), np.std(accuracies[4:])])
    assert learning_curve(Spy(), x, y, test_x, test_y, sizes=(5, 50), repeats=4) == rows
