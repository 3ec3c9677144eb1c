"""energy by loops, its limits and its relations to the other scores."""

import numpy as np
import pytest

from clipworks.errors import ClipworksError
from clipworks.ood.energy import energy
from clipworks.ood.max_logit import max_logit

LOGITS = np.random.default_rng(0).normal(size=(20, 6)) * 3


def test_formula_and_bounds():
    expected = [2 * np.log(sum(np.exp(v / 2) for v in row)) for row in LOGITS]
    np.testing.assert_allclose(energy(LOGITS, temperature=2.0), expected)
    gap = energy(LOGITS) - max_logit(LOGITS)
    assert (gap >= 0).all()
    assert (gap <= np.log(6)).all()
    np.testing.assert_allclose(energy(LOGITS[:, :1]), max_logit(LOGITS[:, :1]))
    np.testing.assert_allclose(energy(LOGITS, temperature=1e-3), max_logit(LOGITS), atol=1e-2)


@pytest.mark.parametrize(
    ("given", "message"),
    [(np.array([np.nan, 1]), "finite"), (3.0, r"shape \(\.\.\., C\)"), ([["a"]], "an array of numbers")],
)
def test_mistakes_are_named(given, message):
    with pytest.raises(ClipworksError, match="logits must .*" + message):
        energy(given)


def test_temperature_is_positive():
    with pytest.raises(ClipworksError, match=r"temperature must be above 0\. Got 0"):
        energy(LOGITS, temperature=0)
