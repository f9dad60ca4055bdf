"""Variants, their steps and the classes, as Step 1's table has them. Uses Step1_Image_Preprocessing.py."""

from collections.abc import Sequence
from pathlib import Path

from Step1_Image_Preprocessing import CLASSES, VARIANTS

__all__ = ["BASELINE", "CHANCE", "CLASSES", "VARIANTS", "choose_variants", "require", "step_pairs"]

BASELINE = next(name for name, steps in VARIANTS.items() if not steps)
CHANCE = 1 / len(CLASSES)
SPELLING = {"roi": "ROI", "clahe": "CLAHE"}  # of steps in texts; others are written as they are called


def require(condition: object, sentence: str) -> None:
    """Raise ValueError with this sentence unless the condition holds."""
    if not condition:
        raise ValueError(sentence)


def step_pairs(variants: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Return, for each step, the pairs (with, without) of these variants that differ by this step alone."""
    known = [name for name in VARIANTS if name in variants]
    pairs: dict[str, list[tuple[str, str]]] = {}
    for a in known:
        for place, step in enumerate(VARIANTS[a]):
            rest = VARIANTS[a][:place] + VARIANTS[a][place + 1 :]
            found = [(a, b) for b in known if VARIANTS[b] == rest]
            pairs.setdefault(SPELLING.get(step, step), []).extend(found)
    return {step: found for step, found in pairs.items() if found}


def choose_variants(wanted: list | str | int | None, data: Path) -> tuple[str, ...]:
    """Return the variant folders of data to compare, those of Step 1's table first and in its order.

    wanted: names or numbers, as a list or as text such as "0,2"; None for all that are there. ValueError
    where one is unknown, not there, or a number that two folders share.
    """
    make = "run Step1_Image_Preprocessing.py"
    there = (data / "manifest.csv").is_file()
    require(there, f"{data} has no manifest.csv: {make}, or set the parameter data to its output")
    found = sorted(p.name for p in data.iterdir() if (p / "TrainingData").is_dir())
    known = [*VARIANTS, *(name for name in found if name not in VARIANTS)]
    if wanted is None:
        require(found, f"{data} has no variant folder with a TrainingData: {make}")
        return tuple(name for name in known if name in found)
    asked = [part.strip() for part in (wanted.split(",") if isinstance(wanted, str) else _texts(wanted))]
    require(asked, "variants: the list is empty, name at least one folder, or None for all")
    chosen = set()
    for text in asked:
        match = [name for name in known if text in (name, name.split("_")[0])]
        require(match, f"variants: {text!r} unknown, choose of {', '.join(known)}, or their numbers")
        require(len(match) == 1, f"variants: {text!r} may be {' or '.join(match)}: write the whole name")
        require(match[0] in found, f"{data / match[0]} has no TrainingData: {make} --variants {match[0]}")
        chosen.add(match[0])
    return tuple(name for name in known if name in chosen)


def _texts(wanted: object) -> list[str]:
    """Return the entries of a list, or the one number that papermill makes of -p variants 3, as texts."""
    entries = wanted if isinstance(wanted, list | tuple) else [wanted]
    fit = all(isinstance(entry, str | int) and not isinstance(entry, bool) for entry in entries)
    require(fit, f"variants = {wanted!r}: set folder names or their numbers, such as '0,2'")
    return [str(entry) for entry in entries]
