"""What a comparison costs and what it could find, before it is trained.

    python -m step2.plan                                   # the pictures in data_preprocessing, this machine
    python -m step2.plan --profile full --slices 6000 --patients 2000 --gpu T4      # a machine that isn't here

Hours come from training steps of the real network at its real size, timed on this device in as many processes
as will train; where that can't be, from its floating-point operations or from what it moves through a GPU's
memory, and the table says so. What it could find comes from the formulas of the statistics, under assumptions.
"""

import argparse
import math
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from step2.files import write_csv
from step2.network import build_network, normalise
from step2.pictures import Pictures, load, shuffled, steps_per_epoch
from step2.power import detectable_points
from step2.settings import PROFILES, Settings, read_settings
from step2.slices import Slices, read_slices
from step2.speed import (
    OUTPUTS,
    device_name,
    find_device,
    gpu_memory,
    prepare_process,
    time_steps,
    usual_speed,
    what_fits,
)
from step2.training import is_judged, release_memory
from step2.variants import VARIANTS, choose_variants, require

# GPUs that are not here: memory bandwidth in GB/s, peak of half precision in TFLOP/s, memory in GB (data sheets)
GPUS = {
    "T4": (320, 65, 16),
    "P100": (732, 19, 16),
    "V100": (900, 125, 16),
    "L4": (300, 121, 24),
    "RTX 3060": (360, 51, 12),
    "RTX 3090": (936, 71, 24),
    "RTX 4090": (1008, 165, 24),
    "A100": (1555, 312, 40),
    "H100": (3350, 990, 80),
    "H200": (4800, 990, 141),
}
# How often a step moves what it saves for the backward pass: from R. Wightman's timings of EfficientNet-B0 in
# mixed precision on RTX 3090 (1,267 images/s), V100 (1,425) and Titan RTX (1,157), 15, 13 and 12 times
TRAFFIC = 14
ARITHMETIC = 0.4  # of the peak, reached by a step's matrix products
# What starting a step's operations takes at least, for each of a network's blocks: 13 ms for the seven of quick's, in
# fp32 on an H200, whatever the pictures
LAUNCH_S = 0.0018
USABLE = 0.92  # of a GPU's memory
FEW_GFLOP = (
    8  # of forward passes: so many pictures are timed on a CPU; a network that needs more a picture ...
)
STAND_IN = {"model_name": "efficientnet-b2", "image_size": 260}  # ... would take minutes and is not timed
SESSION_H, WEEK_H = 12, 30  # Kaggle's, of a session with a GPU and of a week; Colab's sessions are no longer
A_DAY = 24


@dataclass(frozen=True)
class Cost:
    """A network's weights and blocks, GFLOP of a picture's forward pass, bytes it saves for the backward pass."""

    weights: int
    blocks: int
    gflop: float
    saved: float


@dataclass(frozen=True)
class Pace:
    """Seconds a picture takes to train and to load, GPU memory in bytes, slices at a time; and how it is known."""

    train: float
    load: float
    memory: float
    part: int
    basis: str

    def seconds(self, workers: int) -> float:
        """Return seconds a training picture: threads load while the network trains, else one after the other."""
        return max(self.train, self.load) if workers else self.train + self.load


# ---------------------------------------- what a step costs


def network_cost(settings: Settings, half: bool) -> Cost:
    """Return what a picture of the settings' network costs, from a pass over tensors that hold no numbers.

    half: in half precision, as on a GPU. PyTorch's own counter of operations takes the backward pass of
    depthwise convolutions for 17 times what it is, so only the forward pass is counted; training takes three.
    """
    saved, flop = [], 0.0

    def count(layer: torch.nn.Module, _given: Any, made: Any) -> None:
        nonlocal flop
        if isinstance(layer, torch.nn.Conv2d):
            flop += 2 * made.numel() * layer.in_channels / layer.groups * math.prod(layer.kernel_size)
        elif isinstance(layer, torch.nn.Linear):
            flop += 2 * made.numel() * layer.in_features

    for pictures in (1, 2):  # what the second one adds is a picture's
        with FakeTensorMode():
            network = build_network(settings, 0.1, OUTPUTS)
            kept: dict[int, Any] = {}
            hooks = (
                [layer.register_forward_hook(count) for layer in network.modules()] if pictures == 1 else []
            )
            own = {id(weight.untyped_storage()) for weight in network.parameters()}

            def keep(tensor: torch.Tensor, kept: dict = kept) -> torch.Tensor:
                kept[id(tensor.untyped_storage())] = tensor.untyped_storage()
                return tensor

            given = torch.empty(pictures, 3, settings.image_size, settings.image_size)
            with (
                torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
                torch.autocast("cpu", torch.bfloat16, enabled=half),
            ):
                network.train()(given)
            for hook in hooks:
                hook.remove()
            saved.append(sum(storage.nbytes() for key, storage in kept.items() if key not in own))
    weights = sum(weight.numel() for weight in network.parameters())
    return Cost(weights, len(network._blocks), flop / 1e9, saved[1] - saved[0])


def known_gpu(name: str) -> str:
    """Return a GPU's name as GPUS has it; ValueError for an unknown one."""
    found = next((gpu for gpu in GPUS if gpu.lower() == name.lower()), "")
    require(found, f"--gpu {name}: choose of {', '.join(GPUS)}")
    return found


def estimate_pace(settings: Settings, name: str) -> Pace:
    """Return the pace on a GPU that is not here, from its data sheet; ValueError for an unknown one."""
    name = known_gpu(name)
    bandwidth, peak, memory = GPUS[name]
    cost = network_cost(settings, half=True)
    part = part_that_fits(settings, cost, memory * 1e9)
    train = TRAFFIC * cost.saved / (bandwidth * 1e9) + 3 * cost.gflop / (ARITHMETIC * peak * 1e3)
    train = max(train, LAUNCH_S * cost.blocks / max(part, 1))
    needs = memory_needed(cost, part)
    return Pace(train, 0.0, needs, part, f"estimated from the {name}'s data sheet")


def memory_needed(cost: Cost, part: int) -> float:
    """Return the bytes of a step: weights, gradients and Adam's two moments in fp32, and what it saves."""
    return 16 * cost.weights + part * cost.saved


def part_that_fits(settings: Settings, cost: Cost, memory: float) -> int:
    """Return the slices at a time that a GPU's memory holds, halved as training would; 0 for none."""
    part = settings.batch_size
    while part > 1 and memory_needed(cost, part) > USABLE * memory:
        part = math.ceil(part / 2)
    return part if memory_needed(cost, part) <= USABLE * memory else 0


def measure_pace(settings: Settings) -> Pace:
    """Time training steps of the real size, and the loading of pictures, in this process.

    On a CPU a step has fewer pictures where a batch would take long, and the largest networks are not timed.
    """
    cv2.setNumThreads(0)
    device = find_device()
    prepare_process(settings, device)
    loading, speed = time_loading(settings), usual_speed(settings, device)
    cost = network_cost(settings, half=speed.precision != "no")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        speed, seconds = what_fits(settings, replace(speed, channels_last=True), device)
        memory = float(torch.cuda.max_memory_allocated())
        release_memory(device)
        return Pace(seconds / speed.part, loading, memory, speed.part, f"timed on this {device_name(device)}")
    few = max(1, min(settings.batch_size, round(FEW_GFLOP / cost.gflop)))
    timed = settings if cost.gflop < FEW_GFLOP else settings.model_copy(update=STAND_IN)
    seconds, _ = time_steps(timed, replace(speed, part=few), device)
    basis = f"timed on this {device_name(device)}"
    if timed is not settings:
        seconds *= cost.gflop / network_cost(timed, half=False).gflop
        basis = f"from its operations, at the speed of {timed.model_name}"
    return Pace(seconds / few, loading, memory_needed(cost, settings.batch_size), settings.batch_size, basis)


def time_loading(settings: Settings, pictures: int = 24) -> float:
    """Return the seconds to load and augment a picture that is kept in memory, with the settings' threads."""
    noise = np.random.default_rng(0).integers(0, 256, (512, 512), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        cv2.imwrite(f"{folder}/noise.png", cv2.GaussianBlur(noise, (0, 0), 3))
        many = Pictures(Path(folder), ["noise.png"] * pictures, settings, 0, cached=True)
        batches = shuffled(np.arange(pictures), min(settings.batch_size, 8), 0, 0) * 4
        began = time.perf_counter()
        count = sum(len(normalise(batch)) for batch, _ in load(many, batches, settings.workers))
    return (time.perf_counter() - began) / count


def measure_paces(several: Sequence[Settings]) -> list[Pace]:
    """Return the pace of each of the settings, measured in as many processes at once as will train."""
    first = several[0]
    if first.gpus or first.processes == 1 or first.cluster:
        return [measure_pace(settings) for settings in several]
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(first.processes)
    with ProcessPoolExecutor(first.processes, context, together.wait) as pool:
        each = list(pool.map(_measure_all, [tuple(several)] * first.processes))
    return [
        replace(
            paces[0],
            train=float(np.mean([p.train for p in paces])),
            load=float(np.mean([p.load for p in paces])),
        )
        for paces in zip(*each, strict=True)
    ]


def _measure_all(several: Sequence[Settings]) -> list[Pace]:
    return [measure_pace(settings) for settings in several]


# ---------------------------------------- the table


@dataclass(frozen=True)
class Size:
    """What would be compared: slices, their patients, variants; control: one of them again."""

    slices: int
    patients: int
    variants: int
    control: bool = True

    def fewer(self, share: float) -> "Size":
        """Return the same of a share of the patients."""
        return replace(self, slices=round(self.slices * share), patients=round(self.patients * share))


def size_of(slices: Slices, variants: Sequence[str], control: bool) -> Size:
    """Return the size of a comparison; without patients' ids each slice counts as a patient of its own."""
    training = slices.training
    return Size(len(training), training["patient"].nunique(), len(variants), control)


def choices(settings: Settings, size: Size) -> list[tuple[str, Settings, Size]]:
    """Return what one could sensibly train, (what differs, settings, size): what is set comes first."""

    def other(**changed: Any) -> Settings:
        return settings.model_copy(update=changed)

    found = [("as set", settings, size)]
    found += [(f"folds {k}", other(folds=k), size) for k in (1, 3, 5) if k != settings.folds]
    found += [(f"repeats {r}", other(repeats=r), size) for r in (1, 3) if r != settings.repeats]
    found += [
        (f"a {part} of the slices", settings, size.fewer(1 / n)) for part, n in (("third", 3), ("tenth", 10))
    ]
    for name in PROFILES:
        if name != settings.profile:
            found.append((f"profile {name}", other(**PROFILES[name], profile=name), size))
    return found


def plan_table(settings: Settings, size: Size, gpu: str | None = None) -> pd.DataFrame:
    """Return what each choice costs and could find, DataFrame; the first row is what is set.

    Columns: choice, profile, folds, repeats, slices, patients, runs, pictures (to train), hours, gpu_gb (of
    a step), at_a_time (slices), disk_gb, detectable (points of accuracy), basis. gpu: one that is not here.
    """
    rows = choices(settings, size)
    several = {s.profile: s for _, s, _ in rows}
    found = (
        [estimate_pace(s, gpu) for s in several.values()] if gpu else measure_paces(list(several.values()))
    )
    paces = dict(zip(several, found, strict=True))
    return pd.DataFrame([plan_row(*row, paces[row[1].profile]) for row in rows])


def plan_row(choice: str, settings: Settings, size: Size, pace: Pace) -> dict[str, Any]:
    """Return one choice's row of plan_table."""
    runs = (size.variants + size.control) * settings.folds * settings.repeats
    held_out = round(size.slices / (settings.folds if settings.folds > 1 else 5))
    steps = steps_per_epoch(size.slices - held_out, settings.batch_size)
    trained = min(steps * settings.batch_size, size.slices - held_out) * settings.epochs
    judged = held_out * sum(is_judged(epoch, settings.epochs) for epoch in range(settings.epochs))
    forward = replace(pace, train=pace.train / 3).seconds(settings.workers)
    seconds = runs * (trained * pace.seconds(settings.workers) + judged * forward) / settings.processes
    weights = network_cost(settings, half=False).weights
    disk = 4 * weights * runs + 14 * weights * settings.processes  # last and best weights; checkpoints
    # with one fold only its own patients are tested
    tested = size.patients if settings.folds > 1 else round(size.patients / 5)
    points = detectable_points(
        tested,
        slices=size.slices / max(size.patients, 1),
        folds=settings.folds,
        repeats=settings.repeats,
        variants=size.variants,
        control=size.control,
    )
    return {
        **{
            "choice": choice,
            "profile": settings.profile,
            "folds": settings.folds,
            "repeats": settings.repeats,
        },
        **{"slices": size.slices, "patients": size.patients, "runs": runs, "pictures": runs * trained},
        **{"hours": seconds / 3600, "gpu_gb": pace.memory / 1e9, "at_a_time": pace.part},
        **{"disk_gb": disk / 1e9, "detectable": points, "basis": pace.basis},
        **{"loaded_per_s": 1 / pace.load if pace.load else np.nan, "trained_per_s": 1 / pace.train},
    }


def plan_in_words(table: pd.DataFrame, free_bytes: float = math.inf) -> list[str]:
    """Return sentences about what is set, the plan's first row: what takes long, doesn't fit, or could find little.

    free_bytes: of the disk that results are written to.
    """
    row = table.iloc[0]
    work = f"{row['runs']} runs train {row['pictures']:,} pictures"
    lines = [f"{work} in about {in_hours(row['hours'])} ({row['basis']})"]
    if row["hours"] > A_DAY:
        lines[0] += f": {row['hours'] / A_DAY:.1f} days; think of fewer slices, folds, or another profile"
    if row["hours"] > SESSION_H:
        sessions, weeks = math.ceil(row["hours"] / SESSION_H), row["hours"] / WEEK_H
        lines.append(
            f"where a session ends after {SESSION_H} hours, that is {sessions} of them, and {weeks:.1f} weeks of "
            f"{WEEK_H} GPU hours: set max_hours, and start again each time"
        )
    if row["at_a_time"] < 1:
        lines.append(
            "a single slice doesn't fit in the GPU's memory: lower image_size or choose another profile"
        )
    elif row["at_a_time"] < PROFILES[row["profile"]]["batch_size"]:
        lines.append(f"memory holds {row['at_a_time']} slices at a time: a batch is taken in parts")
    if row["trained_per_s"] > row["loaded_per_s"]:
        lines.append("loading pictures takes longer than training: raise workers")
    if row["disk_gb"] * 1e9 > free_bytes:
        lines.append(
            f"results take {row['disk_gb']:.1f} GB, and {free_bytes / 1e9:.1f} GB are free: make room first"
        )
    found = row["detectable"]
    if np.isnan(found):
        lines.append("so few patients could show no difference between variants")
    else:
        lines.append(
            f"a difference of {found:.1f} points in accuracy would be found in 8 of 10 such comparisons "
            "(if two variants differ on a fifth of the slices, and a retraining moves accuracy by 1 point)"
        )
    return lines


def in_hours(hours: float) -> str:
    """Return '12 minutes' or '3.5 hours'."""
    return f"{60 * hours:.0f} minutes" if hours < 1.5 else f"{hours:.1f} hours"


def plan_to_show(table: pd.DataFrame) -> pd.DataFrame:
    """Return the columns to read, rounded as far as they are known."""
    shown = table.set_index("choice")
    shown = shown[["profile", "folds", "repeats", "slices", "patients", "runs", "pictures", "hours"]].assign(
        hours=shown["hours"].map("{:.2g}".format),
        **{"memory, GB": shown["gpu_gb"].map("{:.1f}".format), "at a time": shown["at_a_time"]},
        **{"disk, GB": shown["disk_gb"].map("{:.1f}".format)},
        **{
            "finds, points": shown["detectable"].map(
                lambda points: "-" if np.isnan(points) else f"{points:.1f}"
            )
        },
    )
    return shown.assign(known=table["basis"].to_numpy())


def main() -> None:
    """Print the plan of a comparison and write it to plan.csv in the results folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", default="auto", help=", ".join(("auto", *PROFILES)))
    parser.add_argument("--data", type=Path, default=Path("data_preprocessing"), help="Step 1's output")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where plan.csv goes")
    parser.add_argument("--variants", default=None, help="such as 0,1,4 or all (default: the seven)")
    parser.add_argument("--slices", type=int, help="plan for so many instead of those in --data")
    parser.add_argument("--patients", type=int, help="of whom they are (default: half as many)")
    parser.add_argument("--gpu", help=f"one that is not here: {', '.join(GPUS)}")
    args = parser.parse_args()
    try:
        gpus, memory = torch.cuda.device_count(), gpu_memory()
        if args.gpu:
            gpus, memory = 1, GPUS[known_gpu(args.gpu)][2] * 1e9
        given = {"profile": args.profile, "weights": "none", "results": args.results}
        settings = read_settings(given, gpus, memory)
        if args.slices:
            size = Size(args.slices, args.patients or args.slices // 2, len(VARIANTS))
        else:
            slices, chosen = read_slices(args.data), choose_variants(args.variants, args.data)
            size = size_of(slices, chosen, control=True)
        table = plan_table(settings, size, args.gpu)
    except ValueError as err:
        sys.exit(str(err))
    args.results.mkdir(parents=True, exist_ok=True)
    write_csv(args.results / "plan.csv", table)
    print(f"{settings.profile} profile: {settings.why}")
    print(plan_to_show(table).to_string())
    print(*plan_in_words(table, shutil.disk_usage(args.results).free), sep="\n")


if __name__ == "__main__":
    main()
