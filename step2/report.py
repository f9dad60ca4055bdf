"""Where tables and figures go, and the line under every title that says what made them.

A quick result is never mistaken for a B7 result: that line names profile, network, data and initial weights.
"""

import io
import json
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
from IPython.core.getipython import get_ipython
from IPython.display import Image, Markdown, display

from step2.classes import CLASSES
from step2.files import put_aside, write_content, write_csv, write_json
from step2.runs import Comparison, read_note
from step2.sessions import part_in_words

OPTIMISTIC = " (slice-level, optimistic)"


def make_caption(comparison: Comparison, pictures: str) -> str:
    """Return profile, what was changed in it, network, size, data and initial weights in a line.

    pictures: what they are, "" if unknown. Of a part of the declared comparison, also which part it is.
    """
    settings, slices, part = comparison.settings, comparison.slices, part_in_words(comparison)
    shown = ("model_name", "image_size", "weights")
    changed = [f"{name} {value}" for name, value in settings.changed().items() if name not in shown]
    word = "phantom" if pictures == "phantoms" else pictures
    parts = [
        f"{settings.profile} profile" + (f" with {', '.join(changed)}" if changed else ""),
        f"{settings.model_name} at {settings.image_size} px",
        count_slices(slices.training, word, slices.patient_level),
        comparison.weights.in_words(),
    ]
    if settings.folds == 1 or part:
        held_out = [comparison.fold_of[repeat - 1] == fold - 1 for repeat, fold in comparison.places]
        tested = count_slices(slices.training[np.any(held_out, axis=0)], "", slices.patient_level)
        parts.insert(3, f"tested: {tested}" + f" ({part})" * bool(part))
    return ", ".join(parts)


def count_slices(rows: pd.DataFrame, word: str, patient_level: bool) -> str:
    """Return '90 phantom slices of 63 patients'; of RSNA's subtypes, that slices with several are not among them."""
    subtypes = "rsna" in word.lower() and bool(set(rows["label"]) & set(CLASSES[1:]))
    kind = "slices with one subtype" if subtypes else "slices"
    patients = rows["patient"].nunique() if patient_level else "an unknown number of"
    return " ".join(f"{len(rows)} {word} {kind} of {patients} patients".split())


def describe_runs(comparison: Comparison) -> dict[str, Any]:
    """Return what made the results: settings, fallbacks, and of each run its machine, versions and speed.

    made_with: {name: each way once}; each of the runs has the place of its own in these lists.
    """
    noted = [(run, read_note(comparison, run)) for run in comparison.runs]
    batch, weights = comparison.settings.batch_size, comparison.weights
    fallbacks = [
        f"{run}: memory ended, {done['part']} of {batch} slices at a time"
        for run, done in noted
        if done["part"] < batch
    ]
    made: dict[str, list] = {name: [] for name in ("device", "speed", "threads", "system", "versions")}
    for name, ways in made.items():
        for _, done in noted:
            if done[name] not in ways:
                ways.append(done[name])
        if len(ways) > 1:
            fallbacks.append(f"runs differ in their {name}, which may explain differences: {ways}")
    if weights.used == "none" and weights.requested != "none":
        fallbacks.append(weights.note)
    return {
        "settings": comparison.settings.model_dump(mode="json", exclude={"threads"}),  # they are each run's
        "variants": comparison.variants,
        "classes": comparison.slices.classes,
        "roi_window": comparison.slices.roi_window,
        "code": comparison.code,
        "initial_weights": asdict(weights),
        "made_with": made,
        "fallbacks": fallbacks,
        "training_seconds": round(sum(done["seconds"] for _, done in noted), 1),
        "runs": [
            {
                **run._asdict(),
                "seed": comparison.seed(run),
                "folder": comparison.folders[run].name,
                "seconds": round(done["seconds"], 1),
                **{name: ways.index(done[name]) for name, ways in made.items()},
            }
            for run, done in noted
        ],
    }


class Report:
    """Where figures and tables go, and the line under every title that says what made them."""

    def __init__(self, results: Path, caption: str, patient_level: bool, identity: str):
        self.results, self.caption, self.identity = results, caption, identity
        self.level = "" if patient_level else OPTIMISTIC
        earlier, self.written = put_aside(results, identity)
        if earlier:
            print(f"tables and figures of another comparison were moved to {earlier}")

    def figure(self, figure: plt.Figure, title: str, name: str, says: str | list[str] = "") -> None:
        """Title a figure, write it as PNG and SVG, show it with what it says beneath, and close it."""
        width, height = figure.get_size_inches()
        small = textwrap.fill(self.caption, max(int(width * 15), 40))
        above = 1 + (0.14 * (small.count("\n") + 1) + 0.12) / height
        # no formulas: a file's name may have two $
        named: dict[str, Any] = {"ha": "center", "va": "bottom", "parse_math": False}
        figure.text(0.5, above, title + self.level, weight="bold", size=12, **named)
        figure.text(0.5, 1 + 0.08 / height, small, size=8, color="#444444", **named)
        drawn = {ending: io.BytesIO() for ending in ("png", "svg")}
        for ending, buffer in drawn.items():
            figure.savefig(buffer, format=ending, dpi=150, bbox_inches="tight")
            self.write(f"{name}.{ending}", buffer.getvalue())
        display(Image(data=small_png(drawn["png"])))
        plt.close(figure)
        if says:
            display(Markdown(says if isinstance(says, str) else "\n".join(f"* {line}." for line in says)))

    def table(self, table: pd.DataFrame, title: str) -> None:
        """Show a table under its title and caption; as plain text outside of a notebook."""
        caption = f"{title}{self.level}: {self.caption}"
        if get_ipython():
            display(table.style.format(brief).set_caption(caption))
        else:
            print(caption, table.to_string(), sep="\n")

    def csv(self, table: pd.DataFrame, name: str) -> None:
        """Write a table to the results folder."""
        self.note(name)
        write_csv(self.results / name, table)

    def text(self, text: str, name: str) -> None:
        """Write Markdown to the results folder and show it."""
        self.write(name, text.encode())
        display(Markdown(text))

    def json(self, content: dict, name: str) -> None:
        """Write a dict to the results folder."""
        self.write(name, json.dumps(content, indent=2).encode())

    def write(self, name: str, content: bytes) -> None:
        """Write a file of the results folder, whole or not at all."""
        self.note(name)
        write_content(self.results / name, content)

    def note(self, name: str) -> None:
        """Remember that this comparison writes a file, so that another one moves it away."""
        if name not in self.written:
            self.written.append(name)
            path = self.results / "written.json"
            write_json(path, {"comparison": self.identity, "files": self.written})


def brief(cell: Any) -> Any:
    """Return a table's cell as it is shown: 26.7, not 26.700000."""
    return f"{cell:g}" if isinstance(cell, float) else cell


def small_png(drawn: IO[bytes]) -> bytes:
    """Return a figure's PNG at 60 % of its size and in 256 colours, so that the notebook stays small."""
    picture = PIL.Image.open(drawn).convert("RGB")
    size = (round(0.6 * picture.width), round(0.6 * picture.height))
    picture = picture.resize(size, PIL.Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    cover = PIL.Image.Quantize.MAXCOVERAGE  # the median cut loses colours of thin lines and small spots
    picture.quantize(256, cover, dither=PIL.Image.Dither.NONE).save(buffer, "png", optimize=True)
    return buffer.getvalue()
