"""The clinical endpoint, any hemorrhage against healthy: paired differences between variants, as secondary.

AUC, and sensitivity at 90 % specificity, by 1 - p(healthy). Both with the same two sources of noise as accuracy.
"""

import numpy as np
import pandas as pd

from step2.bootstrap import MIN_PATIENTS
from step2.classes import HEALTHY, classes_of
from step2.metrics import METRIC_DRAWS, concordance, patient_counts, ranking_estimates, sensitivity_at_90
from step2.statistics import all_contrasts, holm

ENDPOINTS = {"AUC": concordance, "sensitivity at 90 % specificity": sensitivity_at_90}
MIN_HEALTHY = 10  # healthy slices a fold; of fewer, 90 % is no number of slices


def endpoint_table(
    predictions: pd.DataFrame, control: pd.DataFrame | None = None, n_draws: int = METRIC_DRAWS, seed: int = 0
) -> pd.DataFrame:
    """Return all contrasts of both endpoints, DataFrame; empty where there are no or too few healthy or bleeding.

    Columns: endpoint, contrast, kind, a, b, value_a, value_b (of single pairs), difference, error,
    patient_error, training_error, ci_low, ci_high, seed_noise, p_value, p_holm (within endpoint and kind).
    Secondary: nothing corrects for there being two endpoints beside accuracy.
    """
    declared, rows = all_contrasts(predictions, control)
    estimable = declared and HEALTHY in classes_of(predictions)
    if not estimable or patient_counts(predictions).behind("any_auc") < MIN_PATIENTS:
        return pd.DataFrame(columns=["endpoint", "contrast", "kind"])  # a file of it can be read
    healthy = rows[rows["label"] == HEALTHY].groupby(["variant", "repeat", "fold"]).size()
    found = []
    for endpoint, measure in ENDPOINTS.items():
        if measure is sensitivity_at_90 and healthy.min() < MIN_HEALTHY:
            lacks = f"{healthy.min()} healthy slices in a fold, {MIN_HEALTHY} needed"
            print(f"{endpoint}: not estimable, {lacks}")
            continue
        estimates = ranking_estimates(rows, measure, n_draws, seed)
        value = dict(zip(estimates.names, estimates.values, strict=True))
        for each in declared:
            single = {f"value_{side}": value.get(each[side], np.nan) for side in "ab"}
            contrast = estimates.contrast(estimates.coefficients(each["pairs"]))
            found.append({"endpoint": endpoint} | each | single | contrast)
    table = pd.DataFrame(found).drop(columns=["pairs", "freedom"])
    table["p_holm"] = table.groupby(["endpoint", "kind"])["p_value"].transform(holm)
    return table
