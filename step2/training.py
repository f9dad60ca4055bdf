"""One training step, one epoch, one run from first to last epoch. A run's numbers depend on this file."""

import io
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from step2.files import read_sealed, write_content, write_sealed
from step2.network import InitialWeights, batch_norm_momentum, build_network, learning_rate, load_initial
from step2.pictures import Batch, Pictures, in_order, load, normalise, shuffled, steps_per_epoch
from step2.settings import Recipe, Settings
from step2.variants import require

LONGER = 1.1  # times the longest epoch so far: what the next one may take
CALMER = "lower the profile's rates, or set mixed_precision to 'no'"
CURVE_POINTS = 24  # of a held-out curve, at least, where there are as many epochs
Tell = Callable[[float], None]  # is told the epochs done; may raise to stop the run


class OutOfTime(Exception):
    """The time for training is over, or would be before the next epoch of this run is."""


@dataclass(frozen=True)
class Speed:
    """How steps are computed, without changing what is learnt.

    precision: bf16, fp16 or no; compiled: by torch.compile, replayed as CUDA graphs where a batch is taken
    whole; part: slices at a time; reasons: a line each.
    """

    precision: str
    channels_last: bool
    fused: bool
    compiled: bool
    part: int
    reasons: tuple[str, ...]


class Trainer:
    """A network and its optimizer on a device.

    part: slices at a time, halved when memory ends.
    """

    def __init__(self, recipe: Recipe, speed: Speed, momentum: float, device: torch.device, outputs: int):
        self.recipe, self.part, self.device = recipe, speed.part, device
        self.layout = torch.channels_last if speed.channels_last else torch.contiguous_format
        self.network = build_network(recipe, momentum, outputs).to(device, memory_format=self.layout)
        decay = recipe.weight_decay  # 0 makes AdamW the same as Adam
        weights = self.network.parameters()
        self.optimizer = torch.optim.AdamW(weights, lr=0.0, weight_decay=decay, fused=speed.fused)
        self.scaler = torch.amp.GradScaler(device.type, enabled=speed.precision == "fp16")
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(speed.precision)
        self.compiled_for = speed.part if speed.compiled else 0
        if self.compiled_for:
            # Of a batch in parts, a CUDA graph would write a part's gradients over those of the part before
            mode = "reduce-overhead" if speed.part >= recipe.batch_size else "default"
            self.compiled = torch.compile(self.network, dynamic=False, mode=mode)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return scores, float (n, outputs): compiled for one number of pictures, any other goes without."""
        network = self.compiled if len(pictures) == self.compiled_for else self.network
        return network(pictures)

    def autocast(self) -> AbstractContextManager:
        """Return the context in which the network computes in its precision."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def to_device(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return uint8 (n, 1 or 3, h, w) as the network's input on its device."""
        pictures = pictures.to(self.device, non_blocking=True)
        return normalise(pictures).contiguous(memory_format=self.layout)

    def gradients(self, pictures: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Add up the gradients of a batch, part by part; return its mean loss and share right, float (2,)."""
        self.network.train()
        self.optimizer.zero_grad()
        total = torch.zeros(2, device=self.device)
        for some, truth in zip(pictures.split(self.part), labels.split(self.part), strict=True):
            with self.autocast():
                scores = self.forward(self.to_device(some))
                smoothing = self.recipe.label_smoothing
                truth = truth.to(self.device)
                loss = F.cross_entropy(scores, truth, label_smoothing=smoothing, reduction="sum")
            self.scaler.scale(loss / len(labels)).backward()
            right = (scores.detach().argmax(1) == truth).sum()
            total += torch.stack([loss.detach(), right.to(loss.dtype)]) / len(labels)
        return total


def train_step(trainer: Trainer, pictures: torch.Tensor, labels: torch.Tensor, rate: float) -> torch.Tensor:
    """Take one optimizer step and return the batch's mean loss and share right, float (2,).

    Out of memory: the same batch again in parts of half the size, whose gradients add up. The effective batch
    stays as set, though batch norm then sees the parts.
    """
    for group in trainer.optimizer.param_groups:
        group["lr"] = rate
    while True:
        try:
            done = trainer.gradients(pictures, labels)
            trainer.scaler.step(trainer.optimizer)
            trainer.scaler.update()
            return done
        except RuntimeError as err:
            if not out_of_memory(err):
                raise
            if trainer.part == 1:
                advice = "lower image_size, workers or processes, or choose a smaller model_name"
                raise RuntimeError(f"memory ended with one slice at a time ({err}): {advice}") from err
        trainer.part = math.ceil(trainer.part / 2)
        if trainer.compiled_for:
            torch.compiler.reset()  # its CUDA graphs keep their memory, and are for more slices
        torch.cuda.empty_cache()


def out_of_memory(err: Exception) -> bool:
    """Tell whether an error means that memory ended, on a GPU or here."""
    on_cpus = ("can't allocate memory", "not enough memory")  # the latter on Windows
    signs = ("out of memory", "CUDNN_STATUS_NOT_SUPPORTED", "ALLOC_FAILED", *on_cpus)
    return isinstance(err, torch.OutOfMemoryError) or any(sign in str(err) for sign in signs)


@torch.inference_mode()
def predict(trainer: Trainer, batches: Iterable[Batch]) -> np.ndarray:
    """Return probabilities, float64 (n, classes), in the order of the batches that `load` yields."""
    trainer.network.eval()
    found = []
    for pictures, _ in batches:
        for some in pictures.split(trainer.part):
            with trainer.autocast():
                scores = trainer.network(trainer.to_device(some))
            found.append(scores.float().cpu().double().softmax(1).numpy())
    return np.concatenate(found)


def log_loss(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """Return the mean negative log of the true class's probability."""
    return float(-np.log(np.maximum(probabilities[np.arange(len(truth)), truth], 1e-15)).mean())


def train_epoch(
    trainer: Trainer, batches: Iterable[Batch], steps: int, truth: torch.Tensor, epoch: int, tell: Tell
) -> dict[str, Any]:
    """Train one epoch on batches that `load` yields and return its row of history.

    steps: of an epoch. truth: of all slices, int (n,).
    """
    epochs, began, seen, rate = trainer.recipe.epochs, time.perf_counter(), 0, 0.0
    total = torch.zeros(2, device=trainer.device)
    for number, (pictures, index) in enumerate(batches):
        rate = learning_rate(epoch * steps + number, epochs * steps, trainer.recipe)
        total += train_step(trainer, pictures, truth[index], rate) * len(index)
        seen += len(index)
        tell(epoch + (number + 1) / steps)
    (loss, right), spent = (total / seen).tolist(), time.perf_counter() - began
    require(math.isfinite(loss), f"the training loss is {loss} in epoch {epoch + 1}: {CALMER}")
    speed = {"images_per_s": seen / spent, "seconds": spent}
    fit = {"train_loss": loss, "train_accuracy": right}
    return {"epoch": epoch + 1, **fit, "learning_rate": rate, **speed}


@dataclass(frozen=True)
class RunInput:
    """What one run is made of. pictures, labels, int (n,) of 0 to classes - 1: of all slices; train, held_out:
    positions. The pictures' seed is that of weights and order too.

    ends: when training has to be over, in seconds since 1970.
    """

    folder: Path
    pictures: Pictures
    labels: np.ndarray
    classes: int
    train: np.ndarray
    held_out: np.ndarray
    settings: Settings
    weights: InitialWeights
    ends: float = math.inf


def train_run(
    run: RunInput, speed: Speed, device: torch.device, tell: Tell
) -> tuple[Trainer, list[dict], np.ndarray]:
    """Train to the last epoch, from the checkpoint if there is one; return the trainer, its history and its
    probabilities for the slices of its fold, float64 (n held out, classes).

    Held-out predictions are of the last epoch, fixed in advance: one chosen by the slices it is judged on
    flatters. OutOfTime where run.ends comes first; the checkpoint is that of the last whole epoch. A kill may
    cost two epochs, as one's checkpoint is written while the next one trains.
    """
    settings, size, threads = run.settings, run.settings.batch_size, run.settings.workers
    pictures, seed = run.pictures, run.pictures.seed
    torch.manual_seed(seed)
    steps, held_out = steps_per_epoch(len(run.train), size), in_order(run.held_out, size)
    momentum = batch_norm_momentum(steps * settings.epochs)
    trainer = Trainer(settings, speed, momentum, device, run.classes)
    load_initial(trainer.network, run.weights)
    path = run.folder / "checkpoint.pt"
    history = load_checkpoint(path, trainer)
    truth, answers = torch.from_numpy(run.labels), run.labels[run.held_out]
    tell = tell_until(run.ends, tell)
    with ThreadPoolExecutor(1) as beside:  # a B7's checkpoint takes seconds, in which the next epoch trains
        written: Future[Any] = beside.submit(int)
        try:
            for epoch in epochs_in_time(history, settings.epochs, run.ends):
                batches = load(pictures, shuffled(run.train, size, seed, epoch), threads)
                row = train_epoch(trainer, batches, steps, truth, epoch, tell)
                row |= {"val_loss": None, "val_accuracy": None}
                if is_judged(epoch, settings.epochs):
                    found = predict(trainer, load(pictures, held_out, threads))
                    row["val_loss"] = log_loss(found, answers)
                    row["val_accuracy"] = float((found.argmax(1) == answers).mean())
                history.append(row)
                kept = snapshot(trainer, history)
                written.result()
                written = beside.submit(write_checkpoint, path, kept)
        finally:
            written.result()  # what failed there is raised, whatever else ended the run
    found = predict(trainer, load(pictures, held_out, threads))
    require(np.isfinite(found).all(), f"the last epoch's predictions are no numbers: {CALMER}")
    return trainer, history, found


def epochs_in_time(history: list[dict], epochs: int, ends: float) -> Iterator[int]:
    """Yield the epochs to train, 0 to epochs - 1; OutOfTime instead of one that would not end before `ends`.

    history: rows of the epochs that are done; the longest so far says how long the next one may take.
    """
    longest = max((row["seconds"] for row in history), default=0.0)
    for epoch in range(len(history), epochs):
        began = time.time()
        if began + LONGER * longest > ends:
            raise OutOfTime(f"epoch {epoch + 1} may take {LONGER * longest:.0f} s, more than are left")
        yield epoch
        longest = max(longest, time.time() - began)


def tell_until(ends: float, tell: Tell) -> Tell:
    """Return tell, but that it stops the run once `ends` has come: a first epoch's length is not known."""

    def checked(epochs: float) -> None:
        tell(epochs)
        if time.time() > ends:
            raise OutOfTime("an epoch took longer than was left")

    return checked


def is_judged(epoch: int, epochs: int) -> bool:
    """Tell whether the held-out slices are predicted after an epoch, 0 to epochs - 1: for the curves, so a
    tenth of the time of short epochs need not go there. The last one always is."""
    return (epochs - 1 - epoch) % max(1, epochs // CURVE_POINTS) == 0


def snapshot(trainer: Trainer, history: list[dict]) -> dict[str, Any]:
    """Return copies of all that the next epoch depends on; rates, order and augmentation follow from its number.
    A few long vectors: hundreds of small ones take much longer to write."""
    kept = {"history": list(history), "part": trainer.part, "scaler": trainer.scaler.state_dict()}
    kept |= {"random": torch.get_rng_state()} | joined("model", trainer.network.state_dict().values())
    if trainer.device.type != "cpu":
        kept["random_device"] = torch.get_device_module(trainer.device).get_rng_state()
    state = trainer.optimizer.state_dict()["state"]  # empty, if fp16 skipped each step so far
    moments = [state[number] for number in sorted(state)]
    for name in moments[0] if moments else ():
        kept |= joined(f"optimizer {name}", (moment[name] for moment in moments))
    return kept


def write_checkpoint(path: Path, kept: dict[str, Any]) -> None:
    """Write a snapshot."""
    write_sealed(path, packed(kept))


def load_checkpoint(path: Path, trainer: Trainer) -> list[dict]:
    """Go back to a checkpoint and return the history up to it; none where it is missing or damaged."""
    content = read_sealed(path)
    if content is None:
        if path.exists():
            print(f"{path} is damaged: this run starts again at its first epoch", flush=True)
        return []
    kept = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)  # nothing in it is run
    trainer.network.load_state_dict(parted("model", kept, trainer.network.state_dict()))
    weights = dict(enumerate(trainer.optimizer.param_groups[0]["params"]))
    state: dict[int, dict[str, torch.Tensor]] = {number: {} for number in weights}
    for name in {key.split()[1] for key in kept if key.startswith("optimizer")}:
        like = {number: torch.zeros(()) for number in weights} if name == "step" else weights
        for number, value in parted(f"optimizer {name}", kept, like).items():
            state[number][name] = value
    groups = trainer.optimizer.state_dict()["param_groups"]  # they follow from the settings
    trainer.optimizer.load_state_dict({"state": state if state[0] else {}, "param_groups": groups})
    if kept["scaler"]:
        trainer.scaler.load_state_dict(kept["scaler"])
    torch.set_rng_state(kept["random"])
    if "random_device" in kept and trainer.device.type != "cpu":
        torch.get_device_module(trainer.device).set_rng_state(kept["random_device"])
    trainer.part = kept["part"]
    return kept["history"]


def joined(kind: str, tensors: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors one after another, as a vector for each of their types: {"<kind> <type>": (n,)}."""
    flat: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        flat.setdefault(tensor.dtype, []).append(tensor.detach().flatten())
    return {f"{kind} {dtype}": torch.cat(some).cpu() for dtype, some in flat.items()}


def parted(
    kind: str, vectors: dict[str, torch.Tensor], like: dict[Any, torch.Tensor]
) -> dict[Any, torch.Tensor]:
    """Return what was joined as tensors of the names, shapes, types, layouts and devices of others.

    The layout matters: the fused optimizer takes for granted that it is the weight's.
    """
    place: Counter[torch.dtype] = Counter()
    found = {}
    for name, model in like.items():
        begins = place[model.dtype]
        place[model.dtype] += model.numel()
        piece = vectors[f"{kind} {model.dtype}"][begins : place[model.dtype]]
        found[name] = torch.empty_like(model).copy_(piece.view(model.shape))
    return found


def half_weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of the weights for later use: convolutions as float16, half the size; the rest as is."""
    kept = {key: value.half() if value.ndim > 1 else value for key, value in network.state_dict().items()}
    return {key: value.to("cpu", copy=True) for key, value in kept.items()}


def save_weights(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write weights, atomically."""
    write_content(path, packed(weights))


def packed(kept: dict[str, Any]) -> bytes:
    """Return what torch.save makes of a dict."""
    buffer = io.BytesIO()
    torch.save(kept, buffer)
    return buffer.getvalue()
