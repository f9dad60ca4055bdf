"""Folds: no patient on both sides, every class on each, the same for all, else a sentence."""

import numpy as np
import pandas as pd
import pytest
from step2_helpers import CLASSES, some_slices

from step2.folds import check_folds, make_folds, repeat_folds


def test_folds_are_patient_disjoint_and_stratified():
    slices = some_slices(dict.fromkeys(CLASSES, 10))
    fold_of = make_folds(slices, 5, seed=0)
    assert pd.Series(fold_of).groupby(slices["patient"]).nunique().max() == 1
    assert (pd.crosstab(fold_of, slices["label"]) == 6).to_numpy().all()


def test_folds_follow_from_the_seed():
    slices = some_slices(dict.fromkeys(CLASSES, 10))
    fold_of = make_folds(slices, 5, seed=0)
    assert np.array_equal(fold_of, make_folds(slices, 5, seed=0))
    assert not np.array_equal(fold_of, make_folds(slices, 5, seed=1))


def test_each_repeat_has_other_folds_and_the_first_is_that_of_the_seed():
    slices = some_slices(dict.fromkeys(CLASSES, 10))
    first, second = repeat_folds(slices, 5, 2, seed=3)
    assert np.array_equal(first, make_folds(slices, 5, seed=3)) and not np.array_equal(first, second)


def test_largest_seed_makes_folds_too():
    make_folds(some_slices({"a": 2, "b": 2}), 2, seed=2**31 - 1)


def test_folds_do_not_depend_on_how_patients_are_called():
    """Pseudonyms are keyed by the output folder: the same data would get other folds on each machine."""
    slices = some_slices(dict.fromkeys(CLASSES, 10))
    renamed = {name: f"{k * 7919 % 1009:04}" for k, name in enumerate(sorted(set(slices["patient"])))}
    other = slices.assign(patient=slices["patient"].map(renamed))
    assert np.array_equal(*[make_folds(table, 5, seed=0) for table in (slices, other)])


def test_patients_with_slices_of_several_classes_are_still_spread_evenly():
    rng = np.random.default_rng(0)
    pairs = [(CLASSES[c], f"p{p}") for p in range(60) for c in rng.choice(6, 2)]
    rows = [pair for pair in pairs for _ in range(rng.integers(1, 4))]
    slices = pd.DataFrame(rows, columns=["label", "patient"]).assign(image="x.png")
    table = pd.crosstab(make_folds(slices, 3, seed=0), slices["label"])
    assert (table.max() - table.min() <= 5).all() and (table.min() >= 4).all()


def test_one_fold_is_a_single_split_of_a_fifth():
    fold_of = make_folds(some_slices(dict.fromkeys(CLASSES, 10)), 1, seed=0)
    assert set(fold_of) == {0, 1} and (fold_of == 0).mean() == pytest.approx(0.2)


def test_leaking_patient_is_found():
    slices = some_slices(dict.fromkeys(CLASSES, 2))
    with pytest.raises(ValueError, match=r"patients in more than one fold: \['epidural 0'"):
        check_folds(slices, np.arange(len(slices)) % 2, 2)


def test_fold_without_a_class_is_found():
    slices = some_slices(dict.fromkeys(CLASSES, 2))
    fold_of = slices["patient"].str.endswith("1").to_numpy().astype(int)
    fold_of[slices["label"] == "subdural"] = 0
    with pytest.raises(ValueError, match="training side of fold 1 has no subdural: lower folds"):
        check_folds(slices, fold_of, 2)


@pytest.mark.parametrize(
    ("patients", "sentence"),
    [
        (dict.fromkeys(CLASSES, 4) | {"subdural": 2}, "subdural has 2 patients for 3 folds: set folds to 2"),
        (
            dict.fromkeys(CLASSES, 1),
            "healthy has 1 patient for 3 folds: put more into TrainingData/healthy/, or take that folder away",
        ),
    ],
)
def test_too_few_patients_get_a_sentence(patients, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_folds(some_slices(patients), 3, seed=0)


def test_split_of_one_patient_gets_a_sentence():
    with pytest.raises(ValueError, match="healthy has 1 patient for a split, which needs two: put more"):
        make_folds(some_slices(dict.fromkeys(CLASSES, 1)), 1, seed=0)


def test_one_patient_with_everything_is_refused():
    slices = some_slices(dict.fromkeys(CLASSES, 3)).assign(patient="the only one")
    with pytest.raises(ValueError, match="1 patient for 3 folds"):
        make_folds(slices, 3, seed=0)


def test_single_split_does_not_always_hold_out_the_patient_of_the_most_slices(monkeypatch):
    monkeypatch.setattr("step2.folds.SHUFFLES", 2)  # enough here, and ten times as fast
    rows = [(label, f"{label} {p}") for label in "ab" for p in range(20) for _ in range(1 + p % 2)]
    rows += [("a", "a 0")] * 12
    slices = pd.DataFrame(rows, columns=["label", "patient"])
    largest = (slices["patient"] == "a 0").to_numpy()
    held_out = sum((make_folds(slices, 1, seed)[largest] == 0).all() for seed in range(20))
    assert 0 < held_out < 12  # 4 of 20 expected


def test_evenest_shuffle_is_not_kept_where_it_leaves_a_fold_without_a_class():
    """Of the 20 shuffles seven give each fold both classes, but not the evenest one."""
    a, b = (4, 7, 5, 7, 1, 7, 3, 0), (0, 0, 0, 0, 0, 1, 1, 4)  # slices of eight patients
    rows = [row for p in range(8) for row in [("b", p)] * b[p] + [("a", p)] * a[p]]
    slices = pd.DataFrame(rows, columns=["label", "patient"])
    assert (pd.crosstab(make_folds(slices, 3, seed=5), slices["label"]) > 0).all(axis=None)
