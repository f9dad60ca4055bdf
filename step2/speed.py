"""Precision, memory layout and compilation: measured once on a GPU, fixed on a CPU so that results repeat."""

import math
import platform
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace

import torch
from filelock import FileLock
from torch.utils._triton import has_triton

from step2.files import read_json, write_json
from step2.settings import Settings
from step2.training import Speed, Trainer, out_of_memory, train_step

OUTPUTS = 6  # of the networks that are timed; the size of a classifier doesn't show
WORTH_COMPILING_S = 60  # of all runs of a process; fewer are over before the network is compiled


def find_device() -> torch.device:
    """Return the first CUDA GPU that this process sees, else Apple's, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def prepare_process(settings: Settings, device: torch.device) -> None:
    """Set what holds for a whole process that trains: threads, and how exactly a GPU computes."""
    torch.set_num_threads(settings.threads)
    torch.set_flush_denormal(True)  # numbers too small to matter, on which a CPU is slow
    if device.type == "cuda":
        # With its search for the fastest kernels, the first steps of quick's seven blocks in bf16 took 16 s on an
        # H200 (2 s in fp32), and B7's more than a minute; it would be repeated in each process for each shape.
        torch.backends.cudnn.benchmark = False
        torch.set_float32_matmul_precision("high")


def choose_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """Return bf16, fp16 or no, and the reason."""
    if device.type != "cuda":
        return "no", f"fp32: mixed precision is for CUDA GPUs, this is {device.type}"
    if wanted != "auto":
        return wanted, f"{wanted}: asked for"
    name = torch.cuda.get_device_name()
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", f"bf16: {name} has it"
    return "fp16", f"fp16: {name} has no bf16"


def usual_speed(settings: Settings, device: torch.device) -> Speed:
    """Return how to compute as far as it is known without measuring."""
    precision, why = choose_precision(settings.mixed_precision, device)
    base = Speed(precision, False, False, False, settings.batch_size, (why,))
    if device.type == "cpu":
        last = "channels_last on: it is faster on CPUs; not measured, so that results repeat"
        return replace(base, channels_last=True, fused=True, reasons=(why, last))
    if device.type == "cuda":
        return replace(base, fused=True, reasons=(why, "fused optimizer on: one kernel for all weights"))
    return base


def choose_speed(settings: Settings, steps: int, device: torch.device) -> Speed:
    """Return how to compute: on CUDA as measured, now or earlier in this results folder; else fixed.

    steps: that would be compiled, of all runs of a process; it compiles once more than the first of them needs,
    for the timing. What was measured is kept in results/speed.json, so that all runs use the same.
    """
    base = usual_speed(settings, device)
    if device.type != "cuda":
        return base
    key = f"{torch.cuda.get_device_name()}, {settings.model_name}, {settings.image_size} px"
    key += f", {base.part} slices, {base.precision}, {steps} steps, PyTorch {torch.__version__}"
    path = settings.results / "speed.json"
    with FileLock(path.with_name(".speed.lock")):  # of several processes the first measures
        known = read_json(path) or {}
        if key not in known:
            known[key] = asdict(measure_speed(settings, base, steps, device))
            write_json(path, known)
    return Speed(**{**known[key], "reasons": tuple(known[key]["reasons"])})


def measure_speed(settings: Settings, base: Speed, steps: int, device: torch.device) -> Speed:
    """Time real training steps on the GPU and return what was fastest, with reasons.

    First what fits, then channels_last, then torch.compile, which has to earn back the time it takes.
    """
    best, slow = what_fits(settings, base, device)
    parts = steps * math.ceil(settings.batch_size / best.part)  # what is timed is a part of a step
    reasons = [*base.reasons, f"{best.part} slices at a time: they fit"]
    try:
        last, _ = time_steps(settings, replace(best, channels_last=True), device)
    except RuntimeError as err:
        if not out_of_memory(err):
            raise
        last = math.inf
    best, fast = replace(best, channels_last=last < slow), min(last, slow)
    times = f"{last * 1e3:.0f} ms a step with, {slow * 1e3:.0f} without"
    reasons.append(f"channels_last {'on' if last < slow else 'off'}: {times}")
    why_not, pays = why_not_compile(device), False
    if not steps:
        why_not = "batches differ in size"
    elif fast * parts < WORTH_COMPILING_S:
        why_not = f"a process trains for {fast * parts:.0f} s, less than compiling would take"
    if not why_not:
        try:
            compiled, once = time_steps(settings, replace(best, compiled=True), device)
            pays = (fast - compiled) * parts > 2 * once  # compiled for this timing, and for the runs
            times = f"{compiled * 1e3:.0f} ms a step with, {fast * 1e3:.0f} without"
            why_not = f"{times}, {once:.0f} s to get going, for {steps} steps a process"
        except (RuntimeError, OSError, AssertionError) as err:
            why_not = f"it fails here ({type(err).__name__})"
        if not pays:
            with suppress(AssertionError):  # in a thread, before PyTorch 2.14
                torch.compiler.reset()  # its CUDA graphs keep their memory
            torch.cuda.empty_cache()
    reasons.append(f"torch.compile {'on' if pays else 'off'}: {why_not}")
    return replace(best, compiled=pays, reasons=tuple(reasons))


def what_fits(settings: Settings, base: Speed, device: torch.device) -> tuple[Speed, float]:
    """Return base with its slices at a time halved until they fit, and the seconds of such a step."""
    while True:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # what did not fit is no part of it
        try:
            return base, time_steps(settings, base, device)[0]
        except RuntimeError as err:
            if not out_of_memory(err) or base.part == 1:
                raise
        base = replace(base, part=math.ceil(base.part / 2))
        torch.cuda.empty_cache()


def time_steps(settings: Settings, speed: Speed, device: torch.device) -> tuple[float, float]:
    """Return the seconds of a real training step, and those to get going; RuntimeError where memory ends."""
    torch.manual_seed(0)
    trainer = Trainer(settings, speed, 0.1, device, OUTPUTS)
    size = (speed.part, 1, settings.image_size, settings.image_size)
    pictures = torch.randint(256, size, dtype=torch.uint8)
    labels = torch.arange(speed.part) % OUTPUTS
    wait = torch.get_device_module(device).synchronize
    first = 1 + speed.compiled  # step one compiles, step two records the CUDA graphs
    seconds = seconds_a_step(lambda: train_step(trainer, pictures, labels, 1e-6), wait, first)
    if trainer.part < speed.part:  # it took smaller parts by itself; what_fits has to know
        raise RuntimeError(f"out of memory: {speed.part} slices at a time don't fit")
    return seconds


def seconds_a_step(
    step: Callable[[], object], wait: Callable[[], object], slow: int = 1
) -> tuple[float, float]:
    """Return a step's time, and what the first, slow ones took more than that. wait: until the GPU is done.

    Long steps are timed by the next one alone, short ones by eight more.
    """

    def timed(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            step()
        wait()
        return time.perf_counter() - began

    first, each = timed(slow), timed(1)
    count = min(round(1.5 / max(each, 0.01)), 8)
    each = timed(count) / count if count else each
    return each, max(first - slow * each, 0.0)


def why_not_compile(device: torch.device) -> str:
    """Return why torch.compile can't work here, '' where it can."""
    if sys.platform != "linux":
        return "used on Linux alone"
    if not (shutil.which("cc") or shutil.which("gcc")):
        return "there is no C compiler, cc or gcc"
    return "" if device.type == "cpu" or has_triton() else "there is no Triton"


def gpu_memory() -> float:
    """Return the memory of the smallest CUDA GPU, bytes; infinity where there is none."""
    gpus = range(torch.cuda.device_count())
    return min((torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus), default=math.inf)


def device_name(device: torch.device) -> str:
    """Return what to call the device in reports."""
    return (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"
    )
