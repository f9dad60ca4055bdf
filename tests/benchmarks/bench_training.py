"""Time training steps of EfficientNet: as the library comes, each option alone, the notebook's, and timm's.

    python tests/benchmarks/bench_training.py                                    # B7 at 600 px on a CUDA GPU
    python tests/benchmarks/bench_training.py --model efficientnet-b0 --size 96 --batch 16 --steps 5   # a CPU
    python tests/benchmarks/bench_training.py --profile quick       # whole epochs beside a bare loop of steps
    pip install timm                                                             # to have it in the table

Prints training images/s (forward, backward and optimizer step on pictures that are on the device already),
then images/s of the loader alone (read, decode, resize, augment, transfer). Ways run in turn, round by round,
so that a change of the machine's speed meets them alike.
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from efficientnet_pytorch import EfficientNet
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from step2.pictures import Pictures, augment, load, read_png, shuffled
from step2.settings import Settings, read_settings
from step2.speed import measure_speed, prepare_process, usual_speed, why_not_compile
from step2.training import Speed, Trainer, snapshot, train_epoch, train_step, write_checkpoint

OPTIONS = ("SiLU", "bf16", "channels_last", "fused", "compile")


def plain_step(
    model: torch.nn.Module, pictures: torch.Tensor, labels: torch.Tensor, options: set
) -> Callable:
    """Return a function that takes one step of a network with these options, as any training loop would."""
    if "channels_last" in options:
        model = model.to(memory_format=torch.channels_last)
        pictures = pictures.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6, fused="fused" in options or None)
    model.train()
    forward = torch.compile(model, dynamic=False, mode="reduce-overhead") if "compile" in options else model

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(pictures.device.type, torch.bfloat16, enabled="bf16" in options):
            loss = F.cross_entropy(forward(pictures), labels)
        loss.backward()
        optimizer.step()

    return step


def library_model(name: str, size: int, options: set) -> torch.nn.Module:
    """Return efficientnet_pytorch's network; its own memory-saving swish unless SiLU is among the options."""
    model = EfficientNet.from_name(name, num_classes=6, image_size=size)
    model.set_swish(memory_efficient="SiLU" not in options)
    return model


def benchmark_settings(args: argparse.Namespace) -> Settings:
    """Return the full profile's settings, but for what was asked for."""
    given = {"model_name": args.model, "image_size": args.size, "batch_size": args.batch, "weights": "none"}
    return read_settings({"profile": "full", "threads": torch.get_num_threads(), **given})


def notebook_step(args: argparse.Namespace, device: torch.device) -> tuple[Callable, Speed]:
    """Return the notebook's own step and how it chose to compute it."""
    settings = benchmark_settings(args)
    speed = usual_speed(settings, device)
    if device.type == "cuda":
        speed = measure_speed(settings, speed, 10_000, device)
    trainer = Trainer(settings, speed, 0.1, device, outputs=6)
    pictures = torch.randint(256, (args.batch, 1, args.size, args.size), dtype=torch.uint8, device=device)
    labels = torch.arange(args.batch, device=device) % 6
    return (lambda: train_step(trainer, pictures, labels, 1e-6)), speed


def ways_to_train(args: argparse.Namespace, device: torch.device) -> dict[str, Callable]:
    """Return {name: function that makes a step}, made late: one network at a time is on the device."""
    pictures = torch.randn(args.batch, 3, args.size, args.size, device=device)
    labels = torch.arange(args.batch, device=device) % 6
    bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    usable = [option for option in OPTIONS if option != "bf16" or bf16]
    if why := why_not_compile(device) if device.type == "cuda" else "measured on CUDA only":
        usable.remove("compile")
        print(f"torch.compile is left out: {why}")

    def library(options: set) -> Callable:
        model = library_model(args.model, args.size, options).to(device)
        return plain_step(model, pictures, labels, options)

    ways = {"as it comes, fp32": lambda: library(set())}
    ways |= {f"with {option} alone": partial(library, {option}) for option in usable}
    step, chosen = notebook_step(args, device)
    print("the notebook's options:", *chosen.reasons, sep="\n  ")
    ways["the notebook"] = lambda: step
    try:
        import timm  # type: ignore[import-not-found]
    except ImportError:
        print("timm is not installed: left out")
        return ways
    same = {"channels_last": chosen.channels_last, "fused": chosen.fused, "compile": chosen.compiled}
    options = {name for name, on in same.items() if on} | ({"bf16"} if chosen.precision == "bf16" else set())
    name = "tf_efficientnet_" + args.model.removeprefix("efficientnet-")
    ways["timm, the notebook's options"] = lambda: plain_step(
        timm.create_model(name, num_classes=6).to(device), pictures, labels, options
    )
    return ways


def against_a_bare_loop(args: argparse.Namespace, device: torch.device) -> None:
    """Print images/s of a profile's epochs, with loading, augmentation and checkpoint, and of a bare loop of
    forward, backward and step on the same network, its pictures on the device as it takes them."""
    settings = read_settings({"profile": args.profile, "weights": "none"})
    prepare_process(settings, device)  # as the processes that train are
    cv2.setNumThreads(0)
    speed, size, count = usual_speed(settings, device), settings.image_size, 2 * settings.batch_size
    bare, ours = (Trainer(settings, speed, 0.1, device, outputs=6) for _ in range(2))
    ready = bare.to_device(torch.randint(256, (settings.batch_size, 1, size, size), dtype=torch.uint8))
    labels = torch.arange(settings.batch_size, device=device) % 6
    options = {"fused", "channels_last"} if speed.channels_last else {"fused"}
    step = plain_step(bare.network, ready, labels, options)
    rates: dict[str, list[float]] = {"a bare loop": [], "epochs of the notebook": []}
    with tempfile.TemporaryDirectory() as folder:
        names = write_pictures(Path(folder), count)
        pictures = Pictures(Path(folder), names, settings, 0, cached=True)
        truth = torch.arange(count) % 6

        def epoch() -> None:
            batches = load(pictures, shuffled(np.arange(count), settings.batch_size, 0, 0), settings.workers)
            row = train_epoch(ours, batches, 2, truth, 0, lambda epochs: None)
            write_checkpoint(Path(folder) / "checkpoint.pt", snapshot(ours, [row]))

        for _ in range(args.rounds):
            rates["a bare loop"].append(images_per_s(step, settings.batch_size, args.steps, device))
            rates["epochs of the notebook"].append(images_per_s(epoch, count, args.steps // 2, device))
    for way, values in rates.items():
        print(f"{way:34}{statistics.median(values):9.1f}{min(values):9.1f}{max(values):9.1f}")
    whole, loop = (statistics.median(rates[way]) for way in ("epochs of the notebook", "a bare loop"))
    print(f"the notebook trains at {whole / loop:.2f} of the bare loop's speed, profile {args.profile}")


def images_per_s(step: Callable, images: int, count: int, device: torch.device) -> float:
    """Return images/s over count steps, after two that are not counted."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(2):
        step()
    finish()
    began = time.perf_counter()
    for _ in range(count):
        step()
    finish()
    return images * count / (time.perf_counter() - began)


def write_pictures(folder: Path, count: int) -> list[str]:
    """Write 512 x 512 PNGs of smooth noise, which compresses about as CT slices do; return their names."""
    rng, names = np.random.default_rng(0), [f"{number}.png" for number in range(count)]
    for name in names:
        noise = cv2.GaussianBlur(rng.normal(128, 60, (512, 512)), (0, 0), 2)
        cv2.imwrite(str(folder / name), np.clip((noise - 128) * 6 + 128, 0, 255).astype(np.uint8))
    return names


def time_stages(args: argparse.Namespace, paths: list[Path], device: torch.device) -> dict:
    """Return images/s of each stage of loading, in one process."""
    rng, settings = np.random.default_rng(0), benchmark_settings(args)
    pictures = [read_png(path, args.size) for path in paths]
    batches = torch.from_numpy(np.stack(pictures)).split(args.batch)
    batches = [batch.pin_memory() for batch in batches] if device.type == "cuda" else []

    def transfer() -> None:
        for batch in batches:
            batch.to(device, non_blocking=True)
        torch.cuda.synchronize()

    stages = {
        "read and decode": lambda: [read_png(path, 512) for path in paths],
        "the same and resize": lambda: [read_png(path, args.size) for path in paths],
        "augment": lambda: [augment(picture, rng, settings) for picture in pictures],
    } | ({"transfer to the device": transfer} if batches else {})
    rates = {}
    for name, stage in stages.items():
        began = time.perf_counter()
        stage()
        rates[f"loader: {name}"] = len(paths) / (time.perf_counter() - began)
    return rates


def time_loader(args: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """Return images/s of the loader: stage by stage, and whole with no thread of its own and with several."""
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        images = write_pictures(Path(folder), args.pictures)
        ways = {"loader, PNGs": (0, False), "loader, in memory": (0, True)}
        for threads in {args.threads} - {0}:
            ways |= {f"loader, PNGs, {threads} threads": (threads, False)}
            ways |= {f"loader, in memory, {threads} threads": (threads, True)}
        for _ in range(args.rounds):
            stages = time_stages(args, [Path(folder) / image for image in images], device)
            for name, rate in stages.items():
                rates.setdefault(name, []).append(rate)
            for name, (threads, cached) in ways.items():
                pictures = Pictures(Path(folder), images, benchmark_settings(args), 0, cached)
                batches = shuffled(np.arange(len(images)), args.batch, 0, 0)
                began = time.perf_counter()
                count = sum(len(batch.to(device)) for batch, _ in load(pictures, batches, threads))
                rates.setdefault(name, []).append(count / (time.perf_counter() - began))
    return rates


def main() -> None:
    """Measure and print one table."""
    cv2.setNumThreads(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    network = f"{args.model} at {args.size} px, batch {args.batch}"
    print(f"{name}, PyTorch {torch.__version__}, {f'profile {args.profile}' if args.profile else network}")
    if args.profile:
        against_a_bare_loop(args, device)
        return
    rates: dict[str, list[float]] = {}
    ways = {} if args.loader_only else ways_to_train(args, device)
    for _ in range(args.rounds):
        for way, make in ways.items():
            step = make()
            rates.setdefault(way, []).append(images_per_s(step, args.batch, args.steps, device))
            del step
    rates |= time_loader(args, device)
    base = statistics.median(rates["as it comes, fp32"]) if ways else math.nan
    print(f"{'images/s':34}{'median':>9}{'min':>9}{'max':>9}" + ("" if math.isnan(base) else f"{'ratio':>8}"))
    for way, values in rates.items():
        middle = statistics.median(values)
        print(
            f"{way:34}{middle:9.1f}{min(values):9.1f}{max(values):9.1f}"
            + ("" if math.isnan(base) else f"{middle / base:8.2f}")
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="efficientnet-b7", help="efficientnet-b0 to -b8 (default: %(default)s)"
    )
    parser.add_argument("--size", type=int, default=600, help="pixels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default: %(default)s)")
    parser.add_argument("--profile", choices=("quick", "medium"), help="whole epochs beside a bare loop")
    parser.add_argument("--loader-only", action="store_true", help="time no training, only the loader")
    parser.add_argument(
        "--pictures", type=int, default=256, help="that the loader loads (default: %(default)s)"
    )
    threads = min(os.cpu_count() or 1, 16)
    parser.add_argument(
        "--threads", type=int, default=threads, help="of the loader (default: all cores, here %(default)s)"
    )
    args = parser.parse_args()
    main()
