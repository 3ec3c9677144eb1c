"""Every error names the argument, what is allowed, what was given, and the closest match."""

import pickle

import pytest

from clipworks.errors import (
    BadImage,
    BadWeights,
    ClipworksError,
    CollectionError,
    MissingExtra,
    UnknownName,
    check_choice,
    check_range,
    closest,
    need,
)


def test_choice():
    assert check_choice("metric", "dot", ("cosine", "dot")) == "dot"
    with pytest.raises(UnknownName) as error:
        check_choice("metric", "cosin", ("cosine", "dot"))
    assert str(error.value) == "metric must be one of 'cosine', 'dot'. Got 'cosin'. Did you mean 'cosine'?"
    with pytest.raises(UnknownName, match=r"'19' \.\.\. Got 'x'|'19' \.\.\.\. Got 'x'"):
        check_choice("n", "x", [str(i) for i in range(40)])


@pytest.mark.parametrize(
    ("low", "high", "given", "bounds"),
    [(1, None, 0, "[1, inf]"), (None, 3, 4, "[-inf, 3]"), (0, 1, 1.5, "[0, 1]"), (0, 1, float("nan"), "[0, 1]")],
)
def test_range(low, high, given, bounds):
    with pytest.raises(ClipworksError) as error:
        check_range("k", given, low, high)
    assert str(error.value) == f"k must lie in {bounds}. Got {given!r}."
    assert check_range("k", 2, 1, 3) == 2


def test_closest_is_silent_when_nothing_is_near():
    assert closest("cosin", ["cosine"]) == " Did you mean 'cosine'?"
    assert closest("zzz", ["cosine"]) == ""


@pytest.mark.parametrize("kind", [BadImage, BadWeights, CollectionError, MissingExtra, UnknownName])
def test_all_are_value_errors_of_one_family(kind):
    assert issubclass(kind, ClipworksError)
    assert issubclass(kind, ValueError)


def test_bad_image_crosses_processes():
    error = pickle.loads(pickle.dumps(BadImage("a.jpg", "is empty")))
    assert (error.key, error.reason, str(error)) == ("a.jpg", "is empty", "image 'a.jpg': is empty")


def test_need():
    assert need("json", "none").dumps([1]) == "[1]"
    with pytest.raises(MissingExtra, match=r"pip install 'clipworks\[search\]'") as error:
        need("no_such_library", "search")
    assert isinstance(error.value, ImportError)
