"""The clinical endpoint: AUC and sensitivity at 90 % specificity, against scikit-learn and by hand."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score, roc_curve
from step2_helpers import ALL_VARIANTS, CLASSES, random_table

from step2.endpoints import endpoint_table
from step2.metrics import concordance, metric_table, ranking_estimates, sensitivity_at_90
from step2.statistics import holm
from step2.summary import endpoints_in_words


def test_sensitivity_at_90_agrees_with_the_roc_curve():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(40, size=300) / 40, rng.random(300) < 0.5
    weights = rng.integers(0, 4, size=(5, 300)).astype(float)
    found, total = sensitivity_at_90(scores, positive, weights)
    for draw in range(5):
        false, true, _ = roc_curve(positive, scores, sample_weight=weights[draw], drop_intermediate=False)
        assert found[draw] / total[draw] == pytest.approx(true[false <= 0.1 + 1e-12].max())


def test_sensitivity_at_90_by_hand():
    """Ten healthy, one above the lowest bleed but two: 90 % specificity allows exactly one."""
    scores = np.array([0.9, *np.linspace(0.0, 0.2, 9), 0.95, 0.92, 0.5, 0.19])
    positive = np.array([False] * 10 + [True] * 4)
    found, total = sensitivity_at_90(scores, positive, np.ones((1, 14)))
    assert (found[0], total[0]) == (3, 4)


def test_estimates_rank_within_folds_and_share_draws_between_variants():
    table = random_table(80, 2, ALL_VARIANTS[:3], folds=2)
    found = ranking_estimates(table, concordance, 100, 0)
    for name, value in zip(found.names, found.values, strict=True):
        rows = table[table["variant"] == name]
        parts = []
        for _, fold in rows.groupby("fold"):
            bleed = fold["label"] != "healthy"
            parts.append((roc_auc_score(bleed, 1 - fold["p_healthy"]), bleed.sum() * (~bleed).sum()))
        assert value == pytest.approx(np.average([a for a, _ in parts], weights=[n for _, n in parts]))
    assert found.freedom[1] == 2


def test_auc_interval_is_on_the_logit_scale():
    table = random_table(80, 2, ALL_VARIANTS[:2], folds=3)
    row = metric_table(table, n_draws=100).set_index(["variant", "metric"]).loc[("1_ROI", "any_auc")]
    low, value, high = (np.log(p / (1 - p)) for p in row[["ci_low", "value", "ci_high"]])
    assert value - low == pytest.approx(high - value)


def test_contrasts_of_both_endpoints():
    table = endpoint_table(random_table(200, 2, ALL_VARIANTS, folds=2), n_draws=60)
    for _, family in table.groupby(["endpoint", "kind"]):
        assert list(family["p_holm"]) == pytest.approx(list(holm(family["p_value"])))
    assert set(table["endpoint"]) == {"AUC", "sensitivity at 90 % specificity"}
    assert (table.groupby("endpoint")["kind"].apply(lambda kind: (kind == "primary").sum()) == 6).all()
    first = table.iloc[0]
    assert first["difference"] == pytest.approx(first["value_a"] - first["value_b"])


@pytest.mark.parametrize(("healthy", "estimable"), [(9, False), (10, True)])
def test_fold_of_fewer_than_ten_healthy_slices_leaves_sensitivity_out_with_a_word(capsys, healthy, estimable):
    table = random_table(60, 1, ALL_VARIANTS[:2], folds=2).sort_values(["variant", "fold"])
    labels = ["healthy"] * healthy + ["subdural"] * (40 - healthy) + ["healthy"] * 20  # 30 a fold
    endpoints = endpoint_table(table.assign(label=labels * 2), n_draws=40)["endpoint"]
    assert list(endpoints.unique()) == ["AUC", "sensitivity at 90 % specificity"][: 1 + estimable]
    said = "sensitivity at 90 % specificity: not estimable, 9 healthy slices in a fold, 10 needed\n"
    assert capsys.readouterr().out == said * (not estimable)


def test_endpoint_without_the_baseline_says_so():
    table = random_table(200, 2, ("1_ROI", "4_ROI+noblank"), folds=2)
    endpoints = endpoint_table(table, n_draws=60)
    said = endpoints_in_words(metric_table(table, n_draws=20), endpoints, CLASSES)
    assert len(endpoints) and said.startswith("No variant was compared with 0_Dicom2PNG.")


def test_too_few_healthy_patients_leave_nothing():
    table = random_table(30, 2, ALL_VARIANTS[:2])
    few = table[(table["label"] != "healthy") | table["patient"].isin(["P0", "P1"])]
    assert endpoint_table(few).empty
    said = endpoints_in_words(some_metrics({"a": 0.8}), pd.DataFrame(), CLASSES)
    assert said.startswith("Nothing to compare, or too few healthy or bleeding patients for it. a, calling")


def some_metrics(accuracies: dict[str, float]) -> pd.DataFrame:
    """Return made-up metrics of variants."""
    rows = [(name, "accuracy", value, 0.4, 0.95) for name, value in accuracies.items()]
    rows += [(name, "any_sensitivity", value - 0.1, 0.3, 0.9) for name, value in accuracies.items()]
    rows += [(name, "any_specificity", value + 0.1, np.nan, np.nan) for name, value in accuracies.items()]
    return pd.DataFrame(rows, columns=["variant", "metric", "value", "ci_low", "ci_high"])


def test_words_give_sensitivity_and_specificity_and_what_is_not_estimable():
    endpoints = pd.DataFrame({"kind": ["factorial"], "endpoint": ["AUC"]})
    assert endpoints_in_words(some_metrics({"a": 0.8, "b": 0.6}), endpoints, CLASSES) == (
        "No variant was compared with 0_Dicom2PNG. "
        "Not estimable, as a fold has too few healthy slices: sensitivity at 90 % specificity. "
        "a, calling the most probable class: sensitivity 70.0 (30.0 to 90.0) %, specificity 90.0 %."
    )
    both = pd.DataFrame({"kind": "factorial", "endpoint": ["AUC", "sensitivity at 90 % specificity"]})
    said = endpoints_in_words(some_metrics({"0_Dicom2PNG": 0.5, "a": 0.8}), both, CLASSES)
    assert (
        "estimable" not in said and "0_Dicom2PNG, calling the most probable class: sensitivity 40.0" in said
    )
    assert said.count("calling") == 2


def test_endpoint_says_size_without_a_second_sign_and_where_training_noise_is_unknown():
    row = {"kind": "primary", "endpoint": "AUC", "a": "1_ROI", "difference": -0.031, "ci_low": -0.05}
    row |= {"ci_high": -0.012, "p_holm": 0.01, "seed_noise": np.nan}
    metrics = some_metrics({"a": 0.9})
    said = endpoints_in_words(metrics, pd.DataFrame([row]), CLASSES)
    assert said.startswith(
        "AUC, differences from 0_Dicom2PNG: 1_ROI lower by 3.1 points (1.2 to 5.0) (for these trained networks alone). "
    )
    assert "alone" not in endpoints_in_words(metrics, pd.DataFrame([row | {"seed_noise": 0.0}]), CLASSES)


def test_intervals_beside_0_that_holm_does_not_leave_are_no_sign_of_equality():
    row = {"kind": "primary", "endpoint": "AUC", "a": "1_ROI", "difference": 0.4, "ci_low": 0.1}
    row |= {"ci_high": 0.7, "p_holm": 0.08, "seed_noise": 0.0}
    said = endpoints_in_words(some_metrics({"a": 0.9}), pd.DataFrame([row]), CLASSES)
    assert "AUC, differences from 0_Dicom2PNG: none significant after Holm's correction; too cautious" in said
    said = endpoints_in_words(some_metrics({"a": 0.9}), pd.DataFrame([row | {"ci_low": -0.1}]), CLASSES)
    assert "AUC, differences from 0_Dicom2PNG: none that these data show." in said


def test_endpoint_without_an_interval_is_not_said_to_show_no_difference():
    classes = ("healthy", "bleed")
    rows = random_table(40, 2, ALL_VARIANTS[:2], folds=2, classes=classes)
    rows["p_healthy"] = (rows["label"] == "healthy").astype(float)  # all ranked right: no error to estimate
    said = endpoints_in_words(metric_table(rows, n_draws=20), endpoint_table(rows, n_draws=40), classes)
    assert "AUC, differences from 0_Dicom2PNG: not estimable" in said
