"""Which patients are held out together: the same folds for all variants. Uses scikit-learn."""

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

from step2.classes import order_classes
from step2.variants import require

SHUFFLES = 20  # the one with the evenest classes is kept


def make_folds(slices: pd.DataFrame, folds: int, seed: int) -> np.ndarray:
    """Return each slice's fold, 0 to folds - 1, int (n,); of a single split, 0 is validation, 1 training.

    All slices of a patient are in one fold. ValueError, with what to do, where a class has too few patients.
    """
    patients = slices.groupby("label")["patient"].nunique().reindex(list(order_classes(slices["label"])))
    rarest, fewest = patients.idxmin(), int(patients.min())
    parts = folds if folds > 1 else max(min(5, fewest), 2)
    advice = f"set folds to {fewest}, or " if 1 < fewest < folds else ""
    more = f"put more into TrainingData/{rarest}/, or take that folder away, and run Step1_Image_Preprocessing.py"
    needs = f"{parts} folds" if folds > 1 else "a split, which needs two"
    lacks = f"{rarest} has {fewest} patient{'s' * (fewest > 1)} for {needs}"
    one = "; if an export gave all patients one PatientID, give each its own" * (fewest == 1)
    require(fewest >= parts, f"{lacks}: {advice}{more}{one}")
    shuffles, person = [], pd.factorize(slices["patient"])[0]  # as pseudonyms differ between output folders
    for attempt in range(SHUFFLES):
        splitter = StratifiedGroupKFold(parts, shuffle=True, random_state=(seed * 1009 + attempt) % 2**32)
        fold_of = np.empty(len(slices), int)
        for fold, (_, chosen) in enumerate(splitter.split(slices, slices["label"], person)):
            fold_of[chosen] = fold
        shuffles.append(fold_of)
    best = min(shuffles, key=lambda fold_of: unevenness(slices, fold_of))  # the first of equals
    if folds == 1:  # any of them: the first one always has the patient of the most slices
        best = (best != np.random.default_rng(seed).integers(parts)).astype(int)
    check_folds(slices, best, folds)
    return best


def repeat_folds(slices: pd.DataFrame, folds: int, repeats: int, seed: int) -> np.ndarray:
    """Return the folds of each repeat of the cross-validation, int (repeats, n)."""
    return np.stack([make_folds(slices, folds, seed + 7919 * repeat) for repeat in range(repeats)])


def check_folds(slices: pd.DataFrame, fold_of: np.ndarray, count: int) -> None:
    """Raise ValueError unless no patient is in two folds, and each side of each split has every class."""
    spread = pd.Series(fold_of).groupby(slices["patient"].to_numpy()).nunique()
    require(spread.max() == 1, f"patients in more than one fold: {list(spread.index[spread > 1][:3])}")
    for fold in range(count):
        for side, chosen in (("validation", fold_of == fold), ("training", fold_of != fold)):
            missing = order_classes(set(slices["label"]) - set(slices["label"][chosen]))
            lacks = f"the {side} side of fold {fold + 1} has no {', '.join(missing)}"
            require(not missing, f"{lacks}: lower folds, or add patients of that class and run Step 1 again")


def unevenness(slices: pd.DataFrame, fold_of: np.ndarray) -> tuple[int, float]:
    """Return how often a fold lacks a class, and the squared differences between the folds' class counts and
    even shares, summed."""
    table = pd.crosstab(fold_of, slices["label"]).to_numpy()
    return int((table == 0).sum()), float(((table - table.mean(axis=0)) ** 2).sum())


def fold_table(slices: pd.DataFrame, fold_of: np.ndarray, folds: int, patient_level: bool) -> pd.DataFrame:
    """Return slices and patients of each class (columns) that each fold (rows) holds out."""
    columns = {"slices": ("image", "size")} | ({"patients": ("patient", "nunique")} if patient_level else {})
    table = {}
    for repeat, fold in np.ndindex(len(fold_of), folds):
        rows = slices[fold_of[repeat] == fold]
        table[f"repeat {repeat + 1}, fold {fold + 1}"] = rows.groupby("label").agg(**columns).stack()
    return pd.DataFrame(table).T[list(order_classes(slices["label"]))]
