"""Every figure: tables in, figure out; nothing is written here. Uses matplotlib."""

import math
import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.font_manager import get_font_names

from step2.bootstrap import MIN_PATIENTS
from step2.classes import classes_of, guesses, order_classes, short_names, wrapped
from step2.metrics import (
    confusion_counts,
    count_text,
    mean_curve,
    metric_of,
    patient_counts,
    reliability,
    with_interval,
)
from step2.pictures import Pictures, read_png, to_picture
from step2.settings import Settings
from step2.statistics import EQUIVALENCE, in_points, p_text
from step2.variants import BASELINE, KNOWN_VARIANTS

# Fonts that have the Chinese, Japanese or Korean of a class's name, where the usual one has no letter
EASTERN = (
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "Microsoft YaHei"),
    *("Malgun Gothic", "Yu Gothic", "PingFang SC"),
)
plt.rcParams["font.family"] = ["DejaVu Sans", *(font for font in EASTERN if font in get_font_names())]

# Okabe and Ito's colours, then Tol's muted ones for further variants
COLORS = (
    *("#555555", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00"),
    *("#882255", "#117733", "#332288", "#999933", "#AA4499", "#44AA99", "#88CCEE", "#DDCC77"),
)
LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))  # told apart in grey print
TOP_LOSS = 4  # of the learning curves; what ends above it has its number at the edge
KIND_LOOKS = {  # kind -> heading, marker, colour
    "primary": (f"Against {BASELINE} (primary)", "s", "#0072B2"),
    "factorial": ("Effect of a step (factorial)", "D", "#D55E00"),
    "control": ("Same variant, other seed (A/A)", "o", "#555555"),
}


def variant_colors(variants: Sequence[str]) -> dict[str, str]:
    """Return a colour for each variant, the same for one of Step 1's table in every comparison."""
    order = [*KNOWN_VARIANTS, *(name for name in variants if name not in KNOWN_VARIANTS)]
    return {name: COLORS[place and 1 + (place - 1) % (len(COLORS) - 1)] for place, name in enumerate(order)}


def panels(
    count: int, in_row: int, inches: tuple[float, float], **shared: Any
) -> tuple[plt.Figure, list[plt.Axes]]:
    """Return a figure and so many axes of this width and height, at most in_row in a row; shared: sharex, sharey."""
    columns, rows = min(count, in_row), math.ceil(count / in_row)
    size = (inches[0] * columns + 0.4, inches[1] * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **shared)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def tile(axis: plt.Axes, picture: np.ndarray, title: str, side: str = "", size: float = 8) -> None:
    """Draw one picture, grey or RGB, with a word above it and one at its left, in this size of print."""
    axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, size=size)
    axis.set_ylabel(side, size=size)


def picture_grid(pictures: list, heads: list[str], sides: list[str], inches: float) -> plt.Figure:
    """Return a figure of rows of square pictures, with heads above the first one and sides at their left."""
    size = (inches * len(heads) + 0.6, inches * len(sides))
    figure, axes = plt.subplots(len(sides), len(heads), figsize=size, squeeze=False, layout="constrained")
    for (row, column), axis in np.ndenumerate(axes):
        tile(axis, pictures[row][column], "" if row else heads[column], "" if column else sides[row])
    return figure


def in_lines(variant: str) -> str:
    """Return a variant's name on two or three short lines."""
    return variant.replace("+", "\n+", 1).replace("+Bi", "\n+Bi")


def draw_variants(data: Path, variants: Sequence[str], slices: pd.DataFrame, size: int) -> plt.Figure:
    """Draw a row for one slice of each class, a column for each variant, in size x size pixels."""
    shown = slices.groupby("label").nth(0).set_index("label").loc[list(order_classes(slices["label"]))]
    pictures = [[read_png(data / variant / image, size) for variant in variants] for image in shown["image"]]
    sides = [wrapped(label, 20) for label in shown.index]
    return picture_grid(pictures, [in_lines(variant) for variant in variants], sides, 1.45)


def draw_augmented(settings: Settings, variant: str, slices: pd.DataFrame, epochs: int = 6) -> plt.Figure:
    """Draw a row for one slice of each class: as it is, and as the first epochs get it."""
    pictures = Pictures(settings.data / variant, list(slices["image"]), settings, settings.seed)
    first = {label: index for index, label in slices.drop_duplicates("label")["label"].items()}
    labels, shown = order_classes(first), [None, *range(epochs)]
    rows = [[to_picture(pictures[epoch, first[label]][0]) for epoch in shown] for label in labels]
    heads = ["as it is", *(f"epoch {epoch + 1}" for epoch in range(epochs))]
    return picture_grid(rows, heads, [wrapped(label, 18) for label in labels], 1.3)


def draw_rates(rates: Sequence[float], epochs: int) -> plt.Figure:
    """Draw the learning rate of each step by epoch."""
    figure, axis = plt.subplots(figsize=(5, 2.2), layout="constrained")
    axis.stairs(rates, np.linspace(0, epochs, len(rates) + 1), baseline=None, color="#0072B2")
    axis.set(xlabel="epoch", ylabel="learning rate", ylim=(0, None))
    return figure


def draw_curves(axis: plt.Axes, runs: pd.DataFrame, what: str, color: str) -> None:
    """Draw training and held-out side of loss or accuracy by epoch: thin lines for folds, a thick one for their mean.

    The last values stand at the ends, the higher above and the lower below, so that close ones can be read.
    """
    ends = []
    for column, tint, label in ((f"train_{what}", "#999999", "training"), (f"val_{what}", color, "held out")):
        known = runs.dropna(subset=column)
        for _, fold in known.groupby(["repeat", "fold"]):
            axis.plot(fold["epoch"], fold[column], color=tint, lw=0.6, alpha=0.4)
        mean = known.groupby("epoch")[column].mean()
        dot = "." * (len(mean) == 1)  # no line is drawn through a single point
        axis.plot(mean.index, mean, color=tint, lw=1.8, label=label, marker=dot)
        ends.append((mean.iloc[-1], mean.index[-1], tint))
    for (value, epoch, tint), side in zip(sorted(ends), ("top", "bottom"), strict=True):
        axis.annotate(f"{value:.2f}", (epoch, min(value, TOP_LOSS)), xytext=(2, 0), color=tint, fontsize=7,
                      textcoords="offset points", va=side, annotation_clip=False)  # fmt: skip
    axis.grid(alpha=0.3)


def draw_learning(
    history: pd.DataFrame, variants: Sequence[str], classes: int, learning: Collection[str] = ()
) -> plt.Figure:
    """Draw loss above and accuracy below, a column for each variant; the control is not shown.

    learning: the variants that did not converge, which their titles say.
    """
    inches = (1.55 * len(variants) + 2.0, 3.8)
    how: dict[str, Any] = {"squeeze": False, "sharex": True, "sharey": "row", "layout": "constrained"}
    figure, axes = plt.subplots(2, len(variants), figsize=inches, **how)
    for (loss, accuracy), variant in zip(axes.T, variants, strict=True):
        runs = history[(history["variant"] == variant) & ~history["control"].astype(bool)]
        draw_curves(loss, runs, "loss", "#D55E00")
        draw_curves(accuracy, runs, "accuracy", "#0072B2")
        loss.axhline(math.log(classes), color="#555555", ls=":", lw=1, label="guessing")
        accuracy.axhline(1 / classes, color="#555555", ls=":", lw=1, label="guessing")
        accuracy.set(ylim=(0, 1.15), xlabel="epoch", xlim=(0, 1.22 * history["epoch"].max()))
        loss.set_title(in_lines(variant) + "\nstill learning" * (variant in learning), size=8)
    ends = history.loc[history["epoch"] == history["epoch"].max(), "train_loss"]
    highest = max(history["val_loss"].max(), ends.max(), math.log(classes))
    axes[0, 0].set(ylabel="log loss", ylim=(0, min(highest * 1.15, TOP_LOSS)))
    axes[1, 0].set(ylabel="accuracy")
    for axis in axes[:, -1]:
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


def draw_contrast(axis: plt.Axes, y: float, row: pd.Series) -> None:
    """Draw one contrast's difference and interval, in points, and its numbers at the right."""
    _, marker, color = KIND_LOOKS[row["kind"]]
    difference, low, high = (100 * row[key] for key in ("difference", "ci_low", "ci_high"))
    hollow = "white" if row["kind"] == "control" else color
    axis.plot([low, high], [y, y], color=color, lw=2, solid_capstyle="butt")
    axis.plot(difference, y, marker, color=color, mfc=hollow, ms=7, mew=1.5)
    text, p = "not estimable", ""
    if np.isfinite(low):
        text = in_points(row).replace(" points", "")
        p = p_text(row["p_holm"])
    beyond = axis.get_yaxis_transform()
    axis.text(1.37, y, text, transform=beyond, ha="right", va="center", fontsize=9)
    axis.text(1.52, y, p, transform=beyond, ha="right", va="center", fontsize=9)


def draw_bands(axis: plt.Axes, table: pd.DataFrame, margin: float) -> None:
    """Shade what training again alone may move, and the equivalence band where an interval could fit in it."""
    noise, band = 100 * table["seed_noise"].max(), 100 * margin
    if noise > 0:
        shown = f"\N{PLUS-MINUS SIGN}{noise:.1f}: SD of a difference that training again alone would make"
        axis.axvspan(-noise, noise, fc="none", ec="#bbbbbb", hatch="///", lw=0, label=shown)
    if ((table["ci_high"] - table["ci_low"]) <= 2 * margin).any():
        shown = f"equivalence band: \N{PLUS-MINUS SIGN}{band:g}"
        axis.axvspan(-band, band, color="#56B4E9", alpha=0.45, lw=0, label=shown)
    axis.axvline(0, color="black", lw=1)


def draw_forest(table: pd.DataFrame, margin: float = EQUIVALENCE) -> plt.Figure:
    """Return the forest plot of all contrasts, in the order of their declaration, with a heading for each kind."""
    places = 1 + np.arange(len(table)) + 1.5 * pd.factorize(table["kind"])[0]  # downwards
    height = 1.3 + 0.32 * (places[-1] + 1.5)
    figure, axis = plt.subplots(figsize=(10.5, height))
    figure.subplots_adjust(left=0.27, right=0.69, bottom=1.0 / height, top=1 - 0.1 / height)
    draw_bands(axis, table, margin)
    beside: dict[str, Any] = {"ha": "right", "va": "center", "weight": "bold"}
    beside["transform"] = axis.get_yaxis_transform()
    for y, (_, row), same_kind in zip(places, table.iterrows(), table["kind"].duplicated(), strict=True):
        if not same_kind:
            axis.text(-0.02, y - 1, KIND_LOOKS[row["kind"]][0], **beside)
        draw_contrast(axis, y, row)
    axis.set_yticks(places, table["contrast"])
    axis.text(1.37, 0, "points (95 % CI)", fontsize=9, **beside)
    axis.text(1.52, 0, "Holm p", fontsize=9, **beside)
    axis.set(ylim=(places[-1] + 0.7, -0.7), xlabel="difference in accuracy, percentage points")
    axis.margins(x=0.08)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    if axis.get_legend_handles_labels()[0]:
        beneath = (0.5, -0.55 / (height - 1.1))
        axis.legend(loc="upper center", bbox_to_anchor=beneath, ncols=2, frameon=False, fontsize=9)
    return figure


def draw_pairs(pairs: pd.DataFrame) -> plt.Figure:
    """Return the effect of each step, a panel for each, in each pair of variants that differ by it alone."""
    steps = list(dict.fromkeys(pairs["step"]))
    figure, axes = panels(len(steps), 4, (3.1, 2.6), sharey=True)
    for axis, (step, rows) in zip(axes, pairs.groupby("step", sort=False), strict=True):
        x, low, high = np.arange(len(rows)), *(100 * rows[end] for end in ("ci_low", "ci_high"))
        axis.vlines(x, low, high, color="#0072B2", lw=2)
        axis.plot(x, 100 * rows["difference"], "o-", color="#0072B2", lw=0.8, ms=6)
        axis.axhline(0, color="black", lw=1)
        axis.set_xticks(x, [f"on top of\n{in_lines(b)}" for b in rows["b"]], fontsize=7)
        axis.set(xlim=(-0.6, len(rows) - 0.4))
        axis.set_title(textwrap.fill(str(step), 30), size=9)
        axis.grid(axis="y", alpha=0.3)
    figure.supylabel("effect on accuracy, points", size=10)
    return figure


def draw_accuracy(predictions: pd.DataFrame, metrics: pd.DataFrame, best: Collection[str] = ()) -> plt.Figure:
    """Return a plot of accuracy in %, a line per variant: marker and interval, fold dots, chance.

    best: variants that may be the best; their markers are filled, the others' hollow.
    """
    names = list(predictions["variant"].unique())
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.42 * len(names)))
    colors = variant_colors(names)
    figure.subplots_adjust(left=0.28, right=0.78, bottom=0.62 / figure.get_figheight(), top=0.98)
    right = predictions.assign(right=predictions["label"] == predictions["predicted"])
    for y, name in enumerate(names):
        value, low, high = metric_of(metrics, name, "accuracy")
        fold_means = right[right["variant"] == name].groupby(["repeat", "fold"])["right"].mean()
        equal = fold_means.groupby(fold_means).cumcount().to_numpy()  # they are drawn apart
        dots = y + 0.24 + min(0.05, 0.25 / max(equal.max(), 1)) * equal
        label = "" if y else "one fold"
        axis.plot(100 * fold_means, dots, "o", color="#888888", ms=3.5, label=label, clip_on=False)
        axis.plot([100 * low, 100 * high], [y, y], color=colors[name], lw=2.5, solid_capstyle="butt")
        fill, mark = (colors[name], " \N{BLACK STAR}") if name in best else ("white", "")
        axis.plot(100 * value, y, "s", color=colors[name], mfc=fill, mew=2, ms=8, clip_on=False)
        text = with_interval(value, low, high) + mark
        axis.text(1.03, y, text, transform=axis.get_yaxis_transform(), va="center", fontsize=9)
    if BASELINE in names:
        reference = 100 * metric_of(metrics, BASELINE, "accuracy")[0]
        axis.axvline(reference, color=colors[BASELINE], lw=0.8, label=BASELINE)
    chance, commonest = guesses(predictions)
    axis.axvline(100 * chance, color="black", ls="--", lw=1, label="chance")
    if commonest:
        axis.axvline(100 * commonest, color="black", ls=":", lw=1, label="commonest class")
    if best:
        axis.plot([], [], "s", color="#555555", ms=7, label="\N{BLACK STAR} may be best")
    axis.set_yticks(range(len(names)), names)
    axis.set(xlim=(0, 100), ylim=(len(names) - 0.4, -0.6), xlabel="held-out accuracy, %")
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="upper left", bbox_to_anchor=(1.02, -0.05), fontsize=8, frameon=False)
    return figure


def draw_sensitivities(predictions: pd.DataFrame, metrics: pd.DataFrame, patient_level: bool) -> plt.Figure:
    """Return a heat map of sensitivity in %, variants by classes."""
    names, counts = list(predictions["variant"].unique()), patient_counts(predictions).of
    inches = (3.2 + 1.3 * len(counts), 1.3 + 0.5 * len(names))
    figure, axis = plt.subplots(figsize=inches, layout="constrained")
    cells = [[metric_of(metrics, name, f"sensitivity_{c}") for c in counts] for name in names]
    image = axis.imshow(100 * np.array(cells)[..., 0], cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for y, x in np.ndindex(len(names), len(counts)):
        value, low, high = cells[y][x]
        text = with_interval(value, low, high, digits=0).replace(" (", "\n(").replace("not ", "not\n")
        color = "black" if value > 0.55 else "white"
        axis.text(x, y, text, ha="center", va="center", fontsize=8, color=color)
    tested, heads = predictions.groupby("label")["image"].nunique(), []
    for name, count in counts.items():
        heads.append(f"{wrapped(name + '*' * (count < MIN_PATIENTS), 17)}\n{tested.get(name, 0)} slices")
        heads[-1] += f"\n{count} patients" * patient_level  # else some may be known
    axis.set_xticks(range(len(counts)), heads, fontsize=9)
    axis.set_yticks(range(len(names)), names)
    axis.tick_params(length=0)
    axis.set_facecolor("#999999")  # not estimable
    figure.colorbar(image, label="sensitivity, %", pad=0.01)
    return figure


def draw_confusions(predictions: pd.DataFrame, shown: Sequence[str]) -> plt.Figure:
    """Return the confusion matrices of two variants, in slices, and second minus first; of one, its own."""
    counts = [confusion_counts(predictions[predictions["variant"] == name]) for name in shown]
    share: dict[str, Any] = {"cmap": "cividis", "vmin": 0, "vmax": 100}  # % of a class
    drawn = [(name, count, share) for name, count in zip(shown, counts, strict=True)]
    if len(shown) == 2:
        apart = {"cmap": "RdBu", "vmin": -60, "vmax": 60}
        drawn.append((f"{shown[1]}\nminus {shown[0]}", counts[1] - counts[0], apart))
    short = short_names(classes_of(predictions))
    lines = 1 + max(name.count("\n") for name in short)
    side = max(3.6, max(0.45, 0.17 * lines) * len(short) + 0.9 + 0.5 * (lines > 1))  # inches
    figure, axes = panels(len(drawn), 3, (side, side))
    for axis, (name, count, look) in zip(axes, drawn, strict=True):
        totals = counts[0].sum(axis=1, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            percent = 100 * count / totals
        bright = axis.imshow(percent, **look).to_rgba(percent)[..., :3] @ LUMINANCE > 0.5
        for (y, x), value in np.ndenumerate(count):
            color = "black" if bright[y, x] else "white"
            axis.text(x, y, count_text(value), ha="center", va="center", fontsize=8, color=color)
        axis.set_title(name, size=9)
        axis.set_xticks(range(len(short)), short, rotation=90 if "\n" in "".join(short) else 45, size=8)
        axis.set_yticks(range(len(short)), short, size=8)
        axis.set(xlabel="predicted", ylabel="true", facecolor="#999999")
    return figure


def draw_any_hemorrhage(predictions: pd.DataFrame, metrics: pd.DataFrame, shown: Sequence[str]) -> plt.Figure:
    """Return the AUC of any hemorrhage of each variant with its interval (left), and ROC curves (right).

    shown: the variants whose curves are drawn.
    """
    names = list(predictions["variant"].unique())
    figure, (auc, roc) = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    colors = variant_colors(names)
    for y, name in enumerate(names):
        value, low, high = metric_of(metrics, name, "any_auc")
        auc.plot([low, high], [y, y], color=colors[name], lw=2.5, solid_capstyle="butt")
        auc.plot(value, y, "s", color=colors[name], ms=8)
        text = with_interval(value, low, high, scale=1, digits=2)
        auc.text(1.02, y, text, transform=auc.get_yaxis_transform(), va="center", fontsize=8)
    auc.axvline(0.5, color="black", ls="--", lw=1)
    auc.set_yticks(range(len(names)), names)
    auc.set(ylim=(len(names) - 0.4, -0.6), xlabel="AUC, any hemorrhage (95 % CI); dashed: chance")
    auc.set_xlim(min(0.4, auc.get_xlim()[0]), 1.02)
    for i, name in enumerate(shown):
        curve = mean_curve(predictions[predictions["variant"] == name])
        roc.plot(curve, label=name, color=colors[name], ls=LINE_STYLES[i % len(LINE_STYLES)], lw=1.8)
    roc.plot([0, 1], [0, 1], color="black", lw=0.8, label="chance")
    roc.set(xlabel="1 - specificity", ylabel="sensitivity", ylim=(0, 1.02), xlim=(0, 1))
    roc.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    for axis in (auc, roc):
        axis.grid(alpha=0.3)
    return figure


def draw_reliability(predictions: pd.DataFrame, metrics: pd.DataFrame, shown: Sequence[str]) -> plt.Figure:
    """Return reliability curves of some variants, a panel each, at most four in a row."""
    figure, axes = panels(len(shown), 4, (2.8, 2.8), sharex=True, sharey=True)
    colors = variant_colors(list(predictions["variant"].unique()))
    for axis, name in zip(axes, shown, strict=True):
        bins = reliability(predictions[predictions["variant"] == name])
        x, y = 100 * bins["confidence"], 100 * bins["accuracy"]
        axis.plot([0, 100], [0, 100], color="black", lw=0.8)
        axis.vlines(x, 100 * bins["ci_low"], 100 * bins["ci_high"], color=colors[name], lw=1.5)
        axis.plot(x, y, color=colors[name], lw=1)
        axis.scatter(x, y, 15 + 250 * bins["slices"] / bins["slices"].sum(), color=colors[name], zorder=3)
        error = with_interval(*metric_of(metrics, name, "calibration_error"))
        axis.set_title(f"{name}\nexpected calibration error\n{error} points", size=8)
        axis.grid(alpha=0.3)
        axis.set(xlim=(0, 102), ylim=(-3, 103))
    figure.supxlabel("confidence in the predicted class, %", size=10)
    figure.supylabel("slices predicted correctly, %", size=10)
    return figure


def draw_costs(costs: pd.DataFrame) -> plt.Figure:
    """Return bars of each cost, a panel per column of costs (variants, costs)."""
    inches, colors = (3.2 * costs.shape[1] + 1.5, 1 + 0.36 * len(costs)), variant_colors(list(costs.index))
    how: dict[str, Any] = {"sharey": True, "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(1, costs.shape[1], figsize=inches, **how)
    for axis, (name, values) in zip(axes[0], costs.items(), strict=True):
        bars = axis.barh(costs.index, values, color=[colors[v] for v in costs.index])
        axis.bar_label(bars, [f"{v:.3g}" for v in values], padding=3, fontsize=8)
        axis.set_xlabel(name)
        axis.margins(x=0.18)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].invert_yaxis()
    return figure


def draw_mistakes(mistakes: pd.DataFrame, data: Path, size: int) -> plt.Figure:
    """Draw each mistaken slice in its variant, size x size pixels, with truth and prediction."""
    figure, axes = panels(max(len(mistakes), 1), 6, (1.8, 2.4))
    for axis in axes:
        axis.axis("off")
    for axis, row in zip(axes, mistakes.itertuples(), strict=False):
        said = [f"is {row.label}", f"said {row.predicted}, {row.confidence:.0%}"]
        words = "\n".join([in_lines(row.variant), *(wrapped(line, 28) for line in said)])
        tile(axis, read_png(data / row.variant / row.image, size), words, size=7)
    if mistakes.empty:
        axes[0].text(0.5, 0.5, "none", ha="center")
    return figure
