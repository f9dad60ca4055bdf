"""Step 1's manifest: which slices there are, of which class and patient, and which are left out."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from step2.variants import CLASSES, require

AGAIN = "run Step1_Image_Preprocessing.py again"
YES, NO = {"1", "1.0", "true"}, {"0", "0.0", "false"}  # as pandas and spreadsheets write a flag back


@dataclass(frozen=True)
class Slices:
    """The usable slices, DataFrames of image, label, patient, source; patient_level: patients are known."""

    training: pd.DataFrame
    testing: pd.DataFrame
    left_out: dict[str, int]
    patient_level: bool

    def warnings(self) -> list[str]:
        """Return a sentence for each thing about the patients that makes results optimistic."""
        both = len((set(self.testing["patient"]) & set(self.training["patient"])) - {""})
        unknown = "some slices have no patient in the manifest, so a patient may be on both sides of a "
        lines = [] if self.patient_level else [unknown + "split: all results are slice-level, optimistic"]
        shared = f"{both} patients are in TrainingData and TestingData: the test is optimistic"
        return [*lines, *([shared] if both else [])]


def read_slices(data: Path) -> Slices:
    """Read Step 1's manifest.csv; ValueError, with what to do, where it lacks what training needs."""
    path = data / "manifest.csv"
    rows = _read_rows(path)
    usable = rows[rows["status"] == "ok"].sort_values("image", kind="stable")
    train, test = (usable[usable["split"] == split] for split in ("train", "test"))
    blank = _flags(train["blank"], path)
    find_head = "run Step1_Image_Preprocessing.py with a ROI variant too, which finds the head"
    require(blank.notna().all(), f"{path} doesn't know which slices are blank: {find_head}")
    left_out = {
        "refused by Step 1": int((rows["status"] != "ok").sum()),
        "blank, no brain to see": int((blank == 1).sum()),
    }
    train = train[blank == 0]
    require(len(train) > 0, f"{path} has no usable slice of TrainingData: put some there and {AGAIN}")
    require((usable["image"] != "").all(), f"{path} has rows that are ok but name no image: {AGAIN}")
    wrong = sorted((set(train["label"]) | set(test["label"]) - {""}) - set(CLASSES))
    require(not wrong, f"{path} has labels {wrong}: the classes are {', '.join(CLASSES)}")
    known = bool((train["patient"] != "").all())
    train = train.assign(patient=train["patient"].where(train["patient"] != "", "slice " + train["image"]))
    columns = ["image", "label", "patient", "source"]
    training, testing = (part[columns].reset_index(drop=True) for part in (train, test))
    return Slices(training, testing, left_out, known)


def _read_rows(path: Path) -> pd.DataFrame:
    """Return all rows of the manifest as text; ValueError where it is no such table."""
    try:
        rows = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError) as err:  # pandas' errors of parsing are ValueErrors
        raise ValueError(f"{path} can't be read as a table ({err}): {AGAIN}") from err
    missing = {"image", "split", "label", "status", "blank"} - set(rows.columns)
    require(not missing, f"{path} lacks the columns {sorted(missing)}: {AGAIN}")
    for column in ("patient", "source"):
        rows[column] = rows.get(column, "")
    for column, words in (("status", {"ok", "failed"}), ("split", {"train", "test"})):
        wrong = sorted(set(rows[column]) - words)
        require(not wrong, f"{path}: {column} is {wrong}, neither of {sorted(words)}: {AGAIN}")
    twice = rows.loc[(rows["image"] != "") & rows["image"].duplicated(), "image"]
    require(twice.empty, f"{path} has more than one row for {list(twice[:3])}: {AGAIN}")
    return rows


def _flags(texts: pd.Series, path: Path) -> pd.Series:
    """Return 1 for yes, 0 for no, missing for unknown; ValueError where a text is none of these."""
    lower = texts.str.strip().str.lower()
    wrong = sorted(set(lower) - YES - NO - {""})
    require(not wrong, f"{path}: blank is {wrong}, neither 0 nor 1: {AGAIN}")
    return lower.map(dict.fromkeys(YES, 1.0) | dict.fromkeys(NO, 0.0))


def what_pictures(dataset: str, raw_data: Path, slices: Slices) -> str:
    """Return what to call the pictures; phantoms if all of them come from the folder of make_phantoms.py."""
    if dataset != "auto":
        return dataset
    sources = [*slices.training["source"], *slices.testing["source"]]
    shipped = (raw_data / "make_phantoms.py").is_file() and all((raw_data / s).is_file() for s in sources)
    return "phantoms" if shipped else ""


def count_classes(slices: Slices) -> pd.DataFrame:
    """Return the slices and patients of each class, DataFrame with a last row "together"."""
    rows = slices.training
    counts = rows.groupby("label").agg(slices=("image", "size"), patients=("patient", "nunique"))
    counts = counts.reindex(list(CLASSES), fill_value=0)
    counts.loc["together"] = [len(rows), rows["patient"].nunique()]
    return counts if slices.patient_level else counts.assign(patients="unknown")
