"""Did each variant train to its end? Equal steps are not equal training.

The rule was fixed before any run that is reported, and uses training alone, never held-out slices: a run has
converged where, over its last tenth of epochs, its network fits its training slices as they are augmented. A
variant that has not is "still learning": its accuracy says as much about the epochs as about its pictures.
"""

import numpy as np
import pandas as pd

LAST = 0.1  # of the epochs, averaged: a single epoch of few steps is noisy
LOSS_LEFT = 0.1  # of the way from a perfect fit up to guessing, that a converged run may keep
ACCURACY = 0.95  # of the training slices, that a converged run gets right


def perfect_loss(smoothing: float, classes: int) -> float:
    """Return the cross-entropy of a perfect fit to smoothed labels: their entropy (Szegedy et al., 2016)."""
    p = np.full(classes, smoothing / classes)
    p[0] += 1 - smoothing
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def convergence_table(history: pd.DataFrame, smoothing: float, classes: int) -> pd.DataFrame:
    """Return a row for each run: variant, repeat, fold, control, epochs, train_loss, loss_left,
    train_accuracy, converged and stuck.

    history: the epochs of all runs. train_loss, train_accuracy: means over the last epochs. loss_left: 0 is a
    perfect fit, 1 is guessing. stuck: not converged, though most runs of its variant are.
    """
    runs = ["variant", "repeat", "fold", "control"]
    epochs = history.groupby(runs)["epoch"].transform("max")
    last = history[history["epoch"] > (epochs * (1 - LAST)).clip(upper=epochs - 1)]
    rows = last.groupby(runs, sort=False)[["train_loss", "train_accuracy"]].mean().reset_index()
    best, guess = perfect_loss(smoothing, classes), float(np.log(classes))
    rows.insert(4, "epochs", int(epochs.max()))
    rows.insert(6, "loss_left", (rows["train_loss"] - best) / (guess - best))
    rows["converged"] = (rows["loss_left"] <= LOSS_LEFT) & (rows["train_accuracy"] >= ACCURACY)
    most = rows.groupby("variant")["converged"].transform("mean") > 0.5
    return rows.assign(stuck=most & ~rows["converged"])


def still_learning(convergence: pd.DataFrame) -> list[str]:
    """Return the variants of which half of the runs or more have not converged."""
    share = convergence.groupby("variant", sort=False)["converged"].mean()
    return [str(name) for name in share.index[share <= 0.5]]


def convergence_lines(convergence: pd.DataFrame) -> list[str]:
    """Return a sentence for each variant, and for each run that got stuck: most others of its variant converged."""
    learning, epochs = still_learning(convergence), convergence["epochs"].iloc[0]
    lines = []
    for name, runs in convergence.groupby("variant", sort=False):
        fits = f"training accuracy {100 * runs['train_accuracy'].mean():.0f} %, "
        fits += f"{100 * runs['loss_left'].mean():.0f} % of the loss left"
        state = f"still learning after {epochs} epochs" if name in learning else "converged"
        lines.append(f"{name}: {state} ({fits})")
    for run in convergence[convergence["stuck"]].itertuples():
        who = f"{run.variant}{' (control)' * bool(run.control)}"
        lines.append(f"{who}, repeat {run.repeat}, fold {run.fold} did not converge, most others did")
    return lines
