"""Every figure: tables in, figure out; nothing is written here. Uses matplotlib."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from step2.bootstrap import MIN_PATIENTS
from step2.metrics import (
    GRID,
    confusion_percent,
    mean_curves,
    metric_of,
    patient_counts,
    reliability,
    with_interval,
)
from step2.pictures import Pictures, read_png
from step2.settings import Settings
from step2.statistics import EQUIVALENCE, find_noise_floor, in_points
from step2.variants import BASELINE, CHANCE, CLASSES, VARIANTS

# Okabe and Ito's colours, then Tol's muted ones for further variants
COLORS = (
    *("#555555", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00"),
    *("#882255", "#117733", "#332288", "#999933", "#AA4499", "#44AA99", "#88CCEE", "#DDCC77"),
)
SHORT = dict(zip(CLASSES, ("healthy", "IPH", "IVH", "SAH", "SDH", "EDH"), strict=True))  # as the field says
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))  # told apart in grey print
KIND_LOOKS = {  # kind -> heading, marker, colour
    "primary": (f"Against {BASELINE} (primary)", "s", "#0072B2"),
    "factorial": ("Effect of a step (factorial)", "D", "#D55E00"),
    "control": ("Same variant, other seed (A/A)", "o", "#555555"),
}


def variant_colors(variants: Sequence[str]) -> dict[str, str]:
    """Return a colour for each variant, the same for one of Step 1's table in every comparison."""
    order = [*VARIANTS, *(name for name in variants if name not in VARIANTS)]
    return {name: COLORS[place and 1 + (place - 1) % (len(COLORS) - 1)] for place, name in enumerate(order)}


def grid(rows: int, columns: int, inches: float) -> tuple[plt.Figure, np.ndarray]:
    """Return a figure and its axes (rows, columns), each for a square picture."""
    size = (inches * columns + 0.6, inches * rows)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


def panels(
    count: int, in_row: int, inches: tuple[float, float], sharex: bool = False, sharey: bool = False
) -> tuple[plt.Figure, list[plt.Axes]]:
    """Return a figure and so many axes of this width and height, at most in_row in a row."""
    columns, rows = min(count, in_row), math.ceil(count / in_row)
    size = (inches[0] * columns + 0.4, inches[1] * rows)
    how: dict[str, Any] = {"squeeze": False, "layout": "constrained", "sharex": sharex, "sharey": sharey}
    figure, axes = plt.subplots(rows, columns, figsize=size, **how)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def tile(axis: plt.Axes, picture: np.ndarray, title: str = "", side: str = "") -> None:
    """Draw one grey picture, with a word above it and one at its left."""
    axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, size=8)
    axis.set_ylabel(side, size=8)


def in_lines(variant: str) -> str:
    """Return a variant's name on two or three short lines."""
    return variant.replace("+", "\n+", 1).replace("+Bi", "\n+Bi")


def draw_variants(data: Path, variants: Sequence[str], slices: pd.DataFrame, size: int) -> plt.Figure:
    """Draw a row for one slice of each class, a column for each variant, in size x size pixels."""
    shown = slices.groupby("label").nth(0).set_index("label").reindex(CLASSES).dropna(subset="image")
    figure, axes = grid(len(shown), len(variants), 1.45)
    for row, label in enumerate(shown.index):
        for column, variant in enumerate(variants):
            picture = read_png(data / variant / shown.loc[label, "image"], size)
            tile(axes[row, column], picture, "" if row else in_lines(variant), "" if column else label)
    return figure


def draw_augmented(settings: Settings, variant: str, slices: pd.DataFrame, epochs: int = 6) -> plt.Figure:
    """Draw a row for one slice of each class: as it is, and as the first epochs get it."""
    pictures = Pictures(settings.data / variant, list(slices["image"]), settings, settings.seed)
    first = sorted(slices.drop_duplicates("label").index, key=lambda i: CLASSES.index(slices["label"][i]))
    figure, axes = grid(len(first), epochs + 1, 1.3)
    for row, index in enumerate(first):
        for column, epoch in enumerate([None, *range(epochs)]):
            title = "as it is" if epoch is None else f"epoch {epoch + 1}"
            side = "" if column else slices["label"][index]
            tile(axes[row, column], pictures[epoch, index][0][0].numpy(), "" if row else title, side)
    return figure


def draw_rates(rates: Sequence[float], epochs: int) -> plt.Figure:
    """Draw the learning rate of each step by epoch."""
    figure, axis = plt.subplots(figsize=(5, 2.2), layout="constrained")
    axis.step(np.arange(len(rates)) / len(rates) * epochs, rates, where="post", color="#0072B2")
    axis.set(xlabel="epoch", ylabel="learning rate", ylim=(0, None))
    return figure


def draw_curve(axis: plt.Axes, runs: pd.DataFrame, column: str, color: str, label: str) -> None:
    """Draw a column by epoch: a thin line for each fold, a thick one for their mean."""
    for _, fold in runs.groupby(["repeat", "fold"]):
        axis.plot(fold["epoch"], fold[column], color=color, lw=0.6, alpha=0.4)
    mean = runs.groupby("epoch")[column].mean()
    axis.plot(mean.index, mean, color=color, lw=1.8, label=label)
    axis.grid(alpha=0.3)


def draw_learning(history: pd.DataFrame, variants: Sequence[str]) -> plt.Figure:
    """Draw loss above and accuracy below, a column for each variant; the control is not shown."""
    inches = (1.55 * len(variants) + 1.2, 3.8)
    how: dict[str, Any] = {"squeeze": False, "sharex": True, "sharey": "row", "layout": "constrained"}
    figure, axes = plt.subplots(2, len(variants), figsize=inches, **how)
    for (loss, accuracy), variant in zip(axes.T, variants, strict=True):
        runs = history[(history["variant"] == variant) & ~history["control"].astype(bool)]
        draw_curve(loss, runs, "train_loss", "#999999", "training")
        draw_curve(loss, runs, "val_loss", "#D55E00", "held out")
        draw_curve(accuracy, runs, "val_accuracy", "#0072B2", "held out")
        accuracy.axhline(CHANCE, color="#555555", ls=":", lw=1, label="chance")
        accuracy.set(ylim=(0, 1), xlabel="epoch")
        loss.set_title(in_lines(variant), size=8)
    axes[0, 0].set(ylabel="log loss", ylim=(0, min(history["val_loss"].max() * 1.05, 4)))
    axes[1, 0].set(ylabel="accuracy")
    for axis in axes[:, 0]:
        axis.legend(fontsize=7)
    return figure


def forest_lines(table: pd.DataFrame) -> list[tuple]:
    """Return (y, heading or None, row or None) from top to bottom: a heading before the rows of each kind."""
    lines: list[tuple] = []
    y = 0.0
    for kind in KIND_LOOKS:
        rows = table[table["kind"] == kind]
        if len(rows):
            lines.append((y, KIND_LOOKS[kind][0], None))
            lines += [(y + 1 + i, None, row) for i, (_, row) in enumerate(rows.iterrows())]
            y += len(rows) + 1.5
    return lines


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
        p = "<0.001" if row["p_holm"] < 0.001 else f"{row['p_holm']:.3f}"
    beyond = axis.get_yaxis_transform()
    axis.text(1.37, y, text, transform=beyond, ha="right", va="center", fontsize=9)
    axis.text(1.52, y, p, transform=beyond, ha="right", va="center", fontsize=9)


def draw_bands(axis: plt.Axes, floor: float) -> None:
    """Shade the equivalence band and the noise floor; floor: accuracy, NaN without an A/A control."""
    band = 100 * EQUIVALENCE
    if np.isfinite(floor):
        shown = f"noise floor \N{PLUS-MINUS SIGN}{100 * floor:.1f}: 95 % interval of the A/A control"
        axis.axvspan(-100 * floor, 100 * floor, fc="none", ec="#bbbbbb", hatch="///", lw=0, label=shown)
    shown = f"equivalence band: \N{PLUS-MINUS SIGN}{band:.0f} point"
    axis.axvspan(-band, band, color="#56B4E9", alpha=0.45, lw=0, label=shown)
    axis.axvline(0, color="black", lw=1)


def draw_forest(table: pd.DataFrame) -> plt.Figure:
    """Return the forest plot of all contrasts, in the order of their declaration."""
    lines = forest_lines(table)
    height = 1.3 + 0.32 * (lines[-1][0] + 1.5)
    figure, axis = plt.subplots(figsize=(10.5, height))
    figure.subplots_adjust(left=0.27, right=0.69, bottom=1.0 / height, top=1 - 0.1 / height)
    draw_bands(axis, find_noise_floor(table))
    beside: dict[str, Any] = {"ha": "right", "va": "center", "weight": "bold"}
    beside["transform"] = axis.get_yaxis_transform()
    for y, heading, row in lines:
        if heading:
            axis.text(-0.02, y, heading, **beside)
        else:
            draw_contrast(axis, y, row)
    rows = [(y, row["contrast"]) for y, _, row in lines if row is not None]
    axis.set_yticks([y for y, _ in rows], [name for _, name in rows])
    axis.text(1.37, 0, "points (95 % CI)", fontsize=9, **beside)
    axis.text(1.52, 0, "Holm p", fontsize=9, **beside)
    axis.set(ylim=(lines[-1][0] + 0.7, -0.7), xlabel="difference in accuracy, percentage points")
    axis.margins(x=0.08)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.55 / (height - 1.1)), ncols=2, frameon=False, fontsize=9
    )
    return figure


def draw_accuracy(predictions: pd.DataFrame, metrics: pd.DataFrame) -> plt.Figure:
    """Return a plot of accuracy in %, a line per variant: marker and interval, fold dots, chance."""
    names = list(dict.fromkeys(predictions["variant"]))
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.42 * len(names)))
    colors = variant_colors(names)
    figure.subplots_adjust(left=0.28, right=0.78, bottom=0.62 / figure.get_figheight(), top=0.98)
    right = predictions.assign(right=predictions["label"] == predictions["predicted"])
    for y, name in enumerate(names):
        value, low, high = metric_of(metrics, name, "accuracy")
        fold_means = right[right["variant"] == name].groupby(["repeat", "fold"])["right"].mean()
        dots = np.full(len(fold_means), y + 0.22)
        axis.plot(100 * fold_means, dots, "o", color="#888888", ms=3.5, label="" if y else "one fold")
        axis.plot([100 * low, 100 * high], [y, y], color=colors[name], lw=2.5, solid_capstyle="butt")
        axis.plot(100 * value, y, "s", color=colors[name], ms=8, label="" if y else "all, 95 % CI")
        text = with_interval(value, low, high)
        axis.text(1.03, y, text, transform=axis.get_yaxis_transform(), va="center", fontsize=9)
    axis.axvline(100 * CHANCE, color="black", ls="--", lw=1, label="chance")
    axis.set_yticks(range(len(names)), names)
    axis.set(xlim=(0, 100), ylim=(len(names) - 0.4, -0.6), xlabel="held-out accuracy, %")
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="upper left", bbox_to_anchor=(1.02, -0.05), fontsize=8, frameon=False)
    return figure


def draw_sensitivities(
    predictions: pd.DataFrame, metrics: pd.DataFrame, patient_level: bool = True
) -> plt.Figure:
    """Return a heat map of sensitivity in %, variants by classes."""
    names, counts = list(dict.fromkeys(predictions["variant"])), patient_counts(predictions)
    figure, axis = plt.subplots(figsize=(11, 1.3 + 0.5 * len(names)), layout="constrained")
    cells = [[metric_of(metrics, name, f"sensitivity_{c}") for c in CLASSES] for name in names]
    image = axis.imshow(100 * np.array(cells)[..., 0], cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for (y, x), _ in np.ndenumerate(np.zeros((len(names), len(CLASSES)))):
        value, low, high = cells[y][x]
        text = with_interval(value, low, high, digits=0).replace(" (", "\n(").replace(" e", "\ne")
        axis.text(
            x, y, text, ha="center", va="center", fontsize=8, color="black" if value > 0.55 else "white"
        )
    stars = ["*" if counts[c] < MIN_PATIENTS else "" for c in CLASSES]
    word = "patients" if patient_level else "slices"
    heads = [f"{c}{star}\n{counts[c]} {word}" for c, star in zip(CLASSES, stars, strict=True)]
    axis.set_xticks(range(len(CLASSES)), heads, fontsize=9)
    axis.set_yticks(range(len(names)), names)
    axis.tick_params(length=0)
    axis.set_facecolor("#999999")  # not estimable
    figure.colorbar(image, label="sensitivity, %", pad=0.01)
    return figure


def draw_confusions(predictions: pd.DataFrame) -> plt.Figure:
    """Return the confusion matrices of all variants, at most four in a row."""
    groups = list(predictions.groupby("variant", sort=False))
    figure, axes = panels(len(groups), 4, (3.0, 3.0))
    for axis, (name, rows) in zip(axes, groups, strict=True):
        percent = confusion_percent(rows)
        image = axis.imshow(percent, cmap="cividis", vmin=0, vmax=100)
        for (y, x), value in np.ndenumerate(percent):
            text = "\N{EN DASH}" if np.isnan(value) else f"{value:.0f}"
            axis.text(
                x, y, text, ha="center", va="center", fontsize=7, color="black" if value > 55 else "white"
            )
        axis.set_title(name, size=9)
        axis.set_xticks(range(len(CLASSES)), SHORT.values(), rotation=45, size=8)
        axis.set_yticks(range(len(CLASSES)), SHORT.values(), size=8)
        axis.set(xlabel="predicted", ylabel="true", facecolor="#999999")
    figure.colorbar(image, ax=axes, label="% of the true class", shrink=0.6 if len(groups) > 4 else 0.8)
    return figure


def draw_any_hemorrhage(predictions: pd.DataFrame, metrics: pd.DataFrame) -> plt.Figure:
    """Return ROC (left) and precision-recall (right) curves of any hemorrhage, with the AUCs as legend."""
    figure, (roc, recall) = plt.subplots(1, 2, figsize=(10.5, 4.9), layout="constrained")
    colors = variant_colors(list(dict.fromkeys(predictions["variant"])))
    for i, (name, rows) in enumerate(predictions.groupby("variant", sort=False)):
        sensitivity, precision = mean_curves(rows)
        auc = with_interval(*metric_of(metrics, name, "any_auc"), scale=1, digits=2)
        look = {"color": colors[name], "ls": LINE_STYLES[i % len(LINE_STYLES)], "lw": 1.8}
        roc.plot(GRID, sensitivity, label=f"{name}: AUC {auc}", **look)
        recall.plot(GRID, precision, **look)
    share = (predictions["label"] != "healthy").mean()
    roc.plot([0, 1], [0, 1], color="black", lw=0.8, label="chance")
    recall.axhline(share, color="black", lw=0.8)
    recall.text(0.01, share, f"chance, {100 * share:.0f} % bleed", fontsize=8, va="bottom")
    roc.set(xlabel="1 - specificity", ylabel="sensitivity", ylim=(0, 1.02), xlim=(0, 1))
    recall.set(
        xlabel="sensitivity (recall)", ylabel="precision", ylim=(min(share - 0.1, 0.5), 1.02), xlim=(0, 1)
    )
    for axis in (roc, recall):
        axis.grid(alpha=0.3)
    figure.legend(
        *roc.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False
    )
    return figure


def draw_reliability(predictions: pd.DataFrame, metrics: pd.DataFrame) -> plt.Figure:
    """Return reliability curves, a panel per variant, at most four in a row."""
    groups = list(predictions.groupby("variant", sort=False))
    figure, axes = panels(len(groups), 4, (2.8, 2.8), sharex=True, sharey=True)
    colors = variant_colors([name for name, _ in groups])
    for axis, (name, rows) in zip(axes, groups, strict=True):
        bins = reliability(rows)
        x, y = 100 * bins["confidence"], 100 * bins["accuracy"]
        axis.plot([0, 100], [0, 100], color="black", lw=0.8)
        axis.vlines(x, 100 * bins["ci_low"], 100 * bins["ci_high"], color=colors[name], lw=1.5)
        axis.plot(x, y, color=colors[name], lw=1)
        axis.scatter(x, y, 15 + 250 * bins["slices"] / bins["slices"].sum(), color=colors[name], zorder=3)
        error = with_interval(*metric_of(metrics, name, "calibration_error"))
        axis.set_title(f"{name}\nerror {error} points", size=8)
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
        words = f"{in_lines(row.variant)}\nis {row.label}\nsaid {row.predicted}, {row.confidence:.0%}"
        tile(axis, read_png(data / row.variant / row.image, size), words)
        axis.title.set_fontsize(7)
    if mistakes.empty:
        axes[0].text(0.5, 0.5, "none", ha="center")
    return figure
