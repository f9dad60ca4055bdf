"""The answer in words: half a page of Markdown, results/summary.md."""

import numpy as np
import pandas as pd

from step2.bootstrap import POWER, patient_ids
from step2.metrics import class_warnings, metric_of, with_interval
from step2.report import OPTIMISTIC
from step2.statistics import DRAWS, EQUIVALENCE, find_noise_floor, is_significant
from step2.variants import BASELINE


def summarize(
    predictions: pd.DataFrame,
    contrasts: pd.DataFrame,
    metrics: pd.DataFrame,
    caption: str,
    patient_level: bool,
) -> str:
    """Return the half-page summary, Markdown."""
    level = "" if patient_level else OPTIMISTIC
    warned = class_warnings(predictions, patient_level)
    parts = [
        [f"# Does preprocessing matter?{level}", "", f"**{headline(contrasts)}**"],
        data_lines(predictions, caption, patient_level, warned),
        [*accuracy_lines(metrics), "", f"Accuracy of each variant{level}. {caption}."],
        [*contrast_lines(contrasts), "", f"Differences in accuracy{level}. {caption}."]
        if len(contrasts)
        else [],
        limit_lines(contrasts, patient_level),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def headline(table: pd.DataFrame) -> str:
    """Return the answer in a sentence or two, from the primary contrasts alone."""
    primary = table[table["kind"] == "primary"]
    if primary.empty:
        return f"Without {BASELINE} and another variant, no comparison against it could be made."
    if primary["ci_low"].isna().all():
        return f"Whether any variant differs from {BASELINE} is not estimable from these data."
    clear = [row["verdict"] for _, row in primary.iterrows() if is_significant(row)]
    answer = "; ".join(clear) or f"these data can't tell any variant and {BASELINE} apart"
    same = int((primary["band"] == "inside").sum())
    equal = f" {same} of {len(primary)} are within 1 point of it." if same else ""
    return f"{answer[0].upper()}{answer[1:]}.{equal}{detectable_text(primary)}"


def detectable_text(primary: pd.DataFrame) -> str:
    """Return what difference these patients could show, in a sentence; empty where not estimable."""
    reach = 100 * primary["detectable"].dropna()
    if reach.empty:
        return ""
    span = " to ".join(dict.fromkeys((f"{reach.min():.1f}", f"{reach.max():.1f}")))
    return (
        f" With data of this size, a true difference of {span} points would be found in "
        f"{100 * POWER:.0f} % of such studies; smaller ones are likely to be missed."
    )


def data_lines(predictions: pd.DataFrame, caption: str, patient_level: bool, warned: list[str]) -> list[str]:
    """Return the summary's lines about data and settings, list of str."""
    folds, repeats = predictions.groupby("repeat")["fold"].nunique().max(), predictions["repeat"].nunique()
    design = f"{folds}-fold cross-validation" if folds > 1 else "one hold-out split"
    unit, people = "The unit is the patient.", f" of {patient_ids(predictions).nunique()} patients"
    if not patient_level:
        unit, people = "No patient ids: all intervals are **slice-level, optimistic**.", ""
    return [
        f"**Data and settings.** {caption}. Tested: {predictions['image'].nunique()} slices{people}; "
        f"{design}, {repeats} repeat{'s' if repeats > 1 else ''}, the same folds and seeds for all variants. "
        f"{unit}",
        *(["", *(f"* Warning: {line}." for line in warned)] if warned else []),
    ]


def accuracy_lines(metrics: pd.DataFrame) -> list[str]:
    """Return a Markdown table of the main metrics, list of str; % but for the AUC."""
    lines = ["| variant | accuracy, % (95 % CI) | balanced accuracy, % | AUC, any hemorrhage (95 % CI) |"]
    lines.append("|---|---|---|---|")
    for name in dict.fromkeys(metrics["variant"]):
        accuracy = with_interval(*metric_of(metrics, name, "accuracy"))
        auc = with_interval(*metric_of(metrics, name, "any_auc"), scale=1, digits=2)
        balanced = with_interval(*metric_of(metrics, name, "balanced_accuracy"))
        lines.append(f"| {name} | {accuracy} | {balanced} | {auc} |")
    return lines


def contrast_lines(table: pd.DataFrame) -> list[str]:
    """Return a Markdown table of all contrasts with their verdicts, list of str."""
    band = f"\N{PLUS-MINUS SIGN}{100 * EQUIVALENCE:.0f}-point band"
    lines = [f"| contrast | kind | p | Holm p | McNemar p (secondary) | {band} | verdict |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in table.to_dict("records"):
        p = " | ".join(p_text(row[key]) for key in ("p_value", "p_holm", "p_mcnemar"))
        lines.append(f"| {row['contrast']} | {row['kind']} | {p} | {row['band']} | {row['verdict']} |")
    return lines


def p_text(p: float) -> str:
    """Return a p value for a table, an en dash where there is none."""
    return "\N{EN DASH}" if np.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def limit_lines(table: pd.DataFrame, patient_level: bool) -> list[str]:
    """Return limits and method, list of str."""
    floor = find_noise_floor(table)
    noise = "No A/A control was estimable: nothing says how far the seed alone moves accuracy."
    if np.isfinite(floor):
        noise = (
            "An A/A control, one variant trained again under another seed, stayed within "
            f"{100 * floor:.1f} points (95 %): that much may be the seed."
        )
    both = "" if patient_level else "A patient may be on both sides of a split, so accuracy is optimistic. "
    return [
        f"**Limits.** {both}The intervals cover which patients were tested, not the randomness of training. "
        f"{noise} Primary p are Holm-corrected, intervals are not. Factorial effects are secondary. "
        "McNemar's test takes slices for independent. One network, one data set; no medical device.",
        "",
        f"**Method.** Paired differences; {DRAWS:,} draws of whole patients, all variants together; 95 % "
        "interval: difference \N{PLUS-MINUS SIGN} t times the bootstrap standard error. Equivalent: "
        f"the whole interval within \N{PLUS-MINUS SIGN}{100 * EQUIVALENCE:.0f} point. All numbers come from "
        "`oof_predictions.csv` and `control_predictions.csv`.",
    ]
