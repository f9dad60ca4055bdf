"""Metrics of each variant, against scikit-learn and by hand."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import balanced_accuracy_score, f1_score, log_loss, roc_auc_score
from step2_helpers import ALL_VARIANTS, CLASSES, prediction_table, random_table

from step2.estimates import Estimates
from step2.metrics import (
    auc_draws,
    calibration_error,
    class_warnings,
    concordance,
    confusion_counts,
    confusion_metrics,
    interval_of,
    mean_curve,
    metric_interval,
    metric_table,
    proportion_interval,
    ranking_estimates,
    reliability,
    worst_mistakes,
)
from step2.statistics import compare


def test_metrics_agree_with_scikit_learn():
    rows = random_table(60, 3, variants=["a"])
    value = metric_table(rows, n_draws=50).set_index("metric")["value"]
    p = rows[[f"p_{c}" for c in CLASSES]].to_numpy()
    truth, answers = rows["label"].map(CLASSES.index), (rows["label"], rows["predicted"])
    assert value["accuracy"] == pytest.approx((rows["label"] == rows["predicted"]).mean())
    assert value["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(*answers))
    assert value["macro_f1"] == pytest.approx(f1_score(*answers, average="macro"))
    assert value["macro_auc"] == pytest.approx(roc_auc_score(truth, p, multi_class="ovr"))
    assert value["log_loss"] == pytest.approx(log_loss(truth, p))
    assert value["any_auc"] == pytest.approx(roc_auc_score(truth != 0, 1 - p[:, 0]))


def test_auc_takes_weights_and_ties_like_scikit_learn():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(5, size=80) / 5, rng.random(80) < 0.4
    weights = rng.integers(4, size=(3, 80)).astype(float)
    found, pairs = concordance(scores, positive, weights)
    expected = [roc_auc_score(positive, scores, sample_weight=w) for w in weights]
    assert np.allclose(found / pairs, expected)


def test_auc_compares_within_folds_only():
    """Two folds with perfect ranking each, on scales so different that pooling would spoil it."""
    rows = pd.DataFrame({"repeat": 0, "fold": [0, 0, 1, 1], "p_b": [0.1, 0.2, 0.8, 0.9]})
    rows["label"] = ["a", "b", "a", "b"]
    assert auc_draws(rows, np.arange(4), "b", np.ones((1, 4))) == 1.0
    assert roc_auc_score(rows["label"] == "b", rows["p_b"]) == 0.75


def test_confusion_metrics_by_hand():
    counts = np.zeros((1, 6, 6))
    counts[0, 0, :2] = 3, 1  # healthy: 3 right, 1 called intraparenchymal
    counts[0, 1, :2] = 2, 4  # intraparenchymal: 2 called healthy, 4 right
    value = {name: v[0] for name, v in confusion_metrics(counts, CLASSES).items()}
    assert value["accuracy"] == 0.7
    assert value["any_sensitivity"] == pytest.approx(4 / 6)
    assert value["any_specificity"] == pytest.approx(3 / 4)
    assert value["sensitivity_intraparenchymal"] == pytest.approx(4 / 6)
    assert value["specificity_intraparenchymal"] == pytest.approx(3 / 4)
    assert value["balanced_accuracy"] == pytest.approx((3 / 4 + 4 / 6) / 2)
    assert np.isnan(value["sensitivity_epidural"])


def test_calibration_error_by_hand():
    bins = np.zeros((1, 10, 3))
    bins[0, 5], bins[0, 9] = (1, 2.2, 4), (6, 5.7, 6)  # right, sum of confidences, slices
    assert calibration_error(bins) == pytest.approx((1.2 + 0.3) / 10)


def test_worst_mistakes_are_wrong_sure_and_different_slices():
    columns = ["variant", "image", "label", "predicted", *(f"p_{c}" for c in CLASSES)]
    rows = [
        ("a", "1", "healthy", "subdural", 0.1, 0, 0, 0, 0.9, 0),
        ("b", "1", "healthy", "subdural", 0.2, 0, 0, 0, 0.8, 0),
        ("a", "2", "healthy", "healthy", 1.0, 0, 0, 0, 0, 0),
        ("a", "3", "subdural", "healthy", 0.95, 0, 0, 0, 0.05, 0),
    ]
    worst = worst_mistakes(pd.DataFrame(rows, columns=columns), 5)
    assert list(zip(worst["variant"], worst["image"], strict=True)) == [("a", "3"), ("a", "1")]


def test_interval_of_all_right_is_wilsons():
    """No spread in the draws; 20 of 20 patients: from n / (n + t squared) to 1, with t of 19 degrees of freedom."""
    assert metric_interval("accuracy", 1.0, np.ones(100), 20) == pytest.approx((20 / (20 + 2.093024**2), 1))


def test_repeated_single_splits_have_the_accuracy_that_their_contrasts_compare():
    """A slice that two splits tested counts twice, in both."""
    rows = random_table(60, 2, ["0_Dicom2PNG", "1_ROI"], repeats=4)
    tested = np.random.default_rng(0).random((4, rows["image"].nunique())) < 0.3
    number = rows["image"].str.removesuffix(".png").astype(int)
    rows = rows[tested[rows["repeat"], number]]
    found = metric_table(rows, n_draws=20).set_index(["metric", "variant"])["value"]["accuracy"]
    assert list(found) == pytest.approx(list(compare(rows, n_draws=20).found.values))
    assert list(found) == pytest.approx(
        list((rows["label"] == rows["predicted"]).groupby(rows["variant"]).mean())
    )


def test_slices_of_nobody_are_no_known_patients():
    table = prediction_table({"a": ["healthy"] * 8}, ["healthy"] * 8, [""] * 8)
    assert class_warnings(table, False)[0].startswith("healthy: only 8 patients, or slices of unknown ones")


def test_interval_of_accuracy_holds_training_noise():
    rows = random_table(60, 2, ALL_VARIANTS[:3], folds=3)
    lucky = rows["fold"] == rows["variant"].map(ALL_VARIANTS.index)
    rows["predicted"] = rows["predicted"].where(~lucky, rows["label"])
    found = compare(rows, n_draws=60).found
    row = metric_table(rows, n_draws=60).set_index(["variant", "metric"]).loc[("1_ROI", "accuracy")]
    assert found.training > 0
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(interval_of(found, "1_ROI"))


def test_interval_of_an_auc_is_by_t_on_the_logit_scale():
    rows = random_table(60, 2, ALL_VARIANTS[:2], folds=2)
    found = ranking_estimates(rows, concordance, 60, 0)
    row = metric_table(rows, n_draws=60).set_index(["variant", "metric"]).loc[("1_ROI", "any_auc")]
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(interval_of(found, "1_ROI", logit=True))


def test_metrics_say_how_many_patients_are_behind_them():
    labels = ["healthy", "epidural", "epidural", "subdural", "healthy"]
    table = metric_table(prediction_table({"a": labels}, labels, list("PPQRP")), n_draws=2)
    behind = table.set_index("metric")["patients"]
    names = [
        "accuracy",
        "sensitivity_healthy",
        "specificity_epidural",
        "any_sensitivity",
        "any_auc",
        "macro_f1",
    ]
    assert behind[names].tolist() == [3, 1, 2, 3, 1, 3]


def test_interval_of_accuracy_by_hand():
    """Wilson's of 900 slices, whose standard error is 0.01, with t for 1.96; an AUC's odds times a factor."""
    found = Estimates(("a", "b"), np.array([0.5, 0.9]), 1e-4 * np.eye(2), 0.0, 0.0, 0.25, (499, 20, 4))
    t = stats.t.ppf(0.975, 499)
    middle, reach = (0.9 + t**2 / 1800) / (1 + t**2 / 900), t * np.sqrt(1e-4 + t**2 / 4 / 900**2)
    reach /= 1 + t**2 / 900
    assert interval_of(found, "b") == pytest.approx((middle - reach, middle + reach))
    factor = np.exp(t * 0.01 / (0.9 * 0.1))
    low, high = interval_of(found, "b", logit=True)
    assert (low / (1 - low), high / (1 - high)) == pytest.approx((9 / factor, 9 * factor))


def test_interval_of_all_right_goes_on_where_that_of_nearly_all_right_ends():
    """Of 20 patients: one more right never lowers the lower end."""
    ends = [
        proportion_interval(k / 20, np.sqrt(k / 20 * (1 - k / 20) / 20), 19, 20)[0] for k in range(15, 21)
    ]
    assert ends == sorted(ends)


@pytest.mark.parametrize("metric", ["sensitivity_epidural", "any_specificity"])
def test_interval_of_a_proportion_lies_within_0_and_1_and_is_no_wider_upwards(metric):
    low, high = metric_interval(metric, 0.95, np.tile([0.85, 1.05], 500), 20)
    assert 0.95 - low > high - 0.95 > 0 and high < 1


def test_interval_of_a_metric_by_hand():
    """Draws with a standard deviation of 0.1, 20 patients: Student's t of 19 degrees of freedom."""
    draws = np.tile([0.4, 0.6], 5000)
    half = 2.093024 * 0.1 * np.sqrt(20 / 19)
    assert metric_interval("macro_f1", 0.5, draws, 20) == pytest.approx((0.5 - half, 0.5 + half), rel=1e-3)
    f1, loss = (metric_interval(name, 0.95, draws, 20)[1] for name in ("macro_f1", "log_loss"))
    assert f1 == 1 < loss


@pytest.mark.parametrize(("missing", "known"), [(4, True), (6, False)])
def test_metric_that_many_draws_lack_has_no_interval(missing, known):
    """As an AUC, where few patients are healthy and some draws have none of them."""
    draws = np.linspace(0.4, 0.6, 100)
    draws[:missing] = np.nan
    assert np.isfinite(metric_interval("auc", 0.5, draws, 20)).all() == known


def test_reliability_of_a_bin_by_hand():
    labels = ["epidural"] * 4
    table = reliability(prediction_table({"a": [*labels[:3], "healthy"]}, labels, list("PQRS")))
    assert table[["confidence", "accuracy", "slices"]].to_numpy().tolist() == [[0.5, 0.75, 4]]


def test_roc_curve_is_the_mean_of_folds_weighted_by_pairs():
    """Four pairs in order in one fold, one the wrong way round in the other."""
    labels = ["healthy", "healthy", "epidural", "epidural", "healthy", "epidural"]
    rows = prediction_table({"a": [*labels[:4], *labels[:3:-1]]}, labels, list("PQRSTU"))
    curve = mean_curve(rows.assign(fold=[0, 0, 0, 0, 1, 1]))
    assert curve.iloc[0] == 0 and curve.iloc[1:-1].to_numpy() == pytest.approx(0.8)


def test_confusion_counts_are_a_mean_over_repeats():
    rows = random_table(20, 2, ["a"], repeats=3)
    assert confusion_counts(rows).sum() == pytest.approx(rows["image"].nunique())
