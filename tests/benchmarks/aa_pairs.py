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
comparison, whose variants share the seed, that part cancels; between seeds it does not. So, where the folds are
the same, each fold of each disjoint pair is given by itself as well, less the mean over variants: what is left
is what a contrast of two variants meets, in three or five times as many differences.

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
from step2.bootstrap import ALPHA
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
        found = replace(found, spread=alone.spread, sampling=alone.sampling, freedom=degrees)
    return found.contrast(found.coefficients(control_pair)) | {"excess": found.spread - found.sampling}


def pair_rows(tables: Sequence[pd.DataFrame], draws: int, disjoint: bool = False) -> pd.DataFrame:
    """Return all pairs, or the disjoint ones alone, DataFrame.

    Columns: first, second, variant, disjoint, difference, error, p_value, excess, quotient, z.
    """
    rows = []
    for first, second in combinations(range(len(tables)), 2):
        apart = first % 2 == 0 and second == first + 1
        for variant in tables[0]["variant"].unique() if apart or not disjoint else ():
            row = {"first": first, "second": second, "variant": variant, "disjoint": apart}
            rows.append(row | one_pair(tables[first], tables[second], variant, draws))
    table = pd.DataFrame(rows)
    z = np.sign(table["difference"]) * stats.norm.isf(table["p_value"] / 2)
    return table.assign(quotient=table["difference"] / table["error"], z=z)


def fold_rows(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return each fold of the disjoint pairs less the mean over variants, DataFrame; no row where folds differ.

    Columns: first, variant, fold, difference, error, z, shared (that mean). The error is that of patients within
    the fold, and the training noise that contrast_table sees in the first seed's table.
    """
    rows: list[dict] = []
    for first in range(0, len(tables) - 1, 2):
        a, b = tables[first], tables[first + 1]
        if not (a["fold"] == b["fold"]).all():
            continue
        luck = 2 * compare(a, None, 500).found.training
        right = [(t["label"] == t["predicted"]).astype(float) for t in (a, b)]
        for place, some in a.assign(apart=right[1] - right[0]).groupby(["variant", "repeat", "fold"]):
            mean, patients = some["apart"].mean(), some["patient"].nunique()
            moved = (some["apart"] - mean).groupby(some["patient"]).sum() / len(some)
            variance = (moved**2).sum() * patients / (patients - 1)
            found = {"first": first, "variant": place[0], "fold": place[1:], "difference": mean}
            rows.append(found | {"error": np.sqrt(variance + luck), "freedom": patients - 1})
    table = pd.DataFrame(rows)
    if table.empty:
        return table
    table["shared"] = table.groupby(["first", "fold"])["difference"].transform("mean")
    k = table["variant"].nunique()
    table["difference"] = (table["difference"] - table["shared"]) * np.sqrt(
        k / (k - 1)
    )  # the mean holds a part
    t = table["difference"] / table["error"].where(table["error"] > 0)
    return table.assign(z=np.sign(t) * stats.norm.isf(stats.t.sf(t.abs(), table["freedom"])))


def in_folds(folds: pd.DataFrame) -> list[str]:
    """Return what fold_rows says, lines; none of one variant, whose mean it is."""
    if folds.empty or folds["variant"].nunique() == 1:
        return []
    z = folds["z"].dropna()
    low, high = rms_interval(z)
    k = folds["variant"].nunique()
    shared = folds.groupby(["first", "fold"])["shared"].first()
    beyond = (shared**2).mean() - (folds["difference"] ** 2).mean() / k  # what k variants' chance leaves
    return [
        f"{len(z)} folds of these, less what all variants share: z RMS {rms(z):.2f} ({low:.2f} to {high:.2f})",
        f"  differences {100 * rms(folds['difference']):.2f} points RMS, errors {100 * rms(folds['error']):.2f}; "
        f"shared by the variants of a seed: {100 * np.sqrt(max(beyond, 0) / 2):.2f} points a training",
    ]


def rms(values: pd.Series) -> float:
    """Return the root of the mean square."""
    return float(np.sqrt((values**2).mean()))


def rms_interval(z: pd.Series) -> tuple[float, float]:
    """Return the 95 % interval of independent values' root mean square, by chi-squared."""
    low, high = np.sqrt(len(z) / stats.chi2.ppf([1 - ALPHA / 2, ALPHA / 2], len(z)))
    return rms(z) * low, rms(z) * high


def report(tables: Sequence[pd.DataFrame], pairs: pd.DataFrame) -> list[str]:
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
    sd = np.sqrt(max(pairs.groupby("first")["excess"].mean().mean(), 0))
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
        *in_folds(fold_rows(tables)),
        *(every if len(known) > n else []),
        f"SD of a training: {100 * sd:.2f} points, from the mean over seeds of what patients don't explain",
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
    print(*report(tables, pair_rows(tables, args.draws, args.disjoint)), sep="\n")


if __name__ == "__main__":
    main()
