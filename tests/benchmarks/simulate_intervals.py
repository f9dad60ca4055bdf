"""Are the intervals right? Tables with a known truth, through the functions that the notebook calls.

    python tests/benchmarks/simulate_intervals.py                       # every setting, 2,000 tables each
    python tests/benchmarks/simulate_intervals.py --tables 200 --patients 52
    python tests/benchmarks/simulate_intervals.py --proportions         # a single variant's accuracy, of patients alone

A probit model: a slice is right where a normal score lies below a threshold. The score's variance is 0.40 the
patient's, 0.15 the patient's for this variant (so that differences cluster), 0.30 the slice's, 0.15 the call's
own. Each training (variant, fold) shifts the threshold by chance, by an SD of so many points of accuracy near
its 60 %. Seven variants and a control, patients of 1 to 3 slices. --unequal: variants 2 and 3 are twins, which
share most of what is their own, as CLAHE and CLAHE + bilateral do. --variants: only the first ones and the control.

Printed for each setting, in % of the tables, for the contrasts with the first variant: one, false positives of
a single contrast; alone, the same for an error of patients alone, which takes the trained networks as given;
twins, false positives of variant 2 against 3; family, Holm's family-wise error, and that of patients alone;
covered, intervals that hold a true difference of 5 points; best, best sets that hold the variant that is truly
best, by 2 points; width, of an interval over that of patients alone, and of the twins'; SD found, of a training,
points.
"""

import argparse
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import special
from scipy.stats import norm, t

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from step2.bootstrap import sum_by_patient
from step2.estimates import Cells, Estimates, degrees_of_freedom, find_cells, interaction, mean_estimates
from step2.metrics import proportion_interval
from step2.statistics import best_set, holm

VARIANTS = 7  # and a control of the first
OWN, CALL, TWINS = 0.15, 0.15, 0.85  # variances; the share of theirs that twins have in common
BEST_DRAWS = 4_000  # of the best set's quantile: fewer than for users, right on average


def simulate(
    rng: np.random.Generator,
    patients: int,
    folds: int,
    sd: float,
    gains: np.ndarray,
    unequal: bool = False,
    repeats: int = 1,
    new_folds: bool = True,
    noisy: int = VARIANTS,
) -> tuple[pd.DataFrame, np.ndarray]:
    """Return rows (patient, int, image, repeat, fold) and right or wrong, float (rows, variants and control).

    sd: of a training, accuracy, of the first `noisy` variants and the control; the others have none. gains: of
    each variant over 0.6, accuracy. new_folds: in each repeat.
    """
    codes = np.repeat(np.arange(patients), rng.integers(1, 4, patients))
    n, k = len(codes), VARIANTS + 1
    own = own_noise(rng, (patients, k), unequal)
    own[:, -1] = own[:, 0]  # the control sees the first variant's pictures
    score = np.sqrt(0.40) * rng.normal(size=(patients, 1))[codes] + np.sqrt(0.30) * rng.normal(size=(n, 1))
    score = score + np.sqrt(OWN) * own[codes]
    tables, right = [], []
    for repeat in range(repeats):
        if new_folds or repeat == 0:
            fold = (rng.permutation(patients) % folds)[codes]
        shift = sd * rng.normal(size=(folds, k))
        shift[:, noisy:VARIANTS] = 0
        threshold = norm.ppf(np.clip(0.6 + np.r_[gains, gains[0]] + shift, 0.02, 0.98))[fold]
        call = np.sqrt(CALL) * own_noise(rng, (n, k), unequal)
        right.append((score + call < threshold).astype(float))
        rows = {"patient": codes, "image": np.arange(n), "repeat": repeat, "fold": fold}
        tables.append(pd.DataFrame(rows))
    return pd.concat(tables, ignore_index=True), np.concatenate(right)


def own_noise(rng: np.random.Generator, shape: tuple[int, int], unequal: bool) -> np.ndarray:
    """Return standard normal noise of each variant (second axis), float; unequal: twins share most of theirs."""
    noise = rng.normal(size=shape)
    if unequal:
        shared = rng.normal(size=(len(noise), 1))
        noise[:, 2:4] = np.sqrt(1 - TWINS) * noise[:, 2:4] + np.sqrt(TWINS) * shared
    return noise


def linearised(names: list[str], right: np.ndarray, cells: Cells) -> Estimates:
    """Return mean_estimates as of endless bootstrap draws: each patient's influence takes their place.

    For tables where all variants were tested in all cells. (Infinitesimal jackknife; Efron and Tibshirani 1993.)
    """
    n, k, places = cells.patients, len(names), cells.shape[0] * cells.shape[1]
    values, where = right.mean(0), cells.codes * places + cells.cell
    moved = sum_by_patient(right - values, cells.codes) / len(right)
    covariance = moved.T @ moved * n / (n - 1)
    counts = np.bincount(cells.cell, minlength=places)
    means = sum_by_patient(right, cells.cell) / counts[:, None]
    influence = sum_by_patient((right - means[cells.cell]) / counts[cells.cell, None], where, n * places)
    influence = influence.reshape(n, *cells.shape, k).transpose(0, 3, 1, 2)
    freedom = degrees_of_freedom(n, k, places)
    of_fold = n / cells.shape[1]
    sampling = interaction(influence).sum() * of_fold / (of_fold - 1) / freedom[1]
    spread = interaction(means.T.reshape(k, *cells.shape)) / freedom[1]
    share = float(((counts / len(right)) ** 2).sum())
    return Estimates(tuple(names), values, covariance, float(spread), float(sampling), share, freedom)


def estimates(names: list[str], rows: pd.DataFrame, right: np.ndarray, draws: int, seed: int) -> Estimates:
    """Return mean_estimates of so many bootstrap draws, or linearised with 0."""
    if draws:
        return mean_estimates(names, right, find_cells(rows), draws, seed)
    patient, repeat, fold = rows[["patient", "repeat", "fold"]].to_numpy().T
    shape = (int(repeat.max()) + 1, int(fold.max()) + 1)
    return linearised(names, right, Cells(patient, repeat * shape[1] + fold, shape))


def contrasts(found: Estimates, names: list[str]) -> tuple[list[dict], list[dict]]:
    """Return the contrasts with the first variant, and that of the twins, if they are there."""
    against = [found.contrast(found.coefficients([(name, names[0])])) for name in names[1:]]
    return against, [found.contrast(found.coefficients([(names[2], names[3])]))] if len(names) > 3 else []


def patients_alone(row: dict, freedom: int) -> dict[str, float]:
    """Return the p of a contrast, had it no error but that of the patients."""
    return {"p_value": 2 * special.stdtr(freedom, -abs(row["difference"]) / row["patient_error"])}


def width_of(row: dict, freedom: int) -> tuple[float, float]:
    """Return the width of a contrast's interval, and of one that has no error but that of the patients."""
    return row["ci_high"] - row["ci_low"], 2 * special.stdtrit(freedom, 0.975) * row["patient_error"]


def one_setting(
    patients: int,
    folds: int,
    sd: float,
    tables: int,
    draws: int,
    unequal: bool,
    seed: int = 0,
    variants: int = VARIANTS,
    repeats: int = 1,
    noisy: int = VARIANTS,
) -> dict[str, float]:
    """Return what the docstring lists, for one setting, as a dict."""
    rng = np.random.default_rng([patients, folds, round(1e4 * sd), unequal, seed])
    names, columns = [f"v{i}" for i in range(variants)], [*range(variants), VARIANTS]
    best_one = min(4, variants - 1)

    def one_table(gains: np.ndarray, number: int) -> Estimates:
        rows, right = simulate(rng, patients, folds, sd, gains, unequal, repeats, noisy=noisy)
        return estimates([*names, "control"], rows, right[:, columns], draws, number)

    shares = ("one", "alone", "twins", "family", "family alone", "covered", "best")
    known: dict[str, list] = {key: [] for key in (*shares, "width", "twins width", "sd")}
    for number in range(tables):
        gain = 0.05 * (number % 2)  # every second table has a true difference
        gains = np.r_[0, np.full(VARIANTS - 1, gain)]
        found = one_table(gains, number)
        both, twins = contrasts(found, names)
        alone = [patients_alone(row, found.freedom[0]) for row in both]
        known["width"] += [width_of(row, found.freedom[0]) for row in both]
        known["twins width"] += [width_of(row, found.freedom[0]) for row in twins]
        known["sd"].append(found.spread - found.explained)
        known["twins"] += [row["p_value"] < 0.05 for row in twins]
        if gain:
            known["covered"] += [row["ci_low"] <= gain <= row["ci_high"] for row in both]
            guess = one_table(0.02 * (np.arange(VARIANTS) == best_one), number)  # truly the best, by little
            best = best_set(guess, names, number, BEST_DRAWS).set_index("variant")
            known["best"].append(best.loc[names[best_one], "in_best_set"])
            continue
        for key, several in (("one", both), ("alone", alone)):
            p = pd.Series([row["p_value"] for row in several])
            known[key] += list(p < 0.05)
            known["family" if key == "one" else "family alone"].append((holm(p) <= 0.05).any())
    widths = {key: np.mean(known[key] or [(np.nan, 1)], axis=0) for key in ("width", "twins width")}
    spread = np.sqrt(max(np.mean(known["sd"]), 0))
    percent = {key: 100 * float(np.mean(known[key] or np.nan)) for key in shares}
    ratios = {key: float(ours / patients) for key, (ours, patients) in widths.items()}
    return percent | ratios | {"sd": 100 * float(spread)}


def proportions(tables: int, seed: int) -> None:
    """Print how often intervals of a proportion hold it, in %, and how wide they are, in points: those that the
    notebook gives, and value +- t * error, with the former at 0 and 1.

    Each patient of 1 to 3 slices has a chance of its own, from a beta distribution; alike is the slices' correlation.
    """
    rng = np.random.default_rng(seed)
    print("patients  alike  share | Wilson's, width | value +- t * error, width")
    for patients, alike, share in product(
        (10, 20, 63, 213), (0.05, 0.2, 0.4, 0.8), (0.17, 0.5, 0.8, 0.9, 0.95, 0.98)
    ):
        a, b = (part * (1 - alike) / alike for part in (share, 1 - share))
        slices = rng.integers(1, 4, (tables, patients))
        right = rng.binomial(slices, rng.beta(a, b, slices.shape))
        value = right.sum(1) / slices.sum(1)
        left = ((right - value[:, None] * slices) ** 2).sum(1) ** 0.5
        error = left / slices.sum(1) * (patients / (patients - 1)) ** 0.5
        wilson = proportion_interval(value, error, patients - 1, patients)
        reach = t.ppf(0.975, patients - 1) * error
        plain = np.maximum(value - reach, 0), np.minimum(value + reach, 1)
        usual = [np.where(np.isin(value, (0, 1)), *both) for both in zip(wilson, plain, strict=True)]
        found = [100 * np.mean((low <= share) & (share <= high)) for low, high in (wilson, usual)]
        width = [100 * np.mean(high - low) for low, high in (wilson, usual)]
        line = f"{found[0]:9.1f} {width[0]:5.0f} | {found[1]:9.1f} {width[1]:5.0f}"
        print(f"{patients:8} {alike:6} {share:6} | {line}", flush=True)


def main() -> None:
    """Print a line for each setting."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", type=int, default=2000, help="a setting; half have a true difference")
    parser.add_argument("--draws", type=int, default=0, help="bootstrap draws a table; 0: their limit")
    parser.add_argument("--patients", type=int, nargs="+", default=[52, 500, 3000])
    parser.add_argument("--folds", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--sd", type=float, nargs="+", default=[0, 0.5, 1, 2], help="of a training, points")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", type=int, choices=range(2, VARIANTS + 1), default=VARIANTS)
    parser.add_argument("--repeats", type=int, default=1, help="of the cross-validation, with new folds")
    parser.add_argument("--noisy", type=int, default=VARIANTS, help="variants whose trainings have that SD")
    parser.add_argument("--unequal", action="store_true", help="variants 2 and 3 are twins")
    parser.add_argument("--proportions", action="store_true", help="only those of a single proportion")
    args = parser.parse_args()
    if args.proportions:
        proportions(args.tables, args.seed)
        return
    print("patients folds SD | one  alone twins family alone | covered best | width twins | SD", flush=True)
    for patients in args.patients:
        for folds in args.folds:
            for sd in args.sd:
                how = (args.tables, args.draws, args.unequal, args.seed, args.variants, args.repeats)
                r = one_setting(patients, folds, sd / 100, *how, noisy=args.noisy)
                print(
                    f"{patients:8} {folds:5} {sd:3} | {r['one']:4.1f} {r['alone']:5.1f} {r['twins']:5.1f} "
                    f"{r['family']:6.1f} {r['family alone']:5.1f} | {r['covered']:7.1f} {r['best']:4.1f} | "
                    f"{r['width']:5.3f} {r['twins width']:5.3f} | {r['sd']:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
