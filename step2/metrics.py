"""Accuracy, sensitivity, specificity, AUC and calibration of each variant, with patient-clustered intervals.

Confusion counts, log loss and calibration sums are added up per patient, a repeat of an image counting as a
fraction of it. AUC compares pairs of images within one fold only, as scores of two networks share no scale.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import special, stats
from sklearn.metrics import roc_curve
from statsmodels.stats.proportion import proportion_confint

from step2.bootstrap import ALPHA, MIN_PATIENTS, bootstrap_weights, patient_ids, sum_by_patient
from step2.classes import HEALTHY, classes_of, probability_columns
from step2.estimates import Estimates, Floats, combine, find_cells, mean_estimates, paired_correctness

Quotient = tuple[np.ndarray, np.ndarray]  # numerator and denominator of a measure, float (draws,) each
Ranked = Callable[[np.ndarray, np.ndarray, np.ndarray], Quotient]  # such as concordance
METRIC_DRAWS = 1_000  # their intervals need the standard error alone
CALIBRATION_BINS = 10
SPECIFICITY = 0.9  # at which sensitivities are compared
GRID = np.linspace(0, 1, 201)  # of false positive rates and sensitivities, on which curves are averaged


def metric_table(predictions: pd.DataFrame, n_draws: int = METRIC_DRAWS, seed: int = 0) -> pd.DataFrame:
    """Return DataFrame (variant, metric, value, ci_low, ci_high, patients) of all metrics; NaN is not estimable.
    patients: whom a metric speaks about, each slice of an unknown patient counted as one.

    Intervals of accuracy and of the AUC of any hemorrhage hold patients and trainings, but not what moves all
    variants of a run together (folds, initial weights, order); the others hold patients alone. Any hemorrhage is
    every class but healthy; where no class is healthy, its metrics are left out.
    """
    counts, table = patient_counts(predictions), []
    correct, cells = paired_correctness(predictions)
    both = {"accuracy": mean_estimates(list(correct), correct.to_numpy(), cells, n_draws, seed)}
    if HEALTHY in classes_of(predictions):
        both["any_auc"] = ranking_estimates(predictions, concordance, n_draws, seed)
    for variant, rows in predictions.groupby("variant", sort=False):
        codes = pd.factorize(patient_ids(rows))[0]
        tables, n = patient_tables(rows, codes), codes.max() + 1
        blocks = [metric_draws(rows, codes, tables, w) for w in bootstrap_weights(n, n_draws, seed)]
        for metric, value in metric_draws(rows, codes, tables, np.ones((1, n))).items():
            draws = np.concatenate([block[metric] for block in blocks])
            ends = metric_interval(metric, value[0], draws, counts.behind(metric))
            if metric in both and np.isfinite(ends).all() and 0 < value[0] < 1:
                ends = interval_of(both[metric], str(variant), logit=metric == "any_auc")
            table.append((variant, metric, value[0], *ends, counts.behind(metric)))
    return pd.DataFrame(table, columns=["variant", "metric", "value", "ci_low", "ci_high", "patients"])


def metric_draws(
    rows: pd.DataFrame, codes: np.ndarray, tables: dict[str, np.ndarray], weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Return each metric of one variant, dict of float (draws,). weights: float (draws, patients)."""
    drawn = {name: np.tensordot(weights, table, 1) for name, table in tables.items()}
    confusion, classes = drawn["confusion"], classes_of(rows)
    values = confusion_metrics(confusion, classes)
    aucs = np.array([auc_draws(rows, codes, name, weights) for name in classes])
    if HEALTHY in classes:  # healthy against the rest; turned round, it is the same
        values["any_auc"] = aucs[classes.index(HEALTHY)]
    found = np.isfinite(aucs)
    with np.errstate(invalid="ignore", divide="ignore"):
        values["macro_auc"] = np.where(found, aucs, 0).sum(0) / found.sum(0)
    values["log_loss"] = drawn["loss"] / confusion.sum((1, 2))
    values["calibration_error"] = calibration_error(drawn["calibration"])
    return values


def patient_tables(rows: pd.DataFrame, codes: np.ndarray) -> dict[str, np.ndarray]:
    """Return sums per patient: confusion (patients, true, called), calibration (patients, bins, 3), loss."""
    classes = classes_of(rows)
    weight = np.full(len(rows), 1 / rows["repeat"].nunique())
    truth, called = (pd.Categorical(rows[c], classes).codes.astype(int) for c in ("label", "predicted"))
    p = rows[probability_columns(classes)].to_numpy(float)
    confusion = np.zeros((codes.max() + 1, len(classes), len(classes)))
    np.add.at(confusion, (codes, truth, called), weight)
    sure = p.max(axis=1)
    bins = np.minimum((sure * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    calibration = np.zeros((codes.max() + 1, CALIBRATION_BINS, 3))  # right, confidence, count
    np.add.at(calibration, (codes, bins), weight[:, None] * np.c_[truth == called, sure, np.ones(len(p))])
    loss = -np.log(np.clip(p[np.arange(len(p)), truth], 1e-7, 1))  # 1e-7: what float32 resolves next to 1
    return {"confusion": confusion, "calibration": calibration, "loss": sum_by_patient(weight * loss, codes)}


def confusion_metrics(confusion: np.ndarray, classes: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Return the metrics of confusion counts (draws, true, called), dict of float (draws,).

    Means are over the classes present in a draw. Any hemorrhage: healthy against all others.
    """
    true, called, hit = confusion.sum(2), confusion.sum(1), confusion.diagonal(axis1=1, axis2=2)
    n = true.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):  # a class without images is NaN: not estimable
        sensitivity, f1 = hit / true, np.where(true > 0, 2 * hit / (true + called), np.nan)
        specificity = 1 - (called - hit) / (n[:, None] - true)
    values = {
        "accuracy": hit.sum(1) / n,
        "balanced_accuracy": np.nanmean(sensitivity, 1),
        "macro_f1": np.nanmean(f1, 1),
    }
    if HEALTHY in classes:
        i = classes.index(HEALTHY)
        values |= {"any_sensitivity": specificity[:, i], "any_specificity": sensitivity[:, i]}
    for i, name in enumerate(classes):
        values |= {f"sensitivity_{name}": sensitivity[:, i], f"specificity_{name}": specificity[:, i]}
    return values


def calibration_error(calibration: np.ndarray) -> np.ndarray:
    """Return the expected calibration error (Guo 2017; ten bins) of sums (draws, bins, 3), float (draws,)."""
    gaps = np.abs(calibration[..., 0] - calibration[..., 1]).sum(1)
    return gaps / calibration[..., 2].sum(1)


def concordance(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> Quotient:
    """Return the weight of concordant pairs and of all pairs, float (draws,) each; ties count half.

    scores: float (images,). positive: bool (images,). weights: float (draws, images). The quotient is
    the ROC AUC.
    """
    order = np.argsort(scores[~positive])
    negatives = scores[~positive][order]
    below = np.zeros((len(weights), len(negatives) + 1))
    np.cumsum(weights[:, ~positive][:, order], axis=1, out=below[:, 1:])
    first, last = (np.searchsorted(negatives, scores[positive], side) for side in ("left", "right"))
    cases = weights[:, positive]
    ranks = below[:, first] if np.array_equal(first, last) else (below[:, first] + below[:, last]) / 2
    return np.einsum("ij,ij->i", cases, ranks), cases.sum(1) * below[:, -1]


def auc_draws(rows: pd.DataFrame, codes: np.ndarray, name: str, weights: np.ndarray) -> np.ndarray:
    """Return a class's AUC of each draw, float (draws,): pairs within a repeat and fold, added up over them.

    weights: float (draws, patients).
    """
    scores, positive = rows[f"p_{name}"].to_numpy(float), (rows["label"] == name).to_numpy()
    found, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    for index in rows.groupby(["repeat", "fold"]).indices.values():
        of_fold = concordance(scores[index], positive[index], weights[:, codes[index]])
        found, pairs = found + of_fold[0], pairs + of_fold[1]
    with np.errstate(invalid="ignore", divide="ignore"):
        return found / pairs


def interval_of(found: Estimates, variant: str, logit: bool = False) -> tuple[float, float]:
    """Return a variant's 95 % interval, patients and trainings: proportion_interval's, or on the logit scale."""
    at = found.names.index(variant)
    value, patients = found.values[at], found.freedom[0] + 1
    patient_error, training_error, degrees = found.errors(np.eye(len(found.names))[at])
    error = np.hypot(patient_error, training_error)
    if value in (0, 1) and patients >= MIN_PATIENTS:  # without an error
        degrees = patients - 1
    if not logit:
        return proportion_interval(value, error, degrees, patients)
    half = stats.t.ppf(1 - ALPHA / 2, degrees) * error / (value * (1 - value))
    low, high = special.expit(special.logit(value) + np.array([-1, 1]) * half)
    return float(low), float(high)


def proportion_interval(value: Floats, error: Floats, degrees: float, patients: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a proportion, with Student's t and as many slices as would have its standard
    error if each were of another patient (Korn and Graubard, 1998); 0 and 1, which have none, count patients.

    In simulations it covered 92 to 98 %, value +- t * error as little as 88 % (docs/statistics.md).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        effective = np.where(np.isin(value, (0, 1)), patients, value * (1 - value) / np.square(error))
    alpha = 2 * stats.norm.sf(stats.t.ppf(1 - ALPHA / 2, degrees))
    return proportion_confint(value * effective, effective, alpha, method="wilson")


def sensitivity_at_90(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> Quotient:
    """Return the weight of positives above the lowest threshold of 90 % specificity, and of all, float (draws,).

    Arguments as for concordance.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.r_[np.flatnonzero(np.diff(scores[order])), len(scores) - 1]  # thresholds lie between values
    false, true = (np.cumsum(weights[:, order] * is_[order], axis=1) for is_ in (~positive, positive))
    allowed = (1 - SPECIFICITY) * false[:, -1:] + 1e-9
    count = (false[:, ends] <= allowed).sum(axis=1)
    found = np.column_stack([np.zeros(len(weights)), true[:, ends]])
    return found[np.arange(len(weights)), count], true[:, -1]


def ranking_estimates(rows: pd.DataFrame, measure: Ranked, n_draws: int, seed: int) -> Estimates:
    """Return the estimates of a measure of how bleeds are ranked above healthy slices, cell by cell.

    Scores of two networks share no scale, so slices are ranked within one repeat and fold only.
    """
    names = list(rows["variant"].unique())
    where = find_cells(rows)
    score, bleed = 1 - rows[f"p_{HEALTHY}"].to_numpy(float), (rows["label"] != HEALTHY).to_numpy()
    variant = rows["variant"].map(names.index).to_numpy()
    places = where.shape[0] * where.shape[1]
    parts = [np.flatnonzero((variant == v) & (where.cell == c)) for v, c in np.ndindex(len(names), places)]

    def quotient(weights: np.ndarray) -> np.ndarray:
        found = [measure(score[part], bleed[part], weights[:, where.codes[part]]) for part in parts]
        return np.array(found).transpose(2, 1, 0).reshape(len(weights), 2, len(names), *where.shape)

    draws = np.concatenate([quotient(w) for w in bootstrap_weights(where.patients, n_draws, seed)])
    behind = patient_counts(rows).behind("any_auc")
    return combine(names, quotient(np.ones((1, where.patients)))[0], draws, behind)


def metric_interval(metric: str, value: float, draws: np.ndarray, n_patients: int) -> tuple[float, float]:
    """Return the 95 % interval of a metric, NaN where not estimable: proportion_interval's, of what is no proportion
    value +- t * standard error within its range.

    In simulations with 10 to 1,000 patients the latter covered 94-96 % around 0.5, the percentile interval as
    little as 86 %.
    """
    proportion = metric.startswith(("accuracy", "sensitivity", "specificity", "any_se", "any_sp"))
    if proportion and value in (0, 1) and n_patients >= MIN_PATIENTS:  # without spread in the bootstrap
        return proportion_interval(value, np.nan, n_patients - 1, n_patients)
    if n_patients < MIN_PATIENTS or np.isnan(draws).mean() > ALPHA:
        return np.nan, np.nan
    spread = np.nanstd(draws, ddof=1) * np.sqrt(n_patients / (n_patients - 1))  # of few (Hesterberg 2015)
    spread = spread if spread > 1e-9 else np.nan
    if proportion:
        return proportion_interval(value, spread, n_patients - 1, n_patients)
    half = stats.t.ppf(1 - ALPHA / 2, n_patients - 1) * spread
    return np.maximum(value - half, 0), value + half if metric == "log_loss" else np.minimum(value + half, 1)


class PatientCounts(NamedTuple):
    """How many patients there are: of each class, of any other than it, together."""

    of: dict[str, int]
    others: dict[str, int]
    together: int

    def behind(self, metric: str) -> int:
        """Return how many patients a metric speaks about."""
        kind, _, name = metric.partition("_")
        if metric == "any_auc":
            return min(self.of[HEALTHY], self.others[HEALTHY])
        if kind == "any":
            return (self.others if name == "sensitivity" else self.of)[HEALTHY]
        return {"sensitivity": self.of, "specificity": self.others}.get(kind, {}).get(name, self.together)


def patient_counts(predictions: pd.DataFrame) -> PatientCounts:
    """Return how many patients a table of predictions has."""
    people = predictions.assign(patient=patient_ids(predictions))
    classes = classes_of(predictions)
    of = {c: people.loc[people["label"] == c, "patient"].nunique() for c in classes}
    others = {c: people.loc[people["label"] != c, "patient"].nunique() for c in classes}
    return PatientCounts(of, others, people["patient"].nunique())


def class_warnings(predictions: pd.DataFrame, patient_level: bool = True) -> list[str]:
    """Return a sentence for each class with fewer than MIN_PATIENTS patients, or slices where unknown."""
    word = "patients" if patient_level else "patients, or slices of unknown ones"
    return [
        f"{name}: only {count} {word}, too few to speak about this class (under {MIN_PATIENTS})"
        if count
        else f"{name}: no patient, nothing can be said about this class"
        for name, count in patient_counts(predictions).of.items()
        if count < MIN_PATIENTS
    ]


# ---------------------------------------- what figures and texts show


def metric_of(metrics: pd.DataFrame, variant: str, metric: str) -> tuple[float, float, float]:
    """Return (value, ci_low, ci_high) of one metric of one variant."""
    row = metrics[(metrics["variant"] == variant) & (metrics["metric"] == metric)].iloc[0]
    return row["value"], row["ci_low"], row["ci_high"]


def with_interval(value: float, low: float, high: float, scale: float = 100, digits: int = 1) -> str:
    """Return '54.4 (40.1 to 68.7)', or without the interval where it isn't estimable."""
    if np.isnan(value):
        return "not estimable"
    text = f"{scale * value:.{digits}f}"
    return text if np.isnan(low) else f"{text} ({scale * low:.{digits}f} to {scale * high:.{digits}f})"


def confusion_counts(rows: pd.DataFrame) -> np.ndarray:
    """Return one variant's confusion matrix in slices, mean over repeats, float (true, called)."""
    return patient_tables(rows, np.zeros(len(rows), int))["confusion"][0]


def count_text(count: float) -> str:
    """Return '12.3', '1234': slices, a mean over repeats, never as 1.23e+03."""
    return f"{count:.3g}" if abs(count) < 999.5 else f"{count:.0f}"


def mean_curve(rows: pd.DataFrame) -> pd.Series:
    """Return the ROC curve of any hemorrhage, Series of sensitivities by GRID: the mean over folds, weighted by
    pairs."""
    curves, pairs = [], []
    for _, fold in rows.groupby(["repeat", "fold"]):
        bleed, score = fold["label"] != HEALTHY, 1 - fold[f"p_{HEALTHY}"]
        if bleed.any() and not bleed.all():
            false, true, _ = roc_curve(bleed, score, drop_intermediate=False)
            curves.append(np.r_[0, np.interp(GRID[1:], false, true)])
            pairs.append(int(bleed.sum() * (~bleed).sum()))
    return pd.Series(np.average(curves, axis=0, weights=pairs) if curves else np.nan, index=GRID)


def reliability(rows: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Return confidence, accuracy, its interval and slice count of each calibration bin, DataFrame."""
    codes = pd.factorize(patient_ids(rows))[0]
    sums = patient_tables(rows, codes)["calibration"]
    right, confidence, count = sums.sum(axis=0).T
    weights = np.concatenate(list(bootstrap_weights(len(sums), METRIC_DRAWS, seed)))
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = (weights @ sums[..., 0]) / (weights @ sums[..., 2])
        table = pd.DataFrame({"confidence": confidence / count, "accuracy": right / count, "slices": count})
    patients = (sums[..., 2] > 0).sum(axis=0)
    bins = zip(table["accuracy"], draws.T, patients, strict=True)
    table[["ci_low", "ci_high"]] = [metric_interval("accuracy", *of_bin) for of_bin in bins]
    return table[table["slices"] > 0]


def worst_mistakes(predictions: pd.DataFrame, count: int) -> pd.DataFrame:
    """Return the wrong predictions with the highest probability, each slice once, highest first."""
    wrong = predictions[predictions["predicted"] != predictions["label"]]
    sure = wrong[probability_columns(classes_of(predictions))].max(axis=1).rename("confidence")
    ordered = wrong.join(sure).sort_values(["confidence", "image"], ascending=[False, True], kind="stable")
    return ordered.drop_duplicates("image").head(count)
