"""Step 1's pixel arithmetic, against hand-computed arrays and plain formulas of the DICOM standard."""

import math
import warnings

import cv2
import numpy as np
import pytest
from conftest import disc, make_ct, plain_head
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

import Step1_Image_Preprocessing as step1


def hu_and_grey(ds):
    hu, _ = step1.hounsfield(step1.decode(ds), ds)
    return hu, step1.dicom2png(hu, ds)[0]


def ct_slice(hu, roi_window=(40.0, 80.0)):
    """Return a CTSlice as it is after dicom2png with a header window of 50/100."""
    hu = hu.astype(np.float32)
    return step1.whole_slice(hu, step1.window_to_grey(hu, (50, 100)), roi_window)


def run_steps(hu, *names, roi_window=(40.0, 80.0)):
    return step1.step_runner(ct_slice(hu, roi_window))(names)


def voi_oracle(x, center, width, function):
    """PS3.3 C.11.2.1.2.1 and C.11.2.1.3, value by value, for an output range of 0 to 255."""
    if function == "SIGMOID":
        return 255 / (1 + math.exp(min(-4 * (x - center) / width, 700)))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    if x <= center - width / 2:
        return 0
    if x > center + width / 2:
        return 255
    return ((x - center) / width + 0.5) * 255


# ---------------------------------------- stored values -> HU


def test_rescale_gives_hu_for_unsigned_values():
    hu, _ = hu_and_grey(make_ct(np.array([[0, 1024, 1064]], np.uint16), RescaleIntercept=-1024))
    assert hu.tolist() == [[-1024, 0, 40]]


def test_rescale_gives_hu_for_signed_values_with_a_slope():
    hu, _ = hu_and_grey(make_ct(np.array([[-500, 0, 20]], np.int16), RescaleSlope=2, RescaleIntercept=3))
    assert hu.tolist() == [[-997, 3, 43]]


def test_padding_becomes_air():
    ct = make_ct(np.array([[-2000, 0, 40]], np.int16), PixelPaddingValue=-2000)
    assert hu_and_grey(ct)[0].tolist() == [[-1000, 0, 40]]


@pytest.mark.parametrize(("dtype", "stored", "written"), [("i2", -2000, 63536), ("u2", 63536, -2000)])
def test_padding_with_the_wrong_sign_is_padding_still(dtype, stored, written):
    ct = make_ct(np.array([[stored, 0, 40]]).astype(dtype))
    ct.add_new("PixelPaddingValue", "US" if written > 0 else "SS", written)
    assert hu_and_grey(ct)[0].tolist() == [[-1000, 0, 40]]


def test_padding_that_8_bits_cannot_hold_is_none():
    """It was left over from the 16 bits that the slice once had."""
    stored = np.array([[48, 0, 40]], np.uint8)
    ct = make_ct(stored, BitsAllocated=8, BitsStored=8, HighBit=7)
    ct.add_new("PixelPaddingValue", "US", 63536)
    assert step1.hounsfield(stored, ct)[0].tolist() == [[48, 0, 40]]


@pytest.mark.parametrize("ends", [(-2000, -1900), (-1900, -2000)])
def test_padding_range_becomes_air(ends):
    ct = make_ct(np.array([[-2000, -1900, -1800, 5]], np.int16))
    ct.PixelPaddingValue, ct.PixelPaddingRangeLimit = ends
    assert hu_and_grey(ct)[0].tolist() == [[-1000, -1000, -1800, 5]]


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless], ids=["plain", "RLE"])
def test_padding_is_looked_for_before_bits_above_bits_stored_are_masked(syntax):
    """63536 in 12 bits is 2096."""
    stored = np.array([[63536, 2096, 40, 0xF000 | 1064]], np.uint16)
    ct = make_ct(stored, BitsStored=12, HighBit=11, RescaleIntercept=-1024, PixelPaddingValue=63536)
    if syntax == RLELossless:
        ct.compress(syntax)
    assert step1.hounsfield(step1.decode(ct), ct)[0].tolist() == [[-1000, 1072, -984, 40]]


def test_padding_is_known_where_the_sign_does_not_reach_into_unused_bits():
    """-2000 in 12 bits, and none above, is 2096."""
    ct = make_ct(np.array([[2096, 40]], np.int16), BitsStored=12, HighBit=11, PixelPaddingValue=-2000)
    assert step1.hounsfield(step1.decode(ct), ct)[0].tolist() == [[-1000, 40]]


@pytest.mark.parametrize("bits", [12, 16])
def test_lowest_signed_value_is_padding_also_without_its_tag(bits):
    ct = make_ct(np.array([[-32768, 40]], np.int16), BitsStored=bits, HighBit=bits - 1)
    assert step1.hounsfield(step1.decode(ct), ct)[0].tolist() == [[-1000, 40]]


@pytest.mark.parametrize(("intercept", "padding", "warned"), [(-1024, 1, 0), (0, 1, 1), (0, 2, 0)])
def test_slice_without_air_is_warned_of_unless_it_was_removed(intercept, padding, warned):
    """0 is padding, whose place says nothing of the intercept."""
    stored = np.array([[*[0, 0][:padding], 24, 1064, 1064, 1064]], np.uint16)
    ct = make_ct(stored, RescaleIntercept=intercept, PixelPaddingValue=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step1.hounsfield(step1.decode(ct), ct)
    assert len(caught) == warned and all("RescaleIntercept" in str(w.message) for w in caught)


def test_slice_of_padding_alone_is_not_warned_of():
    ct = make_ct(np.array([[0, 0]], np.uint16), PixelPaddingValue=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert step1.hounsfield(step1.decode(ct), ct)[0].tolist() == [[-1000, -1000]]


def test_wrapped_12bit_values_are_repaired_and_reported():
    true_hu = np.array([[-1000, -1, 0, 40, 3000]])
    stored = np.where(true_hu < 0, true_hu + 4096, true_hu).astype(np.uint16)
    ct = make_ct(stored, BitsStored=12, HighBit=11)
    hu, repaired = step1.hounsfield(step1.decode(ct), ct)
    assert repaired
    assert hu.tolist() == true_hu.tolist()


def test_12bit_values_with_a_usual_intercept_are_left_alone():
    ct = make_ct(np.array([[0, 3200]], np.uint16), BitsStored=12, HighBit=11, RescaleIntercept=-1024)
    hu, repaired = step1.hounsfield(step1.decode(ct), ct)
    assert not repaired
    assert hu.tolist() == [[-1024, 2176]]


@pytest.mark.parametrize(("slope", "intercept", "hu"), [(0.05, 0, [0, 40, 200]), (1, -50, [-50, 750, 2000])])
def test_12bit_values_keep_their_slope_and_intercept_where_none_wrapped(slope, intercept, hu):
    stored = np.array([[(value - intercept) / slope for value in hu]]).round().astype(np.uint16)
    ct = make_ct(stored, BitsStored=12, HighBit=11, RescaleSlope=slope, RescaleIntercept=intercept)
    found, repaired = step1.hounsfield(stored, ct)
    assert not repaired and found.tolist() == [hu]


@pytest.mark.parametrize("value", [-12_000, 25_000])
def test_values_no_ct_has_are_refused_in_more_than_1_percent_of_the_pixels(value):
    stored = np.zeros((40, 50), np.int16)
    stored.flat[:20] = value
    step1.hounsfield(stored, make_ct(stored))
    stored.flat[:21] = value
    with pytest.raises(step1.UnsuitableFile, match="20,000 HU"):
        step1.hounsfield(stored, make_ct(stored))


# ---------------------------------------- HU -> grey


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("center", "width"), [(40, 80), (36.5, 81.25), (100, 600), (40, 1.5)])
def test_window_follows_the_standards_formula(function, center, width):
    hu = np.arange(-300, 500, dtype=np.int16).reshape(8, 100)
    ct = make_ct(hu, WindowCenter=center, WindowWidth=width, VOILUTFunction=function)
    expected = [[round(voi_oracle(int(x), center, width, function)) for x in row] for row in hu]
    assert hu_and_grey(ct)[1].tolist() == expected


def test_brain_window_by_hand():
    # LINEAR 40/80: black up to 39.5 - 39.5 = 0 HU, white above 79 HU, 255 grey levels over 79 HU
    grey = step1.window_to_grey(np.array([[-5, 0, 1, 40, 79, 80]], np.float32), (40, 80))
    assert grey.tolist() == [[0, 0, round(255 / 79), round(40 * 255 / 79), 255, 255]]


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("values", [[-10.25, 0.5, 39.75, 79.5], [-40_000, 20, 40_000], [-32_768, 60, 32_767]])
def test_fractions_of_hu_and_huge_values_follow_the_formula_too(values, function):
    grey = step1.window_to_grey(np.array([values], np.float32), (40, 80), function)
    with np.errstate(over="ignore"):
        assert grey.tolist() == [[round(voi_oracle(np.float64(x), 40, 80, function)) for x in values]]


def test_a_grey_level_means_the_same_hu_in_every_slice():
    dark = make_ct(np.array([[0, 40]], np.int16), WindowCenter=40, WindowWidth=80)
    bright = make_ct(np.array([[40, 3000]], np.int16), WindowCenter=40, WindowWidth=80)
    assert hu_and_grey(dark)[1][0, 1] == hu_and_grey(bright)[1][0, 0]


def test_signed_and_unsigned_twins_give_the_same_picture():
    hu = np.arange(-100, 156).reshape(16, 16)
    signed = make_ct(hu.astype(np.int16), WindowCenter=40, WindowWidth=80)
    unsigned = make_ct((hu + 1024).astype(np.uint16), RescaleIntercept=-1024, WindowCenter=40, WindowWidth=80)
    assert np.array_equal(hu_and_grey(signed)[1], hu_and_grey(unsigned)[1])


def test_first_of_several_windows_counts():
    stored = np.array([[0, 40, 80]], np.int16)
    both = make_ct(stored, WindowCenter=[40, 600, 7], WindowWidth=[80, 3000])
    one = make_ct(stored, WindowCenter=40, WindowWidth=80)
    assert hu_and_grey(both)[1].tolist() == hu_and_grey(one)[1].tolist()


@pytest.mark.parametrize(
    "window",
    [
        {},
        {"WindowCenter": 40},
        {"WindowCenter": "", "WindowWidth": ""},
        {"WindowCenter": 600, "WindowWidth": 0.5},
        {"WindowCenter": 600, "WindowWidth": 0, "VOILUTFunction": "SIGMOID"},
        {"WindowCenter": 600, "WindowWidth": 80, "VOILUTFunction": "CUBIC"},
    ],
    ids=["absent", "no width", "empty", "width below 1", "sigmoid width 0", "unknown function"],
)
def test_unusable_window_becomes_the_brain_window_and_says_so(window):
    ds = make_ct(np.array([[0, 20, 40]], np.int16), **window)
    grey, fields = step1.dicom2png(np.array([[0, 20, 40]], np.float32), ds)
    assert fields == {"window_center": 40, "window_width": 80, "window_source": "default"}
    assert grey.tolist() == [[0, round(20 * 255 / 79), round(40 * 255 / 79)]]


@pytest.mark.parametrize("text", [b"forty ", b"nan", b"inf "])
def test_window_that_is_no_finite_number_becomes_the_brain_window(text):
    ds = make_ct(np.zeros((1, 1), np.int16))
    ds.WindowWidth = 80
    ds[0x0028, 0x1050] = RawDataElement(Tag(0x0028, 0x1050), "DS", len(text), text, 0, False, True)
    assert step1.header_window(ds) is None


def test_window_after_an_empty_one_counts():
    ds = make_ct(np.zeros((1, 1), np.int16), WindowWidth=[100, 4000])
    ds[0x0028, 0x1050] = RawDataElement(Tag(0x0028, 0x1050), "DS", 5, b"\\600 ", 0, False, True)
    assert step1.header_window(ds) == (600, 4000)


def test_voi_lut_goes_before_the_window():
    item = Dataset()
    item.add_new(0x00283002, "SS", [4, -1, 8])  # four entries, the first for -1 HU, 8 bits
    item.add_new(0x00283006, "US", [10, 20, 30, 250])
    ct = make_ct(np.array([[-50, -1, 0, 1, 2, 90]], np.int16), WindowCenter=40, WindowWidth=80)
    ct.VOILUTSequence = Sequence([item])
    hu = np.array([[-50, -1, 0, 1, 2, 90]], np.float32)
    grey, fields = step1.dicom2png(hu, ct)
    assert grey.tolist() == [[10, 10, 20, 30, 250, 250]]
    assert fields == {"window_source": "header"}


def test_voi_lut_whose_first_value_lost_its_sign_is_the_same():
    item = Dataset()
    item.add_new(0x00283002, "US", [4, 65535, 8])
    item.add_new(0x00283006, "US", [10, 20, 30, 250])
    ct = make_ct(np.array([[-50, -1, 0, 1, 2, 90]], np.int16), VOILUTSequence=Sequence([item]))
    assert hu_and_grey(ct)[1].tolist() == [[10, 10, 20, 30, 250, 250]]


def test_voi_lut_of_12_bits_is_shown_in_8():
    item = Dataset()
    item.add_new(0x00283002, "SS", [3, 0, 12])
    item.add_new(0x00283006, "US", [0, 2048, 4095])
    for inverted, grey in (("MONOCHROME2", [0, 0, 128, 255, 255]), ("MONOCHROME1", [255, 255, 127, 0, 0])):
        ct = make_ct(np.array([[-5, 0, 1, 2, 9]], np.int16), PhotometricInterpretation=inverted)
        ct.VOILUTSequence = Sequence([item])
        assert hu_and_grey(ct)[1].tolist() == [grey]


@pytest.mark.filterwarnings("error")
def test_linear_window_of_width_1_is_black_up_to_its_centre_and_white_above():
    grey = step1.window_to_grey(np.array([[39, 39.5, 40]], np.float32), (40, 1))
    assert grey.tolist() == [[0, 0, 255]]  # PS3.3 C.11.2.1.2.1: black at and below centre - 0.5


def test_fractional_hu_are_windowed_as_they_are():
    hu = np.array([[0.0, 0.5, 39.5, 78.5, 79.0]], np.float32)
    assert np.array_equal(step1.window_to_grey(hu, (40, 80)), np.rint(np.clip(hu / 79, 0, 1) * 255))


def test_monochrome1_shows_the_lowest_value_white():
    window = {"WindowCenter": 40, "WindowWidth": 80}
    stored = np.arange(-20, 100, dtype=np.int16).reshape(10, 12)
    usual = hu_and_grey(make_ct(stored, **window))[1]
    inverted = hu_and_grey(make_ct(stored, PhotometricInterpretation="MONOCHROME1", **window))[1]
    assert np.array_equal(inverted, 255 - usual)


# ---------------------------------------- masks


def test_head_mask_is_the_disc_and_not_the_table():
    hu = plain_head()
    head = hu > -1000
    hu[115:118, 10:120] = 300  # a table
    assert np.array_equal(step1.head_mask(hu.astype(np.float32)), head)


def test_head_mask_cuts_a_holder_wall_that_touches_the_skin():
    hu = plain_head(512)
    head = hu > -1000
    wall = np.zeros(hu.shape, bool)
    wall[150:400, 436:442] = True  # x = 435 is the head's rightmost pixel
    hu[wall] = 300
    mask = step1.head_mask(hu.astype(np.float32))
    assert (mask & wall).sum() < 0.1 * wall.sum()  # a little where it touches
    assert (head & ~mask).sum() < 0.005 * head.sum()


def test_head_mask_cuts_the_soft_edge_of_a_holder_wall_that_touches_the_skin():
    """Of two pixels, as partial volume makes it."""
    hu = plain_head(512)
    edge, wall = np.zeros((2, 512, 512), bool)
    wall[152:398, 438:444] = True
    edge[150:400, 436:446] = True  # x = 435 is the head's rightmost pixel
    edge &= ~wall
    hu[edge], hu[wall] = 0, 300
    assert step1.head_mask(hu.astype(np.float32))[edge].mean() < 0.1


def test_head_mask_keeps_a_long_wall_as_dense_as_bone():
    """The edge of an open jaw or of a sinus: long, partly outside, but above 600 HU somewhere."""
    hu = plain_head(512)
    wall = np.zeros(hu.shape, bool)
    wall[200:260, 436:440] = True
    hu[wall] = 800
    assert step1.head_mask(hu.astype(np.float32))[wall].mean() > 0.9


def test_head_mask_keeps_a_childs_skull_that_reaches_the_skin():
    """Bone below 600 HU throughout, and a little of it outside."""
    hu = plain_head(512)
    head = hu > -1000
    hu[hu == 900] = 500
    hu[60:130, 253:259] = 500
    assert step1.head_mask(hu.astype(np.float32))[head].all()


def test_head_mask_cuts_a_cushion_that_goes_on_and_on():
    hu = plain_head(512)
    cushion = np.zeros(hu.shape, bool)
    cushion[430:436, 20:490] = True  # soft, thin, and touches the skin below
    hu[cushion & (hu < 0)] = 0
    far = cushion & ~disc(hu.shape, (256, 256), 0.4 * 512)
    assert not step1.head_mask(hu.astype(np.float32))[far].any()


def test_head_mask_keeps_a_soft_short_ear():
    hu = plain_head()
    hu[60:64, 108:118] = 20
    mask = step1.head_mask(hu.astype(np.float32))
    assert mask[60:64, 108:118].all()


def test_head_mask_keeps_air_inside_the_head():
    hu = plain_head()
    hu[disc(hu.shape, (64, 50), 6)] = -1000  # a sinus
    assert step1.head_mask(hu.astype(np.float32))[50, 64]


def test_head_mask_keeps_a_thin_hard_wall_in_a_nostril():
    """Below 600 HU and long, but in a notch that is narrower than twice CLOSE_RADIUS."""
    hu = plain_head(512)
    hu[70:150, 240:272] = -1000  # open at the skin
    wall = np.zeros(hu.shape, bool)
    wall[82:150, 254:258] = True
    hu[wall] = 300
    assert step1.head_mask(hu.astype(np.float32))[wall].mean() > 0.9


def parted_head(gap=8):
    """Return HU of a head that air cells part in two bodies, with a gap in the thin bone across, and the head."""
    hu = plain_head(512).astype(np.float32)
    head = hu > -1000
    cells = disc(hu.shape, (256, 256), 0.345 * 512)  # the skin, 2 px, goes round
    cells[:, :280] = cells[:, 340:] = False
    hu[cells] = -1000
    hu[250:254, 260:360] = 700  # thin bone across the air cells
    hu[250:254, 306 : 306 + gap] = -1000
    return hu, head


def test_head_mask_keeps_the_part_beyond_air_cells_that_bone_joins():
    hu, head = parted_head()
    assert np.array_equal(step1.head_mask(hu), head)


def test_head_mask_keeps_a_nose_that_goes_far_along_bone():
    hu = plain_head(512)
    nose = np.zeros(hu.shape, bool)
    nose[5:120, 248:262] = True
    hu[nose & (hu == -1000)] = 30
    hu[10:120, 253:257] = 700
    assert step1.head_mask(hu.astype(np.float32))[nose].all()


def test_head_mask_keeps_the_thick_tip_of_a_nose_that_no_bone_joins():
    hu = plain_head(512)
    nose = np.zeros(hu.shape, bool)
    nose[60:80, 251:261] = nose[30:60, 241:271] = True  # thin where it meets the head, at y = 77
    hu[nose & (hu == -1000)] = 30
    assert step1.head_mask(hu.astype(np.float32))[nose].all()


def test_head_mask_keeps_a_step_of_the_scalp_where_a_long_strap_begins():
    hu = plain_head(512)
    y, x = np.indices(hu.shape)
    hu[disc(hu.shape, (256, 256), 0.35 * 512 + 4) & (x < y) & (hu == -1000)] = 40
    head = hu > -1000
    strap = (np.abs(x - y + 3) <= 1) & (x > 256) & ~head
    hu[strap] = 40
    mask = step1.head_mask(hu.astype(np.float32))
    assert mask[head].all() and mask[strap].mean() < 0.1


def narrow_contact(hu):
    """Join what lies right of the head to its skin by 10 rows."""
    hu[251:261, 430:446] = 30
    return hu.astype(np.float32)


def hand(hu, x=474):
    """Put a hand of soft tissue and bones beside the head; return where."""
    y, columns = np.indices(hu.shape)
    shape = ((columns - x) / 30) ** 2 + ((y - 256) / 75) ** 2 <= 1
    hu[shape] = 50
    for row in (206, 240, 274, 308):
        hu[disc(hu.shape, (x, row), 10)] = 900
    return shape


def second_object(hu):
    """Put a small head beside the head; return where."""
    for radius, value in ((34, 40), (29, 900), (18, 35)):
        hu[disc(hu.shape, (474, 256), radius)] = value
    return disc(hu.shape, (474, 256), 34)


def thick_holder(hu):
    """Put a head holder of 20 px, with foam between it and the head; return where."""
    foam, outer = disc(hu.shape, (256, 256), 196), disc(hu.shape, (256, 256), 216)
    below = np.indices(hu.shape)[0] > 230
    hu[foam & below & (hu == -1000)] = -900
    hu[outer & ~foam & below] = 300
    return outer & ~foam & below


def pillow(hu):
    """Put a pillow beside the head; return where."""
    hu[150:360, 446:500] = -100
    return np.pad(np.ones((210, 54), bool), ((150, 152), (446, 12)))


@pytest.mark.parametrize("join", [np.float32, narrow_contact], ids=["apart", "touching"])
@pytest.mark.parametrize("add", [hand, second_object, thick_holder, pillow])
def test_head_mask_cuts_what_shares_no_bone_with_the_head(add, join):
    hu = plain_head(512)
    head, other = hu > -1000, add(hu)
    mask = step1.head_mask(join(hu))
    assert (mask & other).sum() <= 20 and mask[head].all()  # a few pixels where they touch


@pytest.mark.parametrize("value", [-1000, -3024], ids=["air", "outside the field of view"])
def test_head_mask_of_a_slice_without_head_is_empty(value):
    assert not step1.head_mask(np.full((64, 64), value, np.float32)).any()


def test_bone_mask_is_the_skull():
    hu = plain_head()
    bone = step1.bone_mask(hu.astype(np.float32), hu > -1000)
    assert np.array_equal(bone, hu == 900)


def test_bone_mask_spares_a_calcified_plexus():
    hu = plain_head(256)
    plexus = disc(hu.shape, (128, 128), 4)
    hu[plexus] = 400
    assert not step1.bone_mask(hu.astype(np.float32), hu > -1000)[plexus].any()


def test_bone_mask_takes_the_partial_volume_rim():
    hu = plain_head()
    inner = disc(hu.shape, (64, 64), 0.27 * 128)
    rim = inner & ~disc(hu.shape, (64, 64), 0.27 * 128 - 1.8)  # two pixels
    hu[rim] = 110
    assert step1.bone_mask(hu.astype(np.float32), hu > -1000)[rim].all()


@pytest.mark.parametrize(
    ("points", "box"),
    [
        ([(5, 4), (9, 6)], (4, 3, 9, 8)),  # x 4..6, y 5..9: five wide and high
        ([(0, 0), (2, 0)], (0, 0, 3, 3)),  # at the corner: moved inside
        ([(9, 19), (7, 19)], (17, 7, 20, 10)),
        ([(3, 0), (3, 19)], (0, 0, 20, 20)),  # wider than the image is high: sticks out below
        ([], (0, 0, 20, 10)),
    ],
    ids=["inside", "corner", "far corner", "too wide", "nothing"],
)
def test_square_box(points, box):
    mask = np.zeros((10, 20), bool)
    for y, x in points:
        mask[y, x] = True
    got = step1.square_box(mask)
    if points and box == (4, 3, 9, 8):  # centred on x, whichever way the half pixel falls
        assert got[1] == 5 and got[3] == 10 and got[2] - got[0] == 5 and got[0] in (2, 3)
    else:
        assert got == box


def test_crop_fills_what_lies_beyond_the_edge():
    assert step1.crop(np.array([[1, 2], [3, 4]]), (1, 0, 4, 3), 0).tolist() == [
        [2, 0, 0],
        [4, 0, 0],
        [0, 0, 0],
    ]


# ---------------------------------------- steps


def test_roi_blacks_out_the_table_and_shows_the_head_in_the_brain_window():
    hu = plain_head()
    hu[115:118, 10:120] = 300
    ct = run_steps(hu, "roi")
    assert ct.image[116].max() == 0
    assert ct.image[64, 64] == round(35 * 255 / 79)


def test_roi_with_the_headers_window_only_masks():
    hu = plain_head()
    hu[115:118, 10:120] = 300
    before, after = ct_slice(hu), run_steps(hu, "roi", roi_window=None)
    assert np.array_equal(
        after.image, np.where(hu > -1000, before.image, 0) * (np.arange(128) < 115)[:, None]
    )


def test_noblank_removes_skull_and_crops_to_the_head():
    ct = run_steps(plain_head(), "roi", "noblank")
    assert ct.box == (20, 20, 109, 109)  # a disc of radius 44.8 round (64, 64)
    assert ct.image.shape == (89, 89)
    assert ct.image[44, 44] == round(35 * 255 / 79)
    assert not ct.image[step1.crop(ct.scan.hu, ct.box, 0) == 900].any()


def test_crop_of_a_head_wider_than_the_image_is_high_is_filled_with_background():
    """CLAHE makes grey of black that is no background."""
    wide = plain_head()[34:94]  # skin reaches the upper and lower edge
    ct = run_steps(wide, "roi", "noblank", "clahe")
    rows = len(wide) - ct.box[1]
    assert ct.image.shape[0] == ct.image.shape[1] > rows
    assert not ct.image[rows:].any() and not ct.mask[rows:].any()


def test_bleed_of_95_hu_under_a_narrow_window_survives_noblank():
    hu = plain_head()
    bleed = disc(hu.shape, (64, 38), 9) & (hu == 35)  # touches the inner table
    hu[bleed] = 95
    ct = run_steps(hu, "roi", "noblank", roi_window=(30.0, 60.0))
    x0, y0, x1, y1 = ct.box
    assert (ct.image[bleed[y0:y1, x0:x1]] == 255).all()


def test_clahe_keeps_background_black_and_equals_opencv_inside():
    rng = np.random.default_rng(0)
    hu = plain_head() + rng.integers(-20, 20, (128, 128)).astype(np.int16)
    before, after = run_steps(hu, "roi"), run_steps(hu, "roi", "clahe")
    expected = cv2.createCLAHE(clipLimit=5.0, tileGridSize=(8, 8)).apply(before.image)
    assert expected[~before.mask].max() > 0  # else this test shows nothing
    assert after.image[~before.mask].max() == 0
    assert np.array_equal(after.image[before.mask], expected[before.mask])


def bilateral_oracle(image, y, x, radius=10, sigma_color=50, sigma_space=50):
    """Tomasi and Manduchi 1998, equation 5, over the disc that OpenCV uses, away from the borders."""
    weights = total = 0.0
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            if dy * dy + dx * dx <= radius * radius:
                value = float(image[y + dy, x + dx])
                difference = value - float(image[y, x])
                weight = math.exp(
                    -(dy * dy + dx * dx) / (2 * sigma_space**2) - difference**2 / (2 * sigma_color**2)
                )
                weights += weight
                total += weight * value
    return total / weights


def test_bilateral_follows_the_papers_formula():
    rng = np.random.default_rng(0)
    hu = plain_head() + rng.integers(-20, 20, (128, 128)).astype(np.int16)
    before, after = run_steps(hu, "roi"), run_steps(hu, "roi", "bilateral")
    for y, x in ((64, 64), (30, 64), (64, 105), (90, 70)):
        assert before.mask[y, x]
        assert abs(after.image[y, x] - bilateral_oracle(before.image, y, x)) <= 0.51
    assert after.image[~before.mask].max() == 0


@pytest.mark.parametrize("steps", [("roi",), ("roi", "noblank")], ids=["within the image", "to its edges"])
def test_bilateral_of_the_heads_strips_equals_that_of_the_whole_picture(steps):
    step1.plain_opencv()
    rng = np.random.default_rng(0)
    hu = plain_head(256) + rng.integers(-20, 20, (256, 256)).astype(np.int16)
    before, after = run_steps(hu, *steps), run_steps(hu, *steps, "bilateral")
    whole = cv2.bilateralFilter(before.image, 20, 50, 50)
    assert not np.array_equal(whole, before.image)
    assert np.array_equal(after.image, np.where(before.mask, whole, 0))


def test_bilateral_in_strips_equals_that_of_the_whole_picture_for_any_mask():
    step1.plain_opencv()
    rng = np.random.default_rng(0)
    for _ in range(150):
        rows, columns = rng.integers(1, 100, 2)
        image = rng.integers(0, 256, (rows, columns)).astype(np.uint8)
        mask = rng.random((rows, columns)) < rng.choice([0, 0.01, 0.5, 1])
        ct = step1.CTSlice(step1.Scan(image), image, mask, (0, 0, columns, rows))
        whole = cv2.bilateralFilter(image, 20, 50, 50)
        assert np.array_equal(step1.bilateral(ct).image, np.where(mask, whole, 0))


@pytest.mark.parametrize("value", [-1000, 0, 40, 3000])
@pytest.mark.parametrize("steps", step1.KNOWN_VARIANTS.values(), ids=step1.KNOWN_VARIANTS)
def test_constant_slices_pass_every_variant(value, steps):
    ct = run_steps(np.full((64, 64), value, np.int16), *steps)
    assert ct.image.dtype == np.uint8
    assert ct.image.shape[:2] == (64, 64)


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (7, 5)])
def test_odd_shapes_pass_every_variant(shape):
    rng = np.random.default_rng(0)
    for steps in step1.KNOWN_VARIANTS.values():
        ct = run_steps(rng.integers(-100, 200, shape).astype(np.int16), *steps)
        assert ct.image.ndim == (3 if "windows" in steps else 2)


@pytest.mark.parametrize(
    ("hu", "blank"),
    [
        (np.full((64, 64), -1000), True),
        (np.full((64, 64), 40), True),
        (plain_head(64), False),
        (np.where(disc((64, 64), (32, 32), 3), 30, -1000), True),
        (np.where(disc((64, 64), (32, 32), 5), 30, -1000), False),
    ],
    ids=["air", "constant", "head", "tip of the vertex, 0.7 %", "a little more, 1.9 %"],
)
def test_blank(hu, blank):
    hu = hu.astype(np.float32)
    assert step1.is_blank(hu, step1.head_mask(hu)) is blank


def test_shared_beginnings_are_computed_once(monkeypatch):
    calls = []
    for name, step in step1.STEPS.items():
        monkeypatch.setitem(
            step1.STEPS, name, lambda ct, name=name, step=step: calls.append(name) or step(ct)
        )
    after = step1.step_runner(ct_slice(plain_head()))
    for steps in step1.VARIANTS.values():
        after(steps)
    once, twice = ("mask", "window", "noskull", "crop"), ("clahe", "bilateral")  # with the skull and without
    assert sorted(calls) == sorted((*once, *twice, *twice))


def test_head_and_skull_are_looked_for_once_for_all_variants(monkeypatch):
    calls = []
    for name in ("head_mask", "bone_mask"):
        real = getattr(step1, name)
        monkeypatch.setattr(
            step1, name, lambda *masks, name=name, real=real: calls.append(name) or real(*masks)
        )
    after = step1.step_runner(ct_slice(plain_head()))
    for steps in step1.KNOWN_VARIANTS.values():
        after(steps)
    assert sorted(calls) == ["bone_mask", "head_mask"]


# ---------------------------------------- single steps


def with_table(hu: np.ndarray) -> np.ndarray:
    """Return HU with a table under the head."""
    hu[115:118, 10:120] = 300
    return hu


def test_window_shows_the_whole_picture_in_the_brain_window():
    hu = with_table(plain_head())
    expected = np.rint(np.clip(hu / 79, 0, 1) * 255)  # LINEAR 40/80
    assert np.array_equal(run_steps(hu, "window").image, expected)


def test_mask_keeps_the_headers_window_and_blacks_out_the_table():
    hu = with_table(plain_head())
    ct = run_steps(hu, "mask")
    assert ct.image[64, 64] == round(35 * 255 / 99)  # LINEAR 50/100
    assert ct.image[116].max() == 0


def test_roi_window_sets_the_window_of_window_too():
    assert (
        run_steps(plain_head(), "window", roi_window=(35.5, 2)).image[64, 64] == 128
    )  # the middle of two HU
    unchanged = run_steps(plain_head(), "window", roi_window=None)
    assert np.array_equal(unchanged.image, ct_slice(plain_head()).image)


def test_roi_with_crop_keeps_the_skull_in_noblanks_box():
    ct, cropped = run_steps(plain_head(), "roi", "crop"), run_steps(plain_head(), "roi", "noblank")
    assert ct.box == cropped.box == (20, 20, 109, 109)
    assert (ct.image[plain_head()[20:109, 20:109] == 900] == 255).all()
    assert np.array_equal(ct.image * cropped.mask, cropped.image)


def test_roi_with_noskull_is_noblank_before_the_crop():
    ct, cropped = run_steps(plain_head(), "roi", "noskull"), run_steps(plain_head(), "roi", "noblank")
    assert ct.image.shape == (128, 128) and not ct.image[plain_head() == 900].any()
    assert np.array_equal(ct.image[20:109, 20:109], cropped.image)


@pytest.mark.parametrize(
    "steps",
    [
        ("window", "mask", "noskull", "crop"),
        ("crop", "noskull", "mask", "window"),
        ("noskull", "roi", "crop"),
        ("crop", "roi", "noskull"),
        ("roi", "noblank", "noblank"),
    ],
)
def test_masks_crop_and_window_give_the_same_in_any_order(steps):
    hu = with_table(plain_head())
    ct, usual = run_steps(hu, *steps), run_steps(hu, "roi", "noblank")
    assert (
        ct.box == usual.box and np.array_equal(ct.image, usual.image) and np.array_equal(ct.mask, usual.mask)
    )


def test_noskull_without_a_head_mask_takes_the_skull_alone():
    hu = with_table(plain_head())
    ct = run_steps(hu, "noskull")
    assert np.array_equal(ct.image == 0, (hu <= 0) | (hu == 900)) and ct.image[116, 64] == 255


def test_clahe_without_a_head_mask_is_that_of_the_whole_picture():
    hu = with_table(plain_head())
    expected = cv2.createCLAHE(clipLimit=5.0, tileGridSize=(8, 8)).apply(ct_slice(hu).image)
    assert np.array_equal(run_steps(hu, "clahe").image, expected)


def test_windows_are_brain_subdural_and_bone_as_red_green_and_blue():
    hu = plain_head(brain_hu=60)
    image = run_steps(hu, "roi", "windows").image
    # LINEAR: lowest values 0, -20 and -800 HU; 79, 199 and 2799 HU wide
    assert image[64, 64].tolist() == [round(60 * 255 / 79), round(80 * 255 / 199), round(860 * 255 / 2799)]
    assert image[0, 0].tolist() == [0, 0, 0]  # air lies in the bone window's range, but not in the head


@pytest.mark.parametrize("step", ["clahe", "bilateral"])
def test_step_after_windows_changes_each_colour_by_itself(step):
    rng = np.random.default_rng(0)
    hu = plain_head() + rng.integers(-20, 20, (128, 128)).astype(np.int16)
    colour = run_steps(hu, "roi", "windows", step).image
    for number, window in enumerate([(40.0, 80.0), (80.0, 200.0), (600.0, 2800.0)]):
        assert np.array_equal(colour[..., number], run_steps(hu, "roi", step, roi_window=window).image)


def test_crop_after_windows_crops_all_colours():
    colour = run_steps(plain_head(), "roi", "windows", "noblank").image
    assert colour.shape == (89, 89, 3)
    assert np.array_equal(colour[..., 0], run_steps(plain_head(), "roi", "noblank").image)


def test_png_of_colours_has_red_first():
    content = step1.encode_png(np.full((2, 2, 3), (250, 20, 3), np.uint8))
    assert cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)[0, 0].tolist() == [3, 20, 250]


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        (
            ("roi", "blur"),
            r"^variant 8_Mine: no step 'blur': choose one of roi, noblank, mask, .*, or add it to STEPS$",
        ),
        (
            ("clahe", "roi"),
            "^variant 8_Mine: window makes the picture anew, so clahe .* is lost: put window first$",
        ),
        (("roi", "bilateral", "windows"), "windows makes the picture anew, so bilateral before it is lost"),
    ],
)
def test_steps_that_make_no_sense_are_refused_with_the_remedy(monkeypatch, steps, sentence):
    step1.check_variants()
    monkeypatch.setitem(step1.KNOWN_VARIANTS, "8_Mine", steps)
    with pytest.raises(step1.UsageError, match=sentence):
        step1.check_variants()


@pytest.mark.parametrize("entries", [256, 4096])
def test_voi_lut_of_8_bits_goes_beyond_255_steps(entries):
    item = Dataset()
    item.add_new(0x00283002, "SS", [entries, -100, 8])
    item.add_new(0x00283006, "US", [min(i, 200) for i in range(entries)])
    hu = np.array([[-1000, -100, 0, 155, 156, 900, 3000]], np.float32)
    grey, _ = step1.dicom2png(hu, make_ct(hu.astype(np.int16), VOILUTSequence=Sequence([item])))
    assert grey.tolist() == [[0, 0, 100, 200, 200, 200, 200]]


def test_signed_12bit_values_are_left_alone():
    stored = np.array([[-2000, 0, 40]], np.int16)
    hu, repaired = step1.hounsfield(stored, make_ct(stored, BitsStored=12, HighBit=11))
    assert not repaired and hu.tolist() == [[-2000, 0, 40]]
