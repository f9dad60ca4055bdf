"""Do the errors hold on real trainings? The same variants trained again under other seeds: no difference is true.

    python tests/benchmarks/aa_pairs.py runs/seed0 runs/seed1 runs/seed2 ...

Each folder holds the table of held-out predictions of one seed, oof.csv or oof_predictions.csv, as a comparison
writes it (columns variant, repeat, fold, patient, image, label, predicted): the same pictures of the same
patients and the same variants in all of them; the folds may be the same or new ones.

A pair is one variant under two seeds. Its error is the one that a user of the first seed's comparison would have
been given, had the second seed's training been the A/A control: contrast_table's, where the folds are the same.
With new folds the control fits into no cell of the first seed's table, so the training noise is that of the first
seed's variants alone, and only the patients' part comes from both. Disjoint pairs share no training: seeds 1 and
2, 3 and 4, ..., each variant once; they are what is counted. All pairs are given beside them, without an interval,
as they share trainings. Variants of one seed share folds and order of batches, so that their differences may move
together; "together" is the variance of a pair of seeds' mean z over what independent variants would give. In a
comparison, whose variants share the seed, that part cancels; between seeds it does not. So the disjoint pairs are
given less the mean over variants as well and, where the folds are the same, each of their folds by itself: several
times as many differences, of trainings that share nothing but patients.

z is the standard normal value of a pair's p: its RMS is 1 where the intervals are right, over 1 where they promise
too much. The plain quotient, difference over error, is given too: its RMS is over 1 even where all is right, as few
folds and variants leave few degrees of freedom (1.22 with 6, 1.05 with 20).
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from step2.bootstrap import ALPHA, patient_ids
from step2.estimates import satterthwaite
from step2.statistics import compare

COLUMNS = ["variant", "repeat", "fold", "patient", "image", "label", "predicted"]


def read_seed(folder: Path) -> pd.DataFrame:
    """Return a seed's predictions, sorted. SystemExit where there is no table, or more than one."""
    found = [folder / name for name in ("oof.csv", "oof_predictions.csv") if (folder / name).is_file()]
    if len(found) != 1:
        raise SystemExit(f"{folder}: {len(found)} tables oof.csv or oof_predictions.csv, one is needed")
    table = pd.read_csv(found[0], usecols=COLUMNS, dtype={"patient": "string"})
    return table.sort_values(["variant", "repeat", "image"], ignore_index=True)


def check_seeds(tables: Sequence[pd.DataFrame]) -> None:
    """Raise SystemExit unless all tables are of the same variants, pictures, patients and labels."""
    same = ["variant", "repeat", "image", "patient", "label"]
    for number, table in enumerate(tables):
        if not table[same].equals(tables[0][same]):
            raise SystemExit(
                f"folder {number + 1} has other variants, pictures, patients or labels than the first"
            )
    if len(tables) < 2:
        raise SystemExit("one seed: at least two are needed for a pair")


def one_pair(first: pd.DataFrame, second: pd.DataFrame, variant: str, draws: int) -> dict[str, float]:
    """Return the second seed's training of a variant minus the first's, with the error of the docstring, dict."""
    control = second[second["variant"] == variant]
    compared = compare(first, control, draws)
    found, control_pair = compared.found, compared.declared[-1]["pairs"]
    of_first = first.loc[first["variant"] == variant, "fold"]
    if list(control["fold"]) != list(of_first):
        alone = compare(first, None, draws).found
        degrees = (found.freedom[0], *alone.freedom[1:])
        found = replace(found, spread=alone.spread, explained=alone.explained, freedom=degrees)
    return found.contrast(found.coefficients(control_pair))


def pair_rows(tables: Sequence[pd.DataFrame], draws: int, disjoint: bool = False) -> pd.DataFrame:
    """Return all pairs, or the disjoint ones alone, DataFrame.

    Columns: first, second, variant, disjoint, difference, error, freedom, p_value, quotient, z.
    """
    rows = []
    for first, second in combinations(range(len(tables)), 2):
        apart = first % 2 == 0 and second == first + 1
        for variant in tables[0]["variant"].unique() if apart or not disjoint else ():
            row = {"first": first, "second": second, "variant": variant, "disjoint": apart}
            rows.append(row | one_pair(tables[first], tables[second], variant, draws))
    table = pd.DataFrame(rows)
    quotient = table["difference"] / table["error"]
    return table.assign(quotient=quotient, z=z_of(quotient, table["freedom"]))


def less_shared(rows: pd.DataFrame, place: list[str]) -> pd.DataFrame:
    """Return differences less the mean over the variants of each place, and that mean as shared; none of one variant.

    Scaled by sqrt(k / (k - 1)), as the mean of k variants holds a part of each.
    """
    k = rows["variant"].nunique() if len(rows) else 0
    if k < 2:
        return rows.iloc[:0].assign(shared=np.nan)
    shared = rows.groupby(place)["difference"].transform("mean")
    return rows.assign(shared=shared, difference=(rows["difference"] - shared) * np.sqrt(k / (k - 1)))


def fold_rows(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return each fold of the disjoint pairs less the mean over variants, DataFrame; no row where folds differ.

    Columns: first, place (repeat and fold), variant, difference, error, freedom, shared, z. The error is that of
    patients within the fold, and the training noise that contrast_table sees in the first seed's table.
    """
    rows: list[dict] = []
    for first in range(0, len(tables) - 1, 2):
        a, b = tables[first], tables[first + 1]
        if not (a["fold"] == b["fold"]).all():
            continue
        found = compare(a, None, 500).found
        apart = (b["label"] == b["predicted"]).astype(float) - (a["label"] == a["predicted"])
        slices = less_shared(a.assign(difference=apart, patient=patient_ids(a)), ["repeat", "image"])
        for (variant, *place), some in slices.groupby(["variant", "repeat", "fold"]):
            mean, patients = some["difference"].mean(), some["patient"].nunique()
            moved = (some["difference"] - mean).groupby(some["patient"]).sum() / len(some)
            sampling, luck = np.nan, 2 * found.training
            if patients > 1 and (moved**2).sum() > 0:
                sampling = (moved**2).sum() * patients / (patients - 1)
            degrees = satterthwaite(sampling, luck, 2 * found.spread, (patients - 1, *found.freedom[1:]))
            row = {"first": first, "place": tuple(place), "variant": variant, "difference": mean}
            row |= {"error": np.sqrt(sampling + luck), "freedom": float(degrees)}
            rows.append(row | {"shared": some["shared"].mean()})
    table = pd.DataFrame(rows)
    if table.empty:
        return table
    return table.assign(z=z_of(table["difference"] / table["error"], table["freedom"]))


def beyond_shared(tables: Sequence[pd.DataFrame], counted: pd.DataFrame) -> list[str]:
    """Return what is left of pairs and of their folds less what all variants of a seed share, lines.

    counted: the disjoint pairs.
    """
    lines = []
    whole, folds = less_shared(counted, ["first"]), fold_rows(tables)
    whole["z"] = z_of(whole["difference"] / whole["error"], whole["freedom"])
    for name, rows in (("pairs", whole), ("folds of pairs", folds)):
        if rows.empty or rows["z"].isna().all():
            continue
        rows = rows.dropna(subset="z")
        k = rows["variant"].nunique()
        low, high = rms_interval(rows["z"], len(rows) * (k - 1) // k)
        lines.append(
            f"{len(rows)} {name} less what all variants of a seed share: z RMS {rms(rows['z']):.2f} "
            f"({low:.2f} to {high:.2f}), differences {100 * rms(rows['difference']):.2f} points RMS, "
            f"errors {100 * rms(rows['error']):.2f}, shared {100 * rms(rows['shared']):.2f}"
        )
    return lines


def z_of(t: pd.Series, freedom: pd.Series) -> pd.Series:
    """Return the standard normal value of the same probability as Student's t, signed."""
    return np.sign(t) * stats.norm.isf(stats.t.sf(t.abs(), freedom))


def training_sd(tables: Sequence[pd.DataFrame], draws: int) -> float:
    """Return the SD of a training, accuracy, from the mean over seeds of what patients don't explain."""
    seeds = [compare(table, None, draws).found for table in tables]
    return max(float(np.mean([found.spread - found.explained for found in seeds])), 0.0) ** 0.5


def rms(values: pd.Series) -> float:
    """Return the root of the mean square."""
    return float(np.sqrt((values**2).mean()))


def rms_interval(z: pd.Series, freedom: int | None = None) -> tuple[float, float]:
    """Return the 95 % interval of a root mean square, by chi-squared; freedom: where values are not independent."""
    freedom = freedom or len(z)
    low, high = np.sqrt(freedom / stats.chi2.ppf([1 - ALPHA / 2, ALPHA / 2], freedom))
    return rms(z) * low, rms(z) * high


def report(tables: Sequence[pd.DataFrame], pairs: pd.DataFrame, draws: int = 2000) -> list[str]:
    """Return what the pairs and their folds say, lines."""
    one = tables[0]
    folds = [table.groupby("repeat")["fold"].nunique().max() for table in tables]
    known = pairs.dropna(subset="z")
    counted = known[known["disjoint"]]
    lines = [
        f"{len(tables)} seeds of {one['variant'].nunique()} variants, {one['image'].nunique()} slices of "
        f"{one['patient'].nunique()} patients, {max(folds)} folds, {one['repeat'].nunique()} repeats"
    ]
    if len(known) < len(pairs):
        lines.append(f"{len(pairs) - len(known)} of {len(pairs)} pairs without an error, left out")
    if counted.empty:
        return [*lines, "no disjoint pair with an error"]
    low, high = rms_interval(counted["z"])
    wrong, n = int((counted["p_value"] < ALPHA).sum()), len(counted)
    ends = proportion_confint(wrong, n, ALPHA, method="beta")
    per_seeds = counted.groupby("first")["z"]
    together = float((per_seeds.mean() ** 2 * per_seeds.size()).mean()) / rms(counted["z"]) ** 2
    every = [
        f"all {len(known)} pairs, which share trainings: z RMS {rms(known['z']):.2f}, "
        f"false positives {100 * (known['p_value'] < ALPHA).mean():.1f} %"
    ]
    return [
        *lines,
        f"{n} disjoint pairs: z RMS {rms(counted['z']):.2f} (95 % interval {low:.2f} to {high:.2f})",
        f"  false positives at 5 %: {wrong}, {100 * wrong / n:.1f} % ({100 * ends[0]:.1f} to {100 * ends[1]:.1f})",
        f"  difference over error, RMS {rms(counted['quotient']):.2f}",
        f"  differences {100 * rms(counted['difference']):.2f} points RMS, errors given "
        f"{100 * rms(counted['error']):.2f}; together {together:.1f}",
        *beyond_shared(tables, counted),
        *(every if len(known) > n else []),
        f"SD of a training: {100 * training_sd(tables, draws):.2f} points",
    ]


def main() -> None:
    """Print what the pairs of some folders say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--draws", type=int, default=2000, help="bootstrap draws a pair")
    parser.add_argument("--disjoint", action="store_true", help="leave the pairs that share trainings out")
    args = parser.parse_args()
    tables = [read_seed(folder) for folder in args.folders]
    check_seeds(tables)
    print(*report(tables, pair_rows(tables, args.draws, args.disjoint), args.draws), sep="\n")


if __name__ == "__main__":
    main()
