"""A variant in colour beside grey ones: trained, predicted and drawn like them."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import plain_head, save_ct
from step2_helpers import SIZE, make_comparison_for, make_settings, write_pictures

from step2 import costs, engine, figures
from step2.costs import cost_table, png_kilobytes, raw_slices, slice_milliseconds, training_minutes
from step2.explain import draw_cams
from step2.runs import Comparison, collect_history, collect_predictions
from step2.slices import read_slices

GREY, COLOUR = "1_ROI", "11_ROI+windows"


def write_colours(data: Path, tint: int) -> None:
    """Write the pictures of GREY as RGB into COLOUR: red and green are its grey, blue is less by tint."""
    for path in (data / GREY).rglob("*.png"):
        grey = np.asarray(cv2.imread(str(path), cv2.IMREAD_UNCHANGED))
        target = data / COLOUR / path.relative_to(data / GREY)
        target.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(target), np.dstack([grey - np.minimum(grey, tint), grey, grey]))  # blue, green, red


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Comparison, pd.DataFrame]:
    """Return a comparison of GREY and, without tint, COLOUR, trained, and its predictions."""
    folder = tmp_path_factory.mktemp("colour")
    write_pictures(folder / "data", variants=(GREY,))
    write_colours(folder / "data", tint=0)
    comparison = make_comparison_for(folder / "data", folder / "results", (GREY, COLOUR), folds=1)
    engine.train_all(comparison)
    return comparison, collect_predictions(comparison)


def test_grey_written_as_colour_trains_to_the_same_predictions(trained):
    _, table = trained
    grey, colour = (table[table["variant"] == v].drop(columns="variant") for v in (GREY, COLOUR))
    pd.testing.assert_frame_equal(grey.reset_index(drop=True), colour.reset_index(drop=True))


def test_costs_of_a_colour_variant(trained, tmp_path):
    comparison, table = trained
    save_ct(tmp_path / "TrainingData" / "healthy" / "deep" / "1.2.3", plain_head())
    training = comparison.slices.training.assign(source="")
    given = (training, table, collect_history(comparison))
    assert cost_table(comparison.settings.data, tmp_path, *given).shape == (2, 2)  # no slice is there
    training.loc[1, "source"] = "TrainingData/healthy/deep/1.2.3"
    costs = cost_table(comparison.settings.data, tmp_path, *given)
    assert costs.shape == (2, 3) and (costs > 0).all(axis=None)


def test_grad_cam_of_a_colour_variant_is_drawn(trained):
    figure = draw_cams(*trained)
    shapes = {axis.images[0].get_array().shape for axis in figure.axes}
    plt.close(figure)
    assert shapes == {(SIZE, SIZE), (SIZE, SIZE, 3)}


@pytest.fixture(scope="module")
def tinted(tmp_path_factory) -> Path:
    """Return an output folder of Step 1 with GREY and, with a tint, COLOUR."""
    folder = tmp_path_factory.mktemp("tinted")
    write_pictures(folder, variants=(GREY,))
    write_colours(folder, tint=40)
    return folder


def mistakes(slices: pd.DataFrame) -> pd.DataFrame:
    """Return two slices as mistakes of COLOUR."""
    return slices.head(2).assign(variant=COLOUR, predicted="epidural", confidence=0.9)


@pytest.mark.parametrize(
    "draw",
    [
        lambda data, slices: figures.draw_variants(data, [GREY, COLOUR], slices, SIZE),
        lambda data, slices: figures.draw_augmented(make_settings(data=data), COLOUR, slices, 1),
        lambda data, slices: figures.draw_mistakes(mistakes(slices), data, SIZE),
    ],
    ids=["variants", "augmented", "mistakes"],
)
def test_figures_show_the_colours(tinted, draw):
    figure = draw(tinted, read_slices(tinted).training)
    figure.canvas.draw()
    shown = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    plt.close(figure)
    colours = [picture for picture in shown if picture.ndim == 3]
    assert colours and all(picture.shape == (SIZE, SIZE, 3) for picture in colours)
    bright = np.concatenate(
        [picture[picture[..., 0] > 245] for picture in colours]
    )  # the square of the class
    assert len(bright) and (bright[:, 0] - bright[:, 2] >= 35).all()  # red first, blue less by the tint


@pytest.mark.parametrize("image", ["TrainingData/subdural/0.1.png", "TestingData/healthy.png"])
def test_comparison_refuses_a_variant_that_mixes_grey_and_colour(tinted, tmp_path, image):
    data = tmp_path / "data"
    shutil.copytree(tinted, data)
    shutil.copy(data / GREY / image, data / COLOUR / image)
    with pytest.raises(ValueError, match=rf"11_ROI\+windows mixes grey pictures \({image}\) and colour"):
        make_comparison_for(data, tmp_path / "results", (GREY, COLOUR), folds=1)


def test_time_of_a_slice_goes_from_its_file_to_the_pngs_bytes_for_each_variant(tmp_path, monkeypatch):
    clock, step1 = [0.0], costs.step1
    monkeypatch.setattr(costs, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def slow(seconds, call):
        def slower(*given):
            clock[0] += seconds
            return call(*given)

        return slower

    for name, seconds in (("read_dicom", 4.0), ("decode", 2.0), ("whole_slice", 1.0), ("encode_png", 0.5)):
        monkeypatch.setattr(step1, name, slow(seconds, getattr(step1, name)))
    path = save_ct(tmp_path / "1.2.3", plain_head())
    found = slice_milliseconds(path, ["0_Dicom2PNG", "1_ROI"])
    assert found == {"0_Dicom2PNG": 7500, "1_ROI": 7500}


def test_slices_are_timed_by_turns_of_their_classes(tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "TIMED_SLICES", 4)
    training = pd.DataFrame({"label": list("aaabb"), "source": ["a0", "a1", "a2", "b0", "b1"]})
    assert raw_slices(tmp_path, training) == [tmp_path / name for name in ("a0", "b0", "a1", "b1")]


def test_costs_by_hand(tmp_path):
    rows = [("a", 1, 1, False, 60.0), ("a", 1, 1, False, 60.0)]
    rows += [("a", 1, 2, False, 240.0), ("a", 1, 1, True, 900.0)]
    history = pd.DataFrame(rows, columns=["variant", "repeat", "fold", "control", "seconds"])
    assert training_minutes(history).to_dict() == {"a": 3.0}
    (tmp_path / "a").mkdir()
    for name, size in (("x.png", 2000), ("y.png", 4000)):
        (tmp_path / "a" / name).write_bytes(bytes(size))
    table = pd.DataFrame({"variant": "a", "image": ["x.png", "y.png"]})
    assert png_kilobytes(tmp_path, table).to_dict() == {"a": 3.0}
