"""Shared by the tests of step 2: tiny pictures, settings for them, and tables of made-up predictions.

Pictures are grey noise with a square whose place is the class. Nothing is downloaded, no GPU is needed.
"""

from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from step2.folds import repeat_folds
from step2.network import settle_weights
from step2.runs import Comparison, make_comparison
from step2.settings import Settings, read_settings
from step2.slices import Slices, read_slices
from step2.statistics import Compared, best_set

CLASSES = ("healthy", "intraparenchymal", "intraventricular", "subarachnoid", "subdural", "epidural")
VARIANTS = ("0_Dicom2PNG", "1_ROI")
ALL_VARIANTS = (
    *("0_Dicom2PNG", "1_ROI", "2_ROI+CLAHE", "3_ROI+CLAHE+Bilateral"),
    *("4_ROI+noblank", "5_ROI+noblank+CLAHE", "6_ROI+noblank+CLAHE+Bilateral"),
)
SIZE = 32
TINY = {
    **{"profile": "quick", "image_size": SIZE, "epochs": 2, "batch_size": 8, "folds": 2, "weights": "none"},
    **{"seed": 3, "control_run": False, "processes": 1},
}


def make_settings(**given) -> Settings:
    """Return settings for tiny pictures, but for what is given."""
    return read_settings(TINY | given)


def write_pictures(
    data: Path,
    per_class: int = 4,
    variants: tuple[str, ...] = VARIANTS,
    classes: tuple[str, ...] = CLASSES,
) -> pd.DataFrame:
    """Write what Step 1 would: two slices of each of per_class patients a class, 3 of testing, a manifest.

    One more slice is blank, and one more file was refused.
    """
    rows, first = [], classes[0]
    for number, label in enumerate(classes):
        for patient in range(per_class):
            for k in range(2):
                image = f"TrainingData/{label}/{patient}.{k}.png"
                rows.append([image, "train", label, f"patient {number}-{patient}", "ok", "0"])
    rows.append([f"TrainingData/{first}/blank.png", "train", first, "patient 0-0", "ok", "1"])
    rows.append([f"TrainingData/{first}/bad.png", "train", first, "", "failed", ""])
    rows += [[f"TestingData/{label}.png", "test", label, f"test {label}", "ok", "0"] for label in classes[:3]]
    manifest = pd.DataFrame(rows, columns=["image", "split", "label", "patient", "status", "blank"])
    for variant in variants:
        for index, row in manifest[manifest["status"] == "ok"].iterrows():
            picture = np.random.default_rng([index, len(variant)]).integers(0, 90, (SIZE, SIZE), np.uint8)
            place = classes.index(row["label"])
            picture[8 * (place // 3) + 6 :][:7, 9 * (place % 3) + 3 :][:, :7] = 250
            path = data / variant / row["image"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(picture))
    manifest.to_csv(data / "manifest.csv", index=False)
    return manifest


def png(picture: np.ndarray) -> bytes:
    """Return a picture, uint8, as the bytes of a PNG."""
    return cv2.imencode(".png", picture)[1].tobytes()


def make_comparison_for(
    data: Path, results: Path, variants: tuple[str, ...] = VARIANTS, **given
) -> Comparison:
    """Return the comparison that the notebook's cells would make of data, with make_settings(**given)."""
    results.mkdir(parents=True, exist_ok=True)
    settings = make_settings(data=data, results=results, **given)
    slices = read_slices(data)
    fold_of = repeat_folds(slices.training, settings.folds, settings.repeats, settings.seed)
    return make_comparison(settings, tuple(variants), slices, fold_of, settle_weights(settings))


def some_slices(patients: dict[str, int], each: int = 3) -> pd.DataFrame:
    """Return a table of slices: so many patients of each class, each with as many slices."""
    rows = [(label, f"{label} {p}") for label, count in patients.items() for p in range(count)] * each
    table = pd.DataFrame(sorted(rows), columns=["label", "patient"])
    return table.assign(image=[f"{i}.png" for i in range(len(table))])


def prediction_table(calls: dict, labels: list[str], patients: list[str], repeats: int = 1) -> pd.DataFrame:
    """Return a prediction table; calls: {variant: predicted classes, one per image and repeat by repeat}.

    The class called gets a probability of 0.5, the others 0.1 each.
    """
    rows = []
    for variant, called in calls.items():
        for i, name in enumerate(called):
            k = i % len(labels)
            image = f"TrainingData/{labels[k]}/{k}.png"
            row = {"variant": variant, "repeat": i // len(labels), "fold": 0, "patient": patients[k]}
            row |= {"image": image, "label": labels[k], "predicted": name}
            rows.append(row | {f"p_{c}": 0.5 if c == name else 0.1 for c in CLASSES})
    assert all(len(called) == repeats * len(labels) for called in calls.values())
    return pd.DataFrame(rows)


def random_table(
    patients: int,
    slices: int,
    variants=ALL_VARIANTS,
    folds: int = 1,
    repeats: int = 1,
    seed: int = 0,
    classes: tuple[str, ...] = CLASSES,
) -> pd.DataFrame:
    """Return a prediction table of random probabilities that lean towards the label."""
    rng, tables = np.random.default_rng(seed), []
    codes = np.repeat(np.arange(patients), rng.integers(1, 2 * slices, patients))
    k = len(classes)
    labels = rng.integers(k, size=len(codes))
    labels[:k] = range(k)
    for variant in variants:
        for repeat in range(repeats):
            score = rng.normal(size=(len(codes), k)) + 1.5 * np.eye(k)[labels]
            p = np.exp(score) / np.exp(score).sum(axis=1, keepdims=True)
            table = pd.DataFrame(p, columns=[f"p_{c}" for c in classes])
            names = np.array(classes)
            table = table.assign(variant=variant, repeat=repeat, fold=(codes + repeat) % folds)
            table = table.assign(
                patient=[f"P{c}" for c in codes], label=names[labels], predicted=names[p.argmax(1)]
            )
            tables.append(table.assign(image=[f"{i}.png" for i in range(len(codes))]))
    return pd.concat(tables, ignore_index=True)


def best_among(compared: Compared) -> pd.DataFrame:
    """Return which variants of a comparison may be the best."""
    return best_set(compared.found, compared.variants)


def known_slices(left_out: dict[str, int] | None = None, roi_window: str = "") -> Slices:
    """Return what a summary wants to know of the slices; all patients are known."""
    return Slices(pd.DataFrame(), pd.DataFrame(), left_out or {}, True, (), roi_window)
