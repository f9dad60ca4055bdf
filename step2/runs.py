"""All runs of a comparison: their folders, what they leave behind, and the tables made of them.

A run is one variant, trained on all patients but those of one fold. Its recipe, split, pictures, initial
weights and code are hashed into the name of its folder: a finished run is never trained again, a changed one
gets a folder of its own, and nothing is overwritten.
"""

import hashlib
import io
import json
import math
import os
import platform
import sys
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd
import torch

from step2.classes import probability_columns
from step2.files import read_json, sha256, write_csv, write_json
from step2.network import InitialWeights
from step2.pictures import Pictures, fits_in_memory, in_order, load, pictures_digests, steps_per_epoch
from step2.settings import Settings
from step2.slices import Slices
from step2.speed import choose_speed, device_name, find_device, prepare_process
from step2.training import RunInput, Speed, Tell, Trainer, half_weights, predict, save_weights, train_run
from step2.variants import require

CODE = ("pictures", "network", "training")  # the modules that a run's numbers depend on
PACKAGES = ("efficientnet-pytorch", "numpy", "pandas", "scikit-learn", "scipy", "statsmodels")
TEXTS = dict.fromkeys(("image", "label", "predicted"), str)  # a class may be called 0
MENDED = "is missing or damaged: run the training cell again, which makes it anew"
CHANGED = "was changed since the notebook read it: run the notebook again from its first cell"
NOT_JUDGED = {"val_loss": [""], "val_accuracy": [""]}  # of history.csv: epochs without a look at the held-out


class Run(NamedTuple):
    """One training; control: the same again under another seed."""

    variant: str
    repeat: int
    fold: int
    control: bool = False

    def __str__(self) -> str:
        return f"{self.variant + ' (control)' * self.control:30} repeat {self.repeat} fold {self.fold}"


def code_digest() -> str:
    """Return a hash of the code that a run's numbers depend on."""
    texts = [(files("step2") / f"{module}.py").read_text(encoding="utf-8") for module in CODE]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


LOADED = code_digest()  # of the code that this process runs, whatever the files say by now


@dataclass(frozen=True)
class Comparison:
    """Everything that the runs share. fold_of: int (repeats, n), the fold of each training slice.

    digests: {variant: hashes of its training and its testing pictures}; code: a hash of what it is trained with.
    only: the (repeat, fold) that it consists of where time ended before the others; None is all.
    """

    settings: Settings
    variants: tuple[str, ...]
    slices: Slices
    fold_of: np.ndarray
    weights: InitialWeights
    digests: dict[str, list[str]]
    code: str = LOADED
    only: tuple[tuple[int, int], ...] | None = None

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """The (repeat, fold) of every split."""
        repeats, folds = range(1, self.settings.repeats + 1), range(1, self.settings.folds + 1)
        return self.only or tuple((repeat, fold) for repeat in repeats for fold in folds)

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """All runs, fold by fold, each with its control, so that a stopped comparison has whole folds."""
        of_fold = [(variant, False) for variant in self.variants]
        of_fold += [(self.variants[0], True)] * self.settings.control_run
        return tuple(Run(variant, *place, again) for place in self.places for variant, again in of_fold)

    @cached_property
    def steps(self) -> int:
        """Training steps of a run."""
        train, _ = self.split(self.runs[0])
        return steps_per_epoch(len(train), self.settings.batch_size) * self.settings.epochs

    @property
    def steps_to_compile(self) -> int:
        """Training steps of all runs of a process; of one where a cluster's workers may have no more. 0 where
        batches differ in size, as a network is compiled for one."""
        settings, count = self.settings, len(self.split(self.runs[0])[0])
        runs_each = 1 if settings.cluster else math.ceil(len(self.runs) / settings.processes)
        whole = steps_per_epoch(count, settings.batch_size) * settings.batch_size <= count
        return runs_each * self.steps if whole else 0

    def split(self, run: Run) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions of a run's training and held-out slices."""
        held_out = self.fold_of[run.repeat - 1] == run.fold - 1
        return np.flatnonzero(~held_out), np.flatnonzero(held_out)

    def seed(self, run: Run) -> int:
        """Return the seed of a run's weights, order and augmentation: the same for all variants."""
        text = f"{self.settings.seed} {run.repeat} {run.fold} {run.control}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])

    @cached_property
    def folders(self) -> dict[Run, Path]:
        """The folder of each run; its name has a hash of all that the run's numbers depend on."""
        rows, folders = self.slices.training["label"] + " " + self.slices.training["image"], {}
        for run in self.runs:
            split = [list(rows.iloc[part]) for part in self.split(run)]
            pictures, weights = self.digests[run.variant][0], self.weights.digest
            parts = [self.settings.recipe(), run, self.slices.classes, split, pictures, weights, self.code]
            digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]
            name = f"repeat{run.repeat}_fold{run.fold}{'_control' * run.control}-{digest}"
            folders[run] = self.settings.results / "runs" / run.variant / name
        return folders

    def testing_file(self, run: Run) -> str:
        """Return the name of a run's file of probabilities for TestingData, with a hash of those pictures."""
        return f"testing-{self.digests[run.variant][1][:10]}.csv"

    def identity(self) -> str:
        """Return a hash of all folders, testing pictures and their labels: another comparison has another."""
        names = [str(folder.relative_to(self.settings.results)) for folder in self.folders.values()]
        testing = sorted(digest for _, digest in self.digests.values())
        text = json.dumps([names, testing, list(self.slices.testing["label"])])
        return hashlib.sha256(text.encode()).hexdigest()


def make_comparison(
    settings: Settings,
    variants: tuple[str, ...],
    slices: Slices,
    fold_of: np.ndarray,
    weights: InitialWeights,
) -> Comparison:
    """Return the comparison, after reading every picture; ValueError that names a missing or damaged one."""
    require(code_digest() == LOADED, "step2/ was changed since it was loaded: restart the kernel")
    images = slices.training["image"], slices.testing["image"]
    digests = {variant: pictures_digests(settings.data / variant, *images) for variant in variants}
    return Comparison(settings, variants, slices, fold_of, weights, digests)


# ---------------------------------------- what a run leaves behind


def read_done(folder: Path) -> dict[str, Any] | None:
    """Return what a finished run noted, None where it isn't finished."""
    done = read_json(folder / "done.json")
    return done if done and done.get("folder") == folder.name else None


def damaged_files(folder: Path) -> list[str]:
    """Return which files of a run are damaged or not there, after reading all of them."""
    done, there = read_done(folder), {path.name for path in folder.glob("*") if path.is_file()}
    if done is None:
        return list(there & {"done.json"})
    return [n for n, digest in done["files"].items() if n not in there or sha256(folder / n) != digest]


def is_complete(comparison: Comparison, run: Run) -> bool:
    """Tell whether a run is trained, and has predicted TestingData as it is now; remove_damaged comes before."""
    done = read_done(comparison.folders[run])
    if done is None:
        return False
    return run.control or comparison.slices.testing.empty or comparison.testing_file(run) in done["files"]


def remove_damaged(comparison: Comparison) -> list[str]:
    """Remove what is damaged of finished runs, and return a line for each; it will be made again."""
    lines = []
    for folder in comparison.folders.values():
        done, damaged = read_done(folder), damaged_files(folder)
        for name in damaged:
            (folder / name).unlink(missing_ok=True)
        if done and damaged and all(name.startswith("testing-") for name in damaged):
            done["files"] = {n: digest for n, digest in done["files"].items() if n not in damaged}
            write_json(folder / "done.json", done)
            lines.append(f"{folder / damaged[0]} is damaged or missing: TestingData is predicted again")
        elif damaged:
            for name in [*(done or {"files": {}})["files"], "done.json"]:
                (folder / name).unlink(missing_ok=True)
            lines.append(f"{folder / damaged[0]} is damaged or missing: this run is trained again")
        elif done:
            (folder / "checkpoint.pt").unlink(missing_ok=True)  # of a notebook killed at the very end
    return lines


def complete_run(comparison: Comparison, run: Run, tell: Tell, ends: float = math.inf) -> dict[str, Any]:
    """Train a run and predict TestingData as far as either isn't done, and return what it noted.

    OutOfTime where its next epoch would not be over before `ends`, in seconds since 1970.
    """
    device = find_device()
    prepare_process(comparison.settings, device)
    speed = choose_speed(comparison.settings, comparison.steps_to_compile, device)
    folder = comparison.folders[run]
    folder.mkdir(parents=True, exist_ok=True)
    if read_done(folder) is None:
        finish_run(comparison, run, speed, device, tell, ends)
    if not is_complete(comparison, run):
        predict_testing(comparison, run, speed, device)
    return read_note(comparison, run)


def finish_run(
    comparison: Comparison, run: Run, speed: Speed, device: torch.device, tell: Tell, ends: float
) -> None:
    """Train a run and write predictions, history and weights, then done.json; remove the checkpoint."""
    settings, slices, folder = comparison.settings, comparison.slices.training, comparison.folders[run]
    classes = comparison.slices.classes
    labels = slices["label"].map(classes.index).to_numpy(copy=True)
    data, images = settings.data / run.variant, list(slices["image"])
    cached = fits_in_memory(settings, data / images[0], len(images))
    pictures = Pictures(data, images, settings, comparison.seed(run), cached)
    train, held_out = comparison.split(run)
    job = RunInput(
        folder, pictures, labels, len(classes), train, held_out, settings, comparison.weights, ends
    )
    trainer, history, found = train_run(job, speed, device, tell)
    if pictures_digests(data, images)[0] != comparison.digests[run.variant][0]:
        (folder / "checkpoint.pt").unlink(missing_ok=True)
        raise ValueError(f"{data} {CHANGED}")
    rows = slices.iloc[held_out][["image", "label"]]
    write_csv(folder / "predictions.csv", prediction_table(rows, found, classes))
    write_csv(folder / "history.csv", pd.DataFrame(history))
    save_weights(folder / "last.pt", half_weights(trainer.network))
    names = ("predictions.csv", "history.csv", "last.pt")
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "opencv": cv2.__version__}
    done = {
        "run": run._asdict(),
        "folder": folder.name,
        "classes": classes,
        "accuracy": history[-1]["val_accuracy"],
        "seconds": sum(row["seconds"] for row in history),
        "device": device_name(device),
        "part": trainer.part,
        "speed": asdict(speed),
        "threads": settings.threads,
        "initial_weights": asdict(comparison.weights),
        "system": {"platform": platform.platform(), "cores": os.cpu_count()},
        "versions": versions | {name: version(name) for name in PACKAGES},
        "files": {name: sha256(folder / name) for name in names},
    }
    write_json(folder / "done.json", done)
    (folder / "checkpoint.pt").unlink(missing_ok=True)


def predict_testing(comparison: Comparison, run: Run, speed: Speed, device: torch.device) -> None:
    """Write a trained run's probabilities for TestingData, and note them in done.json."""
    settings, images = comparison.settings, list(comparison.slices.testing["image"])
    data = settings.data / run.variant
    folder, name = comparison.folders[run], comparison.testing_file(run)
    classes = comparison.slices.classes
    trainer = Trainer(settings, speed, 0.1, device, len(classes))
    load_last(comparison, run, trainer.network)
    pictures = Pictures(data, images, settings)
    batches = load(pictures, in_order(np.arange(len(images)), settings.batch_size), settings.workers)
    rows, found = comparison.slices.testing[["image"]], predict(trainer, batches)
    same = pictures_digests(data, images)[0] == comparison.digests[run.variant][1]
    require(same, f"{data} {CHANGED}")
    write_csv(folder / name, prediction_table(rows, found, classes))
    done = read_note(comparison, run)
    done["files"] = {n: d for n, d in done["files"].items() if not n.startswith("testing-")}
    for old in folder.glob("testing-*.csv"):
        if old.name != name:
            old.unlink()
    write_json(folder / "done.json", done | {"files": done["files"] | {name: sha256(folder / name)}})


# ---------------------------------------- tables of all runs


def prediction_table(rows: pd.DataFrame, probabilities: np.ndarray, classes: tuple[str, ...]) -> pd.DataFrame:
    """Return the rows with the columns predicted and p_<class>."""
    table = pd.DataFrame(probabilities, columns=probability_columns(classes), index=rows.index)
    predicted = np.array(classes)[probabilities.argmax(1)]
    return pd.concat([rows.assign(predicted=predicted), table], axis=1)


def read_note(comparison: Comparison, run: Run) -> dict[str, Any]:
    """Return what a finished run noted; ValueError that names the file where there is no whole one."""
    folder = comparison.folders[run]
    done = read_done(folder)
    if done is None:
        raise ValueError(f"{folder / 'done.json'} {MENDED}")
    return done


def read_result(comparison: Comparison, run: Run, name: str) -> bytes:
    """Return a file that a finished run left behind; ValueError that names it where it was changed."""
    noted, path = read_note(comparison, run)["files"].get(name), comparison.folders[run] / name
    content = path.read_bytes() if path.is_file() else b""
    require(hashlib.sha256(content).hexdigest() == noted, f"{path} {MENDED}")
    return content


def load_last(comparison: Comparison, run: Run, network: torch.nn.Module) -> None:
    """Load the weights that a run ended with."""
    content = io.BytesIO(read_result(comparison, run, "last.pt"))
    network.load_state_dict(torch.load(content, map_location="cpu", weights_only=True))


def read_table(comparison: Comparison, run: Run, name: str) -> pd.DataFrame:
    """Return a table that a finished run left behind; ValueError that names it where it was changed."""
    content = io.BytesIO(read_result(comparison, run, name))
    return pd.read_csv(content, dtype=TEXTS, keep_default_na=False, na_values=NOT_JUDGED)


def collect(comparison: Comparison, control: bool, name: str) -> pd.DataFrame:
    """Return all runs' files of this name as one table, in a fixed order; empty where there is no run."""
    runs = [run for run in comparison.runs if run.control == control]
    runs.sort(key=lambda run: (comparison.variants.index(run.variant), run))
    tables = {run: read_table(comparison, run, name) for run in runs}
    return pd.concat(tables, names=Run._fields).droplevel(-1).reset_index() if tables else pd.DataFrame()


def collect_predictions(comparison: Comparison, control: bool = False) -> pd.DataFrame:
    """Return the held-out predictions of all runs, or of the control.

    Columns: variant, repeat, fold, patient, image, label, predicted, p_<class>. Patients come
    from today's manifest, as pseudonyms change with Step 1's key.
    """
    table = collect(comparison, control, "predictions.csv")
    if table.empty:
        return table
    patient = comparison.slices.training.set_index("image")["patient"]
    table = table.drop(columns="control")
    table.insert(3, "patient", table["image"].map(patient))
    return table


def collect_history(comparison: Comparison) -> pd.DataFrame:
    """Return the epochs of all runs, control included, DataFrame."""
    both = [collect(comparison, control, "history.csv") for control in (False, True)]
    return pd.concat(both, ignore_index=True)


def average_testing(comparison: Comparison, variant: str) -> pd.DataFrame:
    """Return image, predicted and the mean probabilities of a variant's runs for TestingData."""
    runs = [run for run in comparison.runs if run.variant == variant and not run.control]
    tables = [read_table(comparison, run, comparison.testing_file(run)) for run in runs]
    classes = comparison.slices.classes
    mean = np.mean([table[probability_columns(classes)].to_numpy() for table in tables], axis=0)
    return prediction_table(tables[0][["image"]], mean, classes)
