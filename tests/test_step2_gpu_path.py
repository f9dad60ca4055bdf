"""The GPU path is the CPU path: one code, the device a value, so each lever runs here too.

| lever | test here or elsewhere |
|---|---|
| autocast bf16, fp16 with gradient scaling | test_half_precision_learns |
| channels_last, fused optimizer | test_levers_compute_the_same |
| torch.compile: the network whole, no graph break | test_network_compiles_whole |
| torch.compile: inductor | test_inductor_takes_a_training_step |
| part size after memory ended, in the middle of an epoch | test_memory_that_ends_in_an_epoch; test_step2_training.py |
| checkpoint: optimizer, scaler, random state | test_checkpoint_goes_on_with_other_levers; test_step2_training.py |
| one GPU for each worker process | test_worker_process_trains |
| devices, dtypes and layouts of B7 at 600 px on CUDA | test_b7_runs_on_a_fake_cuda_device |
| full, a step at its real size | test_a_step_of_full_at_its_real_size |
| what is fastest, what fits, what compiling must earn | test_step2_training.py |
| all of it on a GPU | python -m step2.check_gpu, whose checks these are |
"""

from dataclasses import replace

import psutil
import pytest
import torch
from step2_helpers import make_settings
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from step2 import check_gpu, pace, training
from step2.check_gpu import PLAIN, small, some_batch
from step2.network import build_network
from step2.pictures import normalise
from step2.settings import read_settings
from step2.speed import usual_speed, why_not_compile
from step2.training import Trainer, train_epoch, train_step

CPU = torch.device("cpu")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns(precision):
    fine, says = check_gpu.check_half(CPU, precision)
    assert fine, says
    assert ("loss scale" in says) == (precision == "fp16")


@pytest.mark.parametrize("levers", [{}, {"channels_last": True, "allowed": 1e-2}, {"fused": True}])
def test_levers_compute_the_same(levers):
    fine, says = check_gpu.check_again(CPU, CPU, **levers)
    assert fine, says


def test_check_sees_a_network_that_went_another_way():
    one, _ = check_gpu.trained(CPU)
    other, _ = check_gpu.trained(CPU, steps=4)
    assert not check_gpu.as_close(one, other)[0]


def test_checkpoint_goes_on_with_other_levers():
    fine, says = check_gpu.check_checkpoint(CPU)
    assert fine and says.endswith("same random numbers"), says


@pytest.mark.parametrize(("load", "fine"), [(0.001, True), (0.1, False)])
def test_profile_is_judged_by_its_pace(monkeypatch, load, fine):
    found = pace.Pace(10**6, 0.01, load, 2e9, 32, "timed")
    monkeypatch.setattr(pace, "pace_on_gpu", lambda *_: found)
    good, says = check_gpu.check_profile(CPU, "medium")
    assert good == fine and says.startswith("32 of 32 slices at a time in 2.0 GB; 100 images/s trained")
    assert ("waits for pictures" in says) != fine


def test_profile_too_large_for_a_gpu_is_no_fault_of_it(monkeypatch):
    def measure(*_: object) -> pace.Pace:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pace, "pace_on_gpu", measure)
    monkeypatch.setattr(pace, "device_name", lambda device: "MX450")
    fine, says = check_gpu.check_profile(CPU, "full")
    assert fine and says == "not for this GPU: a single slice doesn't fit in the memory of this MX450"


@pytest.mark.processes
def test_worker_process_trains():
    fine, says = check_gpu.check_worker(CPU)
    assert fine and says.startswith("cpu"), says


def test_network_compiles_whole(monkeypatch):
    """With aot_eager, which traces forward and backward as inductor does and leaves out the machine code."""
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda network, **how: compile_(network, **how, backend="aot_eager")
    )
    fine, says = check_gpu.check_compile(CPU)
    assert fine and says.startswith("0 graph breaks"), says


@pytest.mark.skipif(bool(why_not_compile(CPU)), reason=why_not_compile(CPU))
def test_inductor_takes_a_training_step(monkeypatch):
    """Of one block's kind of layers, as a whole network takes minutes to compile on a CPU."""

    def tiny(*_: object) -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return nn.Sequential(*layers)

    monkeypatch.setattr(training, "build_network", tiny)
    found = []
    for compiled in (False, True):
        trainer = Trainer(small(), replace(PLAIN, compiled=compiled), 0.1, CPU, 6)
        found.append(train_step(trainer, *some_batch(small()), 1e-3))
    assert torch.allclose(*found, atol=1e-5)


def test_memory_that_ends_in_an_epoch():
    """The third step finds no memory for 8 slices: it is taken again in parts of 4, and so are the next ones."""
    settings = make_settings(epochs=1)
    trainer, seen = Trainer(settings, replace(PLAIN, precision="fp16"), 0.1, CPU, 6), []

    def forward(pictures: torch.Tensor) -> torch.Tensor:
        seen.append(len(pictures))
        if len(seen) > 2 and len(pictures) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return trainer.network(pictures)

    trainer.forward = forward
    pictures, labels = some_batch(small())
    batches = [(pictures, torch.arange(8))] * 5
    row = train_epoch(trainer, batches, 5, labels, 0, lambda epochs: None)
    assert seen == [8, 8, 8, 4, 4, 4, 4, 4, 4] and trainer.part == 4
    assert 0 < row["train_loss"] < 3


def test_b7_runs_on_a_fake_cuda_device():
    """FakeTensorMode runs the forward pass without a GPU: wrong devices, dtypes and layouts show."""
    settings = read_settings({"profile": "full", "weights": "none"}, gpus=1)
    with FakeTensorMode(), torch.device("cuda"):
        network = build_network(settings, 0.1, 6)
        pictures = torch.empty(8, 1, 600, 600, dtype=torch.uint8)
        scores = network(normalise(pictures).contiguous(memory_format=torch.channels_last))
    assert scores.shape == (8, 6) and scores.device.type == "cuda" and scores.dtype == torch.float32


@pytest.mark.skipif(psutil.virtual_memory().available < 8e9, reason="it takes up to 6 GB of memory")
def test_a_step_of_full_at_its_real_size():
    """One picture at a time, as 8 at once take more memory than a laptop has; 2 of the 8, for the time."""
    settings = read_settings({"profile": "full", "weights": "none"})
    torch.manual_seed(0)
    trainer = Trainer(settings, replace(usual_speed(settings, CPU), part=1), 0.01, CPU, 6)
    before = [weight.detach().clone() for weight in trainer.network._fc.parameters()]
    pictures = torch.randint(256, (2, 1, 600, 600), dtype=torch.uint8)
    loss, right = train_step(trainer, pictures, torch.arange(2), 6e-5).tolist()
    assert 1 < loss < 4 and 0 <= right <= 1
    assert all(not torch.equal(a, b) for a, b in zip(before, trainer.network._fc.parameters(), strict=True))
