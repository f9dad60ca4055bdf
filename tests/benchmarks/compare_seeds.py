"""Compare variants under several seeds, as the README's figures are made: new folds, weights and order in each.

    python tests/benchmarks/compare_seeds.py --results seeds                                  # as the notebook
    python tests/benchmarks/compare_seeds.py --results s --seeds 0,1,2 --variants all epochs=240 image_size=160

Needs Step 1's pictures. Runs are those of the notebook, trained by --jobs processes (several may share a GPU);
kill it, and the same command goes on. Writes oof.csv, control.csv, history.csv, convergence.csv and testing.csv
into <results>/seed<n>/, and prints accuracies by seed, which runs had not converged, each contrast by seed, and
of all seeds together: there a seed counts as a repeat of the whole cross-validation.
"""

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from step2.convergence import convergence_table, still_learning
from step2.folds import repeat_folds
from step2.network import settle_weights
from step2.pace import end_with_parent
from step2.runs import (
    Comparison,
    Run,
    average_testing,
    collect_history,
    collect_predictions,
    complete_run,
    is_complete,
    make_comparison,
    remove_damaged,
)
from step2.settings import read_settings
from step2.slices import read_slices
from step2.statistics import compare, contrast_table, pair_table, score_testing
from step2.variants import choose_variants


def make(args: argparse.Namespace, seed: int) -> Comparison:
    """Return the comparison of one seed."""
    results = args.results / f"seed{seed}"
    results.mkdir(parents=True, exist_ok=True)
    given = {"profile": args.profile, "data": args.data, "results": results, "seed": seed, "workers": 0}
    given |= {"control_run": not args.no_control, "variants": args.variants, "processes": 1} | dict(
        args.settings
    )
    settings = read_settings(given, gpus=torch.cuda.device_count())
    slices, chosen = read_slices(settings.data), choose_variants(settings.variants, settings.data)
    folds_of = settings.seed if args.folds_of is None else args.folds_of
    fold_of = repeat_folds(slices.training, settings.folds, settings.repeats, folds_of)
    return make_comparison(settings, chosen, slices, fold_of, settle_weights(settings))


def train(comparison: Comparison, run: Run) -> str:
    """Train a run in a process of its own and return a line about it."""
    cv2.setNumThreads(0)
    done = complete_run(comparison, run, lambda epochs: None)
    return f"seed {comparison.settings.seed}  {run}  {done['accuracy']:.3f}  {done['seconds']:.1f} s"


def train_all(comparisons: list[Comparison], jobs: int) -> None:
    """Train what is not trained yet, or was damaged since, fold by fold of every seed."""
    for line in (line for comparison in comparisons for line in remove_damaged(comparison)):
        print(line)
    waiting = [(c, run) for c in comparisons for run in c.runs if not is_complete(c, run)]
    print(f"{sum(len(c.runs) for c in comparisons)} runs, {len(waiting)} of them to train", flush=True)
    began = time.monotonic()
    with ProcessPoolExecutor(jobs, get_context("spawn"), end_with_parent) as pool:
        futures = [pool.submit(train, *each) for each in waiting]
        for count, future in enumerate(as_completed(futures), 1):
            print(f"{time.monotonic() - began:6.0f} s  {count:4}  {future.result()}", flush=True)


def write_tables(comparison: Comparison) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write a seed's tables and return its held-out predictions, without and of the control."""
    folder, history = comparison.settings.results, collect_history(comparison)
    classes = len(comparison.slices.classes)
    tables = {
        "oof": collect_predictions(comparison),
        "control": collect_predictions(comparison, control=True),
        "history": history,
        "convergence": convergence_table(history, comparison.settings.label_smoothing, classes),
    }
    if len(comparison.slices.testing):
        found = {variant: average_testing(comparison, variant) for variant in comparison.variants}
        tables["testing"] = score_testing(
            found, comparison.slices.testing, comparison.slices.training["patient"]
        )
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    return tables["oof"], tables["control"]


def in_points(row: pd.Series) -> str:
    """Return a contrast's difference and interval in points."""
    return f"{100 * row['difference']:.1f} ({100 * row['ci_low']:.1f} to {100 * row['ci_high']:.1f})"


def report(comparisons: list[Comparison]) -> None:
    """Print what all seeds say, each and together."""
    accuracies, contrasts, learning, all_rows = {}, {}, {}, []
    for number, comparison in enumerate(comparisons, 1):
        predictions, control = write_tables(comparison)
        name = f"seed {comparison.settings.seed}"
        right = predictions["label"] == predictions["predicted"]
        accuracies[name] = 100 * right.groupby(predictions["variant"], sort=False).mean()
        convergence = pd.read_csv(comparison.settings.results / "convergence.csv")
        learning[name] = still_learning(convergence)
        table = contrast_table(compare(predictions, control))
        contrasts[name] = table.set_index("contrast").apply(in_points, axis=1)
        all_rows.append(predictions.assign(repeat=number))
    together = compare(pd.concat(all_rows, ignore_index=True))
    if len(comparisons) > 1:
        contrasts["all seeds"] = contrast_table(together).set_index("contrast").apply(in_points, axis=1)
    shown = pd.DataFrame(accuracies)
    print("\nheld-out accuracy, %", shown.assign(mean=shown.mean(axis=1)).round(1).to_string(), sep="\n")
    print("\nstill learning:", {name: list(found) for name, found in learning.items()})
    print("\ndifferences, points (95 % CI)", pd.DataFrame(contrasts).to_string(), sep="\n")
    pairs = pair_table(together)
    if len(pairs):
        pairs["points"] = pairs.apply(in_points, axis=1)
        print(
            "\npairs, all seeds",
            pairs[[c for c in ("step", "a", "b", "points") if c in pairs]].to_string(),
            sep="\n",
        )
    count = comparisons[0].slices.training
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        f"\nn = {len(count)} slices of {count['patient'].nunique()} patients, {len(comparisons)} seeds, {device}"
    )


def value(text: str) -> tuple[str, int | float | str]:
    """Return name and value of name=value."""
    name, _, given = text.partition("=")
    for kind in (int, float):
        try:
            return name, kind(given)
        except ValueError:
            continue
    return name, given


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data_preprocessing"), help="Step 1's output")
    parser.add_argument("--results", type=Path, required=True, help="a folder of its own")
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--seeds", default="0", help="such as 0,1,2 (default: %(default)s)")
    parser.add_argument(
        "--folds-of", type=int, metavar="SEED", help="the same folds for all seeds: this one's"
    )
    parser.add_argument("--variants", default=None, help="as the notebook's parameter, such as 0,1,4 or all")
    parser.add_argument("--jobs", type=int, default=1, help="processes that train (default: %(default)s)")
    parser.add_argument("--no-control", action="store_true", help="without the A/A control")
    parser.add_argument("settings", type=value, nargs="*", metavar="NAME=VALUE", help="other parameters")
    args = parser.parse_args()
    comparisons = [make(args, int(seed)) for seed in args.seeds.split(",")]
    train_all(comparisons, args.jobs)
    np.set_printoptions(linewidth=200)
    pd.set_option("display.width", 250)
    report(comparisons)


if __name__ == "__main__":
    main()
