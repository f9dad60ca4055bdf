"""Accuracy, sensitivity, specificity, AUC and calibration of each variant, with patient-clustered intervals.

Confusion counts, log loss and calibration sums are added up per patient, a repeat of an image counting as a
fraction of it. AUC compares pairs of images within one fold only, as scores of two networks share no scale.
"""

import numpy as np
import pandas as pd
from sklearn.metrics import precision_recall_curve, roc_curve
from statsmodels.stats.proportion import proportion_confint

from step2.bootstrap import (
    ALPHA,
    MIN_PATIENTS,
    bootstrap_weights,
    patient_ids,
    standard_error,
    sum_by_patient,
    t_interval,
)
from step2.variants import CLASSES

METRIC_DRAWS = 1_000  # their intervals need the standard error alone
CALIBRATION_BINS = 10
GRID = np.linspace(0, 1, 201)  # of false positive rates and sensitivities, on which curves are averaged


def metric_table(predictions: pd.DataFrame, n_draws: int = METRIC_DRAWS, seed: int = 0) -> pd.DataFrame:
    """Return DataFrame (variant, metric, value, ci_low, ci_high) of all metrics; NaN is not estimable."""
    counts, table = patient_counts(predictions), []
    for variant, rows in predictions.groupby("variant", sort=False):
        rows = rows.reset_index(drop=True)
        codes = pd.factorize(patient_ids(rows))[0]
        tables, n = patient_tables(rows, codes), codes.max() + 1
        blocks = [metric_draws(rows, codes, tables, w) for w in bootstrap_weights(n, n_draws, seed)]
        for metric, value in metric_draws(rows, codes, tables, np.ones((1, n))).items():
            draws = np.concatenate([block[metric] for block in blocks])
            ends = metric_interval(metric, value[0], draws, patients_behind(metric, counts))
            table.append((variant, metric, value[0], *ends))
    return pd.DataFrame(table, columns=["variant", "metric", "value", "ci_low", "ci_high"])


def metric_draws(
    rows: pd.DataFrame, codes: np.ndarray, tables: dict[str, np.ndarray], weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Return each metric of one variant, dict of float (draws,). weights: float (draws, patients)."""

    def drawn(name: str) -> np.ndarray:
        table = tables[name]
        return (weights @ table.reshape(len(table), -1)).reshape(len(weights), *table.shape[1:])

    confusion = drawn("confusion")
    values = confusion_metrics(confusion)
    label = rows["label"].to_numpy()
    aucs = np.array(
        [auc_draws(rows, codes, rows[f"p_{c}"].to_numpy(float), label == c, weights) for c in CLASSES]
    )
    values["any_auc"] = aucs[0]  # healthy against the rest; turned round, it is the same
    found = np.isfinite(aucs)
    with np.errstate(invalid="ignore", divide="ignore"):
        values["macro_auc"] = np.where(found, aucs, 0).sum(0) / found.sum(0)
    values["log_loss"] = drawn("loss") / confusion.sum((1, 2))
    values["calibration_error"] = calibration_error(drawn("calibration"))
    return values


def row_weights(rows: pd.DataFrame) -> np.ndarray:
    """Return the weight of each row of one variant: 1 / the number of repeats that tested its image."""
    return (1 / rows.groupby("image")["image"].transform("size")).to_numpy()


def patient_tables(rows: pd.DataFrame, codes: np.ndarray) -> dict[str, np.ndarray]:
    """Return sums per patient: confusion (patients, 6, 6), calibration (patients, bins, 3), loss."""
    weight = row_weights(rows)
    truth, called = (pd.Categorical(rows[c], CLASSES).codes.astype(int) for c in ("label", "predicted"))
    p = rows[[f"p_{c}" for c in CLASSES]].to_numpy(float)
    confusion = np.zeros((codes.max() + 1, len(CLASSES), len(CLASSES)))
    np.add.at(confusion, (codes, truth, called), weight)
    bins = np.minimum((p.max(axis=1) * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    calibration = np.zeros((codes.max() + 1, CALIBRATION_BINS, 3))  # right, confidence, count
    np.add.at(
        calibration, (codes, bins), weight[:, None] * np.c_[truth == called, p.max(axis=1), np.ones(len(p))]
    )
    loss = -np.log(np.clip(p[np.arange(len(p)), truth], 1e-7, 1))  # 1e-7: what float32 resolves next to 1
    return {"confusion": confusion, "calibration": calibration, "loss": sum_by_patient(weight * loss, codes)}


def confusion_metrics(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Return the metrics of confusion counts (draws, 6 true, 6 called), dict of float (draws,).

    Means are over the classes present in a draw. Any hemorrhage: healthy against the five others.
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
    values |= {"any_sensitivity": specificity[:, 0], "any_specificity": sensitivity[:, 0]}
    for i, name in enumerate(CLASSES):
        values |= {f"sensitivity_{name}": sensitivity[:, i], f"specificity_{name}": specificity[:, i]}
    return values


def calibration_error(calibration: np.ndarray) -> np.ndarray:
    """Return the expected calibration error (Guo 2017; ten bins) of sums (draws, bins, 3), float (draws,)."""
    gaps = np.abs(calibration[..., 0] - calibration[..., 1]).sum(1)
    return gaps / calibration[..., 2].sum(1)


def concordance(
    scores: np.ndarray, positive: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
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


def auc_draws(
    rows: pd.DataFrame, codes: np.ndarray, scores: np.ndarray, positive: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Return the AUC of each draw, float (draws,): pairs within a repeat and fold, added up over them.

    weights: float (draws, patients).
    """
    found, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    for index in rows.groupby(["repeat", "fold"]).indices.values():
        of_fold = concordance(scores[index], positive[index], weights[:, codes[index]])
        found, pairs = found + of_fold[0], pairs + of_fold[1]
    with np.errstate(invalid="ignore", divide="ignore"):
        return found / pairs


def metric_interval(metric: str, value: float, draws: np.ndarray, n_patients: int) -> tuple[float, float]:
    """Return the 95 % interval of a metric within its range, NaN where not estimable.

    A proportion of 0 or 1 has no spread in the bootstrap: Wilson's interval, with patients as n, stands in.
    """
    proportion = metric.startswith(("accuracy", "sensitivity", "specificity", "any_se", "any_sp"))
    if proportion and value in (0, 1) and n_patients >= MIN_PATIENTS:
        return proportion_confint(value * n_patients, n_patients, ALPHA, method="wilson")
    low, high = t_interval(value, standard_error(draws, n_patients), n_patients)
    return np.maximum(low, 0), high if metric == "log_loss" else np.minimum(high, 1)


def patients_behind(metric: str, counts: dict[str, int]) -> int:
    """Return how many patients a metric speaks about. counts: as patient_counts returns them."""
    kind, _, name = metric.partition("_")
    if kind == "sensitivity" or metric == "any_specificity":
        return counts["healthy" if kind == "any" else name]
    if metric == "any_auc":
        return min(counts["healthy"], counts["bleeding"])
    return counts["bleeding" if metric in ("any_sensitivity", "specificity_healthy") else "all"]


def patient_counts(predictions: pd.DataFrame) -> dict[str, int]:
    """Return the number of patients of each class, of all and of all with a bleed, dict."""
    people = predictions.assign(patient=patient_ids(predictions))
    counts = {c: people.loc[people["label"] == c, "patient"].nunique() for c in CLASSES}
    bleeding = people.loc[people["label"] != "healthy", "patient"].nunique()
    return counts | {"all": people["patient"].nunique(), "bleeding": bleeding}


def class_warnings(predictions: pd.DataFrame, patient_level: bool = True) -> list[str]:
    """Return a sentence for each class with fewer than MIN_PATIENTS patients, or slices where unknown."""
    counts, word = patient_counts(predictions), "patients" if patient_level else "slices"
    return [
        f"{name}: only {counts[name]} {word}, too few to speak about this class (under {MIN_PATIENTS})"
        if counts[name]
        else f"{name}: no patient, nothing can be said about this class"
        for name in CLASSES
        if counts[name] < MIN_PATIENTS
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


def confusion_percent(rows: pd.DataFrame) -> np.ndarray:
    """Return one variant's confusion matrix in % of each true class, float (6, 6), NaN for an absent one."""
    counts = patient_tables(rows, np.zeros(len(rows), int))["confusion"][0]
    with np.errstate(invalid="ignore"):
        return 100 * counts / counts.sum(axis=1, keepdims=True)


def mean_curves(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return mean sensitivity by false positive rate and mean precision by sensitivity, both on GRID."""
    sensitivity, precision = [], []
    for _, fold in rows.groupby(["repeat", "fold"]):
        bleed, score = fold["label"] != "healthy", 1 - fold["p_healthy"]
        pairs = int(bleed.sum() * (~bleed).sum())
        if pairs:
            false, true, _ = roc_curve(bleed, score, drop_intermediate=False)
            right, found, _ = precision_recall_curve(bleed, score)
            sensitivity.append((pairs, np.r_[0, np.interp(GRID[1:], false, true)]))
            precision.append((int(bleed.sum()), np.interp(GRID, found[::-1], right[::-1])))
    means = [np.average([c for _, c in m], axis=0, weights=[w for w, _ in m]) if m else 0 * GRID + np.nan
             for m in (sensitivity, precision)]  # fmt: skip
    return means[0], means[1]


def reliability(rows: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Return confidence, accuracy, its interval and slice count of each calibration bin, DataFrame."""
    codes = pd.factorize(patient_ids(rows))[0]
    sums = patient_tables(rows.reset_index(drop=True), codes)["calibration"]
    right, confidence, count = sums.sum(axis=0).T
    weights = np.concatenate(list(bootstrap_weights(len(sums), METRIC_DRAWS, seed)))
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = (weights @ sums[..., 0]) / (weights @ sums[..., 2])
        table = pd.DataFrame({"confidence": confidence / count, "accuracy": right / count, "slices": count})
    patients = (sums[..., 2] > 0).sum(axis=0)
    ends = [
        metric_interval("accuracy", a, d, n)
        for a, d, n in zip(table["accuracy"], draws.T, patients, strict=True)
    ]
    table[["ci_low", "ci_high"]] = np.array(ends)
    return table[table["slices"] > 0]


def worst_mistakes(predictions: pd.DataFrame, count: int) -> pd.DataFrame:
    """Return the wrong predictions with the highest probability, each slice once, highest first."""
    wrong = predictions[predictions["predicted"] != predictions["label"]]
    sure = wrong[[f"p_{c}" for c in CLASSES]].max(axis=1).rename("confidence")
    ordered = wrong.join(sure).sort_values(["confidence", "image"], ascending=[False, True], kind="stable")
    return ordered.drop_duplicates("image").head(count)


def testing_table(found: dict[str, pd.DataFrame], testing: pd.DataFrame) -> pd.DataFrame:
    """Return slices, right, accuracy and interval of each variant on the labelled slices of TestingData.

    found: {variant: image, predicted, ...}, in the order of testing. Empty where no slice has a label.
    """
    labelled, scores = testing["label"].isin(CLASSES).to_numpy(), []
    for variant, table in found.items():
        right = int((table["predicted"].to_numpy() == testing["label"].to_numpy())[labelled].sum())
        count = int(labelled.sum())
        if count:
            low, high = proportion_confint(right, count, ALPHA, method="wilson")
            score = {"variant": variant, "slices": count, "right": right, "accuracy": f"{right / count:.2f}"}
            scores.append(score | {"95 % CI (Wilson, slices as independent)": f"{low:.2f} to {high:.2f}"})
    return pd.DataFrame(scores).set_index("variant") if scores else pd.DataFrame()
