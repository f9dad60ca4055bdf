"""Which difference a comparison would find: from its error after training, or from a plan before it.

The plan speaks the language of estimates.py: a contrast's variance is that of the patients plus that of the
trainings, of which only an estimate will be known, so that the test is a t test with few degrees of freedom.
"""

from bisect import bisect_left

import numpy as np
import pandas as pd
from scipy import special  # not scipy.stats: a second or two of every plan would be its import

from step2.bootstrap import ALPHA, MIN_PATIENTS, POWER
from step2.estimates import cautious, degrees_of_freedom, satterthwaite

QUANTILES = 60  # of a chi-squared variable, in its place; 200 move no result by 0.01 points


def detectable_difference(error: pd.Series, freedom: pd.Series, comparisons: pd.Series) -> pd.Series:
    """Return the smallest true differences found with 80 % power, at ALPHA / comparisons (Bonferroni)."""
    return (special.stdtrit(freedom, 1 - ALPHA / comparisons / 2) + special.stdtrit(freedom, POWER)) * error


def detectable_points(
    patients: int,
    slices: float = 1.0,
    folds: int = 5,
    repeats: int = 1,
    variants: int = 7,
    disagreement: float = 0.2,
    correlation: float = 0.3,
    training_sd: float = 1.0,
    aa_disagreement: float = 0.0,
    control: bool = True,
    unequal: float = 1.0,
) -> float:
    """Return the true difference, points of accuracy, that a comparison with the baseline finds in 80 %.

    Before any training, so by assumptions. slices: of a patient, mean. unequal: the mean square of these numbers
    over the square of their mean, 1 where all have as many. disagreement: share of slices on which exactly one
    of two variants is right. correlation: of such differences between slices of one patient. training_sd: of one
    training's accuracy, in points, beyond what the choice of slices explains. aa_disagreement: that of two
    trainings of one variant, the part of disagreement that repeats average out; 0 promises least of them.
    control: an A/A control helps to know the training noise. NaN for fewer than 10 patients. One training of a
    variant can't show training noise: with one fold and no repeats the difference is one between these trained
    networks, and training_sd is not used.

    For the test that contrast_table makes, at ALPHA / (variants - 1) as in Holm's first step: its error is a
    chance variable too, and the power is the mean over its distribution.
    """
    if patients < MIN_PATIENTS or variants < 2:
        return np.nan
    trainings = folds * repeats
    freedom = degrees_of_freedom(patients, variants + control, trainings)
    luck = 2 * (training_sd / 100) ** 2 / trainings if trainings > 1 else 0.0
    grouping = (1 + (slices * unequal - 1) * correlation) / (patients * slices)
    middles = (np.arange(QUANTILES) + 0.5) / QUANTILES
    known = special.chdtri(freedom[0], middles)[:, None] / freedom[0]
    seen = special.chdtri(freedom[1], middles)[None] / freedom[1] if freedom[1] else np.zeros((1, 1))

    def power(difference: float) -> float:
        # exactly one is right on at least as many slices as the accuracies differ by
        of_slice = max(disagreement, difference) - difference**2
        noise = min(aa_disagreement, of_slice)
        once = of_slice * grouping
        sampling = (of_slice - noise + noise / repeats) * grouping
        spread = seen * (luck + once / repeats)
        luck_found = cautious(spread, once / repeats) if freedom[1] else np.zeros((1, 1))
        degrees = satterthwaite(sampling * known, luck_found, spread, freedom)
        critical = special.stdtrit(degrees, 1 - ALPHA / (variants - 1) / 2)
        reach = critical * np.sqrt(sampling * known + luck_found)
        return float(special.ndtr((difference - reach) / np.sqrt(sampling + luck)).mean())

    if power(1 - 1e-6) < POWER:
        return np.nan
    return bisect_left(range(10**6), POWER, key=lambda millionths: power(millionths / 1e6)) / 1e4
