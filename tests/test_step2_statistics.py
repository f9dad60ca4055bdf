"""The comparison: that its errors hold patients and trainings, and that odd tables end in words.

The full simulation is tests/benchmarks/simulate_intervals.py; its tables stand in docs/statistics.md.
"""

from dataclasses import replace
from math import comb, nan

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from simulate_intervals import estimates, one_setting, simulate
from step2_helpers import ALL_VARIANTS, CLASSES, best_among, known_slices, prediction_table, random_table

from step2 import summary
from step2.bootstrap import bootstrap_weights, patient_ids
from step2.estimates import (
    CAUTION,
    Estimates,
    combine,
    find_cells,
    interaction,
    mean_estimates,
    paired_correctness,
)
from step2.metrics import class_warnings, metric_table, with_interval
from step2.statistics import (
    band_position,
    best_in_words,
    best_set,
    compare,
    contrast_table,
    declared_contrasts,
    exact_mcnemar,
    holm,
    p_text,
    pair_table,
    score_testing,
    training_in_words,
    verdict,
)
from step2.summary import headline, noise_text, summarize

# ---------------------------------------- intervals and errors, by simulation


@pytest.mark.parametrize("sd", [0.0, 0.03])
def test_false_positives_stay_near_five_percent_with_and_without_training_noise(sd):
    found = one_setting(200, 3, sd, tables=120, draws=60, unequal=False)
    assert 0.5 < found["one"] < 11  # of 360 contrasts, six of a table alike
    assert 89 < found["covered"] < 99.5 and found["best"] > 85
    assert found["alone"] > found["one"]  # what patients alone would have said


def test_training_sd_is_found():
    found = one_setting(800, 5, 0.03, tables=16, draws=60, unequal=False)
    assert found["sd"] == pytest.approx(3, abs=0.6)


def test_more_patients_do_not_buy_off_training_noise():
    """Ten times the patients: the patients' error shrinks, the trainings' error stays."""
    rng, errors = np.random.default_rng(0), {}
    for patients in (200, 2000):
        rows, right = simulate(rng, patients, 4, 0.04, np.zeros(7))
        found = mean_estimates(list("abcdefgh"), right, find_cells(rows), 300, 0)
        errors[patients] = found.errors(found.coefficients([("b", "a")]))
    assert errors[2000][0] < 0.45 * errors[200][0]
    assert errors[2000][1] > 0.02 and errors[2000][1] > 2 * errors[2000][0]


def test_repeats_average_training_noise_out():
    rows, right = simulate(np.random.default_rng(1), 1500, 4, 0.04, np.zeros(7), repeats=4)
    first = (rows["repeat"] == 0).to_numpy()
    one = mean_estimates(list("abcdefgh"), right[first], find_cells(rows[first]), 200, 0)
    four = mean_estimates(list("abcdefgh"), right, find_cells(rows), 200, 0)
    assert four.share == pytest.approx(one.share / 4, rel=0.05)
    assert (one.freedom[1], four.freedom[1]) == (7 * 3, 7 * 15)  # 4 and 16 trainings of each variant
    assert four.seen[0] == pytest.approx(0.04, abs=0.01)


def test_a_single_split_that_is_repeated_tells_training_noise():
    """A fifth of the patients held out, five times: each repeat is a training of its own."""
    rows, right = simulate(np.random.default_rng(2), 3000, 5, 0.04, np.zeros(7), repeats=6)
    held_out = (rows["fold"] == 0).to_numpy()
    found = mean_estimates(list("abcdefgh"), right[held_out], find_cells(rows[held_out]), 200, 0)
    assert found.freedom[1] == 7 * 5
    assert found.seen[0] == pytest.approx(0.04, abs=0.015)
    errors = found.errors(found.coefficients([("b", "a")]))
    assert errors[1] == pytest.approx((2 / 6) ** 0.5 * 0.04, rel=0.4)


@pytest.mark.parametrize(("patients", "repeats"), [(52, 1), (300, 2)])
def test_simulation_may_take_the_limit_of_many_draws(patients, repeats):
    """The simulation's linearised estimates, and those of 4,000 draws."""
    rows, right = simulate(np.random.default_rng(0), patients, 3, 0.02, np.zeros(7), repeats=repeats)
    drawn, limit = (estimates(list("abcdefgh"), rows, right, draws, 0) for draws in (4000, 0))
    assert limit.patients == pytest.approx(drawn.patients, rel=0.1, abs=1e-5)
    assert limit.explained == pytest.approx(drawn.explained, rel=0.04)
    assert (limit.share, limit.freedom) == (pytest.approx(drawn.share), drawn.freedom)
    assert limit.spread == pytest.approx(drawn.spread)


# ---------------------------------------- the parts of an error, by hand


def test_interaction_by_hand():
    """Two variants, two folds: variant and fold explain all but +-0.05 in each cell."""
    additive = np.array([[[0.5, 0.7]], [[0.6, 0.8]]])  # (variants, repeats, folds)
    crossed = additive + 0.05 * np.array([[[1, -1]], [[-1, 1]]])
    assert interaction(additive) == pytest.approx(0)
    assert interaction(crossed) == pytest.approx(4 * 0.05**2)
    as_repeats = crossed.transpose(0, 2, 1)  # a single split, repeated
    assert interaction(as_repeats) == pytest.approx(4 * 0.05**2)


def test_training_variance_is_what_patients_leave_of_the_interaction():
    """Cells that no patient moves: the whole interaction is training's, less the caution of nothing."""
    cells = 0.6 + 0.05 * np.array([[[1, -1]], [[-1, 1]]])
    observed = np.stack([60 * cells, np.full_like(cells, 60)])
    found = combine(["a", "b"], observed, np.repeat(observed[None], 50, 0), patients=60)
    assert found.training == pytest.approx(4 * 0.05**2)  # one degree of freedom
    assert found.share == pytest.approx(0.5)


@pytest.mark.parametrize(("folds", "variants"), [(1, 3), (4, 1)])
def test_one_fold_or_one_variant_cannot_tell_training_noise(folds, variants):
    table = random_table(30, 2, ALL_VARIANTS[:variants], folds=folds)
    correct, cells = paired_correctness(table)
    found = mean_estimates(list(correct), correct.to_numpy(), cells, 100, 0)
    assert found.training == 0 and np.isnan(found.seen[0])
    if variants > 1:
        contrasts = contrast_table(compare(table, n_draws=100))
        assert contrasts["verdict"].str.contains("for these trained networks alone").all()
        assert "can't tell how far training again" in training_in_words(contrasts)


def test_folds_of_few_patients_tell_training_noise_too():
    """Of 45 patients in 10 folds, many draws leave a fold empty: they say nothing, the others do."""
    table = random_table(45, 1, ALL_VARIANTS[:3], folds=10)
    found = compare(table, n_draws=400).found
    assert found.explained > 0 and np.isfinite(found.seen[0])


def test_variants_that_allow_no_comparison_say_so():
    contrasts = contrast_table(compare(random_table(30, 2, ("1_ROI", ALL_VARIANTS[6]), folds=2), n_draws=50))
    assert contrasts.empty and training_in_words(contrasts).startswith("These variants allow no comparison")


def some_estimates(values, error=0.01, training=0.0) -> Estimates:
    """Return estimates of independent variants with this error each."""
    k = len(values)
    names = tuple(f"v{i}" for i in range(k))
    sampling = training / (1 + CAUTION)
    covariance = error**2 * np.eye(k)
    return Estimates(names, np.array(values), covariance, 2 * training, sampling, 0.25, (499, 20, 4))


def test_error_adds_both_sources_and_freedom_follows_from_both():
    found = some_estimates([0.5, 0.6], error=0.01, training=0.0004)
    row = found.contrast(found.coefficients([("v1", "v0")]))
    assert row["patient_error"] == pytest.approx(0.01 * 2**0.5)
    assert row["training_error"] == pytest.approx((0.0004 * 0.25 * 2) ** 0.5)
    assert row["error"] == pytest.approx(np.hypot(row["patient_error"], row["training_error"]))
    assert row["seed_noise"] == pytest.approx(((0.0008 - 0.0004 / (1 + CAUTION)) * 0.25 * 2) ** 0.5)
    both, doubt = 0.0002 + 0.0002, 0.0004  # patients and luck; the interaction that luck was taken from
    assert row["freedom"] == pytest.approx(both**2 / (0.0002**2 / 499 + doubt**2 / 20))
    quiet = some_estimates([0.5, 0.6], error=0.001, training=0.0004)
    degrees = quiet.errors(quiet.coefficients([("v1", "v0")]))[2]
    assert degrees == pytest.approx(20 * (0.0002 / 0.0004) ** 2, rel=0.05)  # of luck alone, a difference
    quieter = replace(quiet, spread=0.0016, explained=0.0012 / (1 + CAUTION))
    assert quieter.errors(quieter.coefficients([("v1", "v0")]))[2] == 4  # of one variant's folds


def test_equal_pairs_do_not_differ_and_unequal_ones_do():
    found = some_estimates([0.5, 0.6, 0.5, 0.6, 0.5, 0.8])
    same = np.array([found.coefficients([("v1", "v0")]), found.coefficients([("v3", "v2")])])
    other = np.array([found.coefficients([("v1", "v0")]), found.coefficients([("v5", "v4")])])
    assert found.differ(same) == pytest.approx(1)
    assert found.differ(other) < 1e-6


def test_pairs_of_which_two_cannot_be_told_apart_have_no_p_in_any_order():
    found = some_estimates([0.5, 0.6, 0.5, 0.7, 0.5, 0.7])
    found = replace(found, patients=np.diag([1e-4, 1e-4, 0, 0, 0, 0]))
    pairs = np.array([found.coefficients([(f"v{i + 1}", f"v{i}")]) for i in (0, 2, 4)])
    assert np.isnan([found.differ(pairs), found.differ(pairs[::-1])]).all()


@pytest.mark.parametrize(
    ("p", "text"),
    [(0.0004, "<0.001"), (0.05, "0.050"), (0.0501, ">0.050"), (0.0506, "0.051"), (nan, "\N{EN DASH}")],
)
def test_a_p_just_above_the_limit_does_not_look_significant(p, text):
    assert p_text(p) == text


# ---------------------------------------- which is best


def test_best_set_holds_what_cannot_be_told_from_the_best():
    best = best_set(some_estimates([0.60, 0.79, 0.80, 0.70]), ["v0", "v1", "v2", "v3"])
    assert list(best["variant"]) == ["v2", "v1", "v3", "v0"]
    assert list(best["in_best_set"]) == [True, True, False, False]
    assert best["difference"].tolist() == pytest.approx([0.01, -0.01, -0.10, -0.20])
    assert best_in_words(best) == "May be the best: v2, v1; worse: v3, v0."
    assert (best["ci_low"] <= best["difference"]).all() and (best["difference"] <= best["ci_high"]).all()


def test_dunnett_quantile_agrees_with_its_published_value():
    """Two comparisons, many degrees of freedom, correlation 0.5, one-sided 5 %: 1.92 (Dunnett 1955)."""
    found = some_estimates([0.5, 0.5, 0.5])
    one_sided = best_set(found, ["v0", "v1", "v2"])["ci_high"].iloc[0] / (0.01 * 2**0.5)
    assert one_sided == pytest.approx(1.92, abs=0.03)


def test_what_little_is_known_of_twins_widens_no_other_difference():
    """v2 and v3 differ by training noise alone; v2 against v1 is as in a table without v3."""
    lone = some_estimates([0.5, 0.56, 0.55], error=0.01, training=0.0002)
    near = some_estimates([0.5, 0.56, 0.55, 0.5], error=0.01, training=0.0002)
    near.patients[2:, 2:] = 1e-4 * np.array([[1, 0.9999], [0.9999, 1]])
    ends = [best_set(found, found.names).set_index("variant")["ci_high"] for found in (lone, near)]
    assert near.errors(near.coefficients([("v2", "v3")]))[2] < 6
    assert 0.02 < ends[0]["v2"] < ends[1]["v2"] < 1.15 * ends[0]["v2"]  # of three differences instead of two


def test_a_clear_winner_is_alone_in_the_best_set():
    best = best_set(some_estimates([0.5, 0.9, 0.6]), ["v0", "v1", "v2"])
    assert best_in_words(best) == "Best: v1; worse: v2, v0."
    assert best["ci_low"].iloc[0] == 0


def test_fewer_than_10_patients_tell_no_best_variant():
    found = some_estimates([0.1, 0.9])
    nine, ten = (best_set(replace(found, freedom=(n - 1, 20, 4)), found.names) for n in (9, 10))
    assert nine["in_best_set"].all() and nine["ci_high"].isna().all()
    assert not ten["in_best_set"].all()


@pytest.mark.filterwarnings("error")
def test_variants_that_predict_alike_share_the_best_set():
    labels = [CLASSES[i % 6] for i in range(24)]
    calls = dict.fromkeys(("0_Dicom2PNG", "1_ROI"), labels[:12] + labels[:1] * 12)
    table = prediction_table(calls, labels, [f"P{i}" for i in range(24)])
    best = best_among(compare(table, n_draws=100))
    assert best["in_best_set"].all()


# ---------------------------------------- against definitions and by hand


def test_holm_by_hand():
    assert np.allclose(holm([0.04, 0.01, 0.03]), [0.06, 0.03, 0.06])
    assert np.allclose(holm([0.9, 0.8]), [1, 1])


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
    correct, _ = paired_correctness(table)
    assert exact_mcnemar(correct["a"], correct["b"]) == pytest.approx(expected)


def test_difference_by_hand():
    """12 patients, 2 slices each; b gets one slice of each of the first 8 wrong: 8/24."""
    labels = ["epidural"] * 24
    patients = [f"P{i // 2}" for i in range(24)]
    b = ["healthy" if i % 2 == 0 and i < 16 else "epidural" for i in range(24)]
    table = prediction_table({"1_ROI": labels, "0_Dicom2PNG": b}, labels, patients)
    row = contrast_table(compare(table)).iloc[0]
    assert (row["contrast"], row["kind"], row["n_images"], row["n_patients"]) == ("1_ROI", "primary", 24, 12)
    assert row["difference"] == pytest.approx(8 / 24)
    d = np.r_[np.full(8, 0.5), np.zeros(4)]  # of each patient; of equal sizes, so its mean's error holds
    half = 2.200985 * d.std(ddof=1) / np.sqrt(12)  # t of 11 degrees of freedom
    assert row["ci_high"] - row["difference"] == pytest.approx(half, rel=0.03)
    assert row["p_mcnemar_ignoring_patients"] == pytest.approx(2 / 2**8)
    assert row["verdict"].startswith("1_ROI beats 0_Dicom2PNG by 33.3 points (1")


def test_repeats_count_no_patient_twice():
    labels, patients = ["epidural"] * 4, ["P1", "P1", "P2", "P2"]
    calls = {"a": [*labels, "healthy", *labels[1:]]}
    correct, cells = paired_correctness(prediction_table(calls, labels, patients, repeats=2))
    assert correct["a"].tolist() == [1, 1, 1, 1, 0, 1, 1, 1]
    assert cells.patients == 2 and cells.shape == (2, 1)


def test_bootstrap_draws_whole_patients():
    weights = np.concatenate(list(bootstrap_weights(7, 600, 0)))
    assert weights.shape == (600, 7)
    assert (weights.sum(axis=1) == 7).all()
    assert np.allclose(weights.mean(axis=0), 1, atol=0.15)


# ---------------------------------------- which contrasts


def test_each_variant_is_compared_with_the_baseline():
    assert sum(c["kind"] == "primary" for c in declared_contrasts(ALL_VARIANTS)) == 6


def test_effects_of_steps_follow_the_folders():
    declared = declared_contrasts(ALL_VARIANTS)
    assert [(c["contrast"], len(c["pairs"])) for c in declared if c["kind"] == "factorial"] == [
        ("effect of CLAHE", 2),
        ("effect of bilateral", 2),
        ("effect of noblank (skull black and crop)", 3),
    ]


@pytest.mark.parametrize(
    ("variants", "expected"),
    [
        (ALL_VARIANTS[:2], ["1_ROI"]),  # the effect of ROI is this contrast, not another one
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
    found = contrast_table(compare(table, control, n_draws=500))
    row = found[found["kind"] == "control"].iloc[0]
    assert (row["a"], row["b"]) == ("0_Dicom2PNG, other seed", "0_Dicom2PNG")
    assert row["verdict"].startswith("one variant trained twice")


def test_pairs_of_a_step_are_shown_one_by_one():
    table = random_table(60, 2, ALL_VARIANTS, folds=3)
    pairs = pair_table(compare(table, n_draws=200))
    clahe = pairs[pairs["step"] == "CLAHE"]
    assert list(clahe["b"]) == ["1_ROI", "4_ROI+noblank"]
    assert clahe["p_differ"].nunique() == 1 and clahe["p_differ"].between(0, 1).all()
    assert np.isnan(pairs.loc[pairs["b"] == "0_Dicom2PNG", "p_differ"]).all()


# ---------------------------------------- verdicts


def some_row(**given) -> dict:
    """Return a contrast as verdict needs it."""
    names = {"kind": "primary", "contrast": "1_ROI", "a": "1_ROI", "b": "0_Dicom2PNG", "n_patients": 50}
    names |= {"training_sd": 0.01, "p_value": 0.04}
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


def test_verdict_names_what_is_still_learning():
    row = some_row(difference=0.03, ci_low=0.01, ci_high=0.05, p_holm=0.01)
    row["pairs"] = [("1_ROI", "0_Dicom2PNG")]
    assert verdict(row, learning=["0_Dicom2PNG", "2_ROI+CLAHE"]).endswith("(still learning: 0_Dicom2PNG)")
    assert "learning" not in verdict(row)


def test_equivalence_margin_is_the_one_that_was_set():
    row = some_row(difference=0.001, ci_low=-0.02, ci_high=0.02, p_holm=0.9)
    assert "can't tell" in verdict(row)
    assert "equivalent within 2.5 points" in verdict(row, margin=0.025)


def test_training_noise_that_cannot_be_seen_is_not_called_zero():
    assert [noise_text(sd) for sd in (np.nan, 0.0, 0.021)] == ["\N{EN DASH}", "not seen", "2.1"]


# ---------------------------------------- the testing slices


def score_of(right: dict[str, int], slices: int = 24, patients: int = 12, known: bool = True) -> pd.DataFrame:
    """Return score_testing where each variant gets the first so many slices right."""
    images = [f"TestingData/{i}.png" for i in range(slices)]
    people = [f"T{i % patients}" if known or i else "" for i in range(slices)]
    testing = pd.DataFrame({"image": images, "label": "epidural", "patient": people})
    found = {
        variant: pd.DataFrame({"image": images, "predicted": ["epidural"] * n + ["healthy"] * (slices - n)})
        for variant, n in right.items()
    }
    found = {variant: table.assign(p_healthy=0.5, p_epidural=0.5) for variant, table in found.items()}
    return score_testing(found, testing, [], n_draws=300)


def test_testing_slices_are_scored_by_patients():
    table = score_of({"0_Dicom2PNG": 8, "1_ROI": 20}).set_index("variant")
    assert table.loc["1_ROI", ["slices", "patients", "right"]].tolist() == [24, 12, 20]
    assert table.loc["1_ROI", "difference to 0_Dicom2PNG"] == pytest.approx(12 / 24)
    low, high = table.loc["1_ROI", ["ci_low", "ci_high"]]
    assert 0 < low < 20 / 24 < high < 1 and 20 / 24 - low > high - 20 / 24 + 0.05  # as Wilson's


def test_testing_in_words_names_no_patients_that_nothing_names():
    lead = (
        "24 slices of {}: 0_Dicom2PNG, the most accurate in cross-validation, gets {} % right by the mean of "
    )
    lead += "its networks; always saying the commonest class gets 100 %; "
    lead += "intervals are over {}, for these trained networks alone."
    for known, whose, over in (
        (True, "12 patients used nowhere else", "patients"),
        (False, "patients that nothing names", "slices, optimistic"),
    ):
        table = score_of({"0_Dicom2PNG": 8, "1_ROI": 20}, known=known)
        right = with_interval(*table.loc[0, ["accuracy", "ci_low", "ci_high"]])
        said = summary.testing_in_words(table, "0_Dicom2PNG", patient_level=True)
        assert said == lead.format(whose, right, over) and right.startswith("33.3 (")


def test_testing_slices_all_right_and_too_few_patients():
    assert 0.7 < score_of({"0_Dicom2PNG": 24})["ci_low"].iloc[0] < 1  # Wilson's, of 12 patients
    assert np.isnan(score_of({"0_Dicom2PNG": 4}, slices=6, patients=6)["ci_low"].iloc[0])


def test_testing_slices_without_labels_are_not_scored():
    testing = pd.DataFrame({"image": ["a.png"], "label": [""], "patient": ["T"]})
    assert score_testing({"0_Dicom2PNG": pd.DataFrame()}, testing, []).empty


# ---------------------------------------- odd tables end in numbers or words


def assert_words_without_nan(table, control=None):
    """Check verdicts and summary of a table, and return its contrasts."""
    compared, metrics = compare(table, control, n_draws=300), metric_table(table, n_draws=100)
    found = contrast_table(compared)
    none = {"endpoints": pd.DataFrame(), "testing": pd.DataFrame()}
    summary = summarize(table, found, metrics, best_among(compared), "caption", known_slices(), **none)
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
    row = contrast_table(compare(prediction_table(calls, labels, patients))).iloc[0]
    assert row["p_value"] >= 2 / 2**4
    assert "beats" not in row["verdict"]


def test_image_missing_from_a_variant_is_named():
    table = random_table(12, 2, ALL_VARIANTS[:2]).drop(index=3)
    with pytest.raises(ValueError, match=r"3\.png has no prediction of 0_Dicom2PNG in repeat 0"):
        compare(table)


def test_image_twice_in_a_variant_is_named():
    table = random_table(12, 2, ALL_VARIANTS[:2])
    with pytest.raises(ValueError, match=r"0\.png of 0_Dicom2PNG was predicted twice"):
        compare(pd.concat([table, table.iloc[:1]]))


@pytest.mark.parametrize("blank", ["", " ", None, float("nan")])
def test_images_without_patient_are_patients_of_their_own(blank):
    table = random_table(12, 2, ALL_VARIANTS[:2]).assign(patient=blank)
    assert paired_correctness(table)[1].patients == patient_ids(table).nunique() == table["image"].nunique()


def test_absent_baseline_leaves_no_primary_contrast():
    found = contrast_table(compare(random_table(20, 2, [ALL_VARIANTS[1], ALL_VARIANTS[6]])))
    assert found.empty and headline(found).startswith("Without 0_Dicom2PNG")


def test_effects_alone_answer_no_declared_comparison():
    found = contrast_table(compare(random_table(20, 2, ALL_VARIANTS[1:3]), n_draws=60))
    assert list(found["kind"]) == ["factorial"]
    assert headline(found).startswith("Without 0_Dicom2PNG")


def test_fewer_than_10_patients_tell_no_training_noise():
    contrasts = contrast_table(compare(random_table(8, 4, ALL_VARIANTS[:3], folds=2), seed=2))
    assert contrasts[["training_sd", "seed_noise"]].isna().all(axis=None)
    assert "can't tell how far training again" in training_in_words(contrasts)


def test_testing_patients_that_are_in_training_too_did_take_part():
    testing = pd.DataFrame({"image": [f"{i}.png" for i in range(24)], "label": "epidural"})
    testing["patient"] = [f"P{i // 2}" for i in range(24)]
    found = testing[["image"]].assign(
        predicted=["epidural"] * 20 + ["healthy"] * 4, p_healthy=0.5, p_epidural=0.5
    )
    table = score_testing({"0_Dicom2PNG": found}, testing, ["P1", "P2", "other"], n_draws=60)
    said = summary.testing_in_words(table, "0_Dicom2PNG", patient_level=True)
    assert said.startswith(
        "24 slices of 12 patients, 2 of them in TrainingData too (optimistic): 0_Dicom2PNG"
    )


def test_intervals_that_hold_no_training_noise_do_not_claim_to():
    """Training noise is seen (an SD of 2.4 points), but below the caution that errors ask for."""
    contrasts = contrast_table(compare(random_table(60, 2, ALL_VARIANTS[:4], folds=3, seed=2), n_draws=500))
    assert contrasts["training_sd"].iloc[0] > 0.02 and (contrasts["training_error"] == 0).all()
    assert "an SD of 2" in training_in_words(contrasts) and "allow for that" not in training_in_words(
        contrasts
    )


def test_holm_is_not_blamed_for_a_single_comparison():
    """5 of 20 patients differ, all one way: the interval is clear of 0, but a sign-flip test says 2 / 2^5."""
    labels, patients = ["epidural"] * 20, [f"P{i}" for i in range(20)]
    calls = {"0_Dicom2PNG": ["healthy"] * 5 + labels[5:], "1_ROI": labels}
    row = contrast_table(compare(prediction_table(calls, labels, patients))).iloc[0]
    assert row["p_holm"] == row["p_value"] == 2 / 2**5 and row["ci_low"] > 0
    assert "apart, as too few patients differ: +25.0 points" in row["verdict"]


def test_interval_of_a_trainings_sd_is_chi_squareds():
    """A variance of 14 degrees of freedom, 9e-4, of which patients explain 1e-4."""
    none = np.zeros(8)
    found = Estimates(tuple("abcdefgh"), none, np.zeros((8, 8)), 9e-4, 1e-4, 1 / 3, (51.0, 14.0))
    sd, low, high = found.seen
    assert sd**2 == pytest.approx(9e-4 - 1e-4)
    variances = 14 * 9e-4 / stats.chi2.interval(0.95, 14)[0], 14 * 9e-4 / stats.chi2.interval(0.95, 14)[1]
    assert (high**2, low**2) == pytest.approx([variance - 1e-4 for variance in variances])


def test_training_noise_that_outweighs_patients_is_not_said_to_be_outweighed():
    """Two near-twins: training moves their difference more than the choice of patients does."""
    table = random_table(60, 2, ALL_VARIANTS[:4], folds=3, seed=11)
    two, own = (table[table["variant"] == name].reset_index(drop=True) for name in ALL_VARIANTS[2:4])
    take = np.random.default_rng(11).random(len(two)) < 0.06
    twin = pd.concat([two[~take], own[take]]).assign(variant=ALL_VARIANTS[3])
    table = pd.concat([table[table["variant"] != ALL_VARIANTS[3]], twin])
    contrasts = contrast_table(compare(table, n_draws=300))
    assert (contrasts["training_error"] == 0).all()
    assert (contrasts["seed_noise"] > contrasts["patient_error"]).any()
    assert "outweighs" not in training_in_words(contrasts)


def test_testing_patients_partly_known():
    testing = pd.DataFrame({"image": [f"{i}.png" for i in range(24)], "label": "epidural"})
    testing["patient"] = [f"P{i // 2}" if i < 22 else "" for i in range(24)]
    found = testing[["image"]].assign(predicted="epidural", p_healthy=0.5, p_epidural=0.5)
    table = score_testing({"a": found}, testing, ["P1"], n_draws=60)
    said = summary.testing_in_words(table, "a", patient_level=True)
    assert "nothing names" not in said and "1 of them in TrainingData too" in said


def test_summary_says_what_was_left_out_and_what_the_commonest_class_gets_in_testing():
    table = random_table(20, 2, ALL_VARIANTS[:2])
    compared, metrics = compare(table, n_draws=60), metric_table(table, n_draws=20)
    rest = {"endpoints": pd.DataFrame(), "testing": score_of({"0_Dicom2PNG": 20, "1_ROI": 20})}
    left_out = {"refused by Step 1": 4, "blank, no brain to see": 0}
    given = (
        table,
        contrast_table(compared),
        metrics,
        best_among(compared),
        "caption",
        known_slices(left_out),
    )
    text = summarize(*given, **rest, learning=["1_ROI"], warned=["copies"])
    assert "Still learning: 1_ROI.\n" in text
    assert "who may be in TrainingData too" in summarize(
        *given[:-1], replace(known_slices(), patient_level=False), **rest
    )
    assert "so that no network was tested on a patient it had seen. Left out: 4 refused by Step 1.\n" in text
    assert "\n* Warning: copies.\n" in text
    first = best_among(compared)["variant"].iloc[0]
    right = with_interval(*rest["testing"].loc[0, ["accuracy", "ci_low", "ci_high"]])  # of both
    found = f"{first}, the most accurate in cross-validation, gets {right} % right by the mean of"
    assert f"{found} its networks; always saying the commonest class gets 100 %; intervals" in text


def test_testing_patients_may_be_those_that_training_does_not_know():
    table = score_of({"0_Dicom2PNG": 8, "1_ROI": 20})
    said = summary.testing_in_words(table, "0_Dicom2PNG", patient_level=False)
    assert said.startswith(
        "24 slices of 12 patients who may be in TrainingData too (optimistic): 0_Dicom2PNG"
    )


def test_best_set_names_what_is_still_learning():
    best = best_among(compare(random_table(60, 2, ALL_VARIANTS[:2], folds=3), n_draws=60))
    assert best_in_words(best, ["1_ROI"]).endswith(" Still learning: 1_ROI.")
    assert "learning" not in best_in_words(best)


@pytest.mark.parametrize(
    ("difference", "low", "high", "p", "words"),
    [
        (0.031, 0.012, 0.050, 0.01, "CLAHE helps by 3.1 points (1.2 to 5.0)"),
        (-0.031, -0.050, -0.012, 0.01, "CLAHE hurts by 3.1 points (1.2 to 5.0)"),
        (0.004, -0.020, 0.028, 0.70, "these data can't tell whether CLAHE helps or hurts: "),
        (0.001, -0.006, 0.008, 0.70, "CLAHE makes no difference within 1 point: "),
    ],
)
def test_verdict_of_a_step(difference, low, high, p, words):
    row = some_row(kind="factorial", contrast="effect of CLAHE", a="2_ROI+CLAHE", b="1_ROI")
    row |= {"difference": difference, "ci_low": low, "ci_high": high, "p_holm": p}
    assert verdict(row).startswith(words)


def test_control_that_differs_is_said():
    row = some_row(kind="control", difference=0.03, ci_low=0.01, ci_high=0.05, p_holm=0.01)
    assert verdict(row).startswith("one variant trained twice differs")
    assert verdict(row | {"ci_low": -0.01}).startswith("one variant trained twice shows no clear difference")


@pytest.mark.parametrize(
    ("low", "high", "band"),
    [(0.02, 0.05, "outside"), (-0.05, -0.02, "outside"), (-0.02, 0.05, "across"), (-0.01, 0.01, "inside")],
)
def test_place_of_an_interval_beside_the_band(low, high, band):
    assert band_position({"ci_low": low, "ci_high": high}) == band


def test_detectable_difference_is_that_of_a_t_test_corrected_within_its_family():
    found = contrast_table(compare(random_table(30, 2, ALL_VARIANTS), n_draws=60))  # one fold: patients alone
    for kind, family in (("primary", 6), ("factorial", 3)):
        row = found[found["kind"] == kind].iloc[0]
        t = stats.t(row["n_patients"] - 1)
        assert row["detectable"] == pytest.approx((t.ppf(1 - 0.05 / family / 2) + t.ppf(0.8)) * row["error"])


def test_dunnett_with_training_noise():
    found = replace(some_estimates([0.5, 0.5, 0.5], training=0.0016), freedom=(10**6,) * 3)
    error = np.hypot(*found.errors(found.coefficients([("v1", "v0")]))[:2])
    assert best_set(found, ["v0", "v1", "v2"])["ci_high"].iloc[0] / error == pytest.approx(1.92, abs=0.03)


def test_repeats_make_no_slices_and_no_smaller_mcnemar():
    labels, patients = ["epidural"] * 24, [f"P{i // 2}" for i in range(24)]
    calls = {"1_ROI": labels * 2, "0_Dicom2PNG": (["healthy"] * 6 + labels[6:]) * 2}
    row = contrast_table(compare(prediction_table(calls, labels, patients, repeats=2), n_draws=60)).iloc[0]
    assert row["n_images"] == 24 and row["p_mcnemar_ignoring_patients"] == pytest.approx(2 / 2**6)


def test_simulation_can_make_some_variants_noisy():
    rng = np.random.default_rng(0)
    rows, right = simulate(rng, 3000, 3, 0.2, np.zeros(7), noisy=1)
    apart = pd.DataFrame(right).groupby(rows["fold"]).mean().std()
    assert apart[[1, 2, 3, 4, 5, 6]].max() < apart[[0, 7]].min()
