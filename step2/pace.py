"""How fast a network trains and what it needs: timed here, or estimated for a GPU that is not here.

On a CPU steps of the real size are timed in as many processes as will train, of a few pictures each; a network
that would take minutes a picture is taken to be as fast, operation for operation, as a smaller one.
"""

import math
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from threading import Thread

import cv2
import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from step2.network import build_network
from step2.pictures import Pictures, load, normalise, shuffled
from step2.settings import Settings
from step2.speed import OUTPUTS, device_name, find_device, prepare_process, time_steps, usual_speed, what_fits
from step2.training import out_of_memory

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
# On a CPU steps of so many pictures are timed as take this in their forward passes; a network that needs more for one
# picture would take minutes, and is taken to be as fast, operation for operation, as the stand-in
FEW_GFLOP = 4
STAND_IN = {"model_name": "efficientnet-b2", "image_size": 260}


@dataclass(frozen=True)
class Cost:
    """A network's weights and blocks, GFLOP of a picture's forward pass, bytes it saves for the backward pass."""

    weights: int
    blocks: int
    gflop: float
    saved: float


@dataclass(frozen=True)
class Pace:
    """Seconds a picture takes to train and to load, GPU memory in bytes, slices at a time; how that is known.

    weights: of the network, their number.
    """

    weights: int
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
    kept, pictures = {}, 2

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[id(tensor.untyped_storage())] = tensor.untyped_storage()
        return tensor

    with (
        FakeTensorMode(),
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        network = build_network(settings, 0.1, OUTPUTS)
        network.train()(torch.empty(pictures, 3, settings.image_size, settings.image_size))
    weights = sum(weight.numel() for weight in network.parameters())
    for weight in network.parameters():
        kept.pop(id(weight.untyped_storage()), None)
    saved = sum(storage.nbytes() for storage in kept.values()) - 2 * weights * half  # their copies in bf16
    return Cost(weights, len(network._blocks), counter.get_total_flops() / pictures / 1e9, saved / pictures)


def count_weights(settings: Settings) -> int:
    """Return the number of the network's weights."""
    with torch.device("meta"):  # without numbers
        return sum(weight.numel() for weight in build_network(settings, 0.1, OUTPUTS).parameters())


def estimate_pace(settings: Settings, name: str) -> Pace:
    """Return the pace on a GPU that is not here, one of GPUS, from its data sheet."""
    bandwidth, peak, memory = GPUS[name]
    cost = network_cost(settings, half=True)
    part = part_that_fits(settings, cost, memory * 1e9)
    train = TRAFFIC * cost.saved / (bandwidth * 1e9) + 3 * cost.gflop / (ARITHMETIC * peak * 1e3)
    train = max(train, LAUNCH_S * cost.blocks / max(part, 1))
    needs = memory_needed(cost, max(part, 1))
    return Pace(cost.weights, train, 0.0, needs, part, f"estimated from the {name}'s data sheet")


def memory_needed(cost: Cost, part: int) -> float:
    """Return the bytes of a step: weights, gradients and Adam's two moments in fp32, and what it saves."""
    return 16 * cost.weights + part * cost.saved


def part_that_fits(settings: Settings, cost: Cost, memory: float) -> int:
    """Return the slices at a time that a GPU's memory holds, halved as training would; 0 for none."""
    part = settings.batch_size
    while part > 1 and memory_needed(cost, part) > USABLE * memory:
        part = math.ceil(part / 2)
    return part if memory_needed(cost, part) <= USABLE * memory else 0


def measure_paces(several: Sequence[Settings]) -> list[Pace]:
    """Return the pace of each of the settings on this machine, on a CPU in as many processes at once as will train.

    On a GPU only the first as it will train; the others without channels_last, for which cuDNN would build kernels
    for 5 to 17 s each. Without it a step took 1.1 to 1.7 times as long for a B7, 0.9 to 1.1 for the others (H100).
    """
    device = find_device()
    if device.type == "cuda":
        first, *others = several
        as_set = pace_on_gpu(first, device, True)
        return [as_set, *(pace_if_it_fits(other, device, False) for other in others)]
    count = 1 if several[0].cluster else several[0].processes
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, begin, (context.Barrier(count),)) as pool:
        for _ in range(count * (count > 1)):
            pool.submit(int)  # they start while costs are counted
        costs = {network_name(settings): network_cost(settings, half=False) for settings in several}
        small = {name for name, cost in costs.items() if cost.gflop < FEW_GFLOP}
        timed = [s if network_name(s) in small else s.model_copy(update=STAND_IN) for s in several]
        each = {network_name(settings): settings for settings in timed}
        for name in each.keys() - costs.keys():  # the stand-in, where it is none of them
            costs[name] = network_cost(each[name], half=False)
        work = [(settings, max(1, round(FEW_GFLOP / costs[name].gflop))) for name, settings in each.items()]
        given = (work, list(several))
        found = list(pool.map(time_all, [given] * count)) if count > 1 else [time_all(given)]
    seconds_of = dict(zip(each, np.mean([steps for steps, _ in found], axis=0), strict=True))
    loading = np.mean([loads for _, loads in found], axis=0)
    paces = []
    for settings, stand_in, seconds in zip(several, timed, loading, strict=True):
        basis = f"timed on this {device_name(device)}"
        if stand_in is not settings:
            basis = f"from its operations, at the speed of {stand_in.model_name}"
        cost, name = costs[network_name(settings)], network_name(stand_in)
        train = float(seconds_of[name]) * cost.gflop / costs[name].gflop
        memory = memory_needed(cost, settings.batch_size)
        paces.append(Pace(cost.weights, train, float(seconds), memory, settings.batch_size, basis))
    return paces


def begin(barrier: Barrier) -> None:
    """Begin with the other processes, and end with the one that started this."""
    end_with_parent()
    barrier.wait()


def end_with_parent() -> None:
    """Let this process end when the one that started it does, also when that is killed: its pool would wait."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent:
            parent.join()
            os._exit(1)

    Thread(target=watch, daemon=True).start()


def network_name(settings: Settings) -> tuple[str, int]:
    """Return what a step's time on a CPU depends on: the network and its pictures' size."""
    return settings.model_name, settings.image_size


def time_all(given: tuple[list[tuple[Settings, int]], list[Settings]]) -> tuple[list[float], list[float]]:
    """Return the seconds a picture of training steps, and of loading, in this process.

    given: settings with the slices to time at a time; settings whose loading is timed.
    """
    cv2.setNumThreads(0)
    device, steps = find_device(), []
    for settings, few in given[0]:
        prepare_process(settings, device)
        few = min(few, settings.batch_size)
        speed = replace(usual_speed(settings, device), part=few)
        steps.append(time_steps(settings, speed, device)[0] / few)
    return steps, [time_loading(settings) for settings in given[1]]


def pace_on_gpu(settings: Settings, device: torch.device, channels_last: bool) -> Pace:
    """Return the pace on this GPU: of as many pictures at a time as fit."""
    prepare_process(settings, device)
    speed = replace(usual_speed(settings, device), channels_last=channels_last)
    speed, seconds = what_fits(settings, speed, device)
    memory = float(torch.cuda.max_memory_allocated())
    torch.cuda.empty_cache()
    without = "torch.compile" if channels_last else "channels_last and torch.compile"
    basis = f"timed on this {device_name(device)}, without {without}"
    weights = count_weights(settings)
    return Pace(weights, seconds / speed.part, time_loading(settings), memory, speed.part, basis)


def pace_if_it_fits(settings: Settings, device: torch.device, channels_last: bool) -> Pace:
    """Return the pace of what is only a choice on this GPU; NaN, of a part of 0, where memory ends."""
    try:
        return pace_on_gpu(settings, device, channels_last)
    except RuntimeError as err:
        if not out_of_memory(err):
            raise
    torch.cuda.empty_cache()
    basis = f"a single slice doesn't fit in the memory of this {device_name(device)}"
    return Pace(count_weights(settings), math.nan, math.nan, math.nan, 0, basis)


def time_loading(settings: Settings) -> float:
    """Return the seconds to load and augment a picture that is kept in memory, with the settings' threads."""
    pictures, shape = Pictures(Path(), [], settings), (24, settings.image_size, settings.image_size)
    pictures.cache = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    batches = shuffled(np.arange(len(pictures.cache)), min(settings.batch_size, 8), 0, 0) * 4
    began = time.perf_counter()
    count = sum(len(normalise(batch)) for batch, _ in load(pictures, batches, settings.workers))
    return (time.perf_counter() - began) / count
