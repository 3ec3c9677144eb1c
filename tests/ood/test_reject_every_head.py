"""The reject option around every registered classifier: known images are named, unknown ones are refused."""

import inspect

import numpy as np
import pytest
from sklearn.base import is_classifier

from clipworks.errors import ClipworksError
from clipworks.ood.reject import Reject
from clipworks.registry import get_method, methods

WORDS = np.eye(8)[:3]
SETTINGS = {"auto": {"budget": 0.5}}


def made(name):
    kind = get_method(name, "heads")
    words = {"text": WORDS} if "text" in inspect.signature(kind).parameters else {}
    return kind(**words, **SETTINGS.get(name, {}))


CLASSIFIERS = [m.name for m in methods("heads") if is_classifier(made(m.name))]


def images(per_class, seed):
    draw = np.random.default_rng(seed)
    y = np.repeat(np.arange(3), per_class)
    known = np.eye(8)[y] + draw.normal(0, 0.12, (len(y), 8))
    unknown = np.eye(8)[draw.integers(3, 8, len(y))] + draw.normal(0, 0.12, (len(y), 8))
    return known, y, unknown


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_unknown_images_are_refused(name):
    x, y, _ = images(12, 0)
    fresh, truth, unknown = images(20, 1)
    fitted = Reject(made(name), rate=0.1).fit(x, y)
    answer = fitted.predict(fresh)
    kept = answer != -1
    assert kept.mean() > 0.7
    assert (answer[kept] == truth[kept]).mean() > 0.9
    assert (fitted.predict(unknown) == -1).mean() > 0.8


def test_all_heads_but_the_one_that_orders_are_classifiers():
    assert {m.name for m in methods("heads")} - set(CLASSIFIERS) == {"ranking_adapter"}


def test_what_is_no_classifier_is_refused():
    x, y, _ = images(4, 0)
    with pytest.raises(ClipworksError, match=r"classifier must be a classifier .* Got RankingAdapter"):
        Reject(made("ranking_adapter")).fit(x, y)
