"""Grad-CAM finds the pixels that a score depends on."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from step2_helpers import SIZE, VARIANTS, make_comparison_for, make_settings, write_pictures

from step2 import explain
from step2.explain import grad_cam
from step2.network import build_network
from step2.pictures import read_png


class Corners(torch.nn.Module):
    """Its first score depends on the upper left corner of 12 x 12 pixels alone, the others on the lower right."""

    def __init__(self):
        super().__init__()
        self._blocks = torch.nn.ModuleList([torch.nn.Conv2d(3, 1, 1, bias=False), torch.nn.AvgPool2d(8)])
        torch.nn.init.ones_(self._blocks[0].weight)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        layer = self._blocks[0](pictures)
        self._blocks[1](layer)  # six cells wide: too few to look at
        first, other = layer[:, 0, :12, :12].mean((1, 2)), layer[:, 0, -12:, -12:].mean((1, 2))
        return torch.stack([first, *[other] * 5], dim=1)


def test_grad_cam_finds_the_pixels_that_the_class_depends_on():
    white = torch.full((2, 1, 48, 48), 255, dtype=torch.uint8)
    expected = np.zeros((2, 48, 48))
    expected[0, :12, :12] = expected[1, -12:, -12:] = 1
    assert np.allclose(grad_cam(Corners(), white, torch.tensor([0, 3])), expected)


@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "colour"])
def test_grad_cam_of_a_real_network_is_a_map_from_0_to_1(channels):
    pictures = torch.randint(256, (3, channels, 96, 96), dtype=torch.uint8)
    network = build_network(make_settings(image_size=96), 0.1, 6)
    maps = grad_cam(network, pictures, torch.tensor([0, 1, 2]))
    assert maps.shape == (3, 96, 96) and maps.min() >= 0 and maps.max() <= 1


def test_heat_maps_are_of_held_out_slices_and_of_their_own_class(tmp_path, monkeypatch):
    write_pictures(tmp_path / "data")
    comparison = make_comparison_for(tmp_path / "data", tmp_path / "r")
    slices, fold_of, shown, asked = comparison.slices.training, comparison.fold_of[0], [], []

    def cam(network, pictures, truth):
        asked.append(truth.tolist())
        return np.zeros((len(pictures), SIZE, SIZE))

    monkeypatch.setattr(explain, "load_last", lambda *given: None)
    monkeypatch.setattr(explain, "grad_cam", cam)
    monkeypatch.setattr(explain, "read_png", lambda path, size: shown.append(path) or read_png(path, size))
    rows = slices.assign(variant=VARIANTS[0], repeat=1, fold=fold_of + 1)
    plt.close(explain.draw_cams(comparison, rows.sort_values("fold", ascending=False)))
    assert asked == [[1, 2, 3, 4, 5]] * 2
    images = slices["image"][fold_of == 0]
    assert len(shown) == 10 and set(shown) <= {tmp_path / "data" / v / i for v in VARIANTS for i in images}
