"""msp by loops, its limits and its relations to the other scores."""

import numpy as np
import pytest

from clipworks.errors import ClipworksError
from clipworks.ood.msp import msp

LOGITS = np.random.default_rng(0).normal(size=(20, 6)) * 3


def test_formula_and_invariance():
    z = LOGITS
    expected = [max(np.exp(v / 2) for v in row) / sum(np.exp(v / 2) for v in row) for row in z]
    np.testing.assert_allclose(msp(z, temperature=2.0), expected, rtol=1e-12)
    np.testing.assert_allclose(msp(z + 7), msp(z))
    assert (msp(z[:, :1]) == 1).all()  # one class: useless
    assert np.isfinite(msp(1e5 * z)).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [(np.array([np.nan, 1]), "finite"), (3.0, r"shape \(\.\.\., C\)"), ([["a"]], "an array of numbers")],
)
def test_mistakes_are_named(given, message):
    with pytest.raises(ClipworksError, match="logits must .*" + message):
        msp(given)


def test_temperature_is_positive():
    with pytest.raises(ClipworksError, match=r"temperature must be above 0\. Got 0"):
        msp(LOGITS, temperature=0)
