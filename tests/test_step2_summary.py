"""The sentences under figures: computed from what is drawn."""

import pandas as pd
import pytest
from step2_helpers import ALL_VARIANTS, best_among, known_slices, prediction_table, random_table

from step2 import summary
from step2.metrics import metric_table, worst_mistakes
from step2.statistics import best_in_words, compare, contrast_table, pair_table
from step2.summary import (
    detectable_text,
    headline,
    say_costs,
    say_forest,
    say_mistakes,
    say_reliability,
    say_sensitivities,
)


def test_summary_says_which_window_roi_showed_and_that_phantoms_are_no_patients():
    table = random_table(12, 2, ALL_VARIANTS[:2], folds=2)

    def said(window, caption="90 slices of an anthropomorphic phantom", rows=table):
        return summary.data_lines(rows, caption, known_slices(roi_window=window), "", [])[0]

    assert " ROI shows the window 50,130 HU (centre, width)." in said("50,130")
    assert " ROI keeps the header's window." in said("header") and "ROI" not in said("")
    assert "nothing here is about patients" in said("", "90 phantom slices")
    assert "about patients" not in said("")
    assert "ROI shows" not in said("50,130", rows=table[table["variant"] == "0_Dicom2PNG"])


def test_reliability_says_how_far_confidence_is_off():
    """All slices right, and none, at a confidence of 0.5."""
    labels = ["epidural"] * 4
    wrong = ["healthy"] * 4
    table = prediction_table({"a": labels, "b": wrong}, labels, ["P"] * 4)
    assert (
        say_reliability(table, ["a", "b"])
        == "On average a is 50.0 points too modest; b is 50.0 points too sure."
    )


def test_costs_name_the_cheapest_and_the_dearest():
    costs = pd.DataFrame({"PNG, kB a slice": [3.0, 50.2, 7.0]}, index=["a", "b", "c"])
    assert say_costs(costs) == "PNG, kB a slice: 3 (a) to 50.2 (b)"


def test_mistakes_name_the_most_frequent_confusion():
    labels = ["epidural", "epidural", "subdural"]
    table = prediction_table({"a": ["healthy", "healthy", "epidural"]}, labels, ["P", "Q", "R"])
    said = say_mistakes(worst_mistakes(table, 12))
    assert said == (
        "Said with 50 to 50 % confidence; epidural called healthy: 2 of 3, and no confusion is more frequent. "
        "`mistakes.csv` names the files in this order."
    )
    assert say_mistakes(worst_mistakes(table, 0)) == "No slice was mistaken by any variant."


@pytest.mark.parametrize(
    ("reach", "says"),
    [
        (
            [0.05, 0.0721],
            " With errors like these, a true difference of 7.2 points or more would be found in at least 80 % "
            "of such comparisons, at p < 0.05 / 2;",
        ),
        (
            [0.05],
            " With errors like these, a true difference of 5.0 points or more would be found in at least 80 % "
            "of such comparisons; smaller",
        ),
        ([0.9, 1.21], " Data of this size are unlikely to show any difference, however large."),
        ([], ""),
    ],
)
def test_difference_that_could_be_found_is_never_more_than_there_can_be(reach, says):
    assert detectable_text(pd.DataFrame({"detectable": reach}, dtype=float)).startswith(says)


def test_forest_without_the_baseline_counts_no_comparison():
    table = random_table(60, 2, ("1_ROI", "4_ROI+noblank"), folds=3)
    said = say_forest(contrast_table(compare(table, n_draws=60)))
    assert said.startswith("No variant was compared with 0_Dicom2PNG. Training a network again")


def test_forest_counts_what_holms_correction_leaves_and_not_intervals_beside_0():
    table = contrast_table(compare(random_table(60, 2, ALL_VARIANTS[:3], folds=3), n_draws=60))
    table = table[table["kind"] == "primary"].assign(ci_low=0.02, ci_high=0.3, p_holm=[0.04, 0.06])
    assert say_forest(table).startswith("Of 2 comparisons with 0_Dicom2PNG, 1 show a difference after Holm")


def test_no_variant_may_be_best_where_that_is_not_estimable():
    table = random_table(8, 4, ALL_VARIANTS[:3], folds=2)
    best = best_among(compare(table, n_draws=50))
    lines = summary.accuracy_lines(metric_table(table, n_draws=20), best, pd.DataFrame())
    assert "yes" not in "".join(lines)


def test_pairs_of_few_patients_are_not_called_single():
    said = summary.say_pairs(pair_table(compare(random_table(8, 3, ALL_VARIANTS, folds=2), n_draws=50)))
    assert said == "Whether a step's pairs differ is not estimable from these data."
    one = pair_table(compare(random_table(30, 2, ALL_VARIANTS[:2], folds=2), n_draws=50))
    assert summary.say_pairs(one) == "No step has more than one pair here."


def test_answer_of_a_single_split_is_about_these_networks():
    table = random_table(20, 3, ALL_VARIANTS[:2], folds=1, classes=("healthy", "bleed"))
    said = headline(contrast_table(compare(table, n_draws=60)))
    assert said.startswith(
        "These data can't tell any variant and 0_Dicom2PNG apart, for these trained networks"
    )


def test_classes_found_equally_often_are_not_ranked():
    scores = {"variant": "1_ROI", "metric": ["sensitivity_a", "sensitivity_b"], "value": 1.0}
    assert say_sensitivities(pd.DataFrame(scores), ("a", "b")) == "Mean over variants: 100 % of every class."


def test_summary_says_what_points_and_brackets_are():
    text = "\n".join(summary.limit_lines(True, 0.01, True))
    assert "A point is 1 % of the slices, of an AUC 0.01; brackets are 95 % intervals" in text
    assert "All numbers" not in text and "patients alone" in text
    assert "10,000 draws of whole patients (1,000 for a variant's own held-out metrics and any hem" in text


def some_contrasts() -> pd.DataFrame:
    """Return three contrasts, one clear and two equivalent."""
    rows = [
        ("1_ROI", 0.031, 0.012, 0.05, 0.01, "across", "beats"),
        ("2_ROI+CLAHE", 0.001, -0.004, 0.006, 0.7, "inside", "same"),
        ("3_ROI+CLAHE+Bilateral", -0.002, -0.006, 0.002, 0.7, "inside", "same"),
    ]
    columns = ["contrast", "difference", "ci_low", "ci_high", "p_holm", "band", "verdict"]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(kind="primary", seed_noise=0.021, training_sd=0.02, detectable=0.05, p_value=0.002)


def test_answer_counts_what_is_equivalent():
    assert headline(some_contrasts()).startswith("Beats. 2 of 3 are within 1 point of it. ")


def test_rows_of_the_tables():
    line = summary.contrast_lines(some_contrasts())[2]
    assert line == "| 1_ROI | +3.1 | +1.2 to +5.0 | 0.010 | 2.1 | beats |"
    rows = [("a", "accuracy", 0.6, 0.5, 0.7), ("a", "any_auc", 0.8, 0.75, 0.9)]
    metrics = pd.DataFrame(rows, columns=["variant", "metric", "value", "ci_low", "ci_high"])
    best = pd.DataFrame({"variant": ["a"], "in_best_set": [True], "ci_high": [0.0]})
    line = summary.accuracy_lines(metrics, best, pd.DataFrame())[2]
    assert line == "| a | 60.0 (50.0 to 70.0) | yes | 0.80 (0.75 to 0.90) |"


def test_sentences_name_the_highest_and_the_lowest():
    rows = [("a", "accuracy", 0.6), ("b", "accuracy", 0.3)]
    rows += [("a", "sensitivity_x", 0.9), ("a", "sensitivity_y", 0.2)]
    metrics = pd.DataFrame(rows, columns=["variant", "metric", "value"])
    found = {"variant": ["a", "b"], "in_best_set": [True, False], "ci_high": [0.4, 0.0], "training_sd": 0.01}
    best = pd.DataFrame(found)
    said = summary.say_accuracy(metrics, best, ["b"])
    assert said == "From 30 % (b) to 60 % (a). Best: a; worse: b. Still learning: b."
    said = summary.say_sensitivities(metrics, ("x", "y"))
    assert said == "Mean over variants: hardest y (20 %), easiest x (90 %)."
    pairs = pd.DataFrame({"step": "CLAHE", "difference": [0.02, -0.01], "p_differ": 0.03})
    words = "CLAHE: \N{MINUS SIGN}1.0 to +2.0 points; do pairs differ? p = 0.030."
    assert summary.say_pairs(pairs).startswith(words)


@pytest.mark.parametrize("told_apart", [False, True])
def test_best_of_a_single_split_is_so_for_its_networks_alone(told_apart):
    one, folds = (random_table(40, 3, ALL_VARIANTS[:3], folds=k) for k in (1, 3))
    for table in (one, folds):
        right = (table["variant"] == "1_ROI") & told_apart
        table["predicted"] = table["predicted"].mask(right, table["label"])
    alone, both = (best_in_words(best_among(compare(table, n_draws=60))) for table in (one, folds))
    assert alone.endswith(", for these trained networks alone.") and alone.startswith("Best:") == told_apart
    assert "alone" not in both
