"""Damage the files below results/ at random, run again, and see that no number ever differs.

    python tests/benchmarks/fuzz_results.py                       # 300 damages, seed 0
    python tests/benchmarks/fuzz_results.py --damages 20 --seed 1

A small comparison (tiny pictures, 2 variants, 2 folds, 2 epochs) is trained once whole, and once until it is
stopped within its second run. Each time a copy of either gets one of its files truncated, emptied, deleted,
some of its bytes flipped, or swapped with another file. The next run, by the functions that the notebook's
cells call, must end with the undisturbed tables byte for byte, or with a sentence that names a damaged file
and helps: with that file deleted, the tables must come out. Prints a tally; exit status 1 where any run did
neither.
"""

import argparse
import collections
import contextlib
import io
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from step2_helpers import make_settings, write_pictures

from step2 import training
from step2.engine import train_all
from step2.files import lock_results
from step2.folds import repeat_folds
from step2.network import settle_weights
from step2.report import Report, describe_runs, make_caption
from step2.runs import average_testing, collect_history, collect_predictions, make_comparison
from step2.slices import read_slices
from step2.variants import choose_variants

TIMES = ["seconds", "images_per_s"]  # columns of the history that differ from run to run


def run_notebook(data: Path, results: Path) -> None:
    """Do what the notebook's cells do, but for most figures."""
    settings = make_settings(data=data, results=results, weights="auto")
    lock = lock_results(settings.results)
    try:
        chosen, slices, initial = choose_variants(None, data), read_slices(data), settle_weights(settings)
        fold_of = repeat_folds(slices.training, settings.folds, settings.repeats, settings.seed)
        comparison = make_comparison(settings, chosen, slices, fold_of, initial)
        report = Report(
            settings.results, make_caption(comparison, ""), slices.patient_level, comparison.identity()
        )
        report.write("variants.png", b"a figure that is there before any training")
        train_all(comparison)
        predictions = collect_predictions(comparison)
        report.csv(predictions, "oof_predictions.csv")
        report.csv(collect_history(comparison), "history.csv")
        report.json(describe_runs(comparison), "settings.json")
        for variant in chosen:
            report.csv(average_testing(comparison, variant), f"testing_predictions_{variant}.csv")
    finally:
        lock.release()


def stop_in_second_run(data: Path, results: Path) -> None:
    """Do the same, but end as a kill would after the first epoch of the second run."""
    train_epoch, epochs = training.train_epoch, []

    def stop(trainer, batches, steps, truth, epoch, tell):
        epochs.append(epoch)
        if len(epochs) == 4:
            raise KeyboardInterrupt
        return train_epoch(trainer, batches, steps, truth, epoch, tell)

    training.train_epoch = stop
    with contextlib.suppress(KeyboardInterrupt):
        run_notebook(data, results)
    training.train_epoch = train_epoch


def tables_of(results: Path) -> dict[str, bytes]:
    """Return the files that a comparison wrote for people, by name, without what depends on the clock."""
    found = {p.name: p.read_bytes() for p in results.iterdir() if p.is_file() and p.name[0] != "."}
    history = pd.read_csv(io.BytesIO(found["history.csv"])).drop(columns=TIMES)
    found["history.csv"] = history.to_csv().encode()
    return {name: content for name, content in found.items() if name != "settings.json"}


# ---------------------------------------- damages


def truncate(paths: list[Path], rng: np.random.Generator) -> list[Path]:
    """Cut the first file at a random place."""
    content = paths[0].read_bytes()
    paths[0].write_bytes(content[: rng.integers(len(content))] if content else b"")
    return paths[:1]


def empty(paths: list[Path], rng: np.random.Generator) -> list[Path]:
    """Leave nothing of the first file."""
    paths[0].write_bytes(b"")
    return paths[:1]


def delete(paths: list[Path], rng: np.random.Generator) -> list[Path]:
    """Delete the first file."""
    paths[0].unlink()
    return paths[:1]


def flip(paths: list[Path], rng: np.random.Generator) -> list[Path]:
    """Change 1 to 8 bytes of the first file."""
    content = bytearray(paths[0].read_bytes())
    for place in rng.integers(len(content), size=rng.integers(1, 9)) if content else ():
        content[place] ^= int(rng.integers(1, 256))
    paths[0].write_bytes(content)
    return paths[:1]


def swap(paths: list[Path], rng: np.random.Generator) -> list[Path]:
    """Exchange two files."""
    first, second = (path.read_bytes() for path in paths[:2])
    paths[0].write_bytes(second)
    paths[1].write_bytes(first)
    return paths[:2]


DAMAGES: tuple[Callable[[list[Path], np.random.Generator], list[Path]], ...] = (
    *(truncate, empty, delete, flip, swap),
)


# ---------------------------------------- the next run


def outcome(data: Path, results: Path, damaged: list[Path], expected: dict[str, bytes]) -> str:
    """Run again and return what came of it; what is wrong starts with WRONG."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            run_notebook(data, results)
    except (ValueError, RuntimeError, OSError) as err:
        named = [path for path in damaged if path.name in str(err)]
        if not named:
            return f"WRONG: {type(err).__name__} that names no damaged file: {err}\n{traceback.format_exc()}"
        for path in named:
            path.unlink(missing_ok=True)
        again = outcome(data, results, [], expected)
        return again if again.startswith("WRONG") else "refused by name"
    except Exception:  # noqa: BLE001 - that is what is looked for
        return f"WRONG: {traceback.format_exc()}"
    found = tables_of(results)
    differing = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
    if differing:
        return f"WRONG: {', '.join(differing)} differ"
    left = [p.name for p in results.rglob("*") if p.suffix == ".tmp" or p.name == "checkpoint.pt"]
    if left:
        return f"WRONG: {left} stay"
    return "the same tables, and a line" if "damaged" in said.getvalue() else "the same tables"


def main() -> int:
    """Fuzz, print the tally, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--damages", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng, began, wrong = np.random.default_rng(given.seed), time.monotonic(), 0
    tally: collections.Counter[tuple[str, str]] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        data, finished, half = (Path(folder) / name for name in ("data", "finished", "half"))
        write_pictures(data, per_class=2)
        with contextlib.redirect_stdout(io.StringIO()):
            run_notebook(data, finished)
            stop_in_second_run(data, half)
        assert list(half.glob("runs/*/*/checkpoint.pt")) and list(half.glob("runs/*/*/done.json"))
        expected = tables_of(finished)
        for number in range(given.damages):
            state, damage = (finished, half)[number % 2], DAMAGES[number // 2 % len(DAMAGES)]
            results = Path(folder) / "results"
            shutil.copytree(state, results)
            paths = sorted(p for p in results.rglob("*") if p.is_file())
            damaged = damage([paths[i] for i in rng.permutation(len(paths))], rng)
            found = outcome(data, results, damaged, expected)
            if found.startswith("WRONG"):
                wrong += 1
                names = ", ".join(str(path.relative_to(results)) for path in damaged)
                print(f"{number}, {state.name}: {damage.__name__} {names}: {found}", flush=True)
                found = "WRONG"
            tally[damage.__name__, found] += 1
            shutil.rmtree(results)
    table = pd.Series(tally).unstack(fill_value=0)
    table.loc["together"] = table.sum()
    print(table.to_string())
    print(f"{given.damages} damages, {wrong} of them wrong, {time.monotonic() - began:.0f} s")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
