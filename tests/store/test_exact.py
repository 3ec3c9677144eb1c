"""Exact search against plain float64 products: every path, ties, ceilings, odd inputs."""

import numpy as np
import pytest

from clipworks.errors import ClipworksError
from clipworks.store.exact import top_k


def oracle(vectors, queries, k, rows=None):
    """Scores and rows by float64 products; equal scores by row."""
    rows = np.arange(len(vectors)) if rows is None else rows
    scores = queries.astype(np.float64) @ vectors[rows].astype(np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), rows[order]


def unit(n, dim, seed=0, dtype=np.float16):
    x = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(dtype)


@pytest.mark.parametrize("path", ["auto", "float32", "half", "bf16"])
@pytest.mark.parametrize("count", [1, 5, 40])
def test_equals_float64(path, count):
    vectors, queries = unit(9001, 33), unit(count, 33, 1, np.float32)
    scores, rows = top_k(vectors, queries, 7, path=path)
    expected, places = oracle(vectors, queries, 7)
    np.testing.assert_allclose(scores, expected, atol=2e-6)
    np.testing.assert_array_equal(rows, places)


@pytest.mark.parametrize("path", ["half", "bf16"])
def test_close_scores_are_done_again(path):
    """1,000 rows that differ by less than the short types can tell: only the second pass can rank them."""
    base = unit(1, 64, 0, np.float32)
    noise = np.random.default_rng(1).standard_normal((1000, 64)).astype(np.float32)
    vectors = (base + 2e-3 * noise).astype(np.float16)
    queries = np.repeat(base, 20, 0) + 1e-3 * unit(20, 64, 2, np.float32)
    _, rows = top_k(vectors, queries, 5, path=path)
    np.testing.assert_array_equal(rows, oracle(vectors, queries, 5)[1])


def test_ties_come_in_the_order_of_rows():
    vectors = np.tile(unit(3, 8), (400, 1))
    for path in ("float32", "half", "bf16"):
        _, rows = top_k(vectors, vectors[1:2].astype(np.float32), 9, path=path)
        np.testing.assert_array_equal(rows[0], np.arange(1, 27, 3))


def test_rows_that_are_not_unit():
    lengths = np.random.default_rng(3).uniform(0.01, 50, (3000, 1)).astype(np.float32)
    vectors = unit(3000, 16, dtype=np.float32) * lengths
    queries = 7 * unit(20, 16, 4, np.float32)
    for path in ("float32", "bf16"):
        np.testing.assert_array_equal(top_k(vectors, queries, 10, path=path)[1], oracle(vectors, queries, 10)[1])
    half = vectors.astype(np.float16)
    np.testing.assert_array_equal(top_k(half, queries[:2], 10, path="half")[1], oracle(half, queries[:2], 10)[1])


def test_memory_ceiling_and_subsets_do_not_change_the_answer():
    vectors, queries = unit(20_000, 24), unit(50, 24, 1, np.float32)
    _, expected = oracle(vectors, queries, 10)
    np.testing.assert_array_equal(top_k(vectors, queries, 10, memory=1 << 20)[1], expected)
    rows = np.flatnonzero(np.random.default_rng(0).random(20_000) < 0.3)
    np.testing.assert_array_equal(top_k(vectors, queries, 10, rows=rows)[1], oracle(vectors, queries, 10, rows)[1])


def test_memory_ceiling_holds():
    """Scores for 2,000 queries on 50,000 rows would be 400 MB; the ceiling keeps the peak far below."""
    import subprocess
    import sys

    code = (
        "import numpy as np, resource\n"
        "from clipworks.store.exact import top_k\n"
        "v = np.random.default_rng(0).standard_normal((50_000, 32)).astype(np.float16)\n"
        "top_k(v, v[:8].astype(np.float32), 3)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "top_k(v, v[:2000].astype(np.float32), 3, memory=32 << 20)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 96


def test_small_and_odd():
    vectors, query = unit(3, 8), unit(1, 8, 1, np.float32)
    assert top_k(vectors, query, 10)[1].shape == (1, 3)
    assert top_k(vectors[:0], query, 10)[1].shape == (1, 0)
    assert top_k(vectors, query[:0], 10)[1].shape == (0, 3)
    assert top_k(vectors, query, 2, rows=np.empty(0, np.int64))[1].shape == (1, 0)
    big = top_k(unit(5000, 8), 1e30 * np.repeat(query, 20, 0), 4)  # beyond float16
    np.testing.assert_array_equal(big[1], oracle(unit(5000, 8), np.repeat(query, 20, 0), 4)[1])
    with pytest.raises(ClipworksError, match="finite"):
        top_k(vectors, np.full((1, 8), np.nan, np.float32), 1)
    with pytest.raises(ClipworksError, match=r"shape \(q, 8\)"):
        top_k(vectors, np.zeros((1, 7), np.float32), 1)
    with pytest.raises(ClipworksError, match="k must lie"):
        top_k(vectors, query, 0)


def test_inputs_are_not_changed():
    vectors, queries = unit(500, 8), unit(20, 8, 1, np.float32)
    before = vectors.copy(), queries.copy()
    top_k(vectors, queries, 3)
    np.testing.assert_array_equal(vectors, before[0])
    np.testing.assert_array_equal(queries, before[1])
