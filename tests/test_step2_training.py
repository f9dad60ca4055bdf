"""Training: batches in parts, memory that ends, how fast it computes, checkpoints, seeds."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from step2_helpers import SIZE, make_comparison_for, make_settings, write_pictures

from step2 import training
from step2.files import write_sealed
from step2.network import InitialWeights, build_network, learning_rate
from step2.pictures import Pictures
from step2.runs import Run
from step2.speed import (
    choose_precision,
    choose_speed,
    gpu_memory,
    measure_speed,
    seconds_a_step,
    what_fits,
    why_not_compile,
)
from step2.training import (
    CURVE_POINTS,
    RunInput,
    Speed,
    Trainer,
    half_weights,
    is_judged,
    load_checkpoint,
    log_loss,
    out_of_memory,
    save_weights,
    snapshot,
    train_epoch,
    train_run,
    train_step,
    write_checkpoint,
)

CPU = torch.device("cpu")
PLAIN = Speed("no", False, False, False, 8, ())


def make_trainer(part: int = 7) -> Trainer:
    """Return a trainer of a network without batch norm, whose gradients must not depend on the parts."""
    trainer = Trainer(make_settings(), Speed("no", False, False, False, part, ()), 0.1, CPU, 6)
    torch.manual_seed(0)
    trainer.network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIZE**2, 6))
    trainer.optimizer = torch.optim.SGD(trainer.network.parameters(), lr=0.0, momentum=0.9)  # type: ignore[assignment]
    return trainer


def some_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return seven pictures and labels."""
    torch.manual_seed(1)
    pictures = torch.randint(256, (7, 1, SIZE, SIZE), dtype=torch.uint8)
    return pictures, torch.arange(7) % 6


# ---------------------------------------- steps


def test_gradients_in_parts_are_those_of_the_whole_batch():
    found = []
    for part in (7, 3):
        trainer = make_trainer(part)
        loss = trainer.gradients(*some_batch())
        found.append((loss, trainer.network[1].weight.grad))
    assert torch.allclose(found[0][0], found[1][0]) and torch.allclose(found[0][1], found[1][1], atol=1e-6)


def test_batch_that_ends_the_memory_is_taken_in_halves():
    small, plain = make_trainer(), make_trainer()

    def scarce(pictures: torch.Tensor) -> torch.Tensor:
        if len(pictures) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return small.network(pictures)

    small.forward = scarce
    losses = [train_step(trainer, *some_batch(), 1e-3) for trainer in (small, plain)]
    assert small.part == 2 and plain.part == 7
    assert torch.allclose(*losses)
    assert torch.allclose(small.network[1].weight, plain.network[1].weight, atol=1e-6)


def test_error_that_smaller_parts_do_not_cure_is_raised():
    trainer = make_trainer(part=1)

    def fail(pictures: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("shapes do not match")

    trainer.forward = fail
    with pytest.raises(RuntimeError, match=r"^shapes do not match$"):
        train_step(trainer, *some_batch(), 1e-3)


def test_memory_that_ends_for_a_single_slice_is_explained():
    trainer = make_trainer(part=1)

    def fail(pictures: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer.forward = fail
    with pytest.raises(RuntimeError, match=r"memory ended with one slice at a time .*: lower image_size"):
        train_step(trainer, *some_batch(), 1e-3)


@pytest.mark.parametrize(("part", "mode"), [(8, "reduce-overhead"), (4, "default")])
def test_compiled_network_takes_the_size_that_it_was_compiled_for(monkeypatch, part, mode):
    """CUDA graphs, mode reduce-overhead, write each backward pass's gradients to the same place."""
    made, seen = [], []

    def compiled(network, **how):
        made.append(how)
        return lambda pictures: seen.append(len(pictures)) or network(pictures)

    monkeypatch.setattr(torch, "compile", compiled)
    settings = make_settings()
    trainer = Trainer(settings, Speed("no", False, False, True, part, ()), 0.1, CPU, 6)
    assert settings.batch_size == 8 and made == [{"dynamic": False, "mode": mode}]
    pictures = torch.zeros(8, 1, SIZE, SIZE, dtype=torch.uint8)
    train_step(trainer, pictures, torch.arange(8) % 6, 1e-3)
    assert seen == [part] * (8 // part)
    trainer.part = 2  # as when memory ends: without compiling once more
    train_step(trainer, pictures, torch.arange(8) % 6, 1e-3)
    assert seen == [part] * (8 // part)


def test_step_returns_loss_and_share_right():
    trainer, (pictures, labels) = make_trainer(), some_batch()
    trainer.network.eval()  # for what the step sees before it learns
    with torch.inference_mode():
        expected = (trainer.network(trainer.to_device(pictures)).argmax(1) == labels).float().mean()
    trainer.network.train = lambda mode=True: trainer.network  # stays as it is
    loss, right = train_step(trainer, pictures, labels, 1e-3).tolist()
    assert right == pytest.approx(float(expected)) and loss > 0


@pytest.mark.parametrize("epochs", [1, 2, 34, 70, 100, 101])
def test_held_out_slices_are_judged_often_enough_and_always_at_the_end(epochs):
    judged = [epoch for epoch in range(epochs) if is_judged(epoch, epochs)]
    assert judged[-1] == epochs - 1
    assert len(judged) >= min(epochs, CURVE_POINTS)


def test_log_loss_by_hand():
    found = log_loss(np.array([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]]), np.array([0, 1, 0]))
    assert found == pytest.approx((math.log(2) + math.log(4)) / 3)


# ---------------------------------------- how fast


def test_speed_on_a_cpu_is_fixed_and_gives_reasons(tmp_path):
    speed = choose_speed(make_settings(results=tmp_path), 100, CPU)
    assert (speed.precision, speed.compiled, speed.part) == ("no", False, 8)
    assert len(speed.reasons) == 2 and all(":" in reason for reason in speed.reasons)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wanted", ["auto", "bf16", "fp16", "no"])
def test_precision_on_a_cpu_is_full(wanted):
    precision, why = choose_precision(wanted, CPU)
    assert precision == "no" and why == "fp32: mixed precision is for CUDA GPUs, this is cpu"


@pytest.mark.parametrize("wanted", ["bf16", "fp16", "no"])
def test_precision_on_a_gpu_is_the_one_asked_for(wanted):
    assert choose_precision(wanted, torch.device("cuda")) == (wanted, f"{wanted}: asked for")


@pytest.mark.parametrize(("has", "precision"), [(True, "bf16"), (False, "fp16")])
def test_precision_of_a_gpu_is_bf16_where_its_hardware_has_it(monkeypatch, has, precision):
    """A T4 emulates it, slower than fp16."""

    def supported(including_emulation: bool = True) -> bool:
        return has or including_emulation

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    found, why = choose_precision("auto", torch.device("cuda"))
    assert found == precision and why.startswith(f"{precision}: a GPU has ")


def test_memory_of_several_gpus_is_that_of_the_smallest(monkeypatch):
    gpus = [SimpleNamespace(total_memory=size) for size in (80e9, 16e9)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: gpus[gpu])
    assert gpu_memory() == 16e9


BASE = Speed("bf16", False, True, False, 8, ("bf16: asked for",))


@pytest.mark.parametrize(
    ("steps", "compiled", "channels_last", "on"),
    [
        (2000, 0.02, 0.05, (True, True)),
        (500, 0.02, 0.05, (True, False)),  # 25 s of training: not tried
        (1300, 0.02, 0.05, (True, False)),  # saves 39 s, costs 2 x 20
        (2000, RuntimeError, 0.2, (False, False)),
        (2000, AssertionError, 0.2, (False, False)),  # CUDA graphs in a thread, before PyTorch 2.14
    ],
)
def test_speed_on_a_gpu_is_what_pays(monkeypatch, steps, compiled, channels_last, on):
    tried, resets = [], []

    def seconds(settings, speed, device):
        tried.extend([1] * speed.compiled)
        if speed.compiled and isinstance(compiled, type):
            raise compiled("no backend")
        return (compiled, 20.0) if speed.compiled else (channels_last if speed.channels_last else 0.1, 0.0)

    monkeypatch.setattr("step2.speed.time_steps", seconds)
    monkeypatch.setattr("step2.speed.why_not_compile", lambda device: "")
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    speed = measure_speed(make_settings(), BASE, steps, CPU)
    assert (
        len(resets) == len(tried) - speed.compiled
    )  # CUDA graphs that nobody replays would keep their memory
    assert (speed.channels_last, speed.compiled) == on and speed.part == 8 and speed.precision == "bf16"
    assert [reason.split(":")[0] for reason in speed.reasons] == [
        *("bf16", "8 slices at a time", f"channels_last {'on' if on[0] else 'off'}"),
        f"torch.compile {'on' if on[1] else 'off'}",
    ]


def test_speed_is_measured_once_for_as_many_steps(monkeypatch, tmp_path):
    """Whether compiling pays depends on their number."""
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr("step2.speed.usual_speed", lambda settings, device: BASE)
    monkeypatch.setattr("step2.speed.measure_speed", lambda s, base, steps, d: asked.append(steps) or base)
    settings = make_settings(results=tmp_path)
    found = [choose_speed(settings, steps, torch.device("cuda")) for steps in (10, 10, 20, 10)]
    assert asked == [10, 20] and found == [BASE] * 4


@pytest.mark.parametrize(("slow", "usual", "steps"), [(0.1, 0.01, 2 + 1 + 8), (9.0, 4.0, 2 + 1)])
def test_step_is_timed_after_the_slow_ones(monkeypatch, slow, usual, steps):
    """Steps are begun at once; it is waiting for the GPU that takes their time."""
    clock, begun = [0.0], []
    monkeypatch.setattr("step2.speed.time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def step():
        begun.append(slow if len(begun) < 2 else usual)

    def wait():
        clock[0] = sum(begun)

    assert seconds_a_step(step, wait, 2) == pytest.approx((usual, 2 * slow - 2 * usual))
    assert len(begun) == steps


def test_slices_at_a_time_are_as_many_as_fit(monkeypatch):
    def seconds(settings, speed, device):
        if speed.part > 3 or speed.channels_last:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
        return 0.1, 0.0

    monkeypatch.setattr("step2.speed.time_steps", seconds)
    monkeypatch.setattr("step2.speed.why_not_compile", lambda device: "no compiler")
    assert what_fits(make_settings(), BASE, CPU) == (replace(BASE, part=2), 0.1)
    speed = measure_speed(make_settings(), BASE, 100, CPU)
    assert (speed.part, speed.channels_last) == (2, False)
    assert "trains for 40 s" in speed.reasons[-1]  # 100 steps of 8 slices, 0.1 s for two of them


def test_nobody_installs_a_compiler_where_compiling_is_not_used(monkeypatch):
    monkeypatch.setattr("step2.speed.shutil.which", lambda name: None)
    monkeypatch.setattr("step2.speed.sys.platform", "win32")
    assert why_not_compile(CPU) == "used on Linux alone"
    monkeypatch.setattr("step2.speed.sys.platform", "linux")
    assert why_not_compile(CPU) == "there is no C compiler, cc or gcc"


@pytest.mark.parametrize("message", ["CUDA out of memory", "no kernel image"])
def test_network_that_can_not_be_timed_at_all_is_an_error(monkeypatch, message):
    def fail(settings, speed, device):
        raise RuntimeError(message)

    monkeypatch.setattr("step2.speed.time_steps", fail)
    with pytest.raises(RuntimeError, match=message):
        measure_speed(make_settings(), BASE, 100, CPU)


# ---------------------------------------- checkpoints


@pytest.fixture
def saved(tmp_path):
    """Return a trainer after a step, and its checkpoint."""
    trainer, path = make_trainer(), tmp_path / "checkpoint.pt"
    trainer.part = 3
    train_step(trainer, *some_batch(), 1e-3)
    write_checkpoint(path, snapshot(trainer, [{"epoch": 1, "val_loss": 0.5}]))
    return trainer, path


def test_checkpoint_brings_back_all_that_the_next_step_depends_on(saved):
    trainer, path = saved
    drawn, other = torch.rand(3), make_trainer()
    assert load_checkpoint(path, other) == [{"epoch": 1, "val_loss": 0.5}]
    assert torch.equal(torch.rand(3), drawn) and other.part == 3
    for each in (trainer, other):
        train_step(each, *some_batch(), 1e-3)
    assert torch.equal(trainer.network[1].weight, other.network[1].weight)


def test_snapshot_stays_as_it_was_while_training_goes_on():
    trainer = make_trainer()
    trainer.network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIZE**2, 6, bias=False))
    trainer.optimizer = torch.optim.AdamW(trainer.network.parameters())
    train_step(trainer, *some_batch(), 1e-3)
    kept = snapshot(trainer, [{"epoch": 1}])
    tensors = {name: value for name, value in kept.items() if isinstance(value, torch.Tensor)}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    train_step(trainer, *some_batch(), 1e-3)
    torch.rand(1)
    assert all(torch.equal(tensors[name], value) for name, value in before.items())
    assert not torch.equal(trainer.network[1].weight.flatten(), tensors["model torch.float32"])


def test_checkpoint_before_any_step_goes_on_as_well(tmp_path):
    """As where fp16 has skipped every step of the first epoch."""
    trainer, other = make_trainer(), make_trainer()
    write_checkpoint(tmp_path / "checkpoint.pt", snapshot(trainer, [{"epoch": 1}]))
    assert load_checkpoint(tmp_path / "checkpoint.pt", other) == [{"epoch": 1}]
    train_step(other, *some_batch(), 1e-3)
    train_step(trainer, *some_batch(), 1e-3)
    assert torch.equal(trainer.network[1].weight, other.network[1].weight)


def test_missing_checkpoint_is_a_start_without_a_word(tmp_path, capsys):
    assert load_checkpoint(tmp_path / "checkpoint.pt", make_trainer()) == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("damage", ["empty", "half", "flipped", "foreign"])
def test_damaged_checkpoint_is_named_and_the_run_starts_again(saved, capsys, damage):
    path, whole = saved[1], bytearray(saved[1].read_bytes())
    half = bytes(whole[: len(whole) // 2])
    whole[-100] ^= 1
    content = {"empty": b"", "half": half, "flipped": bytes(whole), "foreign": b"PK half a checkpoint"}
    path.write_bytes(content[damage])
    trainer = make_trainer()
    before = trainer.network[1].weight.clone()
    assert load_checkpoint(path, trainer) == []
    assert torch.equal(trainer.network[1].weight, before)
    assert capsys.readouterr().out == f"{path} is damaged: this run starts again at its first epoch\n"


def test_checkpoint_with_code_in_it_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    write_sealed(tmp_path / "checkpoint.pt", (tmp_path / "evil.pt").read_bytes())
    with pytest.raises(Exception, match="Weights only load failed"):
        load_checkpoint(tmp_path / "checkpoint.pt", make_trainer())
    assert not (tmp_path / "ran").exists()


def test_kept_weights_are_halved_and_can_be_loaded(tmp_path):
    trainer, other = make_trainer(), make_trainer()
    save_weights(tmp_path / "last.pt", half_weights(trainer.network))
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert (state["1.weight"].dtype, state["1.bias"].dtype) == (torch.float16, torch.float32)
    other.network.load_state_dict(state)
    assert torch.allclose(other.network[1].weight, trainer.network[1].weight, rtol=1e-3, atol=1e-4)


# ---------------------------------------- seeds


def test_same_seed_for_all_variants_and_another_for_the_control(tmp_path):
    write_pictures(tmp_path, per_class=2)
    comparison = make_comparison_for(tmp_path, tmp_path / "results")
    assert comparison.seed(Run("a", 1, 1)) == comparison.seed(Run("b", 1, 1))
    seeds = [comparison, replace(comparison, settings=comparison.settings.model_copy(update={"seed": 4}))]
    places = itertools.product((1, 2), (1, 2), (False, True))
    assert len({each.seed(Run("a", *place)) for place in places for each in seeds}) == 16


@pytest.mark.parametrize(
    "message",
    [
        "[enforce fail] data. DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
    ids=["CPU, Windows", "cuBLAS"],
)
def test_memory_that_ends_is_known_by_each_librarys_words(message):
    assert out_of_memory(RuntimeError(message))


# ---------------------------------------- what is trained on what


def test_each_slice_is_trained_with_its_own_label(monkeypatch):
    seen, picture = [], torch.zeros(2, 1, 2, 2)

    def step(trainer, pictures, labels, rate):
        seen.append(labels.tolist())
        return torch.zeros(2)

    monkeypatch.setattr(training, "train_step", step)
    batches = [(picture, torch.tensor([3, 0])), (picture, torch.tensor([2, 1]))]
    train_epoch(make_trainer(), batches, 2, torch.tensor([0, 10, 20, 30]), 0, lambda epochs: None)
    assert seen == [[30, 0], [20, 10]]


def test_epoch_notes_the_mean_over_its_slices_and_follows_the_rate_step_by_step(monkeypatch):
    rates, settings = [], make_settings()

    def step(trainer, pictures, labels, rate):
        rates.append(rate)
        return torch.tensor([float(len(labels)), 0.5])

    monkeypatch.setattr(training, "train_step", step)
    batches = [(torch.zeros(n, 1, 2, 2), torch.arange(n)) for n in (4, 4, 2)]
    row = train_epoch(make_trainer(), batches, 3, torch.zeros(4, dtype=torch.long), 1, lambda epochs: None)
    assert (row["train_loss"], row["train_accuracy"]) == pytest.approx(((16 + 16 + 4) / 10, 0.5))
    assert rates == [learning_rate(number, 6, settings) for number in (3, 4, 5)]  # of two epochs


def test_loss_is_smoothed_as_the_recipe_says():
    trainer, (pictures, labels) = make_trainer(), some_batch()
    scores = trainer.network(trainer.to_device(pictures)).detach().log_softmax(1)
    expected = 0.9 * -scores[range(7), labels].mean() - 0.1 * scores.mean()  # quick smooths by 0.1
    assert float(trainer.gradients(pictures, labels)[0]) == pytest.approx(float(expected), rel=1e-5)


def test_weights_decay_as_the_recipe_says():
    trainer = Trainer(make_settings(weight_decay=0.3), PLAIN, 0.1, CPU, 6)
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.3]


def four_slices(folder, settings, weights) -> RunInput:
    """Return a run that trains on four slices without pictures, and holds out the same."""
    four = np.arange(4)
    return RunInput(folder, Pictures(folder, [], settings), four, 6, four, four, settings, weights)


def test_training_begins_with_the_initial_weights(tmp_path, monkeypatch):
    settings, begun = make_settings(epochs=1), []
    given = build_network(settings, 0.1, 6)
    torch.save(given.state_dict(), tmp_path / "weights.pt")

    def epoch(trainer, *rest):
        begun.append(trainer.network._conv_stem.weight.detach().clone())
        return {"seconds": 0.0}

    monkeypatch.setattr(training, "train_epoch", epoch)
    monkeypatch.setattr(training, "predict", lambda *given: np.full((4, 6), 1 / 6))
    weights = InitialWeights("file", "file", str(tmp_path / "weights.pt"), "", "")
    train_run(four_slices(tmp_path, settings, weights), PLAIN, CPU, lambda epochs: None)
    assert torch.equal(begun[0], given._conv_stem.weight)
