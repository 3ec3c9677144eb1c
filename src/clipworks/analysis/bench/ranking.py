"""Are the differences more than luck? Mean ranks with Friedman's test and Nemenyi's critical difference, and bootstrap
intervals over sets and seeds.

Demsar 2006, Statistical Comparisons of Classifiers over Multiple Data Sets (JMLR); Iman and Davenport 1980 for the F
form of Friedman's test. A block is a set (or a domain that is left out): one number per method, the mean over shots and
seeds, since numbers of shots of one set do not vary independently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import ClipworksError


@dataclass(frozen=True)
class Ranking:
    """Methods by their mean rank over blocks (1 is best).

    Attributes
    ----------
    names, ranks : best first
    blocks : how many sets
    statistic, p : Iman and Davenport's F, and how likely one as large is if all methods were alike
    difference : Nemenyi's critical difference of mean ranks at 5 %; methods nearer than it are not told apart
    """

    names: list[str]
    ranks: np.ndarray
    blocks: int
    statistic: float
    p: float
    difference: float

    def alike(self) -> list[tuple[int, int]]:
        """First and last place of every largest group of methods that are not told apart; only groups of several."""
        groups: list[tuple[int, int]] = []
        for first, rank in enumerate(self.ranks):
            last = int(np.searchsorted(self.ranks, rank + self.difference, side="right")) - 1
            if last > first and (not groups or last > groups[-1][1]):
                groups.append((first, last))
        return groups


def rank(table: Mapping[str, Sequence[float]], alpha: float = 0.05) -> Ranking:
    """Rank methods by their values on the same blocks, higher is better; ties share their mean rank.

    Parameters
    ----------
    table : method -> a value for every block, in the same order
    alpha : level of the critical difference

    Raises
    ------
    ClipworksError
        If there are fewer than two methods or blocks, or a value is missing.

    Examples
    --------
    >>> found = rank({"a": [90, 80, 70], "b": [89, 81, 60], "c": [50, 40, 30]})
    >>> found.names, found.ranks.round(2).tolist()
    (['a', 'b', 'c'], [1.33, 1.67, 3.0])
    """
    from scipy.stats import f, rankdata, studentized_range

    names, lengths = list(table), {len(values) for values in table.values()}
    if len(names) < 2 or len(lengths) != 1 or min(lengths) < 2:
        raise ClipworksError(f"ranking needs two methods with the same blocks, two or more. Got {len(names)} methods "
                             f"with {sorted(lengths)} blocks.")  # fmt: skip
    values = np.array([table[name] for name in names], float)  # (k, N)
    if not np.isfinite(values).all():
        raise ClipworksError("ranking needs a value of every method for every block. Got NaN.")
    k, n = values.shape
    ranks = rankdata(-values, axis=0).mean(1)
    chi = 12 * n / (k * (k + 1)) * ((ranks - (k + 1) / 2) ** 2).sum()
    rest = n * (k - 1) - chi
    statistic = np.inf if rest <= 1e-12 else (n - 1) * chi / rest
    p = float(f.sf(statistic, k - 1, (k - 1) * (n - 1)))
    difference = studentized_range.ppf(1 - alpha, k, np.inf) / np.sqrt(2) * np.sqrt(k * (k + 1) / (6 * n))
    order = np.argsort(ranks, kind="stable")
    return Ranking([names[i] for i in order], ranks[order], n, float(statistic), p, float(difference))


def interval(blocks: Sequence[Sequence[float]], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % of bootstrapped means: sets are drawn with replacement, and seeds within each drawn set.

    Parameters
    ----------
    blocks : for every set the values of its seeds
    draws, seed : how many bootstrap samples, and where they come from

    Examples
    --------
    >>> interval([[50.0, 50.0], [50.0, 50.0]])
    (50.0, 50.0)
    """
    rng = np.random.default_rng(seed)
    arrays = [np.asarray(block, float) for block in blocks]
    chosen = rng.integers(0, len(arrays), (draws, len(arrays)))
    # the mean of a block's own bootstrap sample, for every block and draw; then blocks by choice
    resampled = np.stack([a[rng.integers(0, len(a), (draws, len(arrays), len(a)))].mean(2) for a in arrays])
    means = resampled[chosen, np.arange(draws)[:, None], np.arange(len(arrays))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
