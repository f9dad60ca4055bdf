"""The patient-cluster bootstrap: draws of whole patients.

What is drawn is the patient, not the slice: slices of one head share its bleed, its scanner and its noise, so a
method that counts them as independent promises too narrow intervals (Field and Welsh 2007). A draw takes as
many patients as there are, with replacement, each with all of its slices and all variants together, so that
the pairing survives. It is a row of counts, and a metric of 10,000 draws is a matrix product.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd

ALPHA = 0.05  # two-sided; intervals are 95 %
POWER = 0.80
DRAWS = 10_000  # of the contrasts
DRAW_BLOCK = 250  # draws in memory at once
MIN_PATIENTS = 10  # below, 95 % intervals held 89 % at 5 patients and 74 % at 3 in simulation: none is given


def patient_ids(predictions: pd.DataFrame) -> pd.Series:
    """Return the patient of each row, str; an image without a patient id is a patient of its own."""
    patient = predictions["patient"].astype("string").str.strip().fillna("")
    return patient.where(patient != "", "image " + predictions["image"].astype("string")).astype(str)


def sum_by_patient(values: np.ndarray, codes: np.ndarray, count: int | None = None) -> np.ndarray:
    """Return the sums of values (images, ...) over each patient's images, float (patients, ...).

    codes: int (images,), the patient's number, 0 and up; count: how many patients, where not the highest says it.
    """
    sums = np.zeros((count or codes.max() + 1, *values.shape[1:]))
    np.add.at(sums, codes, values)
    return sums


def bootstrap_weights(n_patients: int, n_draws: int, seed: int) -> Iterator[np.ndarray]:
    """Yield blocks of how often each patient is drawn, float (up to DRAW_BLOCK draws, patients)."""
    rng = np.random.default_rng(seed)
    for start in range(0, n_draws, DRAW_BLOCK):
        drawn = rng.integers(n_patients, size=(min(DRAW_BLOCK, n_draws - start), n_patients))
        yield np.array([np.bincount(row, minlength=n_patients) for row in drawn], float)
