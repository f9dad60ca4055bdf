"""What a comparison costs and what it could find, before it is trained.

    python -m step2.plan                                   # the pictures in data_preprocessing, this machine
    python -m step2.plan --profile full --slices 6000 --patients 2000 --gpu T4      # a machine that isn't here

Hours come from training steps of the real network at its real size, timed on this device (on a CPU in as
many processes as will train); where that can't be, from its floating-point operations or from what it moves
through a GPU's memory, and the table says so. What it could find comes from the formulas of the statistics,
under assumptions.
"""

import argparse
import math
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch

from Step1_Image_Preprocessing import variant_names, whole_number
from step2.files import write_csv
from step2.pace import GPUS, Pace, estimate_pace, measure_paces
from step2.pictures import steps_per_epoch
from step2.power import detectable_points
from step2.settings import PROFILES, Settings, read_settings
from step2.slices import Slices, read_slices
from step2.speed import gpu_memory
from step2.training import is_judged
from step2.variants import VARIANTS, choose_variants

SESSION_H, WEEK_H = 12, 30  # Kaggle's, of a session with a GPU and of a week; Colab's sessions are no longer
A_DAY = 24


@dataclass(frozen=True)
class Size:
    """What would be compared: slices, their patients, variants; control: one of them again.

    unequal: how unequal patients' numbers of slices are, as detectable_points takes it.
    """

    slices: int
    patients: int
    variants: int
    control: bool = True
    unequal: float = 1.0


def size_of(slices: Slices, variants: Sequence[str], control: bool) -> Size:
    """Return the size of a comparison; without patients' ids each slice counts as a patient of its own."""
    counts = slices.training.groupby("patient").size()
    unequal = float((counts**2).mean() / counts.mean() ** 2)
    return Size(int(counts.sum()), len(counts), len(variants), control, unequal)


def choices(settings: Settings, size: Size) -> list[tuple[str, Settings, Size]]:
    """Return what one could sensibly train, (what differs, settings, size): what is set comes first."""

    def other(**changed: Any) -> Settings:
        return settings.model_copy(update=changed)

    found = [("as set", settings, size)]
    found += [(f"folds {k}", other(folds=k), size) for k in (1, 3, 5) if k != settings.folds]
    found += [(f"repeats {r}", other(repeats=r), size) for r in (1, 3) if r != settings.repeats]
    for part, share in (("third", 1 / 3), ("tenth", 1 / 10)):
        fewer = replace(size, slices=round(size.slices * share), patients=round(size.patients * share))
        found.append((f"a {part} of the slices", settings, fewer))
    passed_over = {settings.profile, "quick" if settings.gpus else ""}  # quick is for CPUs
    others = [name for name in PROFILES if name not in passed_over]
    return found + [(f"profile {name}", other(**PROFILES[name], profile=name), size) for name in others]


def plan_table(settings: Settings, size: Size, gpu: str | None = None) -> pd.DataFrame:
    """Return what each choice costs and could find, DataFrame; the first row is what is set.

    Columns: choice, profile, folds, repeats, slices, patients, runs, pictures (to train), hours, memory_gb (of a
    step, in each process), batch_size, at_a_time (slices of it), disk_gb, detectable (points of accuracy), basis,
    loaded_per_s and trained_per_s (pictures, of one process).
    gpu: the name of one that is not here.
    """
    rows = choices(settings, size)
    profiles = {s.profile: s for _, s, _ in rows}
    several = list(profiles.values())
    found = [estimate_pace(s, gpu) for s in several] if gpu else measure_paces(several)
    paces = dict(zip(profiles, found, strict=True))
    return pd.DataFrame([plan_row(*row, paces[row[1].profile]) for row in rows])


def plan_row(choice: str, settings: Settings, size: Size, pace: Pace) -> dict[str, Any]:
    """Return one choice's row of plan_table."""
    folds, repeats = settings.folds, settings.repeats
    runs = (size.variants + size.control) * folds * repeats
    held_out = round(size.slices / (folds if folds > 1 else 5))
    steps = steps_per_epoch(size.slices - held_out, settings.batch_size)
    trained = min(steps * settings.batch_size, size.slices - held_out) * settings.epochs
    judged = held_out * sum(is_judged(epoch, settings.epochs) for epoch in range(settings.epochs))
    forward = replace(pace, train=pace.train / 3).seconds(settings.workers)
    processes, basis = min(settings.processes, runs), pace.basis
    if settings.cluster:
        processes, basis = 1, f"{basis}; hours of one worker of the cluster, several share them"
    one_after_another = math.ceil(runs / processes)  # nine runs by eight processes take as long as sixteen
    seconds = one_after_another * (trained * pace.seconds(settings.workers) + judged * forward)
    # of each run its weights, of each process a checkpoint
    disk = (2 * runs + 12 * processes) * pace.weights
    tested = size.patients if folds > 1 else round(size.patients / 5)  # of a single split, one side
    each = size.slices / max(size.patients, 1)
    points = detectable_points(
        tested, each, folds, repeats, size.variants, control=size.control, unequal=size.unequal
    )
    return {
        **{"choice": choice, "profile": settings.profile},
        **{"folds": folds, "repeats": repeats},
        **{"slices": size.slices, "patients": size.patients, "runs": runs, "pictures": runs * trained},
        **{"hours": seconds / 3600, "memory_gb": pace.memory / 1e9},
        **{"batch_size": settings.batch_size, "at_a_time": pace.part},
        **{"disk_gb": disk / 1e9, "detectable": points, "basis": basis},
        **{"loaded_per_s": 1 / pace.load if pace.load else np.nan, "trained_per_s": 1 / pace.train},
    }


def room_here(settings: Settings, folders: Iterable[Path] = ()) -> tuple[float, float]:
    """Return the bytes that are free where results go, or taken by weights of these folders' runs, and those of
    memory for each process: infinite on a GPU or a cluster."""
    settings.results.mkdir(parents=True, exist_ok=True)
    taken = sum(path.stat().st_size for folder in folders for path in folder.glob("*.pt"))
    memory = psutil.virtual_memory().available / settings.processes
    disk = shutil.disk_usage(settings.results).free + taken
    return disk, math.inf if settings.gpus or settings.cluster else memory


def plan_in_words(
    table: pd.DataFrame, disk: float = math.inf, memory: float = math.inf, session: float | None = None
) -> list[str]:
    """Return sentences about what is set, the plan's first row: what takes long, doesn't fit, or could find little.

    disk, memory: as room_here tells. session: max_hours, where it is set.
    """
    row = table.iloc[0]
    hours, part, batch, finds = (row[name] for name in ("hours", "at_a_time", "batch_size", "detectable"))
    took = f"about {60 * hours:.0f} minutes" if hours < 1.5 else f"about {hours:.1f} hours"
    took = took if hours > 1 / 60 else "less than a minute"
    trained = f"{row['runs']} runs train {row['pictures']:,} pictures in {took} ({row['basis']})"
    if hours > A_DAY:
        trained += f": {hours / A_DAY:.1f} days; think of fewer slices, folds, or another profile"
    limit, advice = session or SESSION_H, "" if session else "set max_hours, and "
    ends = f"where a session ends after {limit:g} hours, that is {math.ceil(hours / limit)} of them (of Kaggle's "
    ends += f"{WEEK_H} GPU hours a week, {hours / WEEK_H:.1f} weeks): {advice}run again each time, it goes on"
    too_large = "a single slice doesn't fit in the GPU's memory: lower image_size or choose another profile"
    in_parts = f"memory holds {part} of a batch's {batch} slices: it is taken in parts"
    waits = "loading pictures takes longer than training: raise the parameter workers"
    needs = f"each process needs {row['memory_gb']:.1f} GB of memory and has {memory / 1e9:.1f}"
    full = f"results take {row['disk_gb']:.1f} GB, and there is room for {disk / 1e9:.1f} GB: make more first"
    again = ", and training again moves accuracy by 1 point" * bool(row["folds"] * row["repeats"] > 1)
    found = f"a difference of {finds:.1f} points in accuracy would be found in 8 of 10 such comparisons "
    found += f"(if two variants differ on a fifth of the slices{again})"
    alone = "* a single split can't tell how much trainings differ: this is for its networks alone"
    said = {
        trained: True,
        ends: hours > limit,
        too_large: part < 1,
        in_parts: 1 <= part < batch,
        waits: row["trained_per_s"] > row["loaded_per_s"],
        f"{needs}: lower processes or batch_size": row["memory_gb"] * 1e9 > memory,
        full: row["disk_gb"] * 1e9 > disk,
        "with so few patients, or a single variant, no difference could be found": np.isnan(finds),
        found: not np.isnan(finds),
        alone: (table["detectable"].notna() & (table["folds"] * table["repeats"] == 1)).any(),
    }
    return [sentence for sentence, holds in said.items() if holds]


def plan_to_show(table: pd.DataFrame) -> pd.DataFrame:
    """Return the columns to read, rounded as far as they are known."""
    shown = table.set_index("choice")
    finds = shown["detectable"].map("{:.1f}".format)
    finds += np.where(shown["folds"] * shown["repeats"] == 1, " *", "")  # says nothing about trainings
    return (
        shown[["profile", "folds", "repeats", "slices", "patients", "runs", "pictures", "hours"]]
        .assign(
            hours=shown["hours"].map(lambda hours: f"{hours:.2g}" if hours < 10 else f"{hours:,.0f}"),
            **{"memory, GB": shown["memory_gb"].map("{:.1f}".format), "at a time": shown["at_a_time"]},
            **{"disk, GB": shown["disk_gb"].map("{:.1f}".format)},
            **{"finds, points": finds},
            known=shown["basis"],
        )
        .replace(["nan", "nan *"], "-")
    )


def main() -> None:
    """Print the plan of a comparison and write it to plan.csv in the results folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", default="auto", help=", ".join(("auto", *PROFILES)))
    parser.add_argument("--data", type=Path, default=Path("data_preprocessing"), help="Step 1's output")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where plan.csv goes")
    parser.add_argument("--variants", default=None, help="such as 0,1,4 or all (default: the seven)")
    parser.add_argument("--slices", type=whole_number, help="plan for so many instead of those in --data")
    parser.add_argument("--patients", type=whole_number, help="their patients (default: half as many)")
    parser.add_argument("--gpu", type=str.upper, choices=GPUS, help="one that is not here")
    args = parser.parse_args()
    if args.patients and not args.slices:
        parser.error("--patients needs --slices too")
    if args.patients and args.patients > args.slices:
        parser.error(f"{args.patients} patients of {args.slices} slices: each patient has at least one slice")
    try:
        gpus, memory = torch.cuda.device_count(), gpu_memory()
        if args.gpu:
            gpus, memory = 1, GPUS[args.gpu][2] * 1e9
        given = {"profile": args.profile, "weights": "none", "results": args.results}
        settings = read_settings(given, gpus, memory)
        if args.slices:
            asked = set(variant_names(args.variants) if args.variants else VARIANTS)
            size = Size(args.slices, args.patients or args.slices // 2, len(asked))
        else:
            slices, chosen = read_slices(args.data), choose_variants(args.variants, args.data)
            size = size_of(slices, chosen, control=True)
        args.results.mkdir(parents=True, exist_ok=True)
        table = plan_table(settings, size, args.gpu)
        write_csv(args.results / "plan.csv", table)
    except (OSError, RuntimeError, ValueError, argparse.ArgumentTypeError) as err:
        sys.exit(str(err))
    print(f"{settings.profile} profile: {settings.why}")
    print(plan_to_show(table).to_string())
    print(*plan_in_words(table, *room_here(settings)), sep="\n")


if __name__ == "__main__":
    main()
