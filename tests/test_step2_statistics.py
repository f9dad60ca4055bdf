"""The comparison: that its intervals and p-values are right, and that odd tables end in words.

Simulations at full size, by hand (python tests/test_step2_statistics.py, one core): 2,000 up to 100 patients,
500 above; 1,000 draws each; seven variants, six contrasts against the first. Share of the 95 % intervals that
cover the true difference, the same where slices are taken for patients (the wrong way), and how often Holm
rejects any contrast although nothing differs:

    patients x slices   no difference: covered, by slice, any rejected   5 points: covered, by slice
          20 x 2                       0.951    0.920     0.025                    0.949    0.911
          40 x 2                       0.953    0.925     0.038                    0.952    0.917
          52 x 2                       0.948    0.911     0.040                    0.946    0.906
         100 x 2                       0.950    0.926     0.043                    0.946    0.914
         300 x 6                       0.950    0.824     0.034                    0.954    0.818
        1000 x 6                       0.951    0.792     0.040                    0.953    0.806
"""

import sys
import time
from math import comb
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from step2_helpers import ALL_VARIANTS, CLASSES, prediction_table, random_table

from step2.bootstrap import bootstrap_weights, patient_ids
from step2.metrics import class_warnings, metric_table
from step2.statistics import (
    accuracy_draws,
    contrast_table,
    declared_contrasts,
    estimate,
    exact_mcnemar,
    find_noise_floor,
    holm,
    paired_correctness,
    verdict,
)
from step2.summary import headline, summarize

# ---------------------------------------- intervals and errors, by simulation


def simulated_calls(patients: int, slices: int, gain: float, rng: np.random.Generator, accuracy: float = 0.6):
    """Return patient codes (images,) and right or wrong (images, 7), 0 and 1; slices: mean per patient.

    A probit model: a slice is right where a normal score lies below a threshold. Its variance is 0.40 the
    patient's, 0.15 the patient's for this variant (so that differences cluster), 0.30 the slice's, 0.15 the
    call's own. The true accuracy is `accuracy` for the first variant, `accuracy + gain` for the others.
    """
    codes = np.repeat(np.arange(patients), rng.integers(1, 2 * slices, patients))
    n, k = len(codes), len(ALL_VARIANTS)
    score = np.sqrt(0.40) * rng.normal(size=(patients, 1))[codes] + np.sqrt(0.30) * rng.normal(size=(n, 1))
    score = (
        score
        + np.sqrt(0.15) * rng.normal(size=(patients, k))[codes]
        + np.sqrt(0.15) * rng.normal(size=(n, k))
    )
    return codes, (score < norm.ppf(accuracy + np.r_[0, np.full(k - 1, gain)])).astype(float)


def simulate(patients, slices, gain, simulations, draws, seed=0, accuracy=0.6):
    """Return the share of intervals covering the truth, by patient and by slice, and of any rejection."""
    rng, covered, covered_slices, rejected = np.random.default_rng(seed), [], [], []
    for _ in range(simulations):
        codes, right = simulated_calls(patients, slices, gain, rng, accuracy)
        rates = accuracy_draws(pd.DataFrame(right), codes, draws, int(rng.integers(2**31)))
        pairs = range(1, right.shape[1])
        rows = [estimate(right[:, j] - right[:, 0], codes, rates[:, j] - rates[:, 0]) for j in pairs]
        covered += [row["ci_low"] <= gain <= row["ci_high"] for row in rows]
        rejected.append(len(rows) * min(row["p_value"] for row in rows) <= 0.05)  # Holm's first step
        alone = np.arange(len(codes))  # the wrong way: each slice a patient of its own
        rates = accuracy_draws(pd.DataFrame(right[:, :2]), alone, draws, 0)
        row = estimate(right[:, 1] - right[:, 0], alone, rates[:, 1] - rates[:, 0])
        covered_slices.append(row["ci_low"] <= gain <= row["ci_high"])
    return np.mean(covered), np.mean(covered_slices), np.mean(rejected)


@pytest.mark.parametrize(("patients", "slices", "gain"), [(40, 2, 0.0), (52, 2, 0.05)])
def test_interval_covers_truth(patients, slices, gain):
    by_patient, by_slice, _ = simulate(patients, slices, gain, simulations=150, draws=400)
    assert 0.91 < by_patient < 0.98  # 0.93 to 0.97 at full size, above
    assert by_slice < by_patient


def test_slice_bootstrap_is_too_narrow():
    by_patient, by_slice, _ = simulate(200, 6, 0.05, simulations=80, draws=250, seed=1)
    assert by_slice < 0.88 < 0.91 < by_patient


def test_holm_controls_family_wise_error():
    _, _, rejected = simulate(52, 2, 0.0, simulations=300, draws=300, seed=2)
    assert rejected < 0.075  # 0.05 and two standard errors of 300 simulations


# ---------------------------------------- against definitions and by hand


def test_holm_agrees_with_definition():
    p = np.array([0.03, 0.001, 0.2, 0.04, 0.012, 0.9])
    expected, running = np.empty(6), 0.0
    for rank, i in enumerate(np.argsort(p)):
        running = max(running, min(1.0, (6 - rank) * p[i]))
        expected[i] = running
    assert np.allclose(holm(p), expected)


def test_holm_counts_what_is_not_estimable():
    assert np.allclose(holm([0.01, np.nan]), [0.02, np.nan], equal_nan=True)


def test_mcnemar_agrees_with_the_binomial_formula():
    right, wrong = "epidural", "healthy"
    table = prediction_table(
        {"a": [right] * 9 + [wrong] * 3, "b": [wrong] * 7 + [right] * 2 + [right] * 2 + [wrong]},
        [right] * 12,
        [f"P{i}" for i in range(12)],
    )  # 7 for a alone, 2 for b alone
    expected = 2 * sum(comb(9, k) for k in range(3)) / 2**9
    assert exact_mcnemar(table, "a", "b") == pytest.approx(expected)


def test_difference_by_hand():
    """12 patients, 2 slices each; b gets one slice of each of the first 8 wrong: 8/24."""
    labels = ["epidural"] * 24
    patients = [f"P{i // 2}" for i in range(24)]
    b = ["healthy" if i % 2 == 0 and i < 16 else "epidural" for i in range(24)]
    table = prediction_table({"1_ROI": labels, "0_Dicom2PNG": b}, labels, patients)
    row = contrast_table(table).iloc[0]
    assert (row["contrast"], row["kind"], row["n_images"], row["n_patients"]) == ("1_ROI", "primary", 24, 12)
    assert row["difference"] == pytest.approx(8 / 24)
    d = np.r_[np.full(8, 0.5), np.zeros(4)]  # of each patient; of equal sizes, so its mean's error holds
    half = 2.200985 * d.std(ddof=1) / np.sqrt(12)  # t of 11 degrees of freedom
    assert row["ci_high"] - row["difference"] == pytest.approx(half, rel=0.03)
    assert row["p_mcnemar"] == pytest.approx(2 / 2**8)
    assert row["verdict"].startswith("1_ROI beats 0_Dicom2PNG by 33.3 points (1")


def test_repeats_are_averaged_not_counted():
    labels, patients = ["epidural"] * 4, ["P1", "P1", "P2", "P2"]
    calls = {"a": [*labels, "healthy", *labels[1:]]}
    correct, people = paired_correctness(prediction_table(calls, labels, patients, repeats=2))
    assert correct["a"].tolist() == [0.5, 1, 1, 1]
    assert len(people) == 4


def test_bootstrap_draws_whole_patients():
    weights = np.concatenate(list(bootstrap_weights(7, 600, 0)))
    assert weights.shape == (600, 7)
    assert (weights.sum(axis=1) == 7).all()
    assert np.allclose(weights.mean(axis=0), 1, atol=0.15)


def test_ten_thousand_draws_take_seconds():
    right = (np.random.default_rng(0).random((6000, 7)) < 0.6).astype(float)
    started = time.perf_counter()
    draws = accuracy_draws(pd.DataFrame(right, columns=ALL_VARIANTS), np.arange(6000) // 6, 10_000)
    seconds = time.perf_counter() - started
    print(f"10,000 draws, 7 variants, 6,000 images of 1,000 patients: {seconds:.2f} s")
    assert draws.shape == (10_000, 7)
    assert seconds < 20


# ---------------------------------------- which contrasts


def test_each_variant_is_compared_with_the_baseline():
    assert sum(c["kind"] == "primary" for c in declared_contrasts(ALL_VARIANTS)) == 6


def test_effects_of_steps_follow_the_folders():
    declared = declared_contrasts(ALL_VARIANTS)
    assert [(c["contrast"], len(c["pairs"])) for c in declared if c["kind"] == "factorial"] == [
        ("effect of ROI (mask and brain window)", 1),
        ("effect of CLAHE", 2),
        ("effect of bilateral", 2),
        ("effect of noblank (skull black and crop)", 3),
    ]


@pytest.mark.parametrize(
    ("variants", "expected"),
    [
        (ALL_VARIANTS[:2], ["1_ROI", "effect of ROI (mask and brain window)"]),
        (["1_ROI", "4_ROI+noblank"], ["effect of noblank (skull black and crop)"]),
        (["1_ROI", "6_ROI+noblank+CLAHE+Bilateral"], []),
        (["0_Dicom2PNG"], []),
    ],
)
def test_contrasts_are_those_that_the_variants_allow(variants, expected):
    assert [c["contrast"] for c in declared_contrasts(variants)] == expected


def test_control_is_a_contrast_of_its_own():
    table = random_table(30, 2, ALL_VARIANTS[:2])
    other = table["predicted"][len(table) // 2 :].to_numpy()
    control = random_table(30, 2, ALL_VARIANTS[:1], seed=0).assign(predicted=other)
    found = contrast_table(table, control, n_draws=500)
    row = found[found["kind"] == "control"].iloc[0]
    assert (row["a"], row["b"]) == ("0_Dicom2PNG, other seed", "0_Dicom2PNG")
    assert find_noise_floor(found) == pytest.approx(max(abs(row["ci_low"]), abs(row["ci_high"])))


# ---------------------------------------- verdicts


def some_row(**given) -> dict:
    """Return a contrast as verdict needs it."""
    names = {"kind": "primary", "contrast": "1_ROI", "a": "1_ROI", "b": "0_Dicom2PNG", "n_patients": 50}
    return names | given


@pytest.mark.parametrize(
    ("difference", "low", "high", "p", "words"),
    [
        (0.031, 0.012, 0.050, 0.01, "1_ROI beats 0_Dicom2PNG by 3.1 points (1.2 to 5.0)"),
        (-0.031, -0.050, -0.012, 0.01, "1_ROI is worse than 0_Dicom2PNG by 3.1 points (1.2 to 5.0)"),
        (0.004, -0.020, 0.028, 0.70, "these data can't tell 1_ROI and 0_Dicom2PNG apart: "),
        (0.031, 0.002, 0.060, 0.12, "can't tell 1_ROI and 0_Dicom2PNG apart after Holm correction: "),
        (0.001, -0.006, 0.008, 0.70, "1_ROI and 0_Dicom2PNG are equivalent within 1 point: "),
        (0.006, 0.004, 0.008, 0.01, "less than the 1 point that would matter"),
    ],
)
def test_verdict(difference, low, high, p, words):
    assert words in verdict(some_row(difference=difference, ci_low=low, ci_high=high, p_holm=p))


@pytest.mark.parametrize(("floor", "named"), [(0.04, True), (0.02, False), (np.nan, False)])
def test_verdict_names_the_noise_floor_where_it_reaches_the_difference(floor, named):
    row = some_row(difference=0.03, ci_low=0.01, ci_high=0.05, p_holm=0.01)
    text = verdict(row, noise_floor=floor)
    assert text.endswith(", yet a retraining alone may move 4.0") == ("retraining" in text) == named


# ---------------------------------------- odd tables end in numbers or words


def assert_words_without_nan(table, control=None):
    """Check verdicts and summary of a table, and return its contrasts."""
    found, metrics = contrast_table(table, control, n_draws=300), metric_table(table, n_draws=100)
    summary = summarize(table, found, metrics, "caption", True)
    assert "nan" not in " ".join([*found["verdict"], summary]).lower().replace("variant", "")
    assert found["verdict"].str.len().gt(10).all()
    return found


@pytest.mark.filterwarnings("error")
def test_one_patient_is_not_estimable():
    labels = list(CLASSES)
    table = prediction_table({"0_Dicom2PNG": labels, "1_ROI": labels[::-1]}, labels, ["P"] * 6)
    found = assert_words_without_nan(table)
    assert found["verdict"].str.startswith("not estimable: 1 patients").all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("called", ["all right", "all wrong", "same"])
def test_variants_without_difference(called):
    labels = [CLASSES[i % 6] for i in range(24)]
    calls = {
        "all right": labels,
        "all wrong": labels[1:] + labels[:1],
        "same": labels[:12] + labels[:1] * 12,
    }[called]
    table = prediction_table({"0_Dicom2PNG": calls, "1_ROI": calls}, labels, [f"P{i}" for i in range(24)])
    found = assert_words_without_nan(table)
    assert (found["difference"] == 0).all()
    assert (found["p_holm"] == 1).all()
    assert found["verdict"].str.startswith("not estimable").all()


@pytest.mark.filterwarnings("error")
def test_all_right_against_all_wrong():
    labels = [CLASSES[i % 6] for i in range(24)]
    calls = {"0_Dicom2PNG": labels[1:] + labels[:1], "1_ROI": labels}
    found = assert_words_without_nan(prediction_table(calls, labels, [f"P{i}" for i in range(24)]))
    assert (found["difference"] == 1).all()


@pytest.mark.filterwarnings("error")
def test_missing_class_is_named():
    labels = [CLASSES[i % 5] for i in range(30)]
    calls = {"0_Dicom2PNG": labels, "1_ROI": labels[:25] + ["epidural"] * 5}
    table = prediction_table(calls, labels, [f"P{i}" for i in range(30)])
    assert_words_without_nan(table)
    assert "epidural: no patient, nothing can be said about this class" in class_warnings(table)


def test_few_differing_patients_never_win():
    """4 of 400 patients, all in favour of one: a normal approximation alone would say p = 0.045."""
    labels, patients = ["epidural"] * 400, [f"P{i}" for i in range(400)]
    calls = {"0_Dicom2PNG": ["healthy"] * 4 + labels[4:], "1_ROI": labels}
    row = contrast_table(prediction_table(calls, labels, patients)).iloc[0]
    assert row["p_value"] >= 2 / 2**4
    assert "beats" not in row["verdict"]


def test_image_missing_from_a_variant_is_named():
    table = random_table(12, 2, ALL_VARIANTS[:2]).drop(index=3)
    with pytest.raises(ValueError, match=r"3\.png has no prediction of 0_Dicom2PNG in repeat 0"):
        contrast_table(table)


def test_image_twice_in_a_variant_is_named():
    table = random_table(12, 2, ALL_VARIANTS[:2])
    with pytest.raises(ValueError, match=r"0\.png of 0_Dicom2PNG was predicted twice"):
        contrast_table(pd.concat([table, table.iloc[:1]]))


@pytest.mark.parametrize("blank", ["", " ", None, float("nan")])
def test_images_without_patient_are_patients_of_their_own(blank):
    table = random_table(12, 2, ALL_VARIANTS[:2]).assign(patient=blank)
    assert paired_correctness(table)[1].nunique() == patient_ids(table).nunique() == table["image"].nunique()


def test_absent_baseline_leaves_no_primary_contrast():
    table = random_table(20, 2, [ALL_VARIANTS[1], ALL_VARIANTS[6]])
    assert contrast_table(table).empty
    assert headline(contrast_table(table)).startswith("Without 0_Dicom2PNG")


def test_effects_alone_answer_no_declared_comparison():
    found = contrast_table(random_table(20, 2, ALL_VARIANTS[1:3]), n_draws=60)
    assert list(found["kind"]) == ["factorial"]
    assert headline(found).startswith("Without 0_Dicom2PNG")


if __name__ == "__main__":
    for setting in ((20, 2), (40, 2), (52, 2), (100, 2), (300, 6), (1000, 6)):
        for gain in (0.0, 0.05):
            count = 2000 if setting[0] <= 100 else 500
            by_patient, by_slice, error = simulate(*setting, gain, count, 1000)
            print(
                f"{setting[0]:5} patients, {setting[1]} slices each, difference {gain:.2f}, "
                f"{count} runs: covered {by_patient:.3f}, by slice {by_slice:.3f}, rejected {error:.3f}",
                flush=True,
            )
