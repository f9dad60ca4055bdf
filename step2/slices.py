"""Step 1's manifest: which slices there are, of which class and patient, and which are left out."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from step2.classes import CLASSES, order_classes
from step2.files import sha256
from step2.variants import require

AGAIN = "run Step1_Image_Preprocessing.py again"
YES, NO = {"1", "1.0", "true"}, {"0", "0.0", "false"}  # as pandas and spreadsheets write a flag back


@dataclass(frozen=True)
class Slices:
    """The usable slices, DataFrames of image, label, patient, source; patient_level: patients are known.

    unusable: labels of training slices that are all blank or refused. roi_window: what Step 1's --roi-window was,
    "" where the manifest doesn't tell.
    """

    training: pd.DataFrame
    testing: pd.DataFrame
    left_out: dict[str, int]
    patient_level: bool
    unusable: tuple[str, ...] = ()
    roi_window: str = ""

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The classes: the labels of the training slices, in the order of the networks' outputs."""
        return order_classes(self.training["label"])

    def classes_in_words(self) -> str:
        """Return which classes there are, and which one might have expected: RSNA's, where a subtype is."""
        expected = set(CLASSES) if set(CLASSES[1:]) & set(self.classes) else set()
        missing = order_classes(expected - set(self.classes) | set(self.unusable))
        lacks = f"; no usable slice of {', '.join(missing)}" if missing else ""
        return f"{len(self.classes)} classes: {', '.join(self.classes)}{lacks}"

    def warnings(self) -> list[str]:
        """Return a sentence for each thing that makes results optimistic, or leaves them out."""
        labels, lines = self.testing["label"], []
        if not self.patient_level:
            unknown = int((self.training["patient"] == "slice " + self.training["image"]).sum())
            lines.append(
                f"{unknown} of {len(self.training)} slices have no PatientID (their patient in the manifest is empty; "
                f"give them one, or take them away, and {AGAIN}), so a patient may be on both sides of a split: "
                "all results are slice-level, optimistic"
            )
        tested = set(self.testing.loc[labels.isin(self.classes), "patient"])
        if "" in tested:
            lines.append(
                "some labelled slices of TestingData have no PatientID: their test is slice-level, optimistic"
            )
        if both := len((tested & set(self.training["patient"])) - {""}):
            lines.append(f"patients in both TrainingData and TestingData: {both}, so the test is optimistic")
        others = labels[~labels.isin(["", *self.classes])]
        if len(others):
            names = ", ".join(order_classes(others))
            lines.append(
                f"{len(others)} slices of TestingData are not scored, nothing was trained on {names}"
            )
        if 0 < (labels == "").sum() < len(labels):
            lines.append(
                f"slices of TestingData without a label, which are not scored: {(labels == '').sum()}"
            )
        return lines


def read_slices(data: Path) -> Slices:
    """Read Step 1's manifest.csv; ValueError, with what to do, where it lacks what training needs."""
    path = data / "manifest.csv"
    rows = _read_rows(path)
    usable = rows[rows["status"] == "ok"].sort_values("image", kind="stable")
    blank = _flags(usable["blank"], path)
    find_head = "run Step1_Image_Preprocessing.py with a ROI variant too, which finds the head"
    require(blank.notna().all(), f"{path} doesn't know which slices are blank: {find_head}")
    left_out = {}
    for split, whose in (("train", ""), ("test", " (TestingData)")):
        left_out[f"refused by Step 1{whose}"] = int((rows["status"][rows["split"] == split] != "ok").sum())
        left_out[f"blank, no brain to see{whose}"] = int(blank[usable["split"] == split].sum())
    usable = usable[blank == 0]
    windows = sorted(set(usable["roi_window"]))
    require(len(windows) < 2, f"{path} has pictures of several ROI windows, {windows}: {AGAIN}")
    train, test = (usable[usable["split"] == split] for split in ("train", "test"))
    require(len(train) > 0, f"{path} has no usable slice of TrainingData: put some there and {AGAIN}")
    require((usable["image"] != "").all(), f"{path} has rows that are ok but name no image: {AGAIN}")
    require((train["label"] != "").all(), f"{path} has training slices without a label: {AGAIN}")
    classes = order_classes(train["label"])
    alone = f"all usable slices of TrainingData are {classes[0]}: put those of another class into a folder"
    why = f"beside TrainingData/{classes[0]}/, or see in {path} why others were refused"
    require(len(classes) > 1, f"{alone} {why}, and {AGAIN}")
    named = set(rows.loc[rows["split"] == "train", "label"]) - {""}
    known = bool((train["patient"] != "").all())
    train = train.assign(patient=train["patient"].where(train["patient"] != "", "slice " + train["image"]))
    columns = ["image", "label", "patient", "source"]
    training, testing = (part[columns].reset_index(drop=True) for part in (train, test))
    return Slices(training, testing, left_out, known, order_classes(named - set(classes)), windows[0])


def _read_rows(path: Path) -> pd.DataFrame:
    """Return all rows of the manifest as text; ValueError where it is no such table."""
    try:
        rows = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError) as err:  # pandas' errors of parsing are ValueErrors
        raise ValueError(f"{path} can't be read as a table ({err}): {AGAIN}") from err
    missing = {"image", "split", "label", "status", "blank"} - set(rows.columns)
    require(not missing, f"{path} lacks the columns {sorted(missing)}: {AGAIN}")
    for column in ("patient", "source", "roi_window"):
        rows[column] = rows.get(column, "")
    for column, words in (("status", {"ok", "failed"}), ("split", {"train", "test"})):
        wrong = sorted(set(rows[column]) - words)
        stopped = column == "status" and wrong == [""]
        what = "Step 1 was stopped" if stopped else f"{column} is {wrong}, neither of {sorted(words)}"
        require(not wrong, f"{path}: {what}: {AGAIN}")
    odd = set(rows.loc[~rows["roi_window"].str.fullmatch(r"(header|-?[\d.]+,[\d.]+)?"), "roi_window"])
    require(not odd, f"{path}: roi_window is {sorted(odd)}, no centre,width: {AGAIN}")
    twice = rows.loc[(rows["image"] != "") & rows["image"].duplicated(), "image"]
    require(twice.empty, f"{path} has more than one row for {list(twice[:3])}: {AGAIN}")
    return rows


def _flags(texts: pd.Series, path: Path) -> pd.Series:
    """Return 1 for yes, 0 for no, missing for unknown; ValueError where a text is none of these."""
    lower = texts.str.strip().str.lower()
    wrong = sorted(set(lower) - YES - NO - {""})
    require(not wrong, f"{path}: blank is {wrong}, neither 0 nor 1: {AGAIN}")
    return lower.map(dict.fromkeys(YES, 1.0) | dict.fromkeys(NO, 0.0))


def what_pictures(dataset: str, slices: Slices) -> str:
    """Return what to call the pictures, "" where nothing tells.

    They are phantoms if all have names that make_phantoms.py gives, RSNA-2019 if all come from Kaggle's download.
    """
    if dataset != "auto":
        return dataset
    sources = [Path(source) for source in (*slices.training["source"], *slices.testing["source"])]
    phantoms = all(source.name.startswith("PHANTOM-") for source in sources)
    kaggle = all(source.parent.name.startswith("stage_2_train") for source in sources)
    return "phantoms" if phantoms else "RSNA-2019" if kaggle else ""


def copies_in_words(slices: Slices, folder: Path) -> list[str]:
    """Return a sentence where a training slice is the same picture as one of another patient or class, testing
    slices included.

    folder: a variant's pictures. The same pixels are the same bytes, and blank slices are left out.
    """
    rows = pd.concat([slices.training, slices.testing], ignore_index=True)
    rows["picture"] = [sha256(folder / image) for image in rows["image"]]
    rows = rows[rows["picture"].isin(rows["picture"].iloc[: len(slices.training)])]
    whose = (rows["patient"] + "\0" + rows["label"]).groupby(rows["picture"]).transform("nunique")
    images = list(rows.loc[whose > 1, "image"])
    advice = f"copies make results too good, or contradict each other; keep one of each, and {AGAIN}"
    listed = f"{len(images)} pictures occur more than once and not under one patient and class, such as {images[:2]}"
    return [f"{listed}: {advice}"] if images else []


def count_classes(slices: Slices) -> pd.DataFrame:
    """Return the slices and patients of each class, and together, in TrainingData and, where it is labelled,
    in TestingData: DataFrame.
    """
    classes = list(slices.classes)
    counts = pd.DataFrame(index=pd.Index([*classes, "together"], name="label"))
    for split, rows in (("training", slices.training), ("testing", slices.testing)):
        rows = rows[rows["label"].isin(classes)]
        known = slices.patient_level if split == "training" else bool((rows["patient"] != "").all())
        each = rows.groupby("label")
        people = [*each["patient"].nunique().reindex(classes, fill_value=0), rows["patient"].nunique()]
        if len(rows):
            counts[f"{split} slices"] = [*each.size().reindex(classes, fill_value=0), len(rows)]
            counts[f"{split} patients"] = people if known else "unknown"
    return counts
