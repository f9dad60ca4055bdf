"""Grad-CAM: where a score comes from, so that one sees whether the network looks at the bleed.

Taken in the deepest layer whose map is still ten cells wide, cell by cell (HiResCAM, Draelos and Carin,
2020): averaging the gradient first (Selvaraju et al., 2017) is meant for the last layer, three cells wide at
80 px.
"""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from step2.classes import HEALTHY, wrapped
from step2.figures import in_lines, picture_grid
from step2.network import build_network
from step2.pictures import normalise, read_png, to_channels
from step2.runs import Comparison, Run, load_last

CELLS = 10


def grad_cam(network: torch.nn.Module, pictures: torch.Tensor, classes: torch.Tensor) -> np.ndarray:
    """Return maps (n, h, w), 0 to 1, of what raises the scores of these classes.

    pictures: uint8 (n, 1 or 3, h, w). One picture at a time, and with gradients after the layer
    alone: those of all of B7 at 600 px take 4 GB.
    """
    network.eval().requires_grad_(False)
    kept: list[torch.Tensor] = []
    maps = []

    def keep(_module: torch.nn.Module, _inputs: tuple, out: torch.Tensor) -> torch.Tensor | None:
        if out.shape[-1] < CELLS and kept:
            return None
        kept[:] = [out.detach().requires_grad_()]
        return kept[0]

    for picture, label in zip(pictures, classes, strict=True):
        kept.clear()
        hooks = [block.register_forward_hook(keep) for block in network._blocks]  # type: ignore[union-attr]
        score = network(normalise(picture[None]))[0, label]
        for hook in hooks:
            hook.remove()
        (slope,) = torch.autograd.grad(score, kept[0])
        one = (kept[0] * slope).sum(1, keepdim=True).relu()
        one = F.interpolate(one, size=pictures.shape[-2:], mode="bilinear", align_corners=False)[0, 0]
        maps.append((one / one.max().clamp_min(1e-12)).detach().numpy())
    return np.stack(maps)


def draw_cams(comparison: Comparison, predictions: pd.DataFrame) -> plt.Figure:
    """Draw held-out slices of each class but healthy (columns) in each variant (rows) under their Grad-CAM.

    Five columns or more, so that of one class of bleeds more than one patient is seen.
    """
    variants, settings, classes = comparison.variants, comparison.settings, comparison.slices.classes
    repeat, fold = comparison.places[0]
    held_out = predictions[predictions["variant"] == variants[0]]
    held_out = held_out[(held_out["repeat"] == repeat) & (held_out["fold"] == fold)]
    bleeds = [name for name in classes if name != HEALTHY]
    one_each = held_out.drop_duplicates(["label", "patient"])
    each = math.ceil(5 / len(bleeds))
    shown = pd.concat([one_each[one_each["label"] == name].head(each) for name in bleeds]).set_index("label")
    truth = torch.tensor([classes.index(label) for label in shown.index])
    network, rows, maps = build_network(settings, 0.1, len(classes)), [], []
    for variant in variants:
        load_last(comparison, Run(variant, repeat, fold), network)
        rows.append([read_png(settings.data / variant / i, settings.image_size) for i in shown["image"]])
        maps.append(grad_cam(network, torch.stack([to_channels(p) for p in rows[-1]]), truth))
    heads, sides = [wrapped(label, 18) for label in shown.index], [in_lines(variant) for variant in variants]
    figure = picture_grid(rows, heads, sides, 1.4)
    for axis, heat in zip(figure.axes, np.concatenate(maps), strict=True):
        axis.imshow(heat, cmap="jet", vmin=0, vmax=1, alpha=0.45 * heat)
    return figure
