"""A metric of every variant, and its two sources of noise: the patients who were tested, and training itself.

A variant's accuracy would come out otherwise on other patients, and otherwise on the same patients after
another training (new folds, initial weights and order). The first noise shrinks as patients grow, the second
as trainings do, so both have to be in an error. Patients: covariances between variants over bootstrap draws
of whole patients, which take the trained networks as given. Trainings: the accuracies form a table of
variants by folds, each repeat with folds of its own. What neither variant nor fold explains of it (the
interaction) is training noise and sampling noise together; taking off what the sampling of patients explains,
by the same draws, leaves the variance of one training, pooled over variants (and control).

A contrast's error^2 is its own patient variance plus, for each variant in it, the training variance shared by
its trainings; t after Satterthwaite (1946). Folds share training slices, so no estimate of the variance over
new training sets is unbiased (Bengio and Grandvalet, 2004): all of this speaks of training on these patients.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import special

from step2.bootstrap import ALPHA, MIN_PATIENTS, bootstrap_weights, patient_ids, sum_by_patient

Floats = np.ndarray | float
Freedom = tuple[int, int, int]  # degrees: of patients, of the interaction, of one variant's trainings
# The interaction has to exceed what patients explain by this part before training noise is seen in it: a variance
# that can't be negative would come out above 0 half of the time where there is none. Chosen by simulation, of eight
# columns (tests/benchmarks/simulate_intervals.py): without it intervals are 11 % (3 folds) or 7 % (5) wider where
# there is no noise; at 0.3 near-twins have 9 % false positives where noise and patients weigh alike.
CAUTION = 0.20


@dataclass(frozen=True)
class Estimates:
    """A metric of k variants. values: float (k,); patients: covariance from who was tested, float (k, k).

    spread: the mean square of the interaction; explained: the part of it that patients explain; NaN where the
    table can't tell (one variant, or one training of each). share: sum of the squared shares of a variant's trainings.
    """

    names: tuple[str, ...]
    values: np.ndarray
    patients: np.ndarray
    spread: float
    explained: float
    share: float
    freedom: Freedom

    @property
    def training(self) -> float:
        """The variance of one training (a fold's) about its variant, as errors take it; 0 where none is seen."""
        return float(np.nan_to_num(cautious(self.spread, self.explained)))

    @property
    def seen(self) -> tuple[float, float, float]:
        """The SD of one training and its 95 % interval, as reports show it; NaN where the table can't tell."""
        chi2 = special.chdtri(max(self.freedom[1], 1), [ALPHA / 2, 1 - ALPHA / 2])
        ends = self.spread * self.freedom[1] / chi2
        sd, low, high = np.sqrt(np.maximum(np.r_[self.spread, ends] - self.explained, 0))
        return float(sd), float(low), float(high)

    def errors(self, coefficients: np.ndarray) -> tuple[float, float, float]:
        """Return a contrast's errors, from patients and from trainings, and its degrees of freedom.

        coefficients: float (k,). NaN where the patients are too few, or no patient differs.
        """
        sampling = float(coefficients @ self.patients @ coefficients)  # variances
        shared = self.share * float(coefficients @ coefficients)
        luck = self.training * shared
        if self.freedom[0] + 1 < MIN_PATIENTS or np.isnan(sampling) or sampling < 1e-18:
            return np.nan, np.nan, np.nan
        degrees = satterthwaite(sampling, luck, self.spread * shared, self.freedom)
        return float(np.sqrt(sampling)), float(np.sqrt(luck)), float(degrees)

    def contrast(self, coefficients: np.ndarray) -> dict[str, float]:
        """Return difference, 95 % interval, errors and p of a contrast, dict; NaN where not estimable.

        seed_noise: the SD of the difference that training again alone would make, as far as it was seen.
        """
        difference = float(np.round(coefficients @ self.values, 12))
        patient_error, training_error, degrees = self.errors(coefficients)
        error = float(np.hypot(patient_error, training_error))
        half = special.stdtrit(degrees, 1 - ALPHA / 2) * error  # Student's t
        p = 2 * special.stdtr(degrees, -abs(difference) / error)
        noise = np.maximum(self.spread - self.explained, 0) * self.share * float(coefficients @ coefficients)
        return {
            **{"difference": difference, "ci_low": difference - half, "ci_high": difference + half},
            **{"error": error, "patient_error": patient_error, "training_error": training_error},
            **{"seed_noise": float(np.sqrt(noise)), "p_value": p, "freedom": degrees},
        }

    def differ(self, contrasts: np.ndarray) -> float:
        """Return the p of several contrasts being equal (Wald's F), NaN for one. contrasts: float (m, k)."""
        steps = np.diff(contrasts, axis=0)
        degrees = [self.errors(step)[2] for step in steps]
        if not degrees or np.isnan(degrees).any():
            return np.nan
        luck = self.training * self.share
        covariance = steps @ self.patients @ steps.T + luck * steps @ steps.T
        apart = steps @ self.values
        wald = float(apart @ np.linalg.pinv(covariance, hermitian=True) @ apart) / len(steps)
        return float(special.fdtrc(len(steps), min(degrees), wald))

    def coefficients(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Return the coefficients of the mean difference, a minus b, of some pairs, float (k,)."""
        found = np.zeros(len(self.names))
        for a, b in pairs:
            found[self.names.index(a)] += 1 / len(pairs)
            found[self.names.index(b)] -= 1 / len(pairs)
        return found


def cautious(mean_square: Floats, sampling: Floats) -> np.ndarray:
    """Return the training variance that an interaction's mean square shows beyond what patients explain."""
    return np.maximum(mean_square - (1 + CAUTION) * sampling, 0.0)


def degrees_of_freedom(patients: int, columns: int, trainings: int) -> Freedom:
    """Return the degrees of freedom of a table.

    columns: variants and control. trainings: of each, folds times repeats.
    """
    return patients - 1, (columns - 1) * (trainings - 1), trainings - 1


def satterthwaite(sampling: Floats, luck: Floats, spread: Floats, freedom: Freedom) -> np.ndarray:
    """Return the degrees of freedom of sampling + luck, variances from patients and from trainings.

    spread: what luck was taken from, patients' part included. freedom: as of Estimates. Never fewer than a
    variant's trainings less 1 (or patients less 1): where patients hardly move a contrast, as that of two
    near-twins, its error is the luck alone, and Satterthwaite's degrees would fall below 1.
    """
    # luck is a difference, which is as unsure as what it was taken from
    doubt = np.where(np.greater(luck, 0), np.square(spread) / max(freedom[1], 1), 0.0)
    least = np.where(np.greater(luck, 0), min(freedom), freedom[0])
    return np.maximum(np.square(sampling + luck) / (np.square(sampling) / freedom[0] + doubt), least)


def combine(names: Sequence[str], observed: np.ndarray, draws: np.ndarray, patients: int) -> Estimates:
    """Return the estimates of a metric that is a quotient of two sums over cells.

    observed: float (2, k, repeats, folds), numerator and denominator of each variant in each cell.
    draws: the same in each bootstrap draw, float (draws, 2, k, repeats, folds).
    patients: how many the metric speaks about.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        cells, drawn = observed[0] / observed[1], draws[:, 0] / draws[:, 1]
        values = observed[0].sum((1, 2)) / observed[1].sum((1, 2))
        totals = draws[:, 0].sum((2, 3)) / draws[:, 1].sum((2, 3))
    covariance = patient_covariance(totals, patients)
    k, repeats, folds = cells.shape
    freedom = degrees_of_freedom(patients, k, repeats * folds)
    spread = explained = np.nan  # of few patients nothing is told, as no interval is given
    if freedom[1] and patients >= MIN_PATIENTS:
        spread = float(interaction(cells)) / freedom[1]
        explained = explained_by_patients(cells, drawn, patients) / freedom[1]
    weights = observed[1, 0] / observed[1, 0].sum()
    share = float((weights**2).sum())
    return Estimates(tuple(names), values, covariance, spread, explained, share, freedom)


def patient_covariance(totals: np.ndarray, patients: int) -> np.ndarray:
    """Return the covariance of variants from who was tested, float (k, k); NaN where many draws have no value.

    totals: the metric in each draw, float (draws, k).
    """
    k = totals.shape[1]
    if np.isnan(totals).mean() > ALPHA:
        return np.full((k, k), np.nan)
    known = totals[np.isfinite(totals).all(1)]
    return np.atleast_2d(np.cov(known, rowvar=False)) * patients / max(patients - 1, 1)


def explained_by_patients(cells: np.ndarray, drawn: np.ndarray, patients: int) -> float:
    """Return the interaction's sum of squares that the choice of patients makes; NaN where most draws have none.

    It is that of each draw about the observed table; draws that leave a fold empty tell nothing.
    cells: float (k, repeats, folds). drawn: float (draws, ...).
    """
    known = drawn[np.isfinite(drawn).all((1, 2, 3))]
    if len(known) < len(drawn) / 2:
        return np.nan
    return float(interaction(known - cells).mean() * patients / max(patients - 1, 1))


def interaction(cells: np.ndarray) -> np.ndarray:
    """Return the sum of squares that neither variant nor fold explains, float (...).

    cells: float (..., variants, repeats, folds). A fold of each repeat is one of its own, so that what repeats
    of one variant differ by counts too: in simulation its variance was found with errors 7 to 25 % smaller than
    from folds within repeats alone, and a single split that is repeated says something as well.
    """
    centred = cells - cells.mean((-2, -1), keepdims=True)
    centred = centred - centred.mean(-3, keepdims=True)
    return (centred**2).sum((-3, -2, -1))


@dataclass(frozen=True)
class Cells:
    """Who was tested where. codes: int (rows,), each row's patient; cell: int (rows,), repeat and fold."""

    codes: np.ndarray
    cell: np.ndarray
    shape: tuple[int, int]

    @property
    def patients(self) -> int:
        """How many patients there are."""
        return int(self.codes.max()) + 1


def find_cells(rows: pd.DataFrame) -> Cells:
    """Return who was tested where. rows: with the columns repeat, fold, image and patient."""
    repeats, folds = (pd.factorize(rows[column], sort=True)[0] for column in ("repeat", "fold"))
    shape = (int(repeats.max()) + 1, int(folds.max()) + 1)
    return Cells(pd.factorize(patient_ids(rows))[0], repeats * shape[1] + folds, shape)


def paired_correctness(predictions: pd.DataFrame) -> tuple[pd.DataFrame, Cells]:
    """Return right (1) or wrong (0), DataFrame (repeat and image, variants), and the cells of its rows.

    ValueError where the variants weren't tested on the same images.
    """
    rows = predictions.assign(correct=(predictions["label"] == predictions["predicted"]).astype(float))
    keys = ["repeat", "image"]
    twice = rows[rows.duplicated([*keys, "variant"])]
    if len(twice):
        wrong = "{image} of {variant} was predicted twice in repeat {repeat}"
        raise ValueError(wrong.format(**twice.iloc[0]))
    table = rows.pivot(index=keys, columns="variant", values="correct")[list(rows["variant"].unique())]
    if table.isna().any(axis=None):
        repeat, image, variant = table.isna().stack().idxmax()
        raise ValueError(
            f"{image} has no prediction of {variant} in repeat {repeat}, others have one: variants must be "
            "tested on the same images; run Step 1 and the training of this variant again"
        )
    first = rows[rows["variant"] == table.columns[0]]
    where = first.set_index(keys).loc[table.index].reset_index()
    return table, find_cells(where)


def mean_estimates(
    names: Sequence[str], values: np.ndarray, cells: Cells, n_draws: int, seed: int
) -> Estimates:
    """Return the estimates of a mean over rows. values: float (rows, k), such as 1 for right, 0 for wrong."""
    count, places = cells.patients, cells.shape[0] * cells.shape[1]
    both = np.column_stack([values, np.ones(len(values))])
    sums = sum_by_patient(both, cells.codes * places + cells.cell, count * places)
    sums = sums.reshape(count, places, -1).transpose(0, 2, 1).reshape(count, -1)  # patients; column, place

    def quotient(weights: np.ndarray) -> np.ndarray:
        found = (weights @ sums).reshape(len(weights), -1, *cells.shape)
        counts = np.broadcast_to(found[:, -1:], found[:, :-1].shape)
        return np.stack([found[:, :-1], counts], axis=1)

    n_draws = n_draws if count >= MIN_PATIENTS else 2  # of fewer no error is given
    draws = np.concatenate([quotient(weights) for weights in bootstrap_weights(count, n_draws, seed)])
    return combine(names, quotient(np.ones((1, count)))[0], draws, count)
