"""Time training steps of EfficientNet: as the library comes, each lever alone, the notebook's, and timm's.

    python tests/benchmarks/bench_training.py                                    # B7 at 600 px on a CUDA GPU
    python tests/benchmarks/bench_training.py --model efficientnet-b0 --size 96 --batch 16 --steps 5   # a CPU
    pip install timm                                                             # to have it in the table

Prints training images/s (forward, backward and optimizer step on pictures that are on the device already),
then images/s of the loader alone (read, decode, resize, augment). Ways run in turn, round by round, so that a
change of the machine's speed meets them alike.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import torch
from accelerate import Accelerator
from efficientnet_pytorch import EfficientNet
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from conftest import load_notebook  # noqa: E402 - from the folder above

LEVERS = ("SiLU", "bf16", "channels_last", "fused", "compile")


def plain_step(model: torch.nn.Module, pictures: torch.Tensor, labels: torch.Tensor, levers: set) -> Callable:
    """Return a function that takes one step of a network with these levers, as any training loop would."""
    if "channels_last" in levers:
        model = model.to(memory_format=torch.channels_last)
        pictures = pictures.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6, fused="fused" in levers or None)
    model.train()
    forward = torch.compile(model, dynamic=False) if "compile" in levers else model

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(pictures.device.type, torch.bfloat16, enabled="bf16" in levers):
            loss = F.cross_entropy(forward(pictures), labels)
        loss.backward()
        optimizer.step()

    return step


def library_model(name: str, size: int, levers: set) -> torch.nn.Module:
    """Return efficientnet_pytorch's network; its own memory-saving swish unless SiLU is among the levers."""
    model = EfficientNet.from_name(name, num_classes=6, image_size=size)
    model.set_swish(memory_efficient="SiLU" not in levers)
    return model


def notebook_step(args: argparse.Namespace, notebook: dict, device: torch.device) -> tuple[Callable, tuple]:
    """Return the notebook's own step and the levers that it chose for it."""
    given = {"model_name": args.model, "image_size": args.size, "batch_size": args.batch, "weights": "none"}
    given |= dict.fromkeys(("epochs", "folds", "repeats", "processes", "workers", "cache"))
    given |= {"seed": 0, "threads": torch.get_num_threads(), "mixed_precision": "auto"}
    settings = notebook["resolve_settings"]("full", given, int(device.type == "cuda"))
    precision, why = notebook["choose_precision"]("auto", device)
    accelerator = Accelerator(mixed_precision=precision)
    if device.type == "cuda":
        base = notebook["Levers"](precision, False, True, False, args.batch, (why,))
        levers = notebook["measure_levers"](settings, accelerator, base, steps=10_000)
    else:
        levers = notebook["choose_levers"](SimpleNamespace(settings=settings), accelerator, precision, why)
    trainer = notebook["Trainer"](settings, levers, accelerator, 0.1)
    pictures = torch.randint(256, (args.batch, 1, args.size, args.size), dtype=torch.uint8, device=device)
    labels = torch.arange(args.batch, device=device) % 6
    return (lambda: notebook["train_step"](trainer, pictures, labels, 1e-6)), levers


def ways_to_train(args: argparse.Namespace, notebook: dict, device: torch.device) -> dict[str, Callable]:
    """Return {name: function that makes a step}, made late: one network at a time is on the device."""
    pictures = torch.randn(args.batch, 3, args.size, args.size, device=device)
    labels = torch.arange(args.batch, device=device) % 6
    bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    usable = [lever for lever in LEVERS if lever != "bf16" or bf16]
    if why := notebook["why_not_compile"]() if device.type == "cuda" else "measured on CUDA only":
        usable.remove("compile")
        print(f"torch.compile is left out: {why}")

    def library(levers: set) -> Callable:
        model = library_model(args.model, args.size, levers).to(device)
        return plain_step(model, pictures, labels, levers)

    ways = {"as it comes, fp32": lambda: library(set())}
    ways |= {f"with {lever} alone": (lambda lever=lever: library({lever})) for lever in usable}
    step, chosen = notebook_step(args, notebook, device)
    print("the notebook's levers:", *chosen.reasons, sep="\n  ")
    ways["the notebook"] = lambda: step
    try:
        import timm
    except ImportError:
        print("timm is not installed: left out")
        return ways
    same = {"channels_last": chosen.channels_last, "fused": chosen.fused, "compile": chosen.compiled}
    levers = {name for name, on in same.items() if on} | ({"bf16"} if chosen.precision == "bf16" else set())
    name = "tf_efficientnet_" + args.model.removeprefix("efficientnet-")
    ways["timm, the notebook's levers"] = lambda: plain_step(
        timm.create_model(name, num_classes=6).to(device), pictures, labels, levers
    )
    return ways


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


def time_loader(args: argparse.Namespace, notebook: dict) -> dict[str, list[float]]:
    """Return images/s of one loading process: streamed from 512 x 512 PNGs, and from memory."""
    rng, settings = (
        np.random.default_rng(0),
        {**notebook["PROFILES"]["full"], "image_size": args.size, "workers": 0},
    )
    rates: dict[str, list[float]] = {"loader, PNGs, 1 worker": [], "loader, cached, 1 worker": []}
    with tempfile.TemporaryDirectory() as folder:
        images = [f"{number}.png" for number in range(64)]
        for image in images:  # smooth noise compresses about as CT slices do
            noise = cv2.GaussianBlur(rng.normal(128, 60, (512, 512)), (0, 0), 2)
            cv2.imwrite(str(Path(folder) / image), np.clip((noise - 128) * 6 + 128, 0, 255).astype(np.uint8))
        for _ in range(args.rounds):
            for name, cached in zip(rates, (False, True), strict=True):
                pictures = notebook["Pictures"](Path(folder), images, settings, 0, cached)
                loader = notebook["make_loader"](
                    pictures, notebook["Batches"](np.arange(64), args.batch, 0), settings
                )
                began = time.perf_counter()
                count = sum(len(index) for _, index in loader)
                rates[name].append(count / (time.perf_counter() - began))
    return rates


def main() -> None:
    """Measure and print one table."""
    cv2.setNumThreads(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    print(f"{name}, PyTorch {torch.__version__}, {args.model} at {args.size} px, batch {args.batch}")
    notebook = load_notebook()
    rates: dict[str, list[float]] = {}
    ways = ways_to_train(args, notebook, device)
    for _ in range(args.rounds):
        for way, make in ways.items():
            step = make()
            rates.setdefault(way, []).append(images_per_s(step, args.batch, args.steps, device))
            del step
    rates |= time_loader(args, notebook)
    base = statistics.median(rates["as it comes, fp32"])
    print(f"{'images/s':34}{'median':>9}{'min':>9}{'max':>9}{'ratio':>8}")
    for way, values in rates.items():
        middle = statistics.median(values)
        print(f"{way:34}{middle:9.1f}{min(values):9.1f}{max(values):9.1f}{middle / base:8.2f}")


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
    args = parser.parse_args()
    main()
