"""What a planned comparison would find: against simulated comparisons, whose truth is known."""

import numpy as np
import pytest
from simulate_intervals import simulate

from step2.bootstrap import sum_by_patient
from step2.estimates import find_cells, mean_estimates
from step2.power import detectable_points

NAMES = [f"v{i}" for i in range(7)]


def assumptions(patients: int = 20_000) -> dict[str, float]:
    """Return what a plan assumes, as it is in the simulation's model: from one very large table."""
    rows, right = simulate(np.random.default_rng(0), patients, 1, 0.0, np.zeros(7), repeats=2)
    first = (rows["repeat"] == 0).to_numpy()
    apart, again = right[first, 1:7] - right[first, :1], right[first] - right[~first]
    sums = sum_by_patient(apart, rows.loc[first, "patient"].astype(int).to_numpy())
    disagreement = float((apart != 0).mean())
    grouping = float((sums**2).sum() / (apart**2).sum())  # 1 + (slices - 1) x correlation
    aa_disagreement = float((again != 0).mean())
    return {
        **{"slices": 2.0, "disagreement": disagreement, "correlation": grouping - 1},
        "aa_disagreement": aa_disagreement,
    }


@pytest.mark.parametrize(
    ("patients", "folds", "repeats", "sd"), [(100, 3, 1, 0.0), (300, 5, 1, 2.0), (200, 3, 2, 2.0)]
)
def test_planned_difference_is_found_in_80_percent_of_simulated_comparisons(patients, folds, repeats, sd):
    points = detectable_points(patients, folds=folds, repeats=repeats, training_sd=sd, **assumptions())
    rng, found = np.random.default_rng(0), []
    for _ in range(150):
        gains = np.r_[0, np.full(6, points / 100)]
        rows, right = simulate(rng, patients, folds, sd / 100, gains, repeats=repeats)
        estimates = mean_estimates([*NAMES, "control"], right, find_cells(rows), 100, 0)
        pairs = [estimates.coefficients([(name, NAMES[0])]) for name in NAMES[1:]]
        found += [estimates.contrast(pair)["p_value"] < 0.05 / 6 for pair in pairs]
    assert np.mean(found) == pytest.approx(0.80, abs=0.07)  # 900 contrasts, but 150 tables


def test_more_patients_do_not_buy_off_training_noise_but_repeats_do():
    few, many, repeated = (
        detectable_points(n, repeats=r, training_sd=2.0) for n, r in ((300, 1), (30_000, 1), (30_000, 4))
    )
    assert few > many > 4  # 2 points a training, 5 folds
    assert repeated < 0.6 * many


def test_accuracies_differ_on_no_more_slices_than_exactly_one_variant_is_right_on():
    """Of 12 patients more than half have to differ, whatever share was assumed."""
    few, more = (detectable_points(12, disagreement=share) for share in (0.2, 0.4))
    assert few == more > 50


def test_plans_that_tell_nothing():
    assert np.isnan(detectable_points(9))
    assert np.isnan(detectable_points(100, variants=1))
    alone = [detectable_points(100, folds=1, training_sd=sd) for sd in (0.0, 5.0)]
    assert alone[0] == alone[1] < detectable_points(100, folds=2, training_sd=5.0)


def test_patients_of_unequal_numbers_of_slices_find_less():
    half = detectable_points(300, 3, correlation=0.3, unequal=13 / 9)  # half of them 1 slice, half 5
    assert half == detectable_points(300, 3, correlation=0.5)  # 1 + (13 / 3 - 1) x 0.3 = 1 + (3 - 1) x 0.5
