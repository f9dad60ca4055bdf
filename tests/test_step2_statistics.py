"""The notebook's comparison: that its intervals and p-values are right, and that odd tables end in words.

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
from sklearn.metrics import balanced_accuracy_score, f1_score, log_loss, roc_auc_score

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import load_notebook

VARIANTS = (
    *("0_Dicom2PNG", "1_ROI", "2_ROI+CLAHE", "3_ROI+CLAHE+Bilateral"),
    *("4_ROI+noblank", "5_ROI+noblank+CLAHE", "6_ROI+noblank+CLAHE+Bilateral"),
)
CLASSES = ("healthy", "intraparenchymal", "intraventricular", "subarachnoid", "subdural", "epidural")


@pytest.fixture(scope="module")
def nb():
    return load_notebook()


# ---------------------------------------- synthetic tables


def simulated_calls(patients: int, slices: int, gain: float, rng: np.random.Generator, accuracy: float = 0.6):
    """Return patient codes (images,) and right or wrong (images, 7), 0 and 1; slices: mean per patient.

    A probit model: a slice is right where a normal score lies below a threshold. Its variance is 0.40 the
    patient's, 0.15 the patient's for this variant (so that differences cluster), 0.30 the slice's, 0.15 the
    call's own. The true accuracy is `accuracy` for the first variant, `accuracy + gain` for the others.
    """
    codes = np.repeat(np.arange(patients), rng.integers(1, 2 * slices, patients))
    n, k = len(codes), len(VARIANTS)
    score = np.sqrt(0.40) * rng.normal(size=(patients, 1))[codes] + np.sqrt(0.30) * rng.normal(size=(n, 1))
    score = (
        score
        + np.sqrt(0.15) * rng.normal(size=(patients, k))[codes]
        + np.sqrt(0.15) * rng.normal(size=(n, k))
    )
    return codes, (score < norm.ppf(accuracy + np.r_[0, np.full(k - 1, gain)])).astype(float)


def simulate(nb, patients, slices, gain, simulations, draws, seed=0, accuracy=0.6):
    """Return the share of intervals covering the truth, by patient and by slice, and of any rejection."""
    rng, covered, covered_slices, rejected = np.random.default_rng(seed), [], [], []
    for _ in range(simulations):
        codes, right = simulated_calls(patients, slices, gain, rng, accuracy)
        rates = nb["accuracy_draws"](pd.DataFrame(right), codes, draws, int(rng.integers(2**31)))
        pairs = range(1, right.shape[1])
        rows = [nb["estimate"](right[:, j] - right[:, 0], codes, rates[:, j] - rates[:, 0]) for j in pairs]
        covered += [row["ci_low"] <= gain <= row["ci_high"] for row in rows]
        rejected.append(len(rows) * min(row["p_value"] for row in rows) <= 0.05)  # Holm's first step
        alone = np.arange(len(codes))  # the wrong way: each slice a patient of its own
        rates = nb["accuracy_draws"](pd.DataFrame(right[:, :2]), alone, draws, 0)
        row = nb["estimate"](right[:, 1] - right[:, 0], alone, rates[:, 1] - rates[:, 0])
        covered_slices.append(row["ci_low"] <= gain <= row["ci_high"])
    return np.mean(covered), np.mean(covered_slices), np.mean(rejected)


def prediction_table(calls: dict, labels: list[str], patients: list[str], repeats: int = 1) -> pd.DataFrame:
    """Return a prediction table; calls: {variant: predicted classes, one per image and repeat by repeat}.

    The class called gets a probability of 0.5, the others 0.1 each.
    """
    rows = []
    for variant, called in calls.items():
        for i, name in enumerate(called):
            k = i % len(labels)
            image = f"TrainingData/{labels[k]}/{k}.png"
            row = {
                "variant": variant,
                "repeat": i // len(labels),
                "fold": 0,
                "patient": patients[k],
                "image": image,
            }
            row |= {"label": labels[k], "predicted": name}
            rows.append(row | {f"p_{c}": 0.5 if c == name else 0.1 for c in CLASSES})
    assert all(len(called) == repeats * len(labels) for called in calls.values())
    return pd.DataFrame(rows)


def random_table(
    patients: int, slices: int, variants=VARIANTS, folds: int = 1, repeats: int = 1, seed: int = 0
):
    """Return a prediction table of random probabilities that lean towards the label."""
    rng, tables = np.random.default_rng(seed), []
    codes = np.repeat(np.arange(patients), rng.integers(1, 2 * slices, patients))
    labels = rng.integers(6, size=len(codes))
    labels[:6] = range(6)
    for variant in variants:
        for repeat in range(repeats):
            score = rng.normal(size=(len(codes), 6)) + 1.5 * np.eye(6)[labels]
            p = np.exp(score) / np.exp(score).sum(axis=1, keepdims=True)
            table = pd.DataFrame(p, columns=[f"p_{c}" for c in CLASSES])
            names = np.array(CLASSES)
            table = table.assign(variant=variant, repeat=repeat, fold=(codes + repeat) % folds)
            table = table.assign(
                patient=[f"P{c}" for c in codes], label=names[labels], predicted=names[p.argmax(1)]
            )
            tables.append(table.assign(image=[f"{i}.png" for i in range(len(codes))]))
    return pd.concat(tables, ignore_index=True)


# ---------------------------------------- intervals and errors, by simulation


@pytest.mark.parametrize(("patients", "slices", "gain"), [(40, 2, 0.0), (52, 2, 0.05)])
def test_interval_covers_truth(nb, patients, slices, gain):
    by_patient, by_slice, _ = simulate(nb, patients, slices, gain, simulations=150, draws=400)
    assert 0.91 < by_patient < 0.98  # 0.93 to 0.97 at full size, above
    assert by_slice < by_patient


def test_slice_bootstrap_is_too_narrow(nb):
    by_patient, by_slice, _ = simulate(nb, 200, 6, 0.05, simulations=80, draws=250, seed=1)
    assert by_slice < 0.88 < 0.91 < by_patient


def test_holm_controls_family_wise_error(nb):
    _, _, rejected = simulate(nb, 52, 2, 0.0, simulations=300, draws=300, seed=2)
    assert rejected < 0.075  # 0.05 and two standard errors of 300 simulations


# ---------------------------------------- against other implementations


def test_holm_agrees_with_definition(nb):
    p = np.array([0.03, 0.001, 0.2, 0.04, 0.012, 0.9])
    expected, running = np.empty(6), 0.0
    for rank, i in enumerate(np.argsort(p)):
        running = max(running, min(1.0, (6 - rank) * p[i]))
        expected[i] = running
    assert np.allclose(nb["holm"](p), expected)


def test_holm_counts_what_is_not_estimable(nb):
    assert np.allclose(nb["holm"]([0.01, np.nan]), [0.02, np.nan], equal_nan=True)


def test_mcnemar_agrees_with_the_binomial_formula(nb):
    right, wrong = "epidural", "healthy"
    table = prediction_table(
        {"a": [right] * 9 + [wrong] * 3, "b": [wrong] * 7 + [right] * 2 + [right] * 2 + [wrong]},
        [right] * 12,
        [f"P{i}" for i in range(12)],
    )  # 7 for a alone, 2 for b alone
    expected = 2 * sum(comb(9, k) for k in range(3)) / 2**9
    assert nb["exact_mcnemar"](table, "a", "b") == pytest.approx(expected)


def test_metrics_agree_with_scikit_learn(nb):
    rows = random_table(60, 3, variants=["a"])
    value = nb["metric_table"](rows, n_draws=50).set_index("metric")["value"]
    p = rows[[f"p_{c}" for c in CLASSES]].to_numpy()
    truth = rows["label"].map(CLASSES.index)
    assert value["accuracy"] == pytest.approx((rows["label"] == rows["predicted"]).mean())
    assert value["balanced_accuracy"] == pytest.approx(
        balanced_accuracy_score(rows["label"], rows["predicted"])
    )
    assert value["macro_f1"] == pytest.approx(f1_score(rows["label"], rows["predicted"], average="macro"))
    assert value["macro_auc"] == pytest.approx(roc_auc_score(truth, p, multi_class="ovr"))
    assert value["log_loss"] == pytest.approx(log_loss(truth, p))
    assert value["any_auc"] == pytest.approx(roc_auc_score(truth != 0, 1 - p[:, 0]))


def test_auc_takes_weights_and_ties_like_scikit_learn(nb):
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(5, size=80) / 5, rng.random(80) < 0.4
    weights = rng.integers(4, size=(3, 80)).astype(float)
    found, pairs = nb["concordance"](scores, positive, weights)
    expected = [roc_auc_score(positive, scores, sample_weight=w) for w in weights]
    assert np.allclose(found / pairs, expected)


def test_auc_compares_within_folds_only(nb):
    """Two folds with perfect ranking each, on scales so different that pooling would spoil it."""
    rows = pd.DataFrame({"repeat": 0, "fold": [0, 0, 1, 1]})
    scores, positive = np.array([0.1, 0.2, 0.8, 0.9]), np.array([False, True, False, True])
    assert nb["auc_draws"](rows, np.arange(4), scores, positive, np.ones((1, 4))) == 1.0
    assert roc_auc_score(positive, scores) == 0.75


# ---------------------------------------- by hand


def test_difference_by_hand(nb):
    """12 patients, 2 slices each; b gets one slice of each of the first 8 wrong: 8/24."""
    labels = ["epidural"] * 24
    patients = [f"P{i // 2}" for i in range(24)]
    b = ["healthy" if i % 2 == 0 and i < 16 else "epidural" for i in range(24)]
    table = prediction_table({"1_ROI": labels, "0_Dicom2PNG": b}, labels, patients)
    row = nb["contrast_table"](table).iloc[0]
    assert (row["contrast"], row["kind"], row["n_images"], row["n_patients"]) == ("1_ROI", "primary", 24, 12)
    assert row["difference"] == pytest.approx(8 / 24)
    d = np.r_[
        np.full(8, 0.5), np.zeros(4)
    ]  # of each patient; equal sizes, so its mean's standard error holds
    half = 2.200985 * d.std(ddof=1) / np.sqrt(12)  # t of 11 degrees of freedom
    assert row["ci_high"] - row["difference"] == pytest.approx(half, rel=0.03)
    assert row["p_mcnemar"] == pytest.approx(2 / 2**8)
    assert row["verdict"].startswith("1_ROI beats 0_Dicom2PNG by 33.3 points (1")


def test_repeats_are_averaged_not_counted(nb):
    labels, patients = ["epidural"] * 4, ["P1", "P1", "P2", "P2"]
    calls = {"a": [*labels, "healthy", *labels[1:]]}
    correct, people = nb["paired_correctness"](prediction_table(calls, labels, patients, repeats=2))
    assert correct["a"].tolist() == [0.5, 1, 1, 1]
    assert len(people) == 4


def test_confusion_metrics_by_hand(nb):
    counts = np.zeros((1, 6, 6))
    counts[0, 0, :2] = 3, 1  # healthy: 3 right, 1 called intraparenchymal
    counts[0, 1, :2] = 2, 4  # intraparenchymal: 2 called healthy, 4 right
    value = {name: v[0] for name, v in nb["confusion_metrics"](counts).items()}
    assert value["accuracy"] == 0.7
    assert value["any_sensitivity"] == pytest.approx(4 / 6)
    assert value["any_specificity"] == pytest.approx(3 / 4)
    assert value["sensitivity_intraparenchymal"] == pytest.approx(4 / 6)
    assert value["specificity_intraparenchymal"] == pytest.approx(3 / 4)
    assert value["balanced_accuracy"] == pytest.approx((3 / 4 + 4 / 6) / 2)
    assert np.isnan(value["sensitivity_epidural"])


def test_calibration_error_by_hand(nb):
    bins = np.zeros((1, 10, 3))
    bins[0, 5], bins[0, 9] = (1, 2.2, 4), (6, 5.7, 6)  # right, sum of confidences, slices
    assert nb["calibration_error"](bins) == pytest.approx((1.2 + 0.3) / 10)


def test_bootstrap_draws_whole_patients(nb):
    weights = np.concatenate(list(nb["bootstrap_weights"](7, 600, 0)))
    assert weights.shape == (600, 7)
    assert (weights.sum(axis=1) == 7).all()
    assert np.allclose(weights.mean(axis=0), 1, atol=0.15)


def test_declared_contrasts_follow_the_folders(nb):
    kinds = [
        (c["contrast"], len(c["pairs"]))
        for c in nb["declared_contrasts"](VARIANTS)
        if c["kind"] == "factorial"
    ]
    assert kinds == [
        ("effect of ROI", 1),
        ("effect of CLAHE", 2),
        ("effect of bilateral", 2),
        ("effect of noblank", 3),
    ]
    assert sum(c["kind"] == "primary" for c in nb["declared_contrasts"](VARIANTS)) == 6
    assert [c["contrast"] for c in nb["declared_contrasts"](VARIANTS[:2])] == ["1_ROI", "effect of ROI"]
    assert nb["declared_contrasts"](["1_ROI", "4_ROI+noblank"]) == []


# ---------------------------------------- verdicts


@pytest.mark.parametrize(
    ("difference", "low", "high", "p", "words"),
    [
        (0.031, 0.012, 0.050, 0.01, "1_ROI beats 0_Dicom2PNG by 3.1 points (1.2 to 5.0)"),
        (-0.031, -0.050, -0.012, 0.01, "1_ROI is worse than 0_Dicom2PNG by 3.1 points (1.2 to 5.0)"),
        (0.004, -0.020, 0.028, 0.70, "these data can't tell 1_ROI and 0_Dicom2PNG apart: "),
        (
            0.031,
            0.002,
            0.060,
            0.12,
            "these data can't tell 1_ROI and 0_Dicom2PNG apart after Holm correction: ",
        ),
        (0.001, -0.006, 0.008, 0.70, "1_ROI and 0_Dicom2PNG are equivalent within 1 point: "),
        (0.006, 0.004, 0.008, 0.01, "less than the 1 point that would matter"),
    ],
)
def test_verdict(nb, difference, low, high, p, words):
    row = {
        "kind": "primary",
        "contrast": "1_ROI",
        "a": "1_ROI",
        "b": "0_Dicom2PNG",
        "p_holm": p,
        "n_patients": 50,
    }
    text = nb["verdict"](row | {"difference": difference, "ci_low": low, "ci_high": high})
    assert words in text


def test_verdict_names_the_noise_floor(nb):
    row = {"kind": "primary", "contrast": "1_ROI", "a": "1_ROI", "b": "0_Dicom2PNG", "p_holm": 0.01}
    row |= {"difference": 0.03, "ci_low": 0.01, "ci_high": 0.05, "n_patients": 50}
    assert nb["verdict"](row, noise_floor=0.04).endswith(", yet a retraining alone may move 4.0")
    assert "retraining" not in nb["verdict"](row, noise_floor=0.02)


def test_control_is_a_contrast_of_its_own(nb):
    table = random_table(30, 2, VARIANTS[:2])
    control = random_table(30, 2, VARIANTS[:1], seed=0).assign(
        predicted=table["predicted"][len(table) // 2 :].to_numpy()
    )
    found = nb["contrast_table"](table, control, n_draws=500)
    row = found[found["kind"] == "control"].iloc[0]
    assert (row["a"], row["b"]) == ("0_Dicom2PNG, other seed", "0_Dicom2PNG")
    assert nb["find_noise_floor"](found) == pytest.approx(max(abs(row["ci_low"]), abs(row["ci_high"])))


# ---------------------------------------- odd tables end in numbers or words


def assert_words_without_nan(nb, table, control=None):
    """Check verdicts and summary of a table, and return its contrasts."""
    found, metrics = nb["contrast_table"](table, control, n_draws=300), nb["metric_table"](table, n_draws=100)
    summary = nb["summarize"](table, found, metrics, "caption", True)
    assert "nan" not in " ".join([*found["verdict"], summary]).lower().replace("variant", "")
    assert found["verdict"].str.len().gt(10).all()
    return found


@pytest.mark.filterwarnings("error")
def test_one_patient_is_not_estimable(nb):
    labels = list(CLASSES)
    table = prediction_table({"0_Dicom2PNG": labels, "1_ROI": labels[::-1]}, labels, ["P"] * 6)
    found = assert_words_without_nan(nb, table)
    assert found["verdict"].str.startswith("not estimable: 1 patients").all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("called", ["all right", "all wrong", "same"])
def test_variants_without_difference(nb, called):
    labels = [CLASSES[i % 6] for i in range(24)]
    calls = {
        "all right": labels,
        "all wrong": labels[1:] + labels[:1],
        "same": labels[:12] + labels[:1] * 12,
    }[called]
    table = prediction_table({"0_Dicom2PNG": calls, "1_ROI": calls}, labels, [f"P{i}" for i in range(24)])
    found = assert_words_without_nan(nb, table)
    assert (found["difference"] == 0).all()
    assert (found["p_holm"] == 1).all()
    assert found["verdict"].str.startswith("not estimable").all()


@pytest.mark.filterwarnings("error")
def test_all_right_against_all_wrong(nb):
    labels = [CLASSES[i % 6] for i in range(24)]
    calls = {"0_Dicom2PNG": labels[1:] + labels[:1], "1_ROI": labels}
    found = assert_words_without_nan(nb, prediction_table(calls, labels, [f"P{i}" for i in range(24)]))
    assert (found["difference"] == 1).all()


@pytest.mark.filterwarnings("error")
def test_missing_class_is_named(nb):
    labels = [CLASSES[i % 5] for i in range(30)]
    calls = {"0_Dicom2PNG": labels, "1_ROI": labels[:25] + ["epidural"] * 5}
    table = prediction_table(calls, labels, [f"P{i}" for i in range(30)])
    assert_words_without_nan(nb, table)
    assert "epidural: no patient, nothing can be said about this class" in nb["class_warnings"](table)


def test_few_differing_patients_never_win(nb):
    """4 of 400 patients, all in favour of one: a normal approximation alone would say p = 0.045."""
    labels, patients = ["epidural"] * 400, [f"P{i}" for i in range(400)]
    calls = {"0_Dicom2PNG": ["healthy"] * 4 + labels[4:], "1_ROI": labels}
    row = nb["contrast_table"](prediction_table(calls, labels, patients)).iloc[0]
    assert row["p_value"] >= 2 / 2**4
    assert "beats" not in row["verdict"]


def test_image_missing_from_a_variant_is_named(nb):
    table = random_table(12, 2, VARIANTS[:2]).drop(index=3)
    with pytest.raises(ValueError, match=r"3\.png has no prediction of 0_Dicom2PNG in repeat 0"):
        nb["contrast_table"](table)


def test_image_twice_in_a_variant_is_named(nb):
    table = random_table(12, 2, VARIANTS[:2])
    with pytest.raises(ValueError, match=r"0\.png of 0_Dicom2PNG was predicted twice"):
        nb["contrast_table"](pd.concat([table, table.iloc[:1]]))


def test_images_without_patient_are_patients_of_their_own(nb):
    table = random_table(12, 2, VARIANTS[:2])
    for blank in ("", None, float("nan")):
        _, people = nb["paired_correctness"](table.assign(patient=blank))
        assert people.nunique() == table["image"].nunique()


def test_absent_baseline_leaves_no_primary_contrast(nb):
    table = random_table(20, 2, VARIANTS[1:3])
    assert nb["contrast_table"](table).empty
    assert nb["headline"](nb["contrast_table"](table)).startswith("Without 0_Dicom2PNG")


# ---------------------------------------- figures and speed


@pytest.mark.parametrize("count", [2, 7])
def test_figures_draw(nb, count):
    table = random_table(24, 2, VARIANTS[:count], folds=3, repeats=2)
    metrics, contrasts = nb["metric_table"](table, n_draws=60), nb["contrast_table"](table, n_draws=60)
    figures = [
        nb["draw_forest"](contrasts),
        nb["draw_accuracy"](table, metrics),
        nb["draw_sensitivities"](table, metrics),
        nb["draw_confusions"](table),
        nb["draw_any_hemorrhage"](table, metrics),
        nb["draw_reliability"](table, metrics),
    ]
    for figure in figures:
        figure.canvas.draw()
        nb["plt"].close(figure)


def test_ten_thousand_draws_take_seconds(nb):
    correct = pd.DataFrame((np.random.default_rng(0).random((6000, 7)) < 0.6).astype(float), columns=VARIANTS)
    started = time.perf_counter()
    draws = nb["accuracy_draws"](correct, np.arange(6000) // 6, 10_000)
    seconds = time.perf_counter() - started
    print(f"10,000 draws, 7 variants, 6,000 images of 1,000 patients: {seconds:.2f} s")
    assert draws.shape == (10_000, 7)
    assert seconds < 20


if __name__ == "__main__":
    notebook = load_notebook()
    for setting in ((20, 2), (40, 2), (52, 2), (100, 2), (300, 6), (1000, 6)):
        for gain in (0.0, 0.05):
            count = 2000 if setting[0] <= 100 else 500
            by_patient, by_slice, error = simulate(notebook, *setting, gain, count, 1000)
            print(
                f"{setting[0]:5} patients, {setting[1]} slices each, difference {gain:.2f}, "
                f"{count} runs: covered {by_patient:.3f}, by slice {by_slice:.3f}, rejected {error:.3f}",
                flush=True,
            )
