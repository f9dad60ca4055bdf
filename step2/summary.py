"""The answer in words: half a page of Markdown, results/summary.md, and a sentence under each figure."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from step2.bootstrap import ALPHA, DRAWS, POWER, patient_ids
from step2.classes import CLASSES, HEALTHY, classes_of, guesses
from step2.endpoints import ENDPOINTS
from step2.metrics import METRIC_DRAWS, class_warnings, count_text, metric_of, with_interval
from step2.report import OPTIMISTIC
from step2.slices import Slices
from step2.statistics import (
    ALONE,
    EQUIVALENCE,
    best_in_words,
    in_band,
    in_points_unsigned,
    is_significant,
    p_text,
    signed,
    training_in_words,
)
from step2.variants import BASELINE, KNOWN_VARIANTS, single_steps

BOTH = ("sensitivity", "specificity")


def summarize(
    predictions: pd.DataFrame,
    contrasts: pd.DataFrame,
    metrics: pd.DataFrame,
    best: pd.DataFrame,
    caption: str,
    slices: Slices,
    *,
    endpoints: pd.DataFrame,
    testing: pd.DataFrame,
    warned: Sequence[str] = (),
    convergence: Sequence[str] = (),
    learning: Sequence[str] = (),
    margin: float = EQUIVALENCE,
    part: str = "",
) -> str:
    """Return the half-page summary, Markdown. convergence: the lines of convergence_lines.

    warned: what the data made the notebook warn of. learning: variants that did not converge. part: which part of
    the declared comparison this is, such as '3 of 5 folds'.
    """
    level = f" ({part})" * bool(part) + ("" if slices.patient_level else OPTIMISTIC)
    classes, first = classes_of(predictions), best["variant"].iloc[0]
    parts = [
        [f"# Does preprocessing matter?{level}", "", f"**{headline(contrasts, margin)}**"],
        [f"**Which is best?** {best_in_words(best, learning)}"],
        data_lines(predictions, caption, slices, part, warned),
        ["**Training.** " + training_in_words(contrasts), *(f"* {line}." for line in convergence)],
        [*accuracy_lines(metrics, best, testing), "", f"Accuracy of each variant{level}. {caption}."],
        [*contrast_lines(contrasts), "", f"Differences in accuracy{level}. {caption}."]
        if len(contrasts)
        else [],
        [f"**Any hemorrhage (secondary).** {endpoints_in_words(metrics, endpoints, classes)}"],
        [f"**TestingData.** {testing_in_words(testing, first, slices.patient_level)}"]
        if len(testing)
        else [],
        limit_lines(slices.patient_level, margin, HEALTHY in classes),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def headline(table: pd.DataFrame, margin: float = EQUIVALENCE) -> str:
    """Return the answer in a sentence or two, from the primary contrasts alone."""
    primary = table[table["kind"] == "primary"]
    if primary.empty:
        return f"Without {BASELINE} and another variant, no comparison against it could be made."
    if primary["ci_low"].isna().all():
        return f"Whether any variant differs from {BASELINE} is not estimable from these data."
    clear = [row["verdict"] for _, row in primary.iterrows() if is_significant(row)]
    alone = f", {ALONE}" if primary["training_sd"].isna().all() else ""
    answer = "; ".join(clear) or f"these data can't tell any variant and {BASELINE} apart{alone}"
    same = int((primary["band"] == "inside").sum())
    equal = f" {same} of {len(primary)} are within {in_band(margin)} of it." if same else ""
    return f"{answer[0].upper()}{answer[1:]}.{equal}{detectable_text(primary)}"


def detectable_text(primary: pd.DataFrame) -> str:
    """Return what difference these patients could show, in a sentence; empty where not estimable."""
    reach = 100 * primary["detectable"].dropna()
    if reach.empty:
        return ""
    if reach.max() >= 100:  # accuracies differ by no more than that
        return " Data of this size are unlikely to show any difference, however large."
    strict = f", at p < {ALPHA:g} / {len(primary)}" if len(primary) > 1 else ""
    return (
        f" With errors like these, a true difference of {reach.max():.1f} points or more would be found in at least "
        f"{100 * POWER:.0f} % of such comparisons{strict}; smaller ones may be missed."
    )


def data_lines(
    predictions: pd.DataFrame, caption: str, slices: Slices, part: str, warned: Sequence[str]
) -> list[str]:
    """Return the summary's lines about data and settings, list of str."""
    folds, repeats = predictions.groupby("repeat")["fold"].nunique().max(), predictions["repeat"].nunique()
    classes = classes_of(predictions)
    chance, commonest = guesses(predictions)
    guessing = f"{len(classes)} classes ({', '.join(classes)}): guessing gets {100 * chance:.3g} % right"
    guessing += f", always saying the commonest {100 * commonest:.3g} %" if commonest else ""
    design = f"{folds}-fold cross-validation" if folds > 1 else "one hold-out split"
    if part:
        design = f"{part} of the cross-validation (an interim look: run the notebook again to train the rest)"
    unit = "Analysed by slice; split and resampled by patient, so that no network was tested on a patient it had seen."
    people = f" of {patient_ids(predictions).nunique()} patients"
    if not slices.patient_level:
        unit, people = "Patient ids are missing: all intervals are **slice-level, optimistic**.", ""
    drawn = " Phantoms are drawn by a program: nothing here is about patients."
    drawn *= " phantom slices" in caption
    steps = [single_steps(KNOWN_VARIANTS.get(name, ())) for name in predictions["variant"].unique()]
    shown = {"": "", "header": " ROI keeps the header's window."}
    window = shown.get(slices.roi_window, f" ROI shows the window {slices.roi_window} HU (centre, width).")
    window *= any("window" in each for each in steps)
    without = "; ".join(f"{count} {reason}" for reason, count in slices.left_out.items() if count)
    lines = [*warned, *class_warnings(predictions, slices.patient_level)]
    return [
        f"**Data and settings.** {caption}.{drawn} Tested: {predictions['image'].nunique()} slices{people}; "
        f"{guessing}; {design}, {repeats} repeat{'s' if repeats > 1 else ''}, the same folds and seeds for all "
        f"variants. {unit}{window}{f' Left out: {without}.' if without else ''}",
        *(["", *(f"* Warning: {line}." for line in lines)] if lines else []),
    ]


def accuracy_lines(metrics: pd.DataFrame, best: pd.DataFrame, testing: pd.DataFrame) -> list[str]:
    """Return a Markdown table of the main metrics, list of str; % but for the AUC."""
    may = set(best.loc[best["in_best_set"] & best["ci_high"].notna(), "variant"])
    tested = testing.set_index("variant") if len(testing) else testing
    with_auc = "any_auc" in set(metrics["metric"])
    heads = ["variant", "accuracy, % (95 % CI)", "may be best"]
    heads += ["AUC, any hemorrhage (95 % CI)"] if with_auc else []
    heads += ["TestingData, % (95 % CI)"] if len(testing) else []
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name in metrics["variant"].unique():
        cells = [name, with_interval(*metric_of(metrics, name, "accuracy")), "yes" if name in may else ""]
        if with_auc:
            cells.append(with_interval(*metric_of(metrics, name, "any_auc"), scale=1, digits=2))
        if len(testing):
            cells.append(with_interval(*tested.loc[name, ["accuracy", "ci_low", "ci_high"]]))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def contrast_lines(table: pd.DataFrame) -> list[str]:
    """Return a Markdown table of all contrasts, list of str: six columns, the rest is in contrasts.csv."""
    head = (
        f"| variant minus {BASELINE}, or an effect | points | 95 % CI | Holm p | SD if retrained | verdict |"
    )
    lines = [head, "|---" * 6 + "|"]
    for row in table.to_dict("records"):
        points, low, high = (signed(100 * row[key]) for key in ("difference", "ci_low", "ci_high"))
        noise = noise_text(row["seed_noise"])
        cells = [row["contrast"], points, f"{low} to {high}", p_text(row["p_holm"]), noise, row["verdict"]]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def noise_text(sd: float) -> str:
    """Return an SD in points; "not seen" where the choice of patients hides it, an en dash where unknown."""
    return "\N{EN DASH}" if np.isnan(sd) else "not seen" if sd < 0.0005 else f"{100 * sd:.1f}"


def endpoints_in_words(metrics: pd.DataFrame, endpoints: pd.DataFrame, classes: tuple[str, ...]) -> str:
    """Return what the clinical endpoints say, and how many bleeding and healthy slices which variant finds."""
    if HEALTHY not in classes:
        return f"Left out: no class is called {HEALTHY}."
    others = [name for name in classes if name not in CLASSES]
    said = [f"It means every class but {HEALTHY}, so {', '.join(others)} too."] if others else []
    none = "Nothing to compare, or too few healthy or bleeding patients for it."
    said += compared_endpoints(endpoints) if len(endpoints) else [none]
    accuracy = metrics[metrics["metric"] == "accuracy"].set_index("variant")["value"]
    for variant in dict.fromkeys((BASELINE, accuracy.idxmax())):
        if variant in accuracy:
            found, spared = (with_interval(*metric_of(metrics, variant, f"any_{name}")) for name in BOTH)
            said.append(
                f"{variant}, calling the most probable class: sensitivity {found} %, specificity {spared} %."
            )
    return " ".join(said)


def compared_endpoints(endpoints: pd.DataFrame) -> list[str]:
    """Return what each endpoint's comparisons with the baseline say, and which one is not estimable, in sentences."""
    primary, said = endpoints[endpoints["kind"] == "primary"], []
    if primary.empty:
        said.append(f"No variant was compared with {BASELINE}.")
    for name, table in primary.groupby("endpoint", sort=False):
        clear = [
            f"{row['a']} {'higher' if row['difference'] > 0 else 'lower'} by {in_points_unsigned(row)}"
            for _, row in table.iterrows()
            if is_significant(row)
        ]
        none = "none that these data show"
        if table["ci_low"].isna().all():
            none = "not estimable"
        elif (table["ci_low"] * table["ci_high"] > 0).any():
            none = (
                "none significant after Holm's correction; too cautious a test where few patients are healthy"
            )
        found = "; ".join(clear) or none
        alone = f" ({ALONE})" if table["seed_noise"].isna().all() else ""
        said.append(f"{name}, differences from {BASELINE}: {found}{alone}.")
    if lost := [name for name in ENDPOINTS if name not in set(endpoints["endpoint"])]:
        said.append(f"Not estimable, as a fold has too few healthy slices: {', '.join(lost)}.")
    return said


def testing_in_words(testing: pd.DataFrame, first: str, patient_level: bool) -> str:
    """Return what the untouched slices say of the variant that cross-validation ranked first, in a sentence or two.

    The best one here would be picked by what is said of it. patient_level: TrainingData's patients are known.
    """
    slices, patients = testing["slices"].iloc[0], testing["patients"].iloc[0]
    known = np.isfinite(patients)
    whose = f"{patients} patients" if known else "patients that nothing names"
    if both := testing["trained_on"].iloc[0]:
        whose = whose if known else "patients who are not all known"
        whose += f", {both} of them in TrainingData too (optimistic)"
    elif known:
        maybe = " who may be in TrainingData too (optimistic)"  # under no name
        whose += " used nowhere else" if patient_level else maybe
    right = with_interval(*testing.set_index("variant").loc[first, ["accuracy", "ci_low", "ci_high"]])
    found = f"{first}, the most accurate in cross-validation, gets {right} % right by the mean of its "
    found += f"networks; always saying the commonest class gets {100 * testing['commonest'].iloc[0]:.0f} %"
    over = "patients" if known else "slices, optimistic"
    alone = f"; intervals are over {over}, for these trained networks alone"
    few = "; too few patients for an interval" if testing["ci_low"].isna().all() else alone
    return f"{slices} slices of {whose}: {found}{few}."


def limit_lines(patient_level: bool, margin: float, with_any: bool) -> list[str]:
    """Return limits and method, list of str. with_any: there are results about any hemorrhage."""
    both = "" if patient_level else "A patient may be on both sides of a split, so accuracy is optimistic. "
    return [
        f"**Limits.** {both}Folds share training slices, so no interval here covers what a newly drawn training set "
        "would change; a single variant's leaves out what moves all variants together. The highest accuracy is "
        "optimistic, as it was picked for being highest. Labels are those of the folders or "
        "of the download, unchecked; accuracy and calibration are for the classes' shares in these data, not a "
        "clinic's. The same seed gives the same table on one kind of machine; another machine's arithmetic is another "
        "draw of the trainings. One network, one data set; no medical device.",
        "",
        f"**Which analysis is what.** Primary: the accuracy of each variant against {BASELINE}. Secondary: the effects "
        f"of steps,{' any hemorrhage,' * with_any} and which variant may be best (95 % for all at once). Exploratory: "
        "single pairs, classes, TestingData. Fixed in the code, not preregistered. Holm's correction is in the "
        f"p values: of the primary comparisons, of the effects{', of each endpoint of any hemorrhage' * with_any}; not "
        "across these, and not in the intervals.",
        "",
        f"**Method.** A point is 1 % of the slices{', of an AUC 0.01' * with_any}; brackets are 95 % intervals. Paired "
        f"differences; the patients' part of each error from {DRAWS:,} draws of whole patients ({METRIC_DRAWS:,} for "
        f"a variant's own held-out metrics{' and any hemorrhage' * with_any}), "
        "all variants together; the trainings' part from what neither variant nor fold explains in the table of "
        "accuracies; intervals of differences by t, of shares by Wilson's formula with t and the effective number of "
        f"slices{', of an AUC by t on the logit scale' * with_any}. In `metrics.csv` all "
        f"but `accuracy`{' and `any_auc`' * with_any}: patients alone. Equivalent: the whole interval within "
        f"\N{PLUS-MINUS SIGN}{in_band(margin)}. Held-out numbers come from `oof_predictions.csv` and, where there is a "
        "control, `control_predictions.csv`.",
    ]


# ---------------------------------------- a sentence under each figure


def say_forest(contrasts: pd.DataFrame) -> str:
    """Return what the forest plot shows."""
    primary = contrasts[contrasts["kind"] == "primary"]
    clear = sum(is_significant(row) for _, row in primary.iterrows())
    against = (
        f"Of {len(primary)} comparisons with {BASELINE}, {clear} show a difference after Holm's correction."
        if len(primary)
        else f"No variant was compared with {BASELINE}."
    )
    return f"{against} {training_in_words(contrasts)}"


def say_accuracy(metrics: pd.DataFrame, best: pd.DataFrame, learning: Sequence[str] = ()) -> str:
    """Return what the accuracy plot shows. learning: variants that did not converge."""
    rows = metrics[metrics["metric"] == "accuracy"].sort_values("value")
    low, high = rows.iloc[0], rows.iloc[-1]
    span = f"From {100 * low['value']:.0f} % ({low['variant']}) to {100 * high['value']:.0f} % ({high['variant']})"
    return f"{span}. {best_in_words(best, learning)}"


def say_pairs(pairs: pd.DataFrame) -> str:
    """Return where a step's effect depends on the others."""
    several = pairs[pairs["step"].duplicated()].drop_duplicates("step").dropna(subset="p_differ")
    if not pairs["step"].duplicated().any():
        return "No step has more than one pair here."
    if several.empty:
        return "Whether a step's pairs differ is not estimable from these data."
    said = []
    for step in several.itertuples():
        points = 100 * pairs.loc[pairs["step"] == step.step, "difference"]
        span = f"{signed(points.min())} to {signed(points.max())} points; do pairs differ? p = {p_text(step.p_differ)}"
        said.append(f"{step.step}: {span.replace('= <', '< ').replace('= >', '> ')}")
    return "; ".join(said) + ". Exploratory: nothing corrects these p for their number."


def say_sensitivities(metrics: pd.DataFrame, classes: tuple[str, ...]) -> str:
    """Return which class is found least and most often, over all variants."""
    mean = {c: metrics.loc[metrics["metric"] == f"sensitivity_{c}", "value"].mean() for c in classes}
    known = {c: 100 * value for c, value in mean.items() if np.isfinite(value)}
    worst, best = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
    if known[worst] == known[best]:
        return f"Mean over variants: {known[best]:.0f} % of every class."
    return (
        f"Mean over variants: hardest {worst} ({known[worst]:.0f} %), easiest {best} ({known[best]:.0f} %)."
    )


def say_confusions(counts: np.ndarray, classes: tuple[str, ...], variant: str) -> str:
    """Return a variant's most frequent confusion. counts: float (true, called)."""
    wrong = counts - np.diag(counts.diagonal())
    true, called = np.unravel_index(wrong.argmax(), wrong.shape)
    if not wrong.any():
        return f"{variant} confuses nothing."
    share = f"{count_text(wrong[true, called])} of {count_text(counts[true].sum())} slices"
    return f"{variant}'s most frequent confusion: {classes[true]} called {classes[called]}, {share}."


def say_reliability(predictions: pd.DataFrame, shown: Sequence[str]) -> str:
    """Return how far each shown variant's confidence lies from how often it is right, in points."""
    said = []
    for variant in dict.fromkeys(shown):
        rows = predictions[predictions["variant"] == variant]
        sure = rows.filter(regex="^p_").max(axis=1)
        excess = 100 * float((sure - (rows["label"] == rows["predicted"])).mean())
        said.append(f"{variant} is {abs(excess):.1f} points {'too sure' if excess > 0 else 'too modest'}")
    return f"On average {'; '.join(said)}."


def say_costs(costs: pd.DataFrame) -> str:
    """Return which variant costs least and most, of each cost. costs: a column each, a row for each variant."""
    return "; ".join(
        f"{name}: {values.min():.3g} ({values.idxmin()}) to {values.max():.3g} ({values.idxmax()})"
        for name, values in costs.items()
    )


def say_mistakes(mistakes: pd.DataFrame) -> str:
    """Return what the most confident mistakes have in common."""
    if mistakes.empty:
        return "No slice was mistaken by any variant."
    kinds = mistakes.groupby(["label", "predicted"], sort=False).size()
    label, called = kinds.idxmax()
    low, high = 100 * mistakes["confidence"].min(), 100 * mistakes["confidence"].max()
    return (
        f"Said with {low:.0f} to {high:.0f} % confidence; {label} called {called}: {kinds.max()} of "
        f"{len(mistakes)}, and no confusion is more frequent. `mistakes.csv` names the files in this order."
    )
