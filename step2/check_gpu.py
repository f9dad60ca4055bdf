"""Check what only a CUDA GPU can show: one line each, with the figure that it was judged by. A few minutes.

    python -m step2.check_gpu

Exit status: 0 all well, 1 something is not. The same checks run on a CPU in the tests, as far as a CPU can.
"""

import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import _dynamo as dynamo

from step2.engine import local_cluster
from step2.network import build_network
from step2.pace import pace_if_it_fits
from step2.settings import Settings, read_settings
from step2.speed import OUTPUTS, find_device, prepare_process, usual_speed, why_not_compile
from step2.training import Speed, Trainer, load_checkpoint, predict, snapshot, train_step, write_checkpoint

Verdict = tuple[bool, str]
PLAIN = Speed("no", False, False, False, 8, ())
CLOSE = 1e-3  # part of the weights' size, between two ways to compute the same steps


def small() -> Settings:
    """Return settings of a network that a step of takes no time."""
    tiny = {"profile": "quick", "image_size": 32, "batch_size": 8, "weights": "none", "processes": 1}
    return read_settings(tiny)


def some_batch(settings: Settings, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch of noise, uint8, with labels."""
    size, generator = settings.image_size, torch.Generator().manual_seed(seed)
    shape = (settings.batch_size, 1, size, size)
    pictures = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return pictures, torch.arange(settings.batch_size) % OUTPUTS


def trained(
    device: torch.device, speed: Speed = PLAIN, steps: int = 3, varied: bool = False
) -> tuple[Trainer, list[float]]:
    """Return a small network after some steps on a device, and the losses; the same start each time.

    varied: another batch in each step, the fourth a slice shorter, and predictions in between.
    """
    settings = small()
    torch.manual_seed(0)  # weights are drawn on the CPU, whatever the device
    trainer = Trainer(settings, speed, 0.1, device, OUTPUTS)
    trainer.network._dropout.p = 0.0  # its draws differ between devices
    losses = []
    for step in range(steps):
        pictures, labels = some_batch(settings, step + 1 if varied else 1)
        if varied and step == 3:
            pictures, labels = pictures[1:], labels[1:]
        losses.append(float(train_step(trainer, pictures, labels, 1e-3)[0]))
        if varied:
            predict(trainer, [(pictures, labels)])
    return trainer, losses


def difference(a: Trainer, b: Trainer) -> float:
    """Return how far two networks' weights are apart, as part of their size."""
    one, other = (
        torch.cat([w.detach().double().cpu().flatten() for w in t.network.parameters()]) for t in (a, b)
    )
    return float((one - other).norm() / one.norm())


def as_close(a: Trainer, b: Trainer, allowed: float = CLOSE) -> Verdict:
    """Judge how far two networks' weights are apart."""
    apart = difference(a, b)
    return apart <= allowed, f"weights {apart:.1e} apart (allowed {allowed:.0e})"


# ---------------------------------------- the checks


def check_again(one: torch.device, other: torch.device, allowed: float = CLOSE, **levers: Any) -> Verdict:
    """The same steps twice in fp32, with levers the second time: only the order of sums may differ."""
    return as_close(trained(one)[0], trained(other, replace(PLAIN, **levers))[0], allowed)


def check_half(device: torch.device, precision: str) -> Verdict:
    """Half precision learns: the loss falls as it does in fp32, and fp16's scaler drops no step at the end."""
    _, exact = trained(device, steps=12)
    trainer, losses = trained(device, replace(PLAIN, precision=precision), 12)
    apart = abs(losses[-1] - exact[-1]) / exact[0]
    scale = f", loss scale {trainer.scaler.get_scale():.0f}" if trainer.scaler.is_enabled() else ""
    fine = apart < 0.1 and all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    return fine, f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, fp32 {exact[0]:.2f} -> {exact[-1]:.2f}{scale}"


def check_compile(device: torch.device) -> Verdict:
    """torch.compile takes the network whole and computes the same, in a process's first run and in its second,
    whose weights lie elsewhere; CUDA graphs are replayed from the third step on."""
    if why := why_not_compile(device):
        return True, f"not used: {why}"
    settings, fast = small(), replace(PLAIN, compiled=True)
    pictures = torch.rand(8, 3, 32, 32, device=device)
    found = dynamo.explain(build_network(settings, 0.1, OUTPUTS).to(device))(pictures)
    began = time.perf_counter()
    plain, first, second = (trained(device, speed, 6, varied=True)[0] for speed in (PLAIN, fast, fast))
    seconds, breaks = time.perf_counter() - began, found.graph_break_count
    verdicts = [as_close(plain, compiled, 1e-2) for compiled in (first, second)]
    fine = not breaks and all(close for close, _ in verdicts)
    return fine, f"{breaks} graph breaks, {' and '.join(says for _, says in verdicts)}, {seconds:.0f} s"


def check_memory_that_ends(device: torch.device) -> Verdict:
    """A batch that doesn't fit is taken in parts, whose gradients add up."""
    settings = read_settings({"profile": "medium", "weights": "none", "batch_size": 64, "processes": 1})
    trainer = Trainer(settings, replace(usual_speed(settings, device), part=64), 0.1, device, OUTPUTS)
    held = torch.cuda.memory_reserved(device)
    room = (held + 2.5e9) / torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(room, 1.0), device)
    try:
        loss = float(train_step(trainer, *some_batch(settings), 1e-4)[0])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    fine = trainer.part < 64 and math.isfinite(loss)
    return fine, f"64 slices in {held / 1e9 + 2.5:.1f} GB: {trainer.part} at a time, loss {loss:.2f}"


def check_checkpoint(device: torch.device) -> Verdict:
    """A checkpoint goes on as if nothing had happened, also computed in another way than it was written."""
    settings, batch = small(), some_batch(small())
    ways = [PLAIN, replace(PLAIN, channels_last=True, fused=True)]
    apart, same_chance = [], True
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        for written, read in product(ways, ways):
            trainer, _ = trained(device, written)
            write_checkpoint(path, snapshot(trainer, [{"epoch": 1}]))
            drawn = float(torch.rand(1, device=device))
            train_step(trainer, *batch, 1e-3)
            other = Trainer(settings, read, 0.1, device, OUTPUTS)
            other.network._dropout.p = 0.0
            load_checkpoint(path, other)
            same_chance &= float(torch.rand(1, device=device)) == drawn
            train_step(other, *batch, 1e-3)
            apart.append(difference(trainer, other))
    says = f"weights {max(apart):.1e} apart a step later, whichever settings of speed wrote it; same random numbers"
    return max(apart) < 5e-5 and same_chance, says if same_chance else says.replace("same", "OTHER")


def check_worker(device: torch.device) -> Verdict:
    """A worker process sees one GPU, and trains on it, compiled: it does so in a thread, where CUDA graphs are
    more easily lost than in a program's first one."""
    settings = small()
    began = time.perf_counter()
    with local_cluster(settings, 1) as client:
        kind, loss = client.submit(_train_in_worker, pure=False).result(timeout=300)
    fine = kind == device.type and math.isfinite(loss)
    return fine, f"{kind}, loss {loss:.2f}, {time.perf_counter() - began:.0f} s"


def _train_in_worker() -> tuple[str, float]:
    device = find_device()
    prepare_process(small(), device)
    compiled = device.type == "cuda" and not why_not_compile(device)
    return device.type, trained(device, replace(PLAIN, compiled=compiled), 5)[1][-1]


def check_profile(device: torch.device, profile: str) -> Verdict:
    """A profile's step at its real size: does it fit, how fast is it, and does it wait for pictures?"""
    given = {"profile": profile, "weights": "none", "processes": 1}
    settings = read_settings(given, gpus=torch.cuda.device_count())
    pace = pace_if_it_fits(settings, device, channels_last=True)
    if not pace.part:
        return True, f"not for this GPU: {pace.basis}"
    fits = f"{pace.part} of {settings.batch_size} slices at a time in {pace.memory / 1e9:.1f} GB"
    says = f"{fits}; {1 / pace.train:.0f} images/s trained, {1 / pace.load:.0f} loaded by {settings.workers} threads"
    says += "; the GPU waits for pictures: raise workers" * (pace.load >= pace.train)
    return pace.load < pace.train, says


def checks(device: torch.device) -> Iterator[tuple[str, Callable[[], Verdict]]]:
    """Yield each check's name and what does it."""
    yield "as on the CPU", partial(check_again, torch.device("cpu"), device, 1e-2)
    yield "repeats", partial(check_again, device, device)
    yield "channels_last", partial(check_again, device, device, 1e-2, channels_last=True)
    yield "fused optimizer", partial(check_again, device, device, fused=True)
    for precision in ("bf16", "fp16"):
        yield precision, partial(check_half, device, precision)
    yield "torch.compile", partial(check_compile, device)
    yield "memory that ends", partial(check_memory_that_ends, device)
    yield "checkpoint", partial(check_checkpoint, device)
    yield "worker process", partial(check_worker, device)
    for profile in ("quick", "medium", "full"):
        yield f"profile {profile}", partial(check_profile, device, profile)


def main() -> int:
    """Run all checks, print a line each, and return the exit status."""
    device = find_device()
    if device.type != "cuda":
        print("there is no CUDA GPU here: nothing was checked")
        return 1
    card = torch.cuda.get_device_properties(device)
    versions = f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}"
    print(f"{card.name}, {card.total_memory / 1e9:.0f} GB, {versions}")
    prepare_process(small(), device)
    torch.set_float32_matmul_precision("highest")  # fp32 is meant where a check says so
    torch.backends.cudnn.allow_tf32 = False
    failed = 0
    for name, check in checks(device):
        began = time.perf_counter()
        try:
            fine, says = check()
        except Exception as err:  # noqa: BLE001  # whatever it is, the other checks are worth their lines
            fine, says = False, f"{type(err).__name__}: {' '.join(str(err).split())[:300]}"
        torch.cuda.empty_cache()
        failed += not fine
        took = time.perf_counter() - began
        print(f"{'ok' if fine else 'FAILED':8}{name:18}{says}  [{took:.1f} s]", flush=True)
    print("all well" if not failed else f"{failed} checks failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
