"""Paired differences between variants, with intervals, p values and verdicts.

All of it is computed from the table of held-out predictions alone (columns variant, repeat, fold, patient,
image, label, predicted, p_<class>). Accuracy is the headline; 1 point is 1 % of the slices.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from step2.bootstrap import (
    ALPHA,
    MIN_PATIENTS,
    POWER,
    bootstrap_weights,
    patient_ids,
    standard_error,
    sum_by_patient,
    t_interval,
)
from step2.variants import BASELINE, step_pairs

EQUIVALENCE = 0.01  # accuracy; a difference inside +-1 point is too small to choose a method by
DRAWS = 10_000  # bootstrap draws of the contrasts
CONTRAST_COLUMNS = [
    *("contrast", "kind", "a", "b", "n_images", "n_patients", "difference", "ci_low", "ci_high"),
    *("p_value", "p_holm", "p_mcnemar", "verdict"),
]


def declared_contrasts(variants: Sequence[str]) -> list[dict[str, Any]]:
    """Return the contrasts that these variants allow, each as dict(contrast, kind, pairs of a and b).

    Primary: each variant against the baseline. Factorial: a step's effect, the mean over the pairs of
    variants that differ by this step alone.
    """
    others = [v for v in variants if v != BASELINE] if BASELINE in variants else []
    primary = [{"contrast": v, "kind": "primary", "pairs": ((v, BASELINE),)} for v in others]
    return primary + [
        {"contrast": f"effect of {step}", "kind": "factorial", "pairs": tuple(pairs)}
        for step, pairs in step_pairs(variants).items()
    ]


def contrast_table(
    predictions: pd.DataFrame, control: pd.DataFrame | None = None, n_draws: int = DRAWS, seed: int = 0
) -> pd.DataFrame:
    """Return all contrasts, DataFrame: CONTRAST_COLUMNS, standard error, band and detectable difference.

    Differences are fractions of 1, as accuracy is. Holm's correction runs within the primary contrasts, and
    within the factorial effects.
    """
    declared = declared_contrasts(list(dict.fromkeys(predictions["variant"])))
    parts = [contrast_rows(predictions, declared, n_draws, seed)] if declared else []
    parts = [part for part in [*parts, control_rows(predictions, control, n_draws, seed)] if len(part)]
    if not parts:
        return pd.DataFrame(columns=[*CONTRAST_COLUMNS, "error", "band", "detectable"])
    table = pd.concat(parts, ignore_index=True)
    table["p_holm"] = table.groupby("kind")["p_value"].transform(holm)
    family = table.groupby("kind")["kind"].transform("size")
    table["detectable"] = [
        detectable_difference(row.error, row.n_patients, m)
        for row, m in zip(table.itertuples(), family, strict=True)
    ]
    floor = find_noise_floor(table)
    table["band"] = [band_position(row) for _, row in table.iterrows()]
    table["verdict"] = [verdict(row, floor) for _, row in table.iterrows()]
    return table


def contrast_rows(predictions: pd.DataFrame, declared: list[dict], n_draws: int, seed: int) -> pd.DataFrame:
    """Return the rows of declared contrasts as a DataFrame; all of them from the same bootstrap draws."""
    correct, patients = paired_correctness(predictions)
    draws = accuracy_draws(correct, patients, n_draws, seed)
    codes = pd.factorize(patients)[0]
    return pd.DataFrame([contrast_row(d, correct, codes, draws, predictions) for d in declared])


def control_rows(
    predictions: pd.DataFrame, control: pd.DataFrame | None, n_draws: int, seed: int
) -> pd.DataFrame:
    """Return the A/A contrast, a DataFrame of one row, empty without a control run."""
    if control is None or control.empty:
        return pd.DataFrame()
    variant = control["variant"].iloc[0]
    again = f"{variant}, other seed"
    first = predictions[predictions["variant"] == variant]
    first = first.merge(control[["repeat", "image"]].drop_duplicates(), on=["repeat", "image"])
    both = pd.concat([first, control.assign(variant=again)], ignore_index=True)
    declared = {"contrast": "A/A control", "kind": "control", "pairs": ((again, variant),)}
    return contrast_rows(both, [declared], n_draws, seed)


def paired_correctness(predictions: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """Return correctness, DataFrame (images, variants) in 0..1, and the patient of each image, Series.

    Averaged over repeats, image by image. ValueError where the variants weren't tested on the same images.
    """
    rows = predictions.assign(correct=(predictions["label"] == predictions["predicted"]).astype(float))
    keys = ["repeat", "image"]
    if rows.duplicated([*keys, "variant"]).any():
        twice = rows[rows.duplicated([*keys, "variant"])].iloc[0]
        raise ValueError(
            f"{twice['image']} of {twice['variant']} was predicted twice in repeat {twice['repeat']}"
        )
    table = rows.pivot(index=keys, columns="variant", values="correct")[list(dict.fromkeys(rows["variant"]))]
    if table.isna().any(axis=None):
        repeat, image, variant = table.isna().stack().idxmax()
        raise ValueError(
            f"{image} has no prediction of {variant} in repeat {repeat}, others have one: variants must be "
            "tested on the same images; run Step 1 and the training of this variant again"
        )
    one = rows.assign(patient=patient_ids(rows)).drop_duplicates("image").set_index("image")["patient"]
    correct = table.groupby("image").mean()
    return correct, one.reindex(correct.index)


def accuracy_draws(
    correct: pd.DataFrame, patients: pd.Series, n_draws: int = DRAWS, seed: int = 0
) -> np.ndarray:
    """Return the accuracy of each variant in each draw, float (draws, variants)."""
    codes = pd.factorize(patients)[0]
    sums, sizes = sum_by_patient(correct.to_numpy(), codes), np.bincount(codes)
    blocks = bootstrap_weights(len(sizes), n_draws, seed)
    return np.concatenate([(w @ sums) / (w @ sizes)[:, None] for w in blocks])


def contrast_row(
    declared: dict, correct: pd.DataFrame, codes: np.ndarray, draws: np.ndarray, predictions: pd.DataFrame
) -> dict:
    """Return one contrast's row: difference in accuracy, a minus b, with interval, p and exact McNemar."""
    pairs, coefficients = declared["pairs"], np.zeros(correct.shape[1])
    for a, b in pairs:
        coefficients[correct.columns.get_loc(a)] += 1 / len(pairs)
        coefficients[correct.columns.get_loc(b)] -= 1 / len(pairs)
    return {
        **{"contrast": declared["contrast"], "kind": declared["kind"]},
        **{side: " and ".join(pair[i] for pair in pairs) for i, side in enumerate("ab")},
        **{"n_images": len(correct), "n_patients": int(codes.max()) + 1},
        **estimate(correct.to_numpy() @ coefficients, codes, draws @ coefficients),
        "p_mcnemar": exact_mcnemar(predictions, *pairs[0]) if len(pairs) == 1 else np.nan,
    }


def estimate(paired: np.ndarray, codes: np.ndarray, draws: np.ndarray) -> dict[str, float]:
    """Return difference, standard error, interval and p of one contrast, dict.

    paired: float (images,), right by a minus right by b. codes: int (images,), the patients. draws: (draws,).
    """
    n, difference = int(codes.max()) + 1, float(np.round(paired.mean(), 12))
    error = standard_error(draws, n)
    low, high = t_interval(difference, error, n)
    p = 1.0 if n >= MIN_PATIENTS and not paired.any() else np.nan
    if np.isfinite(error):
        p = max(2 * stats.t.sf(abs(difference) / error, n - 1), sign_flip_floor(paired, codes))
    return {"difference": difference, "error": error, "ci_low": low, "ci_high": high, "p_value": p}


def sign_flip_floor(paired: np.ndarray, codes: np.ndarray) -> float:
    """Return the smallest two-sided p of a sign-flip test over patients: 2 / 2^k, k patients differing."""
    differing = np.count_nonzero(np.abs(sum_by_patient(paired, codes)) > 1e-9)
    return min(1.0, 2.0 ** (1 - differing))


def exact_mcnemar(predictions: pd.DataFrame, a: str, b: str) -> float:
    """Return exact McNemar's p, first repeat alone; it ignores that slices of a patient are alike."""
    first = predictions[predictions["repeat"] == predictions["repeat"].min()]
    right = first.assign(right=first["label"] == first["predicted"]).pivot(
        index="image", columns="variant", values="right"
    )
    table = [[int(((right[a] == i) & (right[b] == j)).sum()) for j in (True, False)] for i in (True, False)]
    return float(mcnemar(table, exact=True).pvalue)


def holm(p_values: pd.Series) -> np.ndarray:
    """Return Holm's adjusted p of one family; NaN, not estimable, counts as p = 1 and stays NaN."""
    p_values = np.asarray(p_values, float)
    adjusted = multipletests(np.nan_to_num(p_values, nan=1.0), method="holm")[1]
    return np.where(np.isnan(p_values), np.nan, adjusted)


def detectable_difference(error: float, n_patients: int, comparisons: int = 1) -> float:
    """Return the smallest true difference found with 80 % power, at ALPHA / comparisons (Bonferroni)."""
    df = max(n_patients - 1, 1)
    return (stats.t.ppf(1 - ALPHA / comparisons / 2, df) + stats.t.ppf(POWER, df)) * error


def find_noise_floor(table: pd.DataFrame) -> float:
    """Return the largest difference in accuracy inside the A/A control's interval, NaN without one."""
    control = table[table["kind"] == "control"]
    return float(control[["ci_low", "ci_high"]].abs().max(axis=None)) if len(control) else np.nan


def verdict(row: pd.Series, noise_floor: float = np.nan) -> str:
    """Return what a contrast says, in words. noise_floor: what a retraining alone may move, or NaN."""
    if np.isnan(row["ci_low"]):
        return not_estimable(row)
    a, b, band, span = row["a"], row["b"], band_position(row), in_points(row)
    if row["kind"] == "factorial":
        step = row["contrast"].removeprefix("effect of ")
        better, equal, unclear = (
            f"{step} {{}}",
            f"{step} makes no difference",
            f"whether {step} helps or hurts",
        )
    else:
        better, equal, unclear = f"{a} {{}} {b}", f"{a} and {b} are equivalent", f"{a} and {b} apart"
    if row["kind"] == "control":
        moved = (
            "moved accuracy beyond chance"
            if is_significant(row)
            else "makes no difference that these data show"
        )
        return f"training again under another seed {moved}: {span}"
    if is_significant(row):
        verbs = ("helps", "hurts") if row["kind"] == "factorial" else ("beats", "is worse than")
        text = f"{better.format(verbs[row['difference'] < 0])} by {in_points_unsigned(row)}"
        text += f", less than the {100 * EQUIVALENCE:.0f} point that would matter" if band == "inside" else ""
        within = abs(row["difference"]) <= noise_floor
        return text + (f", yet a retraining alone may move {100 * noise_floor:.1f}" if within else "")
    if band == "inside":
        return f"{equal} within {100 * EQUIVALENCE:.0f} point: {span}"
    holm_only = row["ci_low"] * row["ci_high"] > 0
    return f"these data can't tell {unclear}{' after Holm correction' if holm_only else ''}: {span}"


def is_significant(row: pd.Series) -> bool:
    """Tell whether Holm's p and the interval both exclude no difference."""
    return bool(row["p_holm"] <= ALPHA and row["ci_low"] * row["ci_high"] > 0)


def in_points(row: pd.Series) -> str:
    """Return '+3.1 points (+1.2 to +5.0)', in percentage points of accuracy."""
    values = [round(100 * row[key], 1) + 0.0 for key in ("difference", "ci_low", "ci_high")]
    return "{:+.1f} points ({:+.1f} to {:+.1f})".format(*values).replace("-", "\N{MINUS SIGN}")


def in_points_unsigned(row: pd.Series) -> str:
    """Return '3.1 points (1.2 to 5.0)' of a difference whose direction is said in words."""
    ends = sorted((row["ci_low"], row["ci_high"]), key=abs)
    return "{:.1f} points ({:.1f} to {:.1f})".format(*(abs(100 * v) for v in (row["difference"], *ends)))


def band_position(row: pd.Series) -> str:
    """Return where the interval lies: inside, outside or across the edges of the equivalence band."""
    if np.isnan(row["ci_low"]):
        return "not estimable"
    if max(abs(row["ci_low"]), abs(row["ci_high"])) <= EQUIVALENCE:
        return "inside"
    return "outside" if min(row["ci_high"], -row["ci_low"]) < -EQUIVALENCE else "across"


def not_estimable(row: pd.Series) -> str:
    """Return why a contrast has no interval."""
    if row["n_patients"] < MIN_PATIENTS:
        return f"not estimable: {row['n_patients']} patients, at least {MIN_PATIENTS} are needed"
    if not row["difference"]:
        return "not estimable: right and wrong on the very same slices, so there is no error to estimate"
    return f"not estimable: {100 * row['difference']:+.1f} points in every patient, no error to estimate"
