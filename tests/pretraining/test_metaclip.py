"""Curation: what matches, what is counted, what is kept, and that shards and automaton change nothing."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipworks.errors import ClipworksError
from clipworks.pretraining.metaclip import Matcher, balance, curate, decide, entry_counts, entry_probability, spaced


def naive(text, entries):
    """The definition: look for every spaced entry in the spaced text."""
    for mark in ",.;:?!`":
        text = text.replace(mark, f" {mark} ")
    text = " " + text.replace("\t", " ").replace("\n", " ").replace("\r", " ") + " "
    return [i for i, entry in enumerate(entries) if f" {entry} " in text]


def gini(counts):
    counts = np.sort(counts[counts > 0]).astype(float)
    rank = np.arange(1, len(counts) + 1)
    return ((2 * rank - len(counts) - 1) * counts).sum() / (len(counts) * counts.sum())


def zipf_pool(texts=3000, words=300, seed=0):
    rng = np.random.default_rng(seed)
    p = 1 / np.arange(1, words + 1)
    return [" ".join(f"w{i}" for i in rng.choice(words, 3, p=p / p.sum())) for _ in range(texts)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("category", []), ("concat", []), ("a cat.", [0]), ("cat, dog", [0, 1]), ("cat", [0]), ("dog cat", [0, 1]),
        ("I love new york", [2, 3]), ("new  york", [3]), ("new\nyork!", [2, 3]), ("new, york", [3]), ("Cat", []),
        ("dog? dog. dog", [1]), ("", []), ("`cat`", [0]), ("the new york cat", [0, 2, 3]),
    ],
)  # fmt: skip
def test_what_matches(text, found):
    entries = ["cat", "dog", "new york", "york"]
    assert Matcher(entries)(text) == found == naive(text, entries)


LETTERS = st.text(alphabet="ab ,.\n", max_size=14)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(alphabet="ab ", min_size=1, max_size=6).filter(str.strip), min_size=1, max_size=8, unique=True),
       st.lists(LETTERS, max_size=4))  # fmt: skip
def test_the_automaton_finds_what_the_naive_loop_finds(entries, texts):
    """Overlapping entries, entries in entries, double spaces, entries with spaces at their ends, punctuation."""
    matcher = Matcher(entries)
    for text in texts:
        assert matcher(text) == naive(text, entries)
    flat, starts = matcher.rows(texts)
    assert [flat[a:b].tolist() for a, b in itertools.pairwise(starts)] == [naive(t, entries) for t in texts]


def test_spacing():
    assert spaced("a,b\tc") == " a , b c "


def test_the_cards_probability():
    """Entries kept with .2, .02 and .5 on one text: 1 - .8 * .98 * .5."""
    counts = [5, 50, 2]
    texts = ["x y z"] + ["x"] * 4 + ["y"] * 49 + ["z"]
    found = curate(texts, ["x", "y", "z"], t=1)
    assert found.counts.tolist() == counts
    assert found.entry_probability.tolist() == [0.2, 0.02, 0.5]
    assert found.probability[0] == pytest.approx(0.608, abs=1e-12)
    draws = np.random.default_rng(0).random(600_000)
    starts = np.arange(0, 600_001, 3)
    kept, _ = decide(np.tile([0, 1, 2], 200_000), starts, found.entry_probability, draws)
    assert kept.mean() == pytest.approx(0.608, abs=4 * math.sqrt(0.608 * 0.392 / 200_000))


def test_large_t_keeps_all_matches_and_none_keeps_none():
    texts = zipf_pool(500)
    metadata = [f"w{i}" for i in range(100)]
    matched = [bool(naive(t, metadata)) for t in texts]
    everything = curate(texts, metadata, t=math.inf)
    assert everything.kept.tolist() == matched == curate(texts, metadata, t=everything.counts.max()).kept.tolist()
    assert everything.matched == sum(matched)
    assert not curate(texts, metadata, t=0).kept.any()


def test_an_entry_alone_keeps_about_t():
    """Binomial: c = 4000 texts, t = 300; tail entries stay whole."""
    texts = ["head"] * 4000 + ["tail"] * 200
    kept = [curate(texts, ["head", "tail"], t=300, seed=seed).kept for seed in range(20)]
    mean = np.mean([k[:4000].sum() for k in kept])
    assert abs(mean - 300) < 4 * math.sqrt(300 * (1 - 300 / 4000) / 20)
    assert all(k[4000:].all() for k in kept)


def test_a_text_counts_once_per_entry_and_counts_grow_with_the_pool():
    metadata = ["cat", "dog"]
    assert curate(["cat cat cat", "dog"], metadata).counts.tolist() == [1, 1]
    texts = zipf_pool(200)
    names = [f"w{i}" for i in range(300)]
    assert (curate(texts, names).counts >= curate(texts[:100], names).counts).all()


def test_the_tail_is_flattened():
    texts = zipf_pool()
    names = [f"w{i}" for i in range(300)]
    found = curate(texts, names, t=20)
    after = curate([texts[i] for i in found.indices], names).counts
    assert gini(after) < gini(found.counts) - 0.05
    assert set(np.flatnonzero(found.counts)) == set(np.flatnonzero(after))  # nothing disappears


def test_vectorised_and_per_text_keep_the_same():
    texts = zipf_pool(400)
    names = [f"w{i}" for i in range(300)]
    found = curate(texts, names, t=5, seed=3)
    draws = iter(np.random.default_rng(3).random(10_000))
    kept = [any([next(draws) < found.entry_probability[e] for e in naive(text, names)]) for text in texts]
    assert found.kept.tolist() == kept


def test_shards_give_the_whole():
    texts = zipf_pool(1000)
    names = [f"w{i}" for i in range(300)]
    shards = [texts[:137], texts[137:138], texts[138:138], texts[138:]]
    matcher = Matcher(names)
    counts = entry_counts(shards, matcher)
    assert counts.dtype == np.uint64
    whole = curate(texts, matcher, t=10, seed=1)
    assert counts.tolist() == whole.counts.tolist()
    assert np.concatenate(list(balance(shards, matcher, counts, t=10, seed=1))).tolist() == whole.kept.tolist()
    # the fault that the two passes avoid: counts of a shard alone keep too much
    alone = np.concatenate([curate(s, matcher, t=10, seed=1).kept for s in shards if s])
    assert alone.sum() > whole.kept.sum()


def test_seeds():
    texts = zipf_pool(300)
    names = [f"w{i}" for i in range(50)]
    one, again, other = (curate(texts, names, t=5, seed=s).kept for s in (0, 0, 1))
    assert (one == again).all()
    assert (one != other).any()


def test_faults():
    for metadata, message in [([], "at least one entry"), (["a", "b", "a"], "'a' twice"), (["a", " "], "Entry 1")]:
        with pytest.raises(ClipworksError, match=message):
            Matcher(metadata)
    with pytest.raises(ClipworksError, match="t must lie in"):
        entry_probability(np.array([1]), -1)
    assert len(curate([], ["a"]).kept) == 0
    assert entry_probability(np.array([0, 3]), 0).tolist() == [1.0, 0.0]
