"""PNGs, augmentation and batches: whole pictures only, chance that repeats, every slice once."""

import threading

import cv2
import numpy as np
import pytest
import torch
from step2_helpers import SIZE, make_settings, png, write_pictures

from step2.pictures import (
    Pictures,
    augment,
    fits_in_memory,
    in_order,
    load,
    pictures_digests,
    read_content,
    read_png,
    shuffled,
    steps_per_epoch,
    to_channels,
    to_picture,
)
from step2.slices import read_slices


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return a small output folder of Step 1."""
    folder = tmp_path_factory.mktemp("data_preprocessing")
    write_pictures(folder, variants=("1_ROI",))
    return folder


# ---------------------------------------- files


@pytest.mark.parametrize("read", [lambda path: read_png(path, 64), read_content], ids=["picture", "content"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "missing", "text"])
def test_damaged_png_is_named_and_refused(tmp_path, damage, read):
    path = tmp_path / "slice.png"
    whole = png(np.arange(64 * 64).reshape(64, 64).astype(np.uint8))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    content = {"truncated": whole[:-20], "flipped": bytes(flipped), "empty": b"", "text": b"<html>"}
    if damage != "missing":
        path.write_bytes(content[damage])
    with pytest.raises(ValueError, match=r"slice\.png is (damaged|missing).* run Step1_Image_Prepro"):
        read(path)


def test_picture_that_is_no_square_is_padded_not_stretched(tmp_path):
    path = tmp_path / "wide.png"
    path.write_bytes(png(np.full((20, 40), 200, np.uint8)))
    picture = read_png(path, 40)
    assert picture.shape == (40, 40)
    assert (picture[10:30] == 200).all() and (picture[:10] == 0).all() and (picture[30:] == 0).all()


def test_pixels_of_smaller_pictures_are_means_and_those_of_larger_ones_blend(tmp_path):
    (tmp_path / "a.png").write_bytes(png(np.tile(np.array([200, 0, 0, 0], np.uint8), (16, 4))))
    assert (read_png(tmp_path / "a.png", 4) == 50).all()
    assert len(np.unique(read_png(tmp_path / "a.png", 40))) > 2


RGB = (250, 20, 3)


def colour_png(rows: int, columns: int) -> bytes:
    """Return a PNG of one colour, RGB."""
    return png(np.full((rows, columns, 3), RGB[::-1], np.uint8))


@pytest.mark.parametrize("size", [8, 4, 16], ids=["as it is", "smaller", "larger"])
def test_colours_come_as_red_green_and_blue(tmp_path, size):
    (tmp_path / "a.png").write_bytes(colour_png(8, 8))
    picture = read_png(tmp_path / "a.png", size)
    assert picture.shape == (size, size, 3) and (picture == RGB).all()


def test_colour_picture_that_is_no_square_is_padded_with_black(tmp_path):
    (tmp_path / "a.png").write_bytes(colour_png(20, 40))
    picture = read_png(tmp_path / "a.png", 40)
    assert (picture[10:30] == RGB).all() and (picture[:10] == 0).all() and (picture[30:] == 0).all()


@pytest.mark.parametrize(
    "content",
    [png(np.full((4, 4), 9, np.uint8)), png(np.full((4, 4), 9 * 257, np.uint16))],
    ids=["8 bits", "16 bits"],
)
def test_grey_is_one_channel(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    assert (read_png(tmp_path / "a.png", 4) == np.full((4, 4), 9)).all()


def test_variant_that_mixes_grey_and_colour_is_refused_with_a_picture_of_each(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png(np.zeros((4, 4), np.uint8)))
    pictures_digests(tmp_path, ["a.png", "b.png"])
    (tmp_path / "c.png").write_bytes(colour_png(4, 4))
    with pytest.raises(
        ValueError, match=r"mixes grey pictures \(a\.png\) and colour \(c\.png\): delete the f"
    ):
        pictures_digests(tmp_path, ["a.png", "b.png"], ["c.png"])


def test_channels_become_the_picture_again():
    grey, colour = np.arange(6, dtype=np.uint8).reshape(2, 3), np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    assert to_channels(grey).shape == (1, 2, 3) and to_channels(colour).shape == (3, 2, 3)
    for picture in (grey, colour):
        assert np.array_equal(to_picture(to_channels(picture)), picture)


def test_digest_follows_names_and_bytes(tmp_path):
    for name, grey in (("a.png", 1), ("b.png", 1), ("c.png", 2)):
        (tmp_path / name).write_bytes(png(np.full((4, 4), grey, np.uint8)))
    names = (["a.png"], ["b.png"], ["c.png"], ["a.png", "b.png"], ["b.png", "a.png"])
    assert len(set(pictures_digests(tmp_path, *names))) == 5
    assert pictures_digests(tmp_path, ["a.png"]) == pictures_digests(tmp_path, ["a.png"])


# ---------------------------------------- augmentation


def plain_recipe(**given):
    """Return a recipe without any augmentation but for what is given."""
    return make_settings(**{"rotation": 0.0, "shift": 0.0, "zoom": 0.0, "flips": ""} | given)


def some_picture() -> np.ndarray:
    """Return grey noise without any black."""
    return np.random.default_rng(0).integers(1, 255, (31, 31), np.uint8)


def test_augmentation_of_nothing_changes_nothing():
    assert np.array_equal(augment(some_picture(), np.random.default_rng(0), plain_recipe()), some_picture())


def test_gaps_of_a_turned_picture_are_black():
    white, recipe = np.full((31, 31), 255, np.uint8), plain_recipe(rotation=45.0)
    turned = [augment(white, np.random.default_rng(seed), recipe) for seed in range(9)]
    assert any(t[0, 0] == 0 for t in turned) and all(t[15, 15] == 255 for t in turned)


def places(**given) -> np.ndarray:
    """Return where a dot 10 px right of the middle goes, (x, y) from the middle, by 40 chances."""
    picture, recipe = np.zeros((41, 41), np.uint8), plain_recipe(**given)
    picture[19:22, 29:32] = 200
    found = [augment(picture, np.random.default_rng(seed), recipe) for seed in range(40)]
    return np.array([np.argwhere(p)[:, ::-1].T @ p[p > 0] / p.sum() - 20.0 for p in found])


def test_pictures_are_turned_zoomed_and_shifted_both_ways_about_their_middle():
    x, y = places(rotation=20.0).T
    angles = np.degrees(np.arctan2(y, x))
    assert -20.5 < angles.min() < -10 and 10 < angles.max() < 20.5
    assert np.hypot(x, y) == pytest.approx(10, abs=0.2)
    x, y = places(zoom=0.2).T
    assert 7.9 < x.min() < 9 and 11 < x.max() < 12.1 and y == pytest.approx(0, abs=0.1)
    shifts = places(shift=4.0) - (10, 0)
    assert abs(shifts).max() < 4.1 and (shifts.min(0) < -2).all() and (shifts.max(0) > 2).all()
    assert abs(np.corrcoef(shifts.T)[0, 1]) < 0.5


@pytest.mark.parametrize(("flips", "expected"), [("", 1), ("h", 2), ("v", 2), ("hv", 4)])
def test_pictures_are_flipped_in_all_ways_that_are_allowed(flips, expected):
    picture, recipe = some_picture(), plain_recipe(flips=flips)
    found = {augment(picture, np.random.default_rng(seed), recipe).tobytes() for seed in range(20)}
    ways = {"": picture, "h": picture[:, ::-1], "v": picture[::-1], "hv": picture[::-1, ::-1]}
    allowed = {np.ascontiguousarray(way).tobytes() for name, way in ways.items() if set(name) <= set(flips)}
    assert found == allowed and len(found) == expected


def test_colours_are_augmented_as_grey_is():
    recipe, colours = (
        plain_recipe(rotation=20.0, shift=3.0, zoom=0.1, flips="hv"),
        [some_picture() // k for k in (1, 2, 3)],
    )
    for seed in range(5):
        found = augment(np.dstack(colours), np.random.default_rng(seed), recipe)
        expected = [augment(colour, np.random.default_rng(seed), recipe) for colour in colours]
        assert np.array_equal(found, np.dstack(expected))


def test_augmentation_follows_from_seed_epoch_and_slice_alone(data):
    recipe, images = make_settings(profile="full", image_size=SIZE), ["TrainingData/healthy/0.0.png"] * 2
    first, second = (Pictures(data / "1_ROI", images, recipe, seed=1) for _ in range(2))
    here = first[3, 0][0]
    assert torch.equal(here, second[3, 0][0]) and torch.equal(first[None, 0][0], first[None, 1][0])
    for epoch, index in ((4, 0), (3, 1), (None, 0)):
        assert not torch.equal(here, first[epoch, index][0])
    assert not torch.equal(here, Pictures(data / "1_ROI", images, recipe, seed=2)[3, 0][0])


# ---------------------------------------- batches and loaders


def test_batches_have_every_slice_once():
    positions = np.arange(100, 160)
    listed = shuffled(positions, 16, seed=9, epoch=1)
    assert [len(batch) for batch in listed] == [15, 15, 15, 15]
    assert sorted(index for batch in listed for epoch, index in batch if epoch == 1) == list(positions)


def test_batches_repeat_but_differ_between_epochs_and_seeds():
    orders = []
    for seed, epoch in ((9, 0), (9, 0), (9, 1), (8, 0)):
        orders.append([index for batch in shuffled(np.arange(60), 16, seed, epoch) for _, index in batch])
    assert orders[0] == orders[1]
    assert orders[0] != orders[2] and orders[0] != orders[3]


def test_incomplete_last_of_many_batches_is_dropped():
    many = shuffled(np.arange(1003), 8, seed=9, epoch=0)
    assert len(many) == 125 and {len(batch) for batch in many} == {8}


@pytest.mark.parametrize(("count", "steps"), [(1, 1), (8, 1), (9, 2), (159, 20), (160, 20), (167, 20)])
def test_steps_of_an_epoch(count, steps):
    assert steps_per_epoch(count, 8) == steps


def test_batches_in_order_are_not_augmented():
    assert in_order(np.array([5, 3, 4]), 2) == [[(None, 5), (None, 3)], [(None, 4)]]


def test_cached_and_streamed_pictures_are_the_same_with_any_threads(data):
    images = list(read_slices(data).training["image"])
    pictures = [Pictures(data / "1_ROI", images, make_settings(image_size=40), 5, c) for c in (True, False)]
    batches = shuffled(np.arange(48), 8, 5, epoch=0)
    ways = [load(p, batches, threads) for p in pictures for threads in (0, 1, 3)]
    for (first, i), *others in zip(*ways, strict=True):
        assert all(torch.equal(first, second) and torch.equal(i, j) for second, j in others)


def test_damaged_picture_is_named_whichever_thread_loads_it(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    pictures = Pictures(tmp_path, ["a.png"], make_settings())
    with pytest.raises(ValueError, match=r"a\.png is damaged: delete it"):
        list(load(pictures, [[(None, 0)]] * 5, threads=2))


def test_threads_end_with_a_loop_that_is_left_early(tmp_path):
    (tmp_path / "a.png").write_bytes(png(np.zeros((SIZE, SIZE), np.uint8)))
    before, batches = (
        threading.active_count(),
        load(Pictures(tmp_path, ["a.png"], make_settings()), [[(None, 0)]] * 50, threads=2),
    )
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("cached", [True, False])
def test_batches_of_a_colour_variant_have_three_channels(tmp_path, cached):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(colour_png(SIZE, SIZE))
    pictures = Pictures(tmp_path, ["a.png", "b.png"], make_settings(), cached=cached)
    ((batch, index),) = load(pictures, [[(None, 1), (None, 0)]])
    assert batch.shape == (2, 3, SIZE, SIZE) and batch.dtype == torch.uint8 and index.tolist() == [1, 0]
    assert batch[0, :, 5, 7].tolist() == list(RGB)


def test_colours_take_three_times_the_memory(tmp_path, monkeypatch):
    (tmp_path / "grey.png").write_bytes(png(np.zeros((SIZE, SIZE), np.uint8)))
    (tmp_path / "colour.png").write_bytes(colour_png(SIZE, SIZE))
    memory = type(
        "Memory", (), {"available": 2 * 4 * 2 * 10 * SIZE**2}
    )  # a quarter of it, for each of two processes: twice ten grey pictures
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    settings = make_settings(processes=2)
    assert [fits_in_memory(settings, tmp_path / "grey.png", n) for n in (20, 21)] == [True, False]
    assert [fits_in_memory(settings, tmp_path / "colour.png", n) for n in (6, 7)] == [True, False]


def test_loading_draws_nothing_from_the_generator_of_the_training(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((SIZE, SIZE), np.uint8))
    pictures = Pictures(tmp_path, ["a.png"], make_settings())
    before = torch.get_rng_state()
    list(load(pictures, [[(None, 0)]]))
    assert torch.equal(before, torch.get_rng_state())
