"""A slice led through the steps: each picture is Step 1's, each title says the step."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import make_ct, plain_head, save_ct
from pydicom.dataset import Dataset

import Step1_Image_Preprocessing as step1
from step2.steps import draw_hu, draw_steps


def drawn(path, roi_window=""):
    """Return {title: picture} of a slice's figure, in order."""
    figure = draw_steps(path, roi_window)
    figure.canvas.draw()
    plt.close(figure)
    return {axis.get_title(): axis.images[0].get_array() for axis in figure.axes if axis.images}


def test_each_step_follows_the_one_before(tmp_path):
    pictures = drawn(save_ct(tmp_path / "a.dcm", plain_head(), WindowCenter=100, WindowWidth=600))
    assert [title.split(":")[0].split(",")[0] for title in pictures] == [
        *("the header's window", "+ brain window", "+ head mask", "+ skull black", "+ crop"),
        *("+ CLAHE", "+ bilateral filter"),
    ]


def test_pictures_are_those_of_the_variants(tmp_path):
    hu = plain_head() + np.random.default_rng(0).integers(-20, 20, (128, 128)).astype(np.int16)
    path = save_ct(tmp_path / "a.dcm", hu, WindowCenter=100, WindowWidth=600)
    pictures = list(drawn(path).values())
    ct = step1.whole_slice(hu.astype(np.float32), pictures[0], step1.BRAIN_WINDOW)
    after = step1.step_runner(ct)
    same = {1: "7_Window", 2: "1_ROI", 3: "10_ROI+noskull", 4: "4_ROI+noblank"}
    same |= {5: "5_ROI+noblank+CLAHE", 6: "6_ROI+noblank+CLAHE+Bilateral"}
    assert pictures[0][64, 64] == step1.window_to_grey(hu.astype(np.float32), (100, 600))[64, 64]
    for place, variant in same.items():
        assert np.array_equal(pictures[place], after(step1.KNOWN_VARIANTS[variant]).image)


def look_up_table() -> Dataset:
    """Return a VOI LUT of two entries."""
    item = Dataset()
    item.add_new("LUTDescriptor", "SS", [2, 0, 8])
    item.add_new("LUTData", "US", [0, 255])
    return item


@pytest.mark.parametrize(
    ("elements", "title"),
    [
        ({"WindowCenter": 36, "WindowWidth": 80}, "the header's window, 36/80 HU"),
        ({"VOILUTSequence": [look_up_table()]}, "the header's look-up table"),
        ({}, "no window in the header: brain window"),
    ],
    ids=["a window", "look-up table", "none"],
)
def test_first_title_says_which_window(tmp_path, elements, title):
    assert next(iter(drawn(save_ct(tmp_path / "a.dcm", plain_head(), **elements)))) == title


@pytest.mark.parametrize(
    ("roi_window", "title", "shown"),
    [
        ("40,80", "+ brain window, 40/80 HU", (40, 80)),
        ("50.5,130", "+ window, 50.5/130 HU", (50.5, 130)),
        ("header", "+ the header's window stays", (100, 600)),
    ],
)
def test_window_is_the_one_that_roi_has(tmp_path, roi_window, title, shown):
    path = save_ct(tmp_path / "a.dcm", plain_head(), WindowCenter=100, WindowWidth=600)
    picture = drawn(path, roi_window)[title]
    assert np.array_equal(picture, step1.window_to_grey(plain_head().astype(np.float32), shown))


def test_slice_without_a_head_is_drawn_too(tmp_path):
    assert len(drawn(save_ct(tmp_path / "a.dcm", np.full((64, 64), -1000, np.int16)))) == 7


def test_file_that_step_1_refuses_is_named_with_the_reason(tmp_path):
    path = save_ct(tmp_path / "a.dcm", plain_head(), Modality="MR")
    with pytest.raises(ValueError, match=r"a\.dcm: Modality \(0008,0060\) is absent or not CT"):
        draw_steps(path)


def test_histogram_counts_the_heads_pixels_alone():
    hu = plain_head(brain_hu=72)
    figure, axis = plt.subplots()
    draw_hu(axis, step1.Scan(hu.astype(np.float32)))
    values, edges, _ = axis.patches[-1].get_data()
    plt.close(figure)
    assert values[np.searchsorted(edges, 70)] == (hu == 72).sum() / 5  # 70 to 75 HU
    assert values.sum() == ((hu == 72).sum() + (hu == 40).sum()) / 5  # brain and scalp; bone lies beyond


def test_a_window_without_width_is_none_where_training_has_switched_off_the_smallest_numbers():
    try:
        torch.set_flush_denormal(True)  # as prepare_process does
        ds = make_ct(np.zeros((4, 4), np.int16), WindowCenter=40, WindowWidth=0, VOILUTFunction="SIGMOID")
        assert step1.header_window(ds) is None
    finally:
        torch.set_flush_denormal(False)
