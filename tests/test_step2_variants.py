"""Which pairs of variants differ by one step alone: expectations written by hand."""

import pytest
from step2_helpers import ALL_VARIANTS

from step2 import variants
from step2.variants import added_steps, step_pairs

ZERO, ROI, CLAHE, BILATERAL, NOBLANK, NOBLANK_CLAHE, NOBLANK_BILATERAL = ALL_VARIANTS
EXTRA = ("7_Window", "8_Mask", "9_ROI+crop", "10_ROI+noskull", "11_ROI+windows")
WINDOW, MASK, CROP, NOSKULL, WINDOWS = EXTRA
OF_THE_SEVEN = {
    "ROI (mask and window)": [(ROI, ZERO)],
    "CLAHE": [(CLAHE, ROI), (NOBLANK_CLAHE, NOBLANK)],
    "bilateral": [(BILATERAL, CLAHE), (NOBLANK_BILATERAL, NOBLANK_CLAHE)],
    "noblank (skull black and crop)": [
        *((NOBLANK, ROI), (NOBLANK_CLAHE, CLAHE), (NOBLANK_BILATERAL, BILATERAL)),
    ],
}


def test_pairs_of_the_seven():
    assert step_pairs(ALL_VARIANTS) == OF_THE_SEVEN


def test_pairs_of_all_variants():
    assert step_pairs([*ALL_VARIANTS, *EXTRA]) == OF_THE_SEVEN | {
        "window": [(ROI, MASK), (WINDOW, ZERO)],
        "mask": [(ROI, WINDOW), (MASK, ZERO)],
        "crop": [(NOBLANK, NOSKULL), (CROP, ROI)],
        "noskull": [(NOBLANK, CROP), (NOSKULL, ROI)],
        "three windows instead of one": [(WINDOWS, ROI)],
    }


def test_order_in_which_variants_are_named_does_not_matter():
    assert step_pairs([*EXTRA, *ALL_VARIANTS][::-1]) == step_pairs([*ALL_VARIANTS, *EXTRA])


def test_variant_of_the_users_own_pairs_like_the_others(monkeypatch):
    mine = "7_ROI+Bilateral"
    table = {**variants.KNOWN_VARIANTS, mine: ("roi", "bilateral")}
    monkeypatch.setattr(variants, "KNOWN_VARIANTS", table)
    assert step_pairs([ZERO, ROI, CLAHE, BILATERAL, mine]) == {
        "ROI (mask and window)": [(ROI, ZERO)],
        "CLAHE": [(CLAHE, ROI), (BILATERAL, mine)],
        "bilateral": [(BILATERAL, CLAHE), (mine, ROI)],
    }


def test_folder_that_step_1_does_not_know_pairs_with_none():
    assert step_pairs([ZERO, "8_Other"]) == {}


@pytest.mark.parametrize(
    ("more", "fewer", "added"),
    [
        ("abc", "ab", "c"),
        ("abc", "bc", "a"),
        ("abc", "ac", "b"),
        ("abcd", "ad", "bc"),
        ("abc", "", "abc"),
        ("aab", "ab", "a"),
        ("abcd", "ac", ""),  # two steps apart from each other
        ("abc", "ba", ""),  # another order
        ("ab", "ab", ""),
        ("ab", "abc", ""),
        ("ab", "ac", ""),
    ],
)
def test_added_steps_are_those_in_a_row_that_make_the_difference(more, fewer, added):
    assert added_steps(tuple(more), tuple(fewer)) == tuple(added)
