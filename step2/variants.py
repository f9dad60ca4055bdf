"""Variants and their steps, as Step 1's table has them. Uses Step1_Image_Preprocessing.py."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from Step1_Image_Preprocessing import BUNDLES, EXTRA_VARIANTS, KNOWN_VARIANTS, VARIANTS, single_steps

BASELINE = next(name for name, steps in VARIANTS.items() if not steps)
IN_WORDS = {  # what a variant has more than another -> the effect's name
    BUNDLES["roi"]: "ROI (mask and window)",
    BUNDLES["noblank"]: "noblank (skull black and crop)",
    ("windows",): "three windows instead of one",
    ("clahe",): "CLAHE",
}


def require(condition: object, sentence: str) -> None:
    """Raise ValueError with this sentence unless the condition holds."""
    if not condition:
        raise ValueError(sentence)


def entries(value: Any) -> list:
    """Return the entries of a list or of text such as "0,2", or the one number that papermill makes of "3"."""
    value = value.split(",") if isinstance(value, str) else value
    return list(value) if isinstance(value, list | tuple) else [value]


def step_pairs(variants: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Return, for each step in words, the pairs (with, without) of these variants that differ by it alone.

    A step is a single one, or a bundle of Step 1's table as a whole, ROI or noblank; all other steps of the
    two variants are the same, in the same order.
    """
    known = {name: single_steps(steps) for name, steps in KNOWN_VARIANTS.items() if name in variants}
    pairs: dict[str, list[tuple[str, str]]] = {}
    for a, b in product(known, repeat=2):
        more = added_steps(known[a], known[b])
        if len(more) == 1 or more in BUNDLES.values():
            pairs.setdefault(IN_WORDS.get(more, more[0]), []).append((a, b))
    return pairs


def added_steps(more: tuple[str, ...], fewer: tuple[str, ...]) -> tuple[str, ...]:
    """Return the steps in a row without which `more` would be `fewer`, () where there are none such."""
    count = len(more) - len(fewer)
    for place in range(len(fewer) + 1) if count > 0 else ():
        if more[:place] + more[place + count :] == fewer:
            return more[place : place + count]
    return ()


def choose_variants(wanted: list | str | int | None, data: Path) -> tuple[str, ...]:
    """Return the variant folders of data to compare, those of Step 1's table first and in its order.

    wanted: names or numbers, as a list or as text such as "0,2"; "all" for all that are there, None for those
    but Step 1's extra ones. ValueError where one is unknown, not there, or a number that two folders share.
    """
    make, again = "run Step1_Image_Preprocessing.py", f"as for the other pictures of {data}"
    there = (data / "manifest.csv").is_file()
    require(there, f"{data} has no manifest.csv: {make}, or set the parameter data to its output")
    found = sorted(p.name for p in data.iterdir() if (p / "TrainingData").is_dir())
    known = [*KNOWN_VARIANTS, *(name for name in found if name not in KNOWN_VARIANTS)]
    if wanted is None or wanted == "all":
        left_out = () if wanted else EXTRA_VARIANTS
        chosen = [name for name in known if name in found and name not in left_out]
        others = ", or set the parameter variants to 'all'" if found else ""
        require(chosen, f"{data} has no variant folder with a TrainingData: {make}{others}")
        return tuple(chosen)
    asked = [str(entry).strip() for entry in entries(wanted)]
    require(asked, "variants: the list is empty, name at least one folder, or None for the usual ones")
    chosen = []
    for text in asked:
        match = [name for name in known if text in (name, name.split("_")[0])]
        require(match, f"variants: {text!r} unknown, choose one of {', '.join(known)}, or a number")
        require(len(match) == 1, f"variants: {text!r} may be {' or '.join(match)}: write the whole name")
        lacks = f"{data / match[0]} has no TrainingData"
        require(match[0] in found, f"{lacks}: {make} {again}, but --variants {match[0]}")
        chosen.append(match[0])
    return tuple(name for name in known if name in chosen)
