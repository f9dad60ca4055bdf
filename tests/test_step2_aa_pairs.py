"""tests/benchmarks/aa_pairs.py on simulated trainings, whose noise is known."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from aa_pairs import (
    check_seeds,
    fold_rows,
    less_shared,
    pair_rows,
    read_seed,
    report,
    rms,
    rms_interval,
    training_sd,
)
from simulate_intervals import simulate


def write_seeds(
    folder: Path, seeds: int, patients: int, sd: float, new_folds: bool = True, luck: int = 0
) -> list[Path]:
    """Write the predictions of simulated trainings of three variants, a folder a seed, and return the folders."""
    rng = np.random.default_rng(luck)
    rows, right = simulate(rng, patients, 3, sd, np.zeros(7), repeats=seeds, new_folds=new_folds)
    paths = []
    for seed in range(seeds):
        inside = (rows["repeat"] == seed).to_numpy()
        where = rows[inside].assign(repeat=1, label="epidural")
        tables = [
            where.assign(variant=f"v{v}", predicted=np.where(right[inside, v] == 1, "epidural", "healthy"))
            for v in range(3)
        ]
        paths.append(folder / f"seed{seed}")
        paths[-1].mkdir(parents=True)
        pd.concat(tables).to_csv(paths[-1] / "oof.csv", index=False)
    return paths


@pytest.mark.parametrize("new_folds", [False, True])
def test_errors_and_training_noise_of_simulated_trainings_are_right(tmp_path, new_folds):
    parts, variances = [], []
    for luck in range(4):  # patients of their own in each, 4 disjoint pairs of seeds
        tables = [read_seed(p) for p in write_seeds(tmp_path / str(luck), 8, 400, 0.03, new_folds, luck)]
        check_seeds(tables)
        parts.append(pair_rows(tables, draws=100, disjoint=True))
        variances.append(training_sd(tables, draws=100) ** 2)
    pairs = pd.concat(parts)
    assert len(pairs) == 4 * 4 * 3
    assert rms(pairs["z"]) == pytest.approx(1, abs=0.25)
    assert np.sqrt(np.mean(variances)) == pytest.approx(0.03, abs=0.006)
    assert (pairs["p_value"] < 0.05).mean() < 0.13


def test_what_all_variants_of_a_seed_share_is_no_part_of_a_folds_difference(tmp_path):
    """Trainings of no shift; in every second table a third of each fold's slices turns wrong for all variants."""
    tables = [read_seed(path) for path in write_seeds(tmp_path, 8, 600, 0.0, new_folds=False)]
    for table in tables[1::2]:
        table.loc[table["image"] % 3 == 0, "predicted"] = "none"
    folds = fold_rows(tables)
    assert len(folds) == 4 * 3 * 3
    assert rms(folds["shared"]) == pytest.approx(0.2, abs=0.03)  # a third of 60 %
    assert rms(folds["z"]) == pytest.approx(1, abs=0.35)  # with the shared part 3
    said = report(tables, pair_rows(tables, 100, disjoint=True), 100)
    assert sum("less what all variants of a seed share" in line for line in said) == 2


def test_differences_less_their_mean_by_hand():
    rows = pd.DataFrame({"first": 0, "variant": list("abc"), "difference": [0.1, 0.2, 0.6]})
    found = less_shared(rows, ["first"])
    assert found["shared"].tolist() == pytest.approx([0.3] * 3)
    assert found["difference"].tolist() == pytest.approx([1.5**0.5 * d for d in (-0.2, -0.1, 0.3)])


def test_new_folds_or_one_variant_have_no_difference_by_fold(tmp_path):
    for new_folds in (True, False):
        folder = tmp_path / str(new_folds)
        tables = [read_seed(path) for path in write_seeds(folder, 2, 60, 0.0, new_folds=new_folds)]
        if not new_folds:
            tables = [table[table["variant"] == "v0"].reset_index(drop=True) for table in tables]
        assert fold_rows(tables).empty
        said = report(tables, pair_rows(tables, 100), 100)
        assert not any("folds of pairs" in line for line in said)


def test_report_counts_disjoint_pairs_only(tmp_path):
    tables = [read_seed(p) for p in write_seeds(tmp_path, 5, 30, 0.0)]
    pairs = pair_rows(tables, draws=100)
    assert len(pairs) == 10 * 3 and pairs["disjoint"].sum() == 2 * 3
    said = report(tables, pairs)
    assert said[0].startswith("5 seeds of 3 variants, ")
    assert any(line.startswith("6 disjoint pairs: z RMS") for line in said)


def test_interval_of_a_root_mean_square_holds_the_truth():
    rng = np.random.default_rng(0)
    ends = np.array([rms_interval(pd.Series(rng.normal(size=12))) for _ in range(2000)])
    assert ((ends[:, 0] < 1) & (ends[:, 1] > 1)).mean() == pytest.approx(0.95, abs=0.02)


def test_other_patients_or_no_table_are_refused(tmp_path):
    one = write_seeds(tmp_path / "a", 2, 20, 0.0)
    other = write_seeds(tmp_path / "b", 1, 20, 0.0, luck=1)
    with pytest.raises(SystemExit, match="folder 2 has other"):
        check_seeds([read_seed(one[0]), read_seed(other[0])])
    with pytest.raises(SystemExit, match="at least two"):
        check_seeds([read_seed(one[0])])
    with pytest.raises(SystemExit, match="0 tables"):
        read_seed(tmp_path)
