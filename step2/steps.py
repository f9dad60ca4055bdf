"""One slice led through Step 1's single steps, one after the other, for the eye. Uses Step 1 and figures."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import Step1_Image_Preprocessing as step1
from step2.figures import panels, tile

WORDS = {  # the steps after the window, in the order shown; ROI and noblank are two each
    "mask": "head mask: that is ROI",
    "noskull": "skull black",
    "crop": "crop: that is noblank",
    "clahe": "CLAHE: contrast, and noise",
    "bilateral": "bilateral filter: less noise",
}
Window = tuple[float, float] | None  # centre and width in HU; None is the header's
SEEN_HU = (-150, 400)  # of the histogram: fat and skin to the left, the skull beyond the right edge
BLOOD_HU = (50, 90)  # fresh


def draw_steps(path: str | Path, roi_window: str = "") -> plt.Figure:
    """Draw a DICOM slice in its header's window, then after each further step, and the HU of its head.

    roi_window: as Step 1's option takes it, "" is the brain window. ValueError where Step 1 would refuse the file.
    """
    ct, title = read_slice(Path(path), step1.roi_window(roi_window or "brain"))
    words = {"window": window_in_words(ct.scan.window)} | WORDS
    after, names = step1.step_runner(ct), tuple(words)
    figure, axes = panels(len(names) + 2, 4, (2.6, 2.8))
    titles = [title, *(f"+ {text}" for text in words.values())]
    for count, (axis, text) in enumerate(zip(axes, titles, strict=False)):
        tile(axis, after(names[:count]).image, text, size=9)
    draw_hu(axes[-1], ct.scan)
    return figure


def window_in_words(window: Window) -> str:
    """Return what the window step shows."""
    if window is None:
        return "the header's window stays"
    return "{}, {:g}/{:g} HU".format("brain window" if window == step1.BRAIN_WINDOW else "window", *window)


def read_slice(path: Path, window: Window) -> tuple[step1.CTSlice, str]:
    """Return a slice before its first step, and the window of its picture in words."""
    try:
        ds = step1.read_dicom(path)
        hu, _ = step1.hounsfield(step1.decode(ds), ds)
        grey, shown = step1.dicom2png(hu, ds)
    except step1.UnsuitableFile as err:
        raise ValueError(f"{path}: {err}") from err
    words = "the header's look-up table"
    if shown["window_source"] == "default":
        words = "no window in the header: brain window"
    elif shown.get("window_width") is not None:
        words = f"the header's window, {shown['window_center']:g}/{shown['window_width']:g} HU"
    return step1.whole_slice(hu, grey, window), words


def draw_hu(axis: plt.Axes, scan: step1.Scan) -> None:
    """Draw how many of the head's pixels have which HU, and where ROI's window, blood and bone lie."""
    if scan.window:
        center, width = scan.window
        low, high = center - width / 2, center + width / 2
        axis.axvspan(low, high, color="#56B4E9", alpha=0.3, lw=0, label=f"ROI's window, {low:g} to {high:g}")
    blood = "fresh blood, {} to {}".format(*BLOOD_HU)
    axis.axvspan(*BLOOD_HU, fc="none", ec="#D55E00", hatch="////", lw=0, label=blood)
    bone = step1.BONE_SEED_HU
    axis.axvspan(bone, SEEN_HU[1], color="#DDCC77", alpha=0.6, lw=0, label=f"bone, above {bone}")
    counts, edges = np.histogram(scan.hu[scan.head()], bins=np.arange(SEEN_HU[0], SEEN_HU[1] + 1, 5))
    axis.stairs(counts / 5, edges, color="black", lw=1.2)
    axis.set(xlim=SEEN_HU, yscale="symlog", ylim=(0, 500 * max(counts.max(), 1)))
    axis.set_xlabel("HU", size=9)
    axis.set_ylabel("pixels of the head a HU", size=9)
    axis.set_title("what the head is made of", size=9)
    axis.yaxis.tick_right()  # on the left it would push the pictures above apart
    axis.yaxis.set_label_position("right")
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=8, loc="upper right", frameon=True)
