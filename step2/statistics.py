"""Paired differences between variants, with intervals, p values and verdicts; and which variants may be the best.

All of it is computed from the table of held-out predictions alone (columns variant, repeat, fold, patient,
image, label, predicted, p_<class>). Accuracy is the headline; 1 point is 1 % of the slices. Errors hold the
patients' noise and that of training (see estimates.py): verdicts are about a method on such patients, not about
one training of it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from step2.bootstrap import ALPHA, DRAWS, MIN_PATIENTS, sum_by_patient
from step2.classes import classes_of
from step2.estimates import Cells, Estimates, mean_estimates, paired_correctness
from step2.metrics import interval_of
from step2.power import detectable_difference
from step2.variants import BASELINE, step_pairs

EQUIVALENCE = 0.01  # accuracy; a difference inside +-1 point is too small to choose a method by
CONTRAST_COLUMNS = [
    *("contrast", "kind", "a", "b", "n_images", "n_patients", "difference", "ci_low", "ci_high"),
    *("error", "patient_error", "training_error", "seed_noise", "training_sd", "training_sd_low"),
    *("training_sd_high", "p_value", "p_holm", "p_mcnemar_ignoring_patients", "detectable", "band"),
    "verdict",
]
BEST_DRAWS = 20_000  # of the largest of several t
ALONE = "for these trained networks alone"


def declare(contrast: str, kind: str, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return a contrast, the mean difference of some pairs, a minus b, as dict(contrast, kind, a, b, pairs)."""
    a, b = (" and ".join(names) for names in zip(*pairs, strict=True))
    return {"contrast": contrast, "kind": kind, "a": a, "b": b, "pairs": pairs}


def declared_contrasts(variants: Sequence[str]) -> list[dict[str, Any]]:
    """Return the contrasts that these variants allow, each as declare returns it.

    Primary: each variant against the baseline. Factorial: a step's effect, the mean over the pairs of
    variants that differ by this step alone, unless that is one of the primary contrasts again.
    """
    others = [v for v in variants if v != BASELINE] if BASELINE in variants else []
    found = [declare(v, "primary", [(v, BASELINE)]) for v in others]
    for step, pairs in step_pairs(variants).items():
        if len(pairs) > 1 or pairs[0][1] != BASELINE:
            found.append(declare(f"effect of {step}", "factorial", pairs))
    return found


@dataclass(frozen=True)
class Compared:
    """What the tables of a comparison are made of, so that it is estimated once.

    variants: their names, without the control; declared: the contrasts that they and a control allow; correct
    and cells: as paired_correctness returns them; found: the estimates of accuracy.
    """

    variants: list[str]
    declared: list[dict[str, Any]]
    correct: pd.DataFrame
    cells: Cells
    found: Estimates


def compare(
    predictions: pd.DataFrame, control: pd.DataFrame | None = None, n_draws: int = DRAWS, seed: int = 0
) -> Compared:
    """Return what contrast_table, pair_table and best_set are made of."""
    declared, rows = all_contrasts(predictions, control)
    correct, cells = paired_correctness(rows)
    found = mean_estimates(list(correct.columns), correct.to_numpy(), cells, n_draws, seed)
    return Compared(list(predictions["variant"].unique()), declared, correct, cells, found)


def contrast_table(
    compared: Compared, margin: float = EQUIVALENCE, learning: Collection[str] = ()
) -> pd.DataFrame:
    """Return all contrasts, DataFrame of CONTRAST_COLUMNS; the A/A control's is the last row.

    Differences, errors and the SD of one training are fractions of 1, as accuracy is. Holm's correction runs
    within the primary contrasts, and within the factorial effects. margin: of equivalence. learning: variants
    that did not converge, which verdicts name.
    """
    if not compared.declared:
        return pd.DataFrame(columns=CONTRAST_COLUMNS)
    table = pd.DataFrame([contrast_row(declared, compared) for declared in compared.declared])
    table[["training_sd", "training_sd_low", "training_sd_high"]] = compared.found.seen
    table["p_holm"] = table.groupby("kind")["p_value"].transform(holm)
    family = table.groupby("kind")["kind"].transform("size")
    table["detectable"] = detectable_difference(table["error"], table["freedom"], family)
    table["band"] = [band_position(row, margin) for _, row in table.iterrows()]
    table["verdict"] = [verdict(row, margin, learning) for _, row in table.iterrows()]
    return table[CONTRAST_COLUMNS]


def all_contrasts(
    predictions: pd.DataFrame, control: pd.DataFrame | None
) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """Return the declared contrasts and the predictions they need; a control is a variant of its own there."""
    declared, rows = declared_contrasts(list(predictions["variant"].unique())), predictions
    if control is not None and len(control):
        variant = control["variant"].iloc[0]
        again = f"{variant}, other seed"
        declared.append(declare("A/A control", "control", [(again, variant)]))
        rows = pd.concat([predictions, control.assign(variant=again)], ignore_index=True)
    return declared, rows


def contrast_row(declared: dict[str, Any], compared: Compared) -> dict[str, Any]:
    """Return one contrast's row: difference in accuracy, a minus b, with errors, interval, p and McNemar's p."""
    pairs, correct = declared["pairs"], compared.correct
    coefficients = compared.found.coefficients(pairs)
    row = compared.found.contrast(coefficients)
    paired = correct.to_numpy() @ coefficients
    if np.isfinite(row["p_value"]):
        row["p_value"] = max(row["p_value"], sign_flip_floor(paired, compared.cells.codes))
    elif compared.cells.patients >= MIN_PATIENTS and not paired.any():
        row["p_value"] = 1.0
    repeat, image = (correct.index.get_level_values(level) for level in ("repeat", "image"))
    first = correct[repeat == repeat.min()]
    mcnemar_p = exact_mcnemar(*(first[v] for v in pairs[0])) if len(pairs) == 1 else np.nan
    return {
        **declared,
        **{"n_images": image.nunique(), "n_patients": compared.cells.patients},
        **row,
        "p_mcnemar_ignoring_patients": mcnemar_p,
    }


def sign_flip_floor(paired: np.ndarray, codes: np.ndarray) -> float:
    """Return the smallest two-sided p of a sign-flip test over patients: 2 / 2^k, k patients differing."""
    differing = np.count_nonzero(np.abs(sum_by_patient(paired, codes)) > 1e-9)
    return min(1.0, 2.0 ** (1 - differing))


def exact_mcnemar(a: pd.Series, b: pd.Series) -> float:
    """Return exact McNemar's p of right (1) and wrong (0); it ignores that slices of a patient are alike."""
    table = [[int(((a == i) & (b == j)).sum()) for j in (1, 0)] for i in (1, 0)]
    return float(mcnemar(table, exact=True).pvalue)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Return Holm's adjusted p (1979) of one family; NaN, not estimable, counts as p = 1 and stays NaN."""
    p = np.asarray(p_values, float)
    adjusted = multipletests(np.nan_to_num(p, nan=1.0), method="holm")[1]
    return np.where(np.isnan(p), np.nan, adjusted)


def pair_table(compared: Compared) -> pd.DataFrame:
    """Return the effect of each step in each pair of variants that differ by it alone, DataFrame.

    Columns: step, a, b, difference, ci_low, ci_high, p_differ (of the step's pairs having one effect; NaN for a
    single pair). Exploratory: nothing corrects for their number.
    """
    found, rows = compared.found, []
    for step, of_step in step_pairs(compared.variants).items():
        contrasts = np.array([found.coefficients([pair]) for pair in of_step])
        p = found.differ(contrasts)
        for (a, b), contrast in zip(of_step, contrasts, strict=True):
            rows.append({"step": step, "a": a, "b": b, **found.contrast(contrast), "p_differ": p})
    return pd.DataFrame(rows, columns=["step", "a", "b", "difference", "ci_low", "ci_high", "p_differ"])


# ---------------------------------------- which is best


def best_set(
    found: Estimates, variants: Sequence[str], seed: int = 0, draws: int = BEST_DRAWS
) -> pd.DataFrame:
    """Return which variants can't be told from the best, by Hsu's multiple comparisons with the best (1984).

    DataFrame (variant, accuracy, in_best_set, best_other, difference, ci_low, ci_high, training_sd), most
    accurate first: a variant minus the best other one, with 95 % simultaneous intervals, so that the set holds
    the truly best variant in 95 % of such studies. variants: those that compete; a control only helps to know the
    training noise. training_sd: as of contrast_table, NaN where all is for the trained networks alone.
    """
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


def best_in_words(best: pd.DataFrame, learning: Collection[str] = ()) -> str:
    """Return which variants may be the best, in a sentence. learning: variants that did not converge."""
    if len(best) < 2:
        return "A single variant: nothing to choose from."
    may, not_ = (best.loc[best["in_best_set"] == inside, "variant"] for inside in (True, False))
    if best["ci_high"].isna().any():
        return "Which variant is best is not estimable from these data."
    alone = f", {ALONE}" if best["training_sd"].isna().all() else ""
    if len(not_) == 0:
        said = f"Any of these variants may be the best: these data can't tell which{alone}."
    else:
        lead = "Best" if len(may) == 1 else "May be the best"
        said = f"{lead}: {', '.join(may)}; worse: {', '.join(not_)}{alone}."
    return f"{said} Still learning: {', '.join(learning)}." if learning else said


# ---------------------------------------- verdicts


def verdict(row: pd.Series, margin: float = EQUIVALENCE, learning: Collection[str] = ()) -> str:
    """Return what a contrast says, in words. learning: variants that did not converge."""
    if np.isnan(row["ci_low"]):
        return not_estimable(row)
    said = control_verdict(row) if row["kind"] == "control" else difference_verdict(row, margin)
    alone = f", {ALONE}" if np.isnan(row["training_sd"]) else ""
    unready = [v for v in learning if any(v in pair for pair in row["pairs"])]
    return said + alone + (f" (still learning: {', '.join(unready)})" if unready else "")


def control_verdict(row: pd.Series) -> str:
    """Return what the A/A control says: it should find nothing."""
    if is_significant(row):
        return f"one variant trained twice differs, as in 5 % of controls by chance: {in_points(row)}"
    return f"one variant trained twice shows no clear difference: {in_points(row)}"


def difference_verdict(row: pd.Series, margin: float) -> str:
    """Return which side is better, whether both are equivalent, or that these data can't tell."""
    a, b, size, inside = row["a"], row["b"], in_band(margin), band_position(row, margin) == "inside"
    better, worse = f"{a} beats {b}", f"{a} is worse than {b}"
    equal, unclear = f"{a} and {b} are equivalent", f"{a} and {b} apart"
    if row["kind"] == "factorial":
        step = row["contrast"].removeprefix("effect of ")
        better, worse = f"{step} helps", f"{step} hurts"
        equal, unclear = f"{step} makes no difference", f"whether {step} helps or hurts"
    if is_significant(row):
        text = f"{worse if row['difference'] < 0 else better} by {in_points_unsigned(row)}"
        return text + (f", less than the {size} that would matter" if inside else "")
    if inside:
        return f"{equal} within {size}: {in_points(row)}"
    why = ""
    if row["ci_low"] * row["ci_high"] > 0:  # p is larger than the interval says: by Holm, or sign_flip_floor
        why = " after Holm correction" if row["p_value"] <= ALPHA else ", as too few patients differ"
    return f"these data can't tell {unclear}{why}: {in_points(row)}"


def is_significant(row: pd.Series) -> bool:
    """Tell whether Holm's p and the interval both exclude no difference."""
    return bool(row["p_holm"] <= ALPHA and row["ci_low"] * row["ci_high"] > 0)


def in_band(margin: float) -> str:
    """Return '1 point', '2.5 points'."""
    return f"{100 * margin:g} point{'s' * (margin != 0.01)}"


def in_points(row: pd.Series) -> str:
    """Return '+3.1 points (+1.2 to +5.0)', in percentage points of accuracy."""
    points, low, high = (signed(100 * row[key]) for key in ("difference", "ci_low", "ci_high"))
    return f"{points} points ({low} to {high})"


def signed(points: float) -> str:
    """Return '+3.1', an en dash where there is no number."""
    if np.isnan(points):
        return "\N{EN DASH}"
    return f"{round(points, 1) + 0.0:+.1f}".replace("-", "\N{MINUS SIGN}")


def p_text(p: float) -> str:
    """Return a p value for a table, an en dash where there is none; one just above 0.05 is not said to be 0.050."""
    if 0.05 < p < 0.0505:
        return ">0.050"
    return "\N{EN DASH}" if np.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def in_points_unsigned(row: pd.Series) -> str:
    """Return '3.1 points (1.2 to 5.0)' of a difference whose direction is said in words."""
    ends = sorted((row["ci_low"], row["ci_high"]), key=abs)
    return "{:.1f} points ({:.1f} to {:.1f})".format(*(abs(100 * v) for v in (row["difference"], *ends)))


def band_position(row: pd.Series, margin: float = EQUIVALENCE) -> str:
    """Return where the interval lies: inside, outside or across the edges of the equivalence band."""
    if np.isnan(row["ci_low"]):
        return "not estimable"
    if max(abs(row["ci_low"]), abs(row["ci_high"])) <= margin:
        return "inside"
    return "outside" if min(row["ci_high"], -row["ci_low"]) < -margin else "across"


def not_estimable(row: pd.Series) -> str:
    """Return why a contrast has no interval."""
    if row["n_patients"] < MIN_PATIENTS:
        return f"not estimable: {row['n_patients']} patients, at least {MIN_PATIENTS} are needed"
    if not row["difference"]:
        return "not estimable: right and wrong on the very same slices, so there is no error to estimate"
    return f"not estimable: {100 * row['difference']:+.1f} points in every patient, no error to estimate"


def training_in_words(contrasts: pd.DataFrame) -> str:
    """Return how far training again moves accuracy, in a sentence."""
    if contrasts.empty:
        return "These variants allow no comparison, so how far training again moves accuracy is not shown."
    columns = ["training_sd", "training_sd_low", "training_sd_high"]
    sd, low, high = 100 * contrasts[columns].iloc[0]
    if np.isnan(sd):
        return (
            "A single split, or folds of few patients, can't tell how far training again moves accuracy: "
            f"intervals are {ALONE}."
        )
    unseen = "less than can be seen beside the choice of patients"
    allow = "intervals and p values allow for that too"
    if not (contrasts["training_error"] > 0).any():
        allow = "that is too unsure to be added, so intervals and p values hold the choice of patients alone"
    size = f"an SD of {sd:.1f} points" if sd >= 0.05 else unseen
    return (
        f"Training a network again moves its accuracy by {size} (95 % interval of the SD {low:.1f} to "
        f"{high:.1f} points); {allow}."
    )


# ---------------------------------------- the testing slices


def score_testing(
    found: dict[str, pd.DataFrame],
    testing: pd.DataFrame,
    trained: Collection[str],
    n_draws: int = DRAWS,
    seed: int = 0,
) -> pd.DataFrame:
    """Return how each variant does on the labelled slices of TestingData, DataFrame; empty without any.

    found: {variant: image, predicted, p_<class>}, in the order of testing. trained: patients of TrainingData.
    Columns: variant, slices, patients (NaN where some are unknown), trained_on (patients that are in both),
    commonest (what always saying the commonest class gets), right, accuracy, ci_low, ci_high, and the difference
    to the baseline with its own interval. The intervals are over patients, for these trained networks alone; NaN
    for fewer than 10 patients.
    """
    classes = classes_of(next(iter(found.values()))) if found else ()
    labelled = testing["label"].isin(classes).to_numpy()
    if not labelled.any():
        return pd.DataFrame()
    where = testing[["label", "patient"]].assign(repeat=1, fold=1)
    tables = [
        table[["image", "predicted"]].join(where)[labelled].assign(variant=variant)
        for variant, table in found.items()
    ]
    correct, cells = paired_correctness(pd.concat(tables, ignore_index=True))
    estimates = mean_estimates(list(correct.columns), correct.to_numpy(), cells, n_draws, seed)
    rows, patients = [], np.nan if (where["patient"][labelled] == "").any() else cells.patients
    both = len(set(where["patient"][labelled]) & set(trained))
    commonest = where["label"][labelled].value_counts(normalize=True).max()
    for at, variant in enumerate(correct.columns):
        value, count = float(estimates.values[at]), len(correct)
        low, high = interval_of(estimates, variant)
        row = {"variant": variant, "slices": count, "patients": patients}
        row |= {"trained_on": both, "commonest": commonest}
        row |= {"right": round(value * count), "accuracy": value, "ci_low": low, "ci_high": high}
        if BASELINE in correct.columns and variant != BASELINE:
            apart = estimates.contrast(estimates.coefficients([(variant, BASELINE)]))
            row |= {f"{name} to {BASELINE}": apart[name] for name in ("difference", "ci_low", "ci_high")}
        rows.append(row)
    return pd.DataFrame(rows)
