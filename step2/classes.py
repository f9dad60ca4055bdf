"""The classes, as the data have them: RSNA's six first and in their order, others after them by name.

They are the labels of the training slices. A table of predictions says by its columns p_<class> which they were.
"""

import textwrap
from collections.abc import Iterable

import pandas as pd

from Step1_Image_Preprocessing import CLASSES, class_order

HEALTHY = CLASSES[0]  # where it is among the classes, all others together are any hemorrhage
SHORT = dict(zip(CLASSES, ("healthy", "IPH", "IVH", "SAH", "SDH", "EDH"), strict=True))  # as the field says


def order_classes(labels: Iterable[str]) -> tuple[str, ...]:
    """Return each of these labels once, in the order of the networks' outputs."""
    return tuple(class_order(set(labels)))


def probability_columns(classes: Iterable[str]) -> list[str]:
    """Return the names of the columns that hold the probabilities of these classes."""
    return [f"p_{name}" for name in classes]


def classes_of(predictions: pd.DataFrame) -> tuple[str, ...]:
    """Return the classes that a table of predictions is about, in the order of its columns p_<class>."""
    return tuple(name.removeprefix("p_") for name in predictions.columns if name.startswith("p_"))


def guesses(predictions: pd.DataFrame) -> tuple[float, float | None]:
    """Return the accuracy of guessing, and of always saying the commonest class.

    The latter is None where classes are so even that both are within a point of each other.
    """
    chance = 1 / len(classes_of(predictions))
    share = float(predictions["label"].value_counts(normalize=True).max())
    return chance, share if share > chance + 0.01 else None


def short_names(classes: Iterable[str]) -> list[str]:
    """Return the field's abbreviations of RSNA's six, and other names on lines of 14 letters."""
    return [SHORT.get(name, wrapped(name, 14)) for name in classes]


def wrapped(name: str, letters: int) -> str:
    """Return a name on lines of so many letters at most, which end at a space, hyphen or _ where they can."""
    return textwrap.fill(name.replace("_", "_ "), letters).replace("_ ", "_")
