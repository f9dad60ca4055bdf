"""Which variants can't be told from the best: Hsu's multiple comparisons with the best (1984), of some estimates."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from step2.bootstrap import ALPHA, MIN_PATIENTS
from step2.estimates import Estimates

BEST_DRAWS = 20_000  # of the largest of several t


def best_of(
    found: Estimates, variants: Sequence[str], seed: int = 0, draws: int = BEST_DRAWS
) -> pd.DataFrame:
    """Return best_set's table of some estimates. variants: those that compete, without a control."""
    k = len(variants)
    apart, reach = np.full((k, k), np.inf), np.zeros((k, k))  # inf: of a variant and itself
    for i, one in enumerate(variants if k > 1 else ()):
        pairs = np.array([found.coefficients([(one, other)]) for other in variants if other != one])
        reach[i, np.arange(k) != i] = simultaneous_reach(found, pairs, seed, draws)
        apart[i, np.arange(k) != i] = pairs @ found.values
    upper = np.min(apart + reach, axis=1)
    best = np.isnan(upper) | (upper > 0)
    lower = np.min((apart - reach.T)[:, best], axis=1, initial=0.0)
    accuracy = [found.values[found.names.index(one)] for one in variants]
    nearest = [variants[other] if k > 1 else "" for other in apart.argmin(axis=1)]
    columns = {"variant": list(variants), "accuracy": accuracy, "in_best_set": best, "best_other": nearest}
    columns |= {"difference": apart.min(axis=1), "ci_low": lower, "ci_high": np.maximum(upper, 0.0)}
    columns |= {"training_sd": found.seen[0]}
    table = pd.DataFrame(columns)
    if k == 1:
        table[["difference", "ci_low", "ci_high"]] = np.nan
    return table.sort_values("accuracy", ascending=False, kind="stable", ignore_index=True)


def simultaneous_reach(found: Estimates, pairs: np.ndarray, seed: int, draws: int) -> np.ndarray:
    """Return how far each difference may lie below what was seen, all at once in 95 %, float (pairs,).

    Dunnett's one-sided quantile for these correlations, by simulation; as the differences' degrees of freedom
    are not the same, it is found for normal values and each difference takes its own t of that probability.
    pairs: coefficients.
    """
    if found.freedom[0] + 1 < MIN_PATIENTS:
        return np.full(len(pairs), np.nan)
    errors = np.array([found.errors(pair) for pair in pairs])
    known = np.isfinite(errors[:, 0])  # not where two variants are right on the very same slices
    reach = np.full(len(pairs), 1e-9)
    if not known.any():
        return reach
    pairs, errors = pairs[known], errors[known]
    both = np.hypot(errors[:, 0], errors[:, 1])
    luck = found.training * found.share
    covariance = pairs @ found.patients @ pairs.T + luck * pairs @ pairs.T
    root = np.linalg.cholesky(covariance / np.outer(both, both) + 1e-6 * np.eye(len(pairs)))
    largest = (root @ np.random.default_rng(seed).normal(size=(len(pairs), draws))).max(0)
    reach[known] = both * stats.t.ppf(stats.norm.cdf(np.quantile(largest, 1 - ALPHA)), errors[:, 2])
    return reach
