"""What a variant costs: milliseconds of preprocessing, minutes of training, kilobytes on disk."""

import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

import Step1_Image_Preprocessing as step1

TIMED_SLICES = 12  # the first of each class, then the second, ...
SIZED_FILES = 300  # whose size is looked up


def cost_table(
    data: Path, raw_data: Path, training: pd.DataFrame, predictions: pd.DataFrame, history: pd.DataFrame
) -> pd.DataFrame:
    """Return a row for each variant, a column for each cost; without raw slices, none for preprocessing.

    training: the slices, with label and source, the path of the DICOM file below raw_data.
    """
    variants = list(predictions["variant"].unique())
    costs = {
        "preprocessing, ms a slice": preprocessing_times(raw_slices(raw_data, training), variants),
        "training, minutes a fold": training_minutes(history),
        "PNG, kB a slice": png_kilobytes(data, predictions),
    }
    return pd.DataFrame({name: values for name, values in costs.items() if len(values)}).reindex(variants)


def raw_slices(raw_data: Path, training: pd.DataFrame) -> list[Path]:
    """Return the DICOM files of training slices, the first of each class, then the second, ..."""
    turn = training.groupby("label").cumcount().sort_values(kind="stable")
    return [raw_data / source for source in training.loc[turn.index[:TIMED_SLICES], "source"]]


def slice_milliseconds(path: Path, variants: Sequence[str]) -> dict[str, float]:
    """Return the time from file to PNG bytes of one slice for each variant, in ms, nothing shared."""
    started = time.perf_counter()
    ds = step1.read_dicom(path)
    hu, _ = step1.hounsfield(step1.decode(ds), ds)
    grey, _ = step1.dicom2png(hu, ds)
    shared, times = time.perf_counter() - started, {}
    for name in variants:
        started = time.perf_counter()
        after = step1.step_runner(step1.whole_slice(hu, grey, step1.BRAIN_WINDOW))
        step1.encode_png(after(step1.KNOWN_VARIANTS[name]).image)
        times[name] = 1000 * (shared + time.perf_counter() - started)
    return times


def preprocessing_times(paths: Sequence[Path], variants: Sequence[str]) -> pd.Series:
    """Return ms a slice of each variant of Step 1's table, the median over DICOM files, on one thread."""
    known = [name for name in variants if name in step1.KNOWN_VARIANTS]
    threads, rows = cv2.getNumThreads(), []
    cv2.setNumThreads(1)
    for path in paths:
        try:
            twice = [slice_milliseconds(path, known) for _ in range(2)]
        except step1.UnsuitableFile:
            continue  # it is not there any more, or not below raw_data
        rows.append(pd.DataFrame(twice).min())  # the first time, memory is cold
    cv2.setNumThreads(threads)
    if not rows:
        print("preprocessing time left out: set raw_data to Step 1's input, where the slices' files are")
        return pd.Series(dtype=float)
    return pd.DataFrame(rows).median()


def training_minutes(history: pd.DataFrame) -> pd.Series:
    """Return the mean training time of a fold of each variant, minutes, without the control."""
    runs = history[~history["control"].astype(bool)].groupby(["variant", "repeat", "fold"])["seconds"].sum()
    return runs.groupby("variant").mean() / 60


def png_kilobytes(data: Path, predictions: pd.DataFrame) -> pd.Series:
    """Return the mean PNG size of each variant, kB, from some of its pictures."""
    images = predictions["image"].drop_duplicates()
    images = images.sample(min(SIZED_FILES, len(images)), random_state=0)
    names = dict.fromkeys(predictions["variant"])
    return pd.Series({n: np.mean([(data / n / i).stat().st_size for i in images]) / 1000 for n in names})
