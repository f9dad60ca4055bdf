"""Step 1: turn head-CT DICOM slices into seven PNG variants, ready for Step2_EfficientNet_Model.ipynb.

    python Step1_Image_Preprocessing.py                               # raw_data -> data_preprocessing
    python Step1_Image_Preprocessing.py --raw-data D:/ct --output D:/png --jobs 8
    python Step1_Image_Preprocessing.py --variants 0 2_ROI+CLAHE      # only these two
    python Step1_Image_Preprocessing.py --variants all                # the seven, and those of single steps
    python Step1_Image_Preprocessing.py --roi-window 50,130           # another fixed window for ROI
    python Step1_Image_Preprocessing.py --rsna D:/rsna --rsna-labels any    # Kaggle's download: bleed or none

Input:   <raw-data>/TrainingData/<class>/**  and  <raw-data>/TestingData/**, one CT slice a file; the classes
         are the folders' names, two or more. <raw-data>/TestingData_labels.csv (image,label) is optional.
Output:  <output>/<variant>/<the same folders>/<name>.png, 8-bit grey; RGB after the step windows
         <output>/manifest.csv, a row per input file; the notebook takes its patients from it
         (blank and head_fraction are known with a variant that masks the head, as ROI does; bone_fraction
         and crop with one that takes the skull away or crops, as noblank does)
         <output>/preview.png, a labelled contact sheet

A second run does only what is missing or changed. A file that can't be used costs only itself: it becomes a
row of the manifest with its reason. Exit status: 0 all good, 1 some file failed or the run was stopped, 2 usage
error, 130 Ctrl-C.

The chapters: the variants and every number; pixels; one file; many files; where they come from; command line.
"""

import argparse
import csv
import faulthandler
import hashlib
import math
import os
import re
import secrets
import signal
import sqlite3
import struct
import sys
import textwrap
import time
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain, islice
from logging import CRITICAL, getLogger
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import psutil
import pydicom
from pebble import ProcessExpired, ProcessPool
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.filereader import read_file_meta_info
from pydicom.multival import MultiValue
from pydicom.pixels import apply_voi, get_decoder, pixel_array
from tqdm import tqdm

# ---------------------------------------- the variants and every number, once

# The usual classes, those of RSNA-2019, in the order of every table; others, folders of any name, follow.
CLASSES = ("healthy", "intraparenchymal", "intraventricular", "subarachnoid", "subdural", "epidural")

VARIANTS: dict[str, tuple[str, ...]] = {  # folder -> steps after dicom2png; a line more is a variant more
    "0_Dicom2PNG": (),
    "1_ROI": ("roi",),
    "2_ROI+CLAHE": ("roi", "clahe"),
    "3_ROI+CLAHE+Bilateral": ("roi", "clahe", "bilateral"),
    "4_ROI+noblank": ("roi", "noblank"),
    "5_ROI+noblank+CLAHE": ("roi", "noblank", "clahe"),
    "6_ROI+noblank+CLAHE+Bilateral": ("roi", "noblank", "clahe", "bilateral"),
}
EXTRA_VARIANTS: dict[str, tuple[str, ...]] = {  # made when asked for: what ROI and noblank are made of
    "7_Window": ("window",),
    "8_Mask": ("mask",),
    "9_ROI+crop": ("roi", "crop"),
    "10_ROI+noskull": ("roi", "noskull"),
    "11_ROI+windows": ("roi", "windows"),
}
KNOWN_VARIANTS = VARIANTS | EXTRA_VARIANTS
BUNDLES = {"roi": ("mask", "window"), "noblank": ("noskull", "crop")}  # the single steps are those of STEPS

BRAIN_WINDOW = (40.0, 80.0)  # centre, width in HU: the usual window for the brain and for fresh blood
COLOUR_WINDOWS = (BRAIN_WINDOW, (80.0, 200.0), (600.0, 2800.0))  # red brain, green subdural, blue bone
AIR_HU = -1000.0  # what pixel padding becomes

TISSUE_HU = -200  # fat and skin lie above, foam and cushions below
HARD_HU = 120  # plastic and carbon of head holders lie above, skin of ears and noses below
WALL_LENGTH = 16 / 512  # a head holder's wall is longer than this
WALL_MAX_HU = 600  # and nowhere denser; bone is, the walls of nose and sinuses too
WALL_EDGE_PIXELS = 2  # a holder's edge looks like soft tissue by partial volume
CORE_RADIUS = 8 / 512  # of the image's width: thinner things (holder, cables, ears) are no part of the core
BONE_GAP = 12 / 512  # air cells, sutures and canals part bones by less, skin parts those of a hand by more
CORE_MARGIN = 3 / 512  # the core grows back by this much more, to meet the skin again
OTHER_AREA = 40**2 / 512**2  # of the image's; what is thick and not joined by bone is smaller in a nose
EAR_REACH = 80 / 512  # ears and noses end within this distance of core and skull, cushions go on
CLOSE_RADIUS = 25 / 512  # nostrils and ear canals are narrower than twice this
BLANK_FRACTION = 0.01  # a slice with less of its area above 0 HU in the head is air over the vertex

BONE_SEED_HU = 300  # only bone and calcium reach it
BONE_EDGE_HU = 130  # bone goes on down to here; fresh blood stays below about 100 HU
BONE_RIM_HU = 100  # within BONE_RIM_PIXELS of bone, what is above is half bone by partial volume
BONE_RIM_PIXELS = 2
BONE_MIN_FRACTION = 0.0025  # of the head: smaller islands are calcified plexus or pineal, no skull

CLAHE_CLIP = 5.0
CLAHE_TILES = (8, 8)
BILATERAL = (20, 50, 50)  # diameter in px, sigma of colour in grey levels, sigma of space in px
BILATERAL_STRIP = 16  # rows filtered in one go; fewer follow the head's outline closer, more cost fewer calls

MAX_SIDE = 4000  # pixels; no CT slice has more, a header that claims more would only eat memory
MAX_DATASET = 96 << 20  # bytes of a deflated data set: that many pixels squared and a generous header
MEMORY_LIMIT = 2 << 30  # bytes that one file may take
TIME_LIMIT_S = 60  # that one file may take; a decoder that takes longer hangs
POOL_STARTS = 5  # of the processes together, should something outside kill them
DASK_PATIENCE_S = 40  # without any Dask worker; a nanny or a batch system starts one again in less
COMMIT_EVERY_S = 2  # a killed run loses the rows of this many seconds at most; their PNGs are made again

DECODERS = {  # transfer syntax -> (pydicom plugin, package to install); named, as pydicom's own order varies
    uid.JPEGBaseline8Bit: ("pillow", "pillow"),
    uid.JPEGLossless: ("gdcm", "python-gdcm"),
    uid.JPEGLosslessSV1: ("gdcm", "python-gdcm"),
    uid.JPEGLSLossless: ("pyjpegls", "pyjpegls"),
    uid.JPEGLSNearLossless: ("pyjpegls", "pyjpegls"),
    uid.JPEG2000Lossless: ("gdcm", "python-gdcm"),
    uid.JPEG2000: ("gdcm", "python-gdcm"),
    uid.RLELossless: ("pylibjpeg", "pylibjpeg-rle"),
}
OTHER_UNITS = {"OD", "MGML", "Z_EFF", "ED", "EDW", "PCT"}  # than HU, of RescaleType (PS3.3 C.11.1.1.2)

MANIFEST_COLUMNS = (
    *("image", "split", "label", "patient", "source", "status", "reason", "rows", "columns"),
    *("window_center", "window_width", "window_source", "roi_window", "hu_repaired", "blank"),
    *("head_fraction", "bone_fraction", "crop", "warnings", "fingerprint"),
)
FAILED_SHOWN = 50  # lines at the end; the manifest has them all
CLASSES_SHOWN = 12  # in the preview and at the end
# passed over, like hidden files and these endings
STRAY_FILES = {"thumbs.db", "desktop.ini", "icon\r", "dicomdir"}
STRAY_ENDINGS = {".csv", ".txt", ".md", ".json", ".xml", ".pdf", ".py", ".png", ".jpg", ".jpeg", ".zip"}

RSNA_CLASSES = {"subtype": CLASSES, "any": ("healthy", "hemorrhage")}  # of --rsna-labels
RSNA_CANDIDATES = 20  # headers read for each slice wanted, to find many patients among 750,000 slices

# RSNA-2019 writes IDs such as ID_000000e27 where UIDs belong, and pydicom would warn at each access.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE


class UnsuitableFile(Exception):
    """An input that can't become a picture; its text says what is wrong, which tag, and what to do."""


class UsageError(Exception):
    """What the user asked for can't be done; its text says why and what to do."""


# ---------------------------------------- pixels: stored values -> HU


def numbers(ds: Dataset, keyword: str) -> list[float]:
    """Return all values of a numeric element, nan for an empty one; [] where absent, [nan] where one is text."""
    try:
        value = ds.get(keyword)  # converts the stored bytes
        values = value if isinstance(value, MultiValue) else [] if value in (None, "") else [value]
        return [math.nan if v == "" else float(v) for v in values]
    except (ValueError, TypeError, ArithmeticError):
        return [math.nan]


def first_number(ds: Dataset, keyword: str) -> float:
    """Return the first value of a numeric element, nan where there is none."""
    return next(iter(numbers(ds, keyword)), math.nan)


def texts(ds: Dataset, keyword: str) -> list[str]:
    """Return all values of a text element in upper case, [""] where absent."""
    value = ds.get(keyword)
    return [str(v).strip().upper() for v in (value if isinstance(value, MultiValue) else [value or ""])]


def padding_mask(stored: np.ndarray, ds: Dataset) -> np.ndarray:
    """Return where the scanner wrote padding, bool (rows, columns) (DICOM PS3.3 C.7.5.1.1.2)."""
    lowest, count = np.iinfo(stored.dtype).min, 2.0 ** (8 * stored.dtype.itemsize)
    values, limit = (  # real files have them with the wrong sign, but the right bits
        [(value - lowest) % count + lowest for value in numbers(ds, keyword) if -count / 2 <= value < count]
        for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit")
    )
    padded = np.isin(stored, [*values, -32768])  # that is no HU: padding, also where anonymisers drop its tag
    if values and limit:
        low, high = sorted((values[0], limit[0]))
        padded |= (stored >= low) & (stored <= high)
    return padded


def hounsfield(stored: np.ndarray, ds: Dataset) -> tuple[np.ndarray, bool]:
    """Return HU, float32 (rows, columns), and whether wrapped values were repaired (PS3.3 C.11.1).

    The wrap: RSNA-2019's 12-bit unsigned slices with slope 1 and an intercept near 0, found and repaired first by
    J. Howard (Kaggle, RSNA Intracranial Hemorrhage Detection, 2019).
    """
    slope, intercept = first_number(ds, "RescaleSlope"), first_number(ds, "RescaleIntercept")
    padded, unused = padding_mask(stored, ds), 8 * stored.dtype.itemsize - ds.BitsStored
    if unused > 0:  # old scanners kept overlays there; signed values keep their sign
        stored = (stored << unused) >> unused
        padded |= padding_mask(stored, ds)
    wrapped = ds.BitsStored == 12 and ds.PixelRepresentation == 0 and intercept > -100 and slope == 1
    wrapped = wrapped and bool(stored.max() >= 4096 - 1000)  # air wraps, to 3096 and more
    if wrapped:
        stored = (stored.astype(np.int32) + 1000) % 4096 - 1000
    hu = (stored * slope + intercept).astype(np.float32)
    hu[padded] = AIR_HU
    impossible = np.count_nonzero(hu < -10_000) + np.count_nonzero(hu > 20_000)
    if impossible > 0.01 * hu.size:  # metal and its wraps reach further, in few pixels
        beyond = "over 1 % of the pixels are below -10,000 or above 20,000 HU"
        raise UnsuitableFile(f"{beyond}: RescaleSlope/Intercept (0028,1053/1052) wrong, export it again")
    if padded.mean() < 0.3 and hu[~padded].min() > -500:  # a scanner's circle leaves 21 % as padding
        warnings.warn("nothing is as dark as air: is RescaleIntercept (0028,1052) right?", stacklevel=2)
    return hu, wrapped


# ---------------------------------------- pixels: HU -> grey


def header_window(ds: Dataset) -> tuple[float, float] | None:
    """Return the header's first complete VOI window (centre, width), None where it has no usable one."""
    function = texts(ds, "VOILUTFunction")[0] or "LINEAR"
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        return None
    pairs = zip(numbers(ds, "WindowCenter"), numbers(ds, "WindowWidth"), strict=False)
    usable = (p for p in pairs if np.isfinite(p).all() and (p[1] >= 1 if function == "LINEAR" else p[1] > 0))
    return next(usable, None)


def window_to_grey(hu: np.ndarray, window: tuple[float, float], function: str = "LINEAR") -> np.ndarray:
    """Map HU, of any shape, to uint8 grey by a VOI window (PS3.3 C.11.2.1.2 and C.11.2.1.3).

    Black and white are the window's own ends.
    """
    center, width = window
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    grey = hu.astype(np.float64)  # changed in place, which is several times faster
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # exp(710); a LINEAR width of 1
        grey -= center
        grey /= width
        if function == "SIGMOID":
            grey = 255 / (1 + np.exp(-4 * grey))
        else:
            grey += 0.5
            grey *= 255
        np.fmax(grey, 0, out=grey)  # 0 / 0, at the centre of a width of 1, is black
        np.minimum(grey, 255, out=grey)
    return np.rint(grey, out=grey).astype(np.uint8)


def dicom2png(hu: np.ndarray, ds: Dataset) -> tuple[np.ndarray, dict]:
    """Return the picture that the header asks for, uint8 (rows, columns), and its manifest fields."""
    fields: dict[str, Any] = {"window_source": "header"}
    if ds.get("VOILUTSequence"):
        with refusing("VOILUTSequence (0028,3010) can't be applied", "export it again, or leave it out"):
            _, first, depth = ds.VOILUTSequence[0].LUTDescriptor
            if first > 32767:  # no HU is that high: a negative one, written without its sign
                ds.VOILUTSequence[0].LUTDescriptor[1] = first - 65536
            if depth == 8:  # pydicom would count the entries in as many bits, and start again after 255
                ds.VOILUTSequence[0].LUTDescriptor[2] = 16
            shown = apply_voi(np.rint(hu).astype(np.int32), ds) * (255 / (2**depth - 1))
        grey = np.rint(np.clip(shown, 0, 255)).astype(np.uint8)
    else:
        window, function = header_window(ds), texts(ds, "VOILUTFunction")[0] or "LINEAR"
        if not window:
            window, function, fields["window_source"] = BRAIN_WINDOW, "LINEAR", "default"
        grey = window_to_grey(hu, window, function)
        fields |= {"window_center": window[0], "window_width": window[1]}
    if texts(ds, "PhotometricInterpretation") == ["MONOCHROME1"]:  # PS3.3 C.7.6.3.1.2: the lowest is white
        grey = 255 - grey
    return grey, fields


# ---------------------------------------- pixels: masks, from HU


def distance_to(mask: np.ndarray) -> np.ndarray:
    """Return each pixel's distance to the nearest True pixel, float32 (rows, columns), in pixels."""
    if not mask.any():
        return np.full(mask.shape, np.inf, np.float32)
    return cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, 5)


def enlarge(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return a bool mask of every second row and column at its full size (rows, columns) again."""
    return cv2.resize(mask.astype(np.uint8), shape[::-1], interpolation=cv2.INTER_NEAREST).astype(bool)


def pieces(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the 4-connected pieces of a bool mask as labels (0 = none), and how many labels there are."""
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    return labels, count


def found_in(labels: np.ndarray, count: int, where: np.ndarray) -> np.ndarray:
    """Return for each label whether it occurs where a bool mask is True; False for label 0."""
    found = np.zeros(count, bool)
    found[labels[where & (labels > 0)]] = True
    return found


def holder_walls(labels: np.ndarray, bony: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """Return the hard pieces that are long, no bone and mostly outside, bool: a holder's walls."""
    walls = np.zeros(labels.shape, bool)
    for label in np.flatnonzero(found_in(labels, len(bony), outside) & ~bony):
        piece = labels == label
        _, _, width, height = cv2.boundingRect(piece.astype(np.uint8))
        if max(width, height) > WALL_LENGTH * min(labels.shape) and outside[piece].mean() > 0.5:
            walls |= piece
    return walls


def head_and_others(thick: np.ndarray, bone: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the most of the thick bodies that hang together by bone, with that bone, and other large bodies.

    All are bool (rows, columns).
    """
    labels, count = pieces(thick | bone)
    areas = np.bincount(labels[thick], minlength=count)
    head = labels == areas.argmax()
    others = (areas > OTHER_AREA * min(thick.shape) ** 2).take(labels) & thick & ~head
    return head, others


def grow(mask: np.ndarray, pixels: int) -> np.ndarray:
    """Return the bool mask grown by so many pixels to all sides, corners included."""
    kernel = np.ones((2 * pixels + 1, 2 * pixels + 1), np.uint8)
    return cv2.dilate(mask.astype(np.uint8), kernel).astype(bool)


def fill_holes(mask: np.ndarray) -> np.ndarray:
    """Return the mask with everything that it encloses."""
    canvas = np.pad(mask, 1).astype(np.uint8)
    cv2.floodFill(canvas, None, (0, 0), 2)
    return canvas[1:-1, 1:-1] != 2


def head_mask(hu: np.ndarray) -> np.ndarray:
    """Return the head, bool (rows, columns): skin and all within, but no table, holder, cable or air around.

    The head's core is the largest body that survives an erosion, and the others that the skull joins to it:
    air cells in the petrous bone and sinuses make a slice fall apart, but table, pillow and hand share no
    bone with the head. Thin things that touch the core are kept where they are soft and short (ears, nose),
    cut where they are hard or long (head holder, cushion). All False for a slice without a head.
    """
    tissue = hu > TISSUE_HU
    half, width = tissue[::2, ::2], min(hu.shape) / 2  # distances need no more; the mask's edge is tissue's
    from_air = cv2.distanceTransform(np.pad(half, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
    thick = from_air > CORE_RADIUS * width
    if not thick.any():
        return np.zeros(hu.shape, bool)
    hard, count = pieces(hu > HARD_HU)
    bony = found_in(hard, count, hu >= WALL_MAX_HU)  # bone is dense somewhere
    gap = np.ones((2 * round(BONE_GAP * width / 2) + 1,) * 2, np.uint8)
    bone = cv2.morphologyEx(bony.take(hard[::2, ::2]).astype(np.uint8), cv2.MORPH_CLOSE, gap).astype(bool)
    head, others = head_and_others(thick, bone)
    from_center = distance_to(head & thick)
    core = half & (from_center <= CORE_RADIUS * width)  # morphological opening

    from_core = distance_to(core | head)
    enclosed = distance_to(from_core > CLOSE_RADIUS * width) > CLOSE_RADIUS * width  # morphological closing
    walls = holder_walls(hard, bony, enlarge(~core & ~enclosed, hu.shape))
    del hard  # a lower peak, so that less memory goes back to the system and is asked for again
    core = enlarge(from_center <= CORE_RADIUS * width, hu.shape)
    tissue &= ~grow(walls, 1) & (core | ~grow(walls, WALL_EDGE_PIXELS))
    core = tissue & enlarge(from_center <= (CORE_RADIUS + CORE_MARGIN) * width, hu.shape)
    thin = tissue & ~core
    labels, count = pieces(thin)
    far = enlarge(others | (from_core >= EAR_REACH * width), hu.shape)
    near = found_in(labels, count, grow(core, 1)) & ~found_in(labels, count, far)
    core[thin] = near[labels[thin]]  # take would make int64 of all labels
    return fill_holes(core)


def bone_mask(hu: np.ndarray, head: np.ndarray) -> np.ndarray:
    """Return the skull, bool (rows, columns): dense pieces of the head with a core above BONE_SEED_HU.

    Judged in HU, never by grey level: blood (up to about 100 HU) is white in a narrow window, yet no bone.
    """
    labels, count = pieces(head & (hu > BONE_EDGE_HU))
    areas = np.bincount(labels[labels > 0], minlength=count)
    large = areas > BONE_MIN_FRACTION * head.sum()
    bone = (large & found_in(labels, count, hu > BONE_SEED_HU)).take(labels)
    return bone | (head & (hu > BONE_RIM_HU) & grow(bone, BONE_RIM_PIXELS))


def square_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the square (x0, y0, x1, y1) round what is True, moved into the image where it sticks out.

    All of the image where nothing is True. A side longer than the image stays outside it: see crop.
    """
    rows, columns = mask.shape
    if not mask.any():
        return 0, 0, columns, rows
    x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
    side = max(w, h)
    x0 = min(max(x + w // 2 - side // 2, 0), max(columns - side, 0))
    y0 = min(max(y + h // 2 - side // 2, 0), max(rows - side, 0))
    return x0, y0, x0 + side, y0 + side


def crop(array: np.ndarray, box: tuple[int, int, int, int], fill: float) -> np.ndarray:
    """Cut a box out of an array, grey or colour; what lies beyond the right and lower edge is filled."""
    x0, y0, x1, y1 = box
    part = array[y0:y1, x0:x1]
    if part.shape[:2] == (y1 - y0, x1 - x0):
        return np.ascontiguousarray(part)
    missing = ((0, y1 - y0 - part.shape[0]), (0, x1 - x0 - part.shape[1]), (0, 0))
    return np.pad(part, missing[: array.ndim], constant_values=fill)


# ---------------------------------------- pixels: the steps, CTSlice in, CTSlice out


class Scan:
    """One slice as it was scanned, and what steps look for in it, once for all variants.

    hu: float32 (rows, columns), Hounsfield units.  window: (centre, width) in HU that the step window shows,
    None for the header's.  head(), bone(): bool (rows, columns).  box(): the square round head without bone.
    """

    def __init__(self, hu: np.ndarray, window: tuple[float, float] | None = BRAIN_WINDOW):
        head = cache(lambda: head_mask(hu))  # no cached_property, as --dask could not send its lock
        bone = cache(lambda: bone_mask(hu, head()))
        box = cache(lambda: square_box(head() & ~bone()))
        self.hu, self.window, self.head, self.bone, self.box = hu, window, head, bone, box


@dataclass(frozen=True)
class CTSlice:
    """One slice on its way through the steps.

    image: uint8, the picture so far, grey (rows, columns) or RGB (rows, columns, 3).  mask: bool (rows,
    columns), what is not background.  box: (x0, y0, x1, y1), the part of the scan that these two show, x1 and
    y1 exclusive.
    """

    scan: Scan
    image: np.ndarray
    mask: np.ndarray
    box: tuple[int, int, int, int]


def show(ct: CTSlice, image: np.ndarray) -> CTSlice:
    """Return the slice with another picture, grey or RGB, black where the background is."""
    return replace(ct, image=image * (ct.mask if image.ndim == 2 else ct.mask[..., None]))


def keep(ct: CTSlice, mask: np.ndarray) -> CTSlice:
    """Black out all but a mask of the whole scan, bool (rows, columns)."""
    return show(replace(ct, mask=ct.mask & crop(mask, ct.box, False)), ct.image)


def show_window(ct: CTSlice) -> CTSlice:
    """Show one fixed window, so that scanners agree; the header's stays where none is asked for."""
    if ct.scan.window is None:
        return ct
    return show(ct, window_to_grey(crop(ct.scan.hu, ct.box, AIR_HU), ct.scan.window))


def show_windows(ct: CTSlice) -> CTSlice:
    """Show three windows as red, green and blue: brain, subdural and bone.

    As winning solutions of Kaggle's RSNA Intracranial Hemorrhage Detection, 2019, did.
    """
    hu = crop(ct.scan.hu, ct.box, AIR_HU)
    return show(ct, np.dstack([window_to_grey(hu, window) for window in COLOUR_WINDOWS]))


def crop_margin(ct: CTSlice) -> CTSlice:
    """Crop to a square round the head without its skull, scalp included, so that it fills the frame."""
    (x, y, _, _), (x0, y0, x1, y1) = ct.box, ct.scan.box()
    here = x0 - x, y0 - y, x1 - x, y1 - y
    return replace(ct, image=crop(ct.image, here, 0), mask=crop(ct.mask, here, False), box=ct.scan.box())


def by_channel(change: Callable[[np.ndarray], np.ndarray], image: np.ndarray) -> np.ndarray:
    """Apply a function of grey pictures to a grey picture, or to red, green and blue each by itself."""
    return change(image) if image.ndim == 2 else np.dstack([change(part) for part in cv2.split(image)])


def clahe(ct: CTSlice) -> CTSlice:
    """Equalise the histogram tile by tile, contrast-limited (Zuiderveld 1994); background stays 0."""
    return show(ct, by_channel(cv2.createCLAHE(CLAHE_CLIP, CLAHE_TILES).apply, ct.image))


def plain_opencv() -> None:
    """Keep OpenCV, in this thread, to its own code, so that pixels don't depend on the machine.

    A GPU (OpenCL) rounds otherwise, and Intel's IPP, which picks its code by the processor, lets a pixel in
    some 200,000 depend on where its strip begins. One thread, as the processes are the parallelism.
    """
    cv2.setNumThreads(1)
    cv2.ocl.setUseOpenCL(False)
    cv2.ipp.setUseIPP(False)


def bilateral(ct: CTSlice) -> CTSlice:
    """Smooth but keep edges (Tomasi and Manduchi 1998); background stays 0, so only the head is filtered."""
    return show(ct, by_channel(partial(filter_strips, mask=ct.mask.astype(np.uint8)), ct.image))


def filter_strips(grey: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return a grey picture, filtered wherever the mask, uint8 (rows, columns), is not 0.

    Strip by strip, each as wide as the head is there. The strips are parts of one cv2.UMat, so the filter
    sees the pixels beyond their edges, and the result is that of the whole picture (see plain_opencv).
    """
    whole = cv2.UMat(grey)  # type: ignore[call-overload]  # OpenCV's stubs lack arrays
    filtered = np.zeros_like(grey)
    for top in range(0, len(mask), BILATERAL_STRIP):
        x, y, w, h = cv2.boundingRect(mask[top : top + BILATERAL_STRIP])
        if w:
            strip = cv2.UMat(whole, (x, top + y, w, h))
            filtered[top + y : top + y + h, x : x + w] = cv2.bilateralFilter(strip, *BILATERAL).get()
    return filtered


STEPS: dict[str, Callable[[CTSlice], CTSlice]] = {  # one more function and line here is one more step
    "mask": lambda ct: keep(ct, ct.scan.head()),  # all but the head becomes black
    "window": show_window,
    "windows": show_windows,
    "noskull": lambda ct: keep(ct, ~ct.scan.bone()),  # the skull, the white margin, becomes black
    "crop": crop_margin,
    "clahe": clahe,
    "bilateral": bilateral,
}


def single_steps(steps: Iterable[str]) -> tuple[str, ...]:
    """Return a variant's steps with each bundle taken apart."""
    return tuple(chain.from_iterable(BUNDLES.get(step, (step,)) for step in steps))


def check_variants() -> None:
    """Raise UsageError, with the remedy, where the table names no step, or one whose work would be lost."""
    for variant, bundled in KNOWN_VARIANTS.items():
        steps = single_steps(bundled)
        for place, step in enumerate(steps):
            if step not in STEPS:
                known = f"choose one of {', '.join((*BUNDLES, *STEPS))}, or add it to STEPS"
                raise UsageError(f"variant {variant}: no step {step!r}: {known}")
            lost = {"clahe", "bilateral"}.intersection(steps[:place])
            if step in ("window", "windows") and lost:
                remedy = f"{min(lost)} before it is lost: put {step} first"
                raise UsageError(f"variant {variant}: {step} makes the picture anew, so {remedy}")


def whole_slice(hu: np.ndarray, grey: np.ndarray, window: tuple[float, float] | None) -> CTSlice:
    """Return a slice before its first step. grey: of dicom2png.  window: of the step window, or None."""
    return CTSlice(Scan(hu, window), grey, np.ones(hu.shape, bool), (0, 0, hu.shape[1], hu.shape[0]))


def step_runner(ct: CTSlice) -> Callable[[Iterable[str]], CTSlice]:
    """Return a function from a variant's steps to its CTSlice; shared beginnings are computed once."""

    @cache
    def after(steps: tuple[str, ...]) -> CTSlice:
        return STEPS[steps[-1]](after(steps[:-1])) if steps else ct

    return lambda steps: after(single_steps(steps))


def encode_png(image: np.ndarray) -> bytes:
    """Return a picture, uint8 grey or RGB, as the bytes of a PNG."""
    picture = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".png", picture)[1].tobytes()


def is_blank(hu: np.ndarray, head: np.ndarray) -> bool:
    """Tell whether a slice shows nothing: one value everywhere, or air over the vertex."""
    return bool(hu.min() == hu.max() or np.mean(head & (hu > 0)) < BLANK_FRACTION)


# ---------------------------------------- one file: read and check


@contextmanager
def refusing(what: str, remedy: str):
    """Turn whatever pydicom or a decoder raises inside into an UnsuitableFile that says what to do.

    Broken bytes make these libraries raise almost anything, so this, alone, catches it all.
    """
    try:
        yield
    except (UnsuitableFile, MemoryError):
        raise
    except BaseException as err:
        if not isinstance(err, Exception) and type(err).__name__ != "PanicException":  # of decoders in Rust
            raise
        raise UnsuitableFile(f"{what} ({one_line(err)}): {remedy}") from err


def one_line(err: BaseException | str) -> str:
    """Return an exception's or warning's text on one line, without quoted values and UIDs, cut short."""
    text = " ".join(str(err).split()) or type(err).__name__
    text = re.sub(r"['\"].*['\"]|ignoring: .*|\d[\d.]{9,}", "...", text)
    return textwrap.shorten(text, 160, placeholder=" ...")


def check_is_ct_slice(ds: Dataset) -> None:
    """Raise UnsuitableFile unless the header describes one grey CT slice in HU (DICOM PS3.3 C.8.2.1)."""
    rows, columns, frames = (first_number(ds, k) for k in ("Rows", "Columns", "NumberOfFrames"))
    high, stored, allocated = (first_number(ds, k) for k in ("HighBit", "BitsStored", "BitsAllocated"))
    grey = texts(ds, "PhotometricInterpretation") in (["MONOCHROME1"], ["MONOCHROME2"])
    grey = grey and not first_number(ds, "SamplesPerPixel") > 1
    known_sign = first_number(ds, "PixelRepresentation") in (0, 1)
    slope, intercept = first_number(ds, "RescaleSlope"), first_number(ds, "RescaleIntercept")
    unit, size = texts(ds, "RescaleType")[0], f"{rows:.0f} x {columns:.0f}"
    kind = uid.UID(ds.get("SOPClassUID") or uid.CTImageStorage)
    ct = kind == uid.CTImageStorage or kind.name == kind  # unknown: some anonymisers replace every UID
    no_hu = "HU unknown, export the original series"
    fits = {
        "a DICOMDIR, an index of other files: leave it out": "DirectoryRecordSequence" not in ds,
        "float pixels (7FE0,0008/0009): no CT slice": not ds.dir("FloatPixelData"),  # nor DoubleFloat
        "Modality (0008,0060) is absent or not CT: leave it out": texts(ds, "Modality") == ["CT"],
        "no image, PixelData (7FE0,0010) is absent: leave it out": "PixelData" in ds,
        "ImageType (0008,0008) says LOCALIZER: leave it out": "LOCALIZER" not in texts(ds, "ImageType"),
        "NumberOfFrames (0028,0008): multi-frame, split it into slices": not frames > 1,
        f"SOPClassUID (0008,0016) is {kind.name}: leave it out, or split an enhanced CT into slices": ct,
        "PhotometricInterpretation (0028,0004) is not grey, MONOCHROME1 or 2: no CT slice, leave it out": grey,
        "Rows (0028,0010) or Columns (0028,0011) is absent or 0: export it again": rows >= 1 and columns >= 1,
        f"Rows x Columns (0028,0010/0011) claim {size} pixels: no CT slice": max(rows, columns) <= MAX_SIDE,
        "PixelRepresentation (0028,0103) is not 0 or 1, sign unknown: export it again": known_sign,
        "BitsStored (0028,0101) is absent or wrong: export it again": 1 <= stored <= allocated <= 32,
        "HighBit (0028,0102) is not BitsStored (0028,0101) - 1: export it again": high == stored - 1,
        f"RescaleIntercept (0028,1052) is absent or no number: {no_hu}": math.isfinite(intercept),
        f"RescaleSlope (0028,1053) is absent, 0 or no number: {no_hu}": math.isfinite(slope) and slope != 0,
        f"RescaleType (0028,1054) is {unit}, a map without HU: leave it out": unit not in OTHER_UNITS,
    }
    for fault, fine in fits.items():
        if not fine:
            raise UnsuitableFile(fault)


def check_inflated_size(path: Path) -> None:
    """Raise UnsuitableFile where a deflated data set (PS3.5 A.5) would take more memory than any CT slice."""
    with path.open("rb") as file:
        if uid.DeflatedExplicitVRLittleEndian.encode() not in file.read(4096):
            return
        file.seek(128 + 4 + 12 + read_file_meta_info(path).FileMetaInformationGroupLength)
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        size = len(inflater.decompress(file.read(MAX_DATASET), MAX_DATASET))
    if size == MAX_DATASET:
        raise UnsuitableFile(f"deflated data of over {MAX_DATASET >> 20} MB: no CT slice, leave it out")
    if not inflater.eof:
        raise UnsuitableFile("truncated, the deflated data have no end: export it again")


def read_dicom(path: Path) -> Dataset:
    """Read one DICOM file, also without preamble (PS3.10 7.1), and check that it is a CT slice."""
    if not path.is_file():
        raise UnsuitableFile("no regular file, gone meanwhile, or too long a path for Windows: leave it out")
    with refusing("not DICOM or damaged", "export it again"):
        try:
            check_inflated_size(path)
            ds = pydicom.dcmread(path, force=True, defer_size=2**22)  # bytes; more waits for the checks
        except OSError as err:
            if err.errno is None:  # pydicom's own, of a damaged sequence
                raise
            raise UnsuitableFile("unreadable: check the permissions and the disk") from err
    if not any(keyword in ds for keyword in ("SOPClassUID", "Modality", "Rows", "DirectoryRecordSequence")):
        cut = "truncated, it ends within its header or pixels"
        what = cut if ds.file_meta else "not DICOM"
        raise UnsuitableFile(f"{what}: export it again, or leave it out")
    with refusing("damaged header", "export it again"):
        if "TransferSyntaxUID" not in ds.file_meta:
            # no preamble, so no file meta: name the encoding that pydicom has just found by parsing
            implicit, little_endian = ds.original_encoding
            explicit = uid.ExplicitVRLittleEndian if little_endian else uid.ExplicitVRBigEndian
            ds.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else explicit
        check_is_ct_slice(ds)
    return ds


def codestream_size(stream: bytes) -> tuple[int, int, int] | None:
    """Return (rows, columns, components) that a compressed frame claims, None where it says nothing.

    JPEG and JPEG-LS: the frame header (ITU-T T.81 B.2.2, T.87 C.2.2); JPEG 2000: SIZ (ITU-T T.800 A.5.1).
    """
    siz = -1 if stream[:2] == b"\xff\xd8" else stream.find(b"\xff\x4f\xff\x51")  # by chance in JPEG-LS, too
    if siz >= 0 and len(stream) >= siz + 42:
        x1, y1, x0, y0 = struct.unpack_from(">4I", stream, siz + 8)
        return y1 - y0, x1 - x0, struct.unpack_from(">H", stream, siz + 40)[0]
    position = 2 if stream[:2] == b"\xff\xd8" else len(stream)
    while position + 10 <= len(stream) and stream[position] == 0xFF:
        marker = stream[position + 1]
        if marker == 0xF7 or (0xC0 <= marker < 0xD0 and marker not in (0xC4, 0xC8, 0xCC)):
            rows, columns, components = struct.unpack_from(">HHB", stream, position + 5)
            return rows, columns, components
        position += 1 if marker == 0xFF else 2 + struct.unpack_from(">H", stream, position + 2)[0]
    return None


def check_codestream(ds: Dataset) -> None:
    """Raise UnsuitableFile where a compressed frame is not of the size that the header says."""
    frame, expected = get_frame(ds.PixelData, 0, number_of_frames=1), (ds.Rows, ds.Columns, 1)
    if (claimed := codestream_size(frame)) != expected:
        wrong = f"the codestream in PixelData (7FE0,0010) claims {claimed} rows, columns, components"
        raise UnsuitableFile(f"{wrong}, the header {expected}: damaged, export it again")


def decode(ds: Dataset) -> np.ndarray:
    """Return the stored values, integer (rows, columns), decoded by the one plugin named in DECODERS."""
    syntax = ds.file_meta.TransferSyntaxUID
    plugin, package = DECODERS.get(syntax, ("", ""))
    named = f"TransferSyntaxUID (0002,0010) {'of no known name' if syntax.name == syntax else syntax.name}"
    if not plugin and syntax not in uid.UncompressedTransferSyntaxes:
        raise UnsuitableFile(f"{named}: not supported, export uncompressed")
    if plugin and plugin not in get_decoder(syntax).available_plugins:
        raise UnsuitableFile(f"no decoder for {named}: pip install {package}")
    with refusing("PixelData (7FE0,0010) can't be decoded", "damaged or truncated, export it again"):
        if not plugin and ds.PixelData.startswith(b"\xfe\xff\x00\xe0"):  # an item's tag, PS3.5 A.4
            raise UnsuitableFile(f"{named}, yet PixelData (7FE0,0010) is encapsulated: export it again")
        if plugin and syntax != uid.RLELossless:
            check_codestream(ds)
        # pydicom warns of bytes that some archives append to plain pixels, and leaves them out, as viewers do
        # unused bits stay, as padding may reach into them
        how: dict[str, Any] = {"allow_excess_frames": bool(plugin), "correct_unused_bits": False}
        stored = pixel_array(ds, decoding_plugin=plugin, **how)
    if stored.shape != (ds.Rows, ds.Columns):
        raise UnsuitableFile(f"PixelData (7FE0,0010) decodes to {stored.shape}: damaged, export it again")
    return stored


# ---------------------------------------- one file: convert, in a worker process


@dataclass(frozen=True)
class Task:
    """One input file: its path, its PNG under each variant folder, the variants to write.

    made: all variants that there will be, whose steps tell what the manifest knows.
    """

    source: str
    path: Path
    image: str
    variants: tuple[str, ...]
    made: tuple[str, ...] = ()
    fingerprint: str = ""


@dataclass(frozen=True)
class Settings:
    """What is the same for every file of a run."""

    output: Path
    roi_window: tuple[float, float] | None
    patient_key: bytes


def pseudonym(identifier: object, key: bytes) -> str:
    """Return a keyed hash of a patient's or study's id, so that nothing names anybody; '' where there is none."""
    text = str(identifier or "").strip()
    return hashlib.blake2b(text.encode(), key=key, digest_size=8).hexdigest() if text else ""


def put_in_place(temporary: Path, path: Path) -> None:
    """Move a finished file to its place; on Windows a virus scanner may hold either of them for a moment."""
    for pause in (0.1, 0.3, 1):
        with suppress(PermissionError):
            temporary.replace(path)
            return
        time.sleep(pause)
    temporary.replace(path)


def write_atomically(path: Path, data: bytes, output: Path) -> None:
    """Write a file so that it is there whole or not at all, whenever the process ends."""
    temporary = output / ".tmp" / secrets.token_hex(8)
    for folder in (temporary.parent, path.parent):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_bytes(data)
        put_in_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def convert(task: Task, settings: Settings) -> dict:
    """Read one file, write its variants, and return its manifest fields."""
    ds = read_dicom(task.path)
    with refusing("damaged header", "export it again"):
        hu, repaired = hounsfield(decode(ds), ds)
        grey, fields = dicom2png(hu, ds)
        for field, keyword in (("patient", "PatientID"), ("study", "StudyInstanceUID")):
            fields[field] = pseudonym(ds.get(keyword), settings.patient_key)
    ct = whole_slice(hu, grey, settings.roi_window)
    after = step_runner(ct)
    for variant in task.variants:
        png = encode_png(after(KNOWN_VARIANTS[variant]).image)
        write_atomically(settings.output / variant / task.image, png, settings.output)
    fields |= {"status": "ok", "rows": hu.shape[0], "columns": hu.shape[1], "hu_repaired": int(repaired)}
    fields["roi_window"] = "{:g},{:g}".format(*settings.roi_window) if settings.roi_window else "header"
    return fields | found_by_steps(ct.scan, {*task.made, *task.variants})


def found_by_steps(scan: Scan, variants: Iterable[str]) -> dict:
    """Return the manifest fields of what the steps of these variants find in a slice: the head, its skull."""
    steps = set(single_steps(chain.from_iterable(KNOWN_VARIANTS[v] for v in variants)))
    fields: dict[str, Any] = {}
    if steps & {"mask", "noskull", "crop"}:
        fields["blank"] = int(is_blank(scan.hu, scan.head()))
        fields["head_fraction"] = round(float(scan.head().mean()), 4)
    if steps & {"noskull", "crop"}:
        fields["bone_fraction"] = round(float(scan.bone().sum()) / max(int(scan.head().sum()), 1), 4)
        fields["crop"] = "{} {} {} {}".format(*scan.box())
    return fields


@contextmanager
def guarded():
    """Hold what runs inside to MEMORY_LIMIT (on Linux) and TIME_LIMIT_S, also in a decoder's C code.

    Out of memory raises MemoryError or ends the process, out of time ends it: whoever runs the processes sees
    that and goes on with the next file.
    """
    me = psutil.Process()
    before = me.rlimit(psutil.RLIMIT_DATA) if psutil.LINUX else None  # soft and hard
    if before:
        limit = me.memory_info().data + MEMORY_LIMIT
        limit = limit if before[1] == psutil.RLIM_INFINITY else min(limit, before[1])
        me.rlimit(psutil.RLIMIT_DATA, (limit, before[1]))
    with Path(os.devnull).open("w", encoding="ascii") as devnull:
        faulthandler.dump_traceback_later(TIME_LIMIT_S, exit=True, file=devnull)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            if before:
                me.rlimit(psutil.RLIMIT_DATA, before)


def process(task: Task, settings: Settings) -> dict:
    """Return the manifest fields of one file; a file that can't be used is a row with its reason."""
    plain_opencv()
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE  # as Dask sends functions only
    with warnings.catch_warnings(record=True) as caught, guarded():
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", ResourceWarning)  # of what Python tidies up meanwhile
        try:
            row = convert(task, settings)
        except UnsuitableFile as err:
            row = {"status": "failed", "reason": str(err)}
        except FileNotFoundError:  # its folder was just made: so Windows refuses 260 characters or more
            reason = "the path of its picture is too long: give a shorter --output"
            row = {"status": "failed", "reason": reason}
        except (MemoryError, cv2.error) as err:
            if isinstance(err, cv2.error) and err.code != cv2.Error.StsNoMem:
                raise
            reason = (
                f"needs over {MEMORY_LIMIT >> 30} GB of memory, or none is left: lower --jobs or leave it out"
            )
            row = {"status": "failed", "reason": reason}
    said = {one_line(str(w.message).replace(str(task.path), "...")) for w in caught}  # names no folder
    return row | {"warnings": "; ".join(sorted(said))}


# ---------------------------------------- many files: the ledger, what is known of each, on disk


@dataclass(frozen=True)
class Input:
    """One input file as it was found; refusal: why it can't be used, known before it is opened."""

    source: str  # its path below the input folder, as the manifest shows it
    path: Path
    target: str  # its place below each variant folder, before the ending is changed to .png
    split: str
    label: str
    refusal: str = ""


DAMAGED = "is damaged: delete it, and every picture is made again"


def open_ledger(output: Path) -> sqlite3.Connection:
    """Open the table of all files of an output folder; it belongs to this run alone until it ends."""
    (output / ".tmp").mkdir(parents=True, exist_ok=True)
    path, columns = output / ".ledger.sqlite3", (*MANIFEST_COLUMNS, "path", "folded", "made", "study")
    manifest = output / "manifest.csv"
    if not path.exists() and manifest.exists() and not manifest.read_bytes().startswith(b"image,split,"):
        raise UsageError(f"{manifest} is another program's: move it away, or name another --output")
    ledger = sqlite3.connect(path, timeout=1)
    ledger.row_factory = sqlite3.Row
    try:
        ledger.execute("PRAGMA locking_mode = EXCLUSIVE")  # a commit does not let go of it
        ledger.execute("BEGIN EXCLUSIVE")
        found = tuple(row["name"] for row in ledger.execute("PRAGMA table_info(files)"))
        if found != columns:  # none, or of another version
            ledger.execute("DROP TABLE IF EXISTS files")
            keys = "PRIMARY KEY (source), UNIQUE (folded)"
            ledger.execute(f"CREATE TABLE files ({', '.join(columns)}, {keys})")
    except (sqlite3.DatabaseError, UnicodeDecodeError) as err:
        ledger.close()
        code = getattr(err, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)  # text that is none comes without
        if code == sqlite3.SQLITE_BUSY:
            text = f"another run is writing to {output}: wait for it, or name another --output"
        elif code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            text = f"{path} {DAMAGED}"
        else:
            raise
        raise UsageError(text) from err
    return ledger


def count_files(ledger: sqlite3.Connection, where: str) -> int:
    """Return how many files a condition holds for."""
    return ledger.execute(f"SELECT count(*) FROM files WHERE {where}").fetchone()[0]


def pages(ledger: sqlite3.Connection, where: str) -> Iterator[sqlite3.Row]:
    """Yield rows in order of source, a page in memory at a time; the table may change meanwhile."""
    last = ""
    query = f"SELECT * FROM files WHERE source > ? AND {where} ORDER BY source LIMIT 500"
    while rows := ledger.execute(query, (last,)).fetchall():
        yield from rows
        last = rows[-1]["source"]


def folded(name: str) -> str:
    """Return a name without what file systems overlook: case, and how Unicode composes its characters."""
    return unicodedata.normalize("NFKC", name.casefold())


def without_dcm(name: str) -> str:
    """Return a name without a final .dcm; whatever other dots it has stay."""
    return name[:-4] if name.lower().endswith(".dcm") else name


def free_name(target: str, source: str, is_taken: Callable[[str], bool]) -> tuple[str, str]:
    """Return a file's PNG, a path under the variant folder, and that path with case and Unicode form folded.

    Only a final .dcm is cut: names are often UIDs, full of dots. Of several files that would share a name
    (x and x.dcm; X.dcm and x.dcm on Windows and macOS), all but the first carry a hash of their own.
    """
    *folders, name = without_dcm(target).split("/")
    folders = [f"{part[:-1]}~" if part.lower().endswith(".png") else part for part in folders]  # no PNG's
    image = "/".join([*folders, f"{name}.png"])
    if is_taken(folded(image)) or len(name.encode()) > 240:
        own = hashlib.sha256(source.encode()).hexdigest()[:16]
        image = "/".join([*folders, f"{name[:50]}~{own}.png"])
    return image, folded(image)


def list_inputs(ledger: sqlite3.Connection, inputs: Iterable[Input], output: Path) -> int:
    """Bring the ledger's list of files up to date; what an earlier run found out about a file stays.

    Pictures of inputs that are gone, or were moved to another class, are removed; returns their number.
    """
    ledger.execute("CREATE TEMP TABLE earlier AS SELECT image, folded FROM files")
    ledger.execute("UPDATE files SET folded = NULL")  # until the file is found again
    taken = "SELECT 1 FROM files WHERE folded = ?"
    for found in inputs:  # absolute paths, as Dask's workers run in folders of their own
        names = found.source, found.target, found.label, str(found.path.absolute())
        # bytes that are no text are possible on Linux alone; a carriage return would end the manifest's line
        source, target, label, path = (
            name.encode(errors="backslashreplace").decode().replace("\r", r"\r") for name in names
        )
        unfit = "its path is not valid Unicode, or has a carriage return: rename it"
        refusal = found.refusal if path == names[-1] else unfit
        image, name = free_name(target, source, lambda name: any(ledger.execute(taken, (name,))))
        ledger.execute(
            "INSERT INTO files (source, path, image, folded, split, label) VALUES (?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (source) DO UPDATE SET path = excluded.path, image = excluded.image, "
            "folded = excluded.folded, split = excluded.split, label = excluded.label, "
            "fingerprint = CASE WHEN image = excluded.image THEN fingerprint END",
            (source, "" if refusal else path, image, name, found.split, label),
        )
        if refusal:
            record(ledger, source, {"status": "failed", "reason": refusal})
    if not count_files(ledger, "folded IS NOT NULL"):
        raise UsageError("no file to convert: put slices into TrainingData/<class>/; earlier pictures stay")
    ledger.execute("DELETE FROM files WHERE folded IS NULL")
    stale = ledger.execute(
        "SELECT image FROM earlier WHERE image NOT IN (SELECT image FROM files WHERE path != '')"
    )
    return sum(remove_pictures(output, row["image"]) for row in stale)


def remove_pictures(output: Path, image: str) -> bool:
    """Remove what there is of a picture in the variant folders, and tell whether there was any."""
    there = [output / variant / image for variant in KNOWN_VARIANTS if (output / variant / image).exists()]
    for path in there:
        path.unlink(missing_ok=True)
    return bool(there)


def fingerprint(path: Path, identity: str) -> str:
    """Return a hash of what a file's PNGs depend on: the run's identity, with which it begins, its size and times.

    The second time, of the last change of status, tells on Linux and macOS that another file was moved here.
    """
    try:
        stat = path.stat()
    except OSError:  # the worker will say what is wrong with it
        return ""
    text = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {identity}"
    return identity[:8] + hashlib.sha256(text.encode()).hexdigest()[:16]


def due_tasks(ledger: sqlite3.Connection, args: argparse.Namespace, identity: str) -> Iterator[Task]:
    """Yield a task for each file that has variants to write, none where everything is up to date.

    Where the input, settings or code changed, variants that are on disk are made again even if not asked for,
    so that one folder never mixes two settings.
    """
    usable = "path != ''"
    total = count_files(ledger, usable)
    for row in tqdm(pages(ledger, usable), total=total, desc="converting", unit="slice", disable=None):
        due = fingerprint(Path(row["path"]), identity)
        there = {v for v in KNOWN_VARIANTS if (args.output / v / row["image"]).exists()}
        todo = {*args.variants, *there}
        if row["status"] == "ok" and row["fingerprint"] == due:
            there &= set(row["made"].split())
            todo = {v for v in args.variants if args.force or v not in there}
        if todo:
            write, made = (tuple(v for v in KNOWN_VARIANTS if v in some) for some in (todo, todo | there))
            yield Task(row["source"], Path(row["path"]), row["image"], write, made, due)


def record(ledger: sqlite3.Connection, source: str, fields: dict) -> None:
    """Write what became of a file into the ledger, all that is known of it."""
    columns = {*MANIFEST_COLUMNS, "made", "study"} - {"source", "image", "split", "label"}
    values = {column: str(fields.get(column, "")) for column in columns}
    changes = ", ".join(f"{column} = :{column}" for column in values)
    ledger.execute(f"UPDATE files SET {changes} WHERE source = :source", {**values, "source": source})


def write_manifest(ledger: sqlite3.Connection, output: Path) -> None:
    """Write manifest.csv, a row per input file, sorted by source."""
    temporary = output / ".tmp" / "manifest.csv"
    rows = ledger.execute(f"SELECT {', '.join(MANIFEST_COLUMNS)} FROM files ORDER BY source")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(chain([MANIFEST_COLUMNS], rows))
    put_in_place(temporary, output / "manifest.csv")


# ---------------------------------------- many files: processes here, or a Dask cluster

Outcomes = Iterator[tuple[Task, dict]]  # a task with its manifest fields
CRASHED = "it crashed, hung, took too much memory or was killed: run again, or export it again, uncompressed"


def bounded(submit: Callable, tasks: Iterable, ahead: int, waiting, crash, alive=lambda: True) -> Outcomes:
    """Submit tasks, never more than so many ahead of the results, and yield each with its manifest fields.

    submit: Task -> Future.  waiting: {Future: Task}, empty; holds what has no result yet, should an exception
    end this.  crash: exception of a future whose process died, which costs its own file.  alive: () -> whether
    somebody works; BrokenExecutor if not for long.
    """
    tasks, seen = iter(tasks), time.monotonic()
    while True:
        for task in islice(tasks, ahead - len(waiting)):
            waiting[submit(task)] = task
        if not waiting:
            return
        done = wait(waiting, DASK_PATIENCE_S / 8, FIRST_COMPLETED).done
        if done or alive():
            seen = time.monotonic()
        elif time.monotonic() - seen > DASK_PATIENCE_S:
            raise BrokenExecutor
        for future in done:
            try:
                fields = future.result()
            except crash:
                fields = {"status": "failed", "reason": CRASHED}
            yield waiting.pop(future), fields


@contextmanager
def interrupts_blocked():
    """Start threads and processes inside that never see Ctrl-C, not even while they import (on Unix)."""
    if os.name != "posix":
        yield
        return
    resource_tracker.ensure_running()  # else the first process would start it, and it unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class SpawnWithLastingLocks(SpawnContext):
    """Starts processes by spawn; its locks last as long as the program.

    The pool drops them before it ends its processes, and one that just starts would miss them loudly.
    """

    locks: ClassVar[list] = []

    def RLock(self):
        self.locks.append(super().RLock())
        return self.locks[-1]


def in_processes(tasks: Iterable[Task], settings: Settings, jobs: int, starts=POOL_STARTS) -> Outcomes:
    """Run tasks in processes of this machine; one that dies is replaced.

    The pool itself breaks when processes are killed between two tasks, as the system does when memory ends;
    then a new one goes on.
    """
    tasks = iter(tasks)
    waiting: dict[Future, Task] = {}
    pool = ProcessPool(jobs, context=SpawnWithLastingLocks())  # its processes ignore Ctrl-C

    def submit(task: Task) -> Future:
        try:
            return pool.schedule(process, args=(task, settings))
        except RuntimeError as err:  # it broke since the last result
            waiting[Future()] = task  # to be done again with the others by the next pool
            raise BrokenProcessPool from err

    try:
        with interrupts_blocked():
            pool.schedule(os.getpid)  # starts its threads, and they the processes
        yield from bounded(submit, tasks, 4 * jobs, waiting, ProcessExpired)
        return
    except BrokenProcessPool as err:
        if starts == 1:
            raise OSError(f"processes were killed {POOL_STARTS} times, out of memory? try --jobs 1") from err
    finally:
        pool.stop()
        pool.join()
    yield from in_processes(chain(waiting.values(), tasks), settings, jobs, starts - 1)


def on_dask(tasks: Iterable[Task], settings: Settings, address: str) -> Outcomes:
    """Run tasks on a Dask cluster that sees the same file system; a worker that dies loses nothing."""
    import cloudpickle  # here, as these take a second to import
    from distributed import Client, KilledWorker

    for name in ("distributed.client", "tornado.application"):  # a lost cluster is one sentence, below
        getLogger(name).setLevel(CRITICAL)
    if __name__ != "__main__":
        cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers need not have this file
    try:
        client = Client(address, timeout="10s")
    except (OSError, TypeError, ValueError) as err:
        unreachable = f"no Dask scheduler at {address} ({one_line(err)})"
        raise UsageError(f"{unreachable}: start it, or leave --dask out") from err
    with client:
        threads = [worker["nthreads"] for worker in client.scheduler_info(n_workers=-1)["workers"].values()]
        if not threads or max(threads) > 1:
            start = "dask worker ADDRESS --nthreads 1 --nworkers N"
            wrong = "has workers with several threads" if threads else "has no workers"
            raise UsageError(f"the Dask scheduler {wrong}, start some with one thread each: {start}")
        executor = client.get_executor(pure=False)  # not left by with: that would wait for lost workers
        workers = client.scheduler.ncores

        def submit(task: Task) -> Future:
            if client.status == "closed":  # by itself, as the scheduler was lost since the last result
                raise CancelledError
            return executor.submit(process, task, settings)

        def alive() -> bool:
            try:
                return bool(client.sync(workers, callback_timeout=DASK_PATIENCE_S / 8))
            except OSError:  # the scheduler does not answer
                return False

        try:
            yield from bounded(submit, tasks, 4 * len(threads), {}, KilledWorker, alive)
        except BrokenExecutor as err:
            lost = f"the Dask scheduler {address} had no worker, or gave no answer, for {DASK_PATIENCE_S} s"
            raise OSError(f"{lost}: start what is missing") from err
        except CancelledError as err:
            raise OSError(f"the Dask scheduler {address} is gone: start it and its workers again") from err


# ---------------------------------------- many files: the run


def read_patient_key(output: Path) -> bytes:
    """Return the secret of this output's pseudonyms; made at the first run, for its owner's eyes."""
    path = output / ".patient_key"
    if not path.exists():
        temporary = output / ".tmp" / "patient_key"
        temporary.touch(0o600)
        temporary.write_text(secrets.token_hex(32), encoding="ascii")
        put_in_place(temporary, path)
    text = path.read_text(encoding="ascii", errors="replace")
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise UsageError(f"{path} is damaged: restore it, or delete it, and all pseudonyms change")
    return bytes.fromhex(text)


def run_identity(settings: Settings) -> str:
    """Return a hash of all that PNGs and rows depend on besides the input: this code, settings, libraries."""
    versions = cv2.__version__, np.__version__, pydicom.__version__
    parts = Path(__file__).read_bytes(), settings.roi_window, settings.patient_key, versions
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def convert_all(ledger: sqlite3.Connection, settings: Settings, args: argparse.Namespace) -> int:
    """Convert every file that has something to do, record what became of it; return how many were written."""
    identity = run_identity(settings)  # another one's rows are void, now, as a stopped run changes pictures
    other = "status = 'ok' AND ifnull(fingerprint, '') NOT LIKE ?"  # or of another place: without one
    ledger.execute(f"UPDATE files SET status = '', fingerprint = '' WHERE {other}", (f"{identity[:8]}%",))
    ledger.commit()
    tasks, written, committed = due_tasks(ledger, args, identity), 0, time.monotonic()
    first = list(islice(tasks, args.jobs))
    if not first:
        return 0
    for name in ("preview.png", "manifest.csv"):  # a run that is killed leaves none that is out of date
        (args.output / name).unlink(missing_ok=True)
    tasks = chain(first, tasks)
    outcomes = on_dask(tasks, settings, args.dask) if args.dask else in_processes(tasks, settings, len(first))
    for task, fields in outcomes:
        if fields["status"] == "failed":
            if not args.input.is_dir():
                raise FileNotFoundError(f"the input folder {args.input} is gone")
            if task.path.exists():
                remove_pictures(settings.output, task.image)  # what a better version of the file left
        record(ledger, task.source, fields | {"fingerprint": task.fingerprint, "made": " ".join(task.made)})
        written += fields["status"] == "ok"
        if time.monotonic() - committed > COMMIT_EVERY_S:
            ledger.commit()
            committed = time.monotonic()
    return written


def class_order(labels: Collection[str]) -> list[str]:
    """Return classes in the order of every table and figure: the usual ones, then others by name."""
    others = set(labels).difference(CLASSES)
    return [*(label for label in CLASSES if label in labels), *sorted(others)]


def choose_preview(ledger: sqlite3.Connection) -> list[sqlite3.Row]:
    """Return the slice that shows each class, of the training data where it has any.

    Of the class's slices with the header window that is most common in all classes, so that the first column
    shows no rare one, that with the least bone: above the skull's base and below the vertex.
    """
    windows = "window_center, window_width"
    common = f"SELECT {windows}, count(*) AS slices FROM files WHERE status = 'ok' GROUP BY 1, 2"
    best = (
        f"SELECT * FROM files JOIN ({common}) USING ({windows}) "
        "WHERE label = ? AND status = 'ok' AND blank != '1' "
        "ORDER BY split = 'train' DESC, slices DESC, bone_fraction + 0, source LIMIT 1"
    )
    labels = {row["label"] for row in ledger.execute("SELECT DISTINCT label FROM files WHERE label != ''")}
    return [row for label in class_order(labels) for row in ledger.execute(best, (label,))][:CLASSES_SHOWN]


def middle(picture: np.ndarray, row: sqlite3.Row, side: int) -> tuple[int, int, int, int]:
    """Return the box round the middle of the brain, in a picture that is cropped to it or is not."""
    x0, y0, x1, y1 = map(int, row["crop"].split() or (0, 0, row["columns"], row["rows"]))
    if picture.shape[:2] == (y1 - y0, x1 - x0):
        x0, y0, x1, y1 = 0, 0, x1 - x0, y1 - y0
    left, top = max((x0 + x1 - side) // 2, 0), max((y0 + y1 - side) // 2, 0)
    return left, top, left + side, top + side


def draw_preview(ledger: sqlite3.Connection, output: Path) -> None:
    """Write preview.png: a slice of each class (a row) in each variant that it has on disk (a column).

    Last comes a bleed at full size: the middle of the brain, where blood in the ventricles lies.
    """
    tile, left, top, side, letters = 200, 150, 44, 196, 16  # px, but for the letters of a line of the names
    shown = choose_preview(ledger)
    variants = [v for v in KNOWN_VARIANTS if shown and all((output / v / r["image"]).exists() for r in shown)]
    near = [row for row in shown if row["label"] == "intraventricular"]
    sheet = np.zeros((top + tile * len(shown + near), left + tile * len(variants), 3), np.uint8)

    def write(text: str, x: int, y: int) -> None:
        for line, part in enumerate(text.split("\n")):
            cv2.putText(sheet, part, (x, y + 18 * line), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255, 255, 255), 1)

    for j, variant in enumerate(variants):
        write(textwrap.fill(variant.replace("+", " +"), 18).replace(" +", "+"), left + j * tile + 4, 18)
    for i, row in enumerate(shown + near):
        y, name = top + i * tile, textwrap.fill(row["label"], letters)
        write(name if i < len(shown) else f"{name},\nthe middle,\nfull size", 4, y + tile // 2)
        for j, variant in enumerate(variants):
            x, content = left + j * tile, np.fromfile(output / variant / row["image"], np.uint8)
            picture: Any = cv2.imdecode(content, cv2.IMREAD_COLOR)
            longest = max(picture.shape[:2])
            box = (0, 0, longest, longest) if i < len(shown) else middle(picture, row, side)
            picture = cv2.resize(crop(picture, box, 0), (side, side), interpolation=cv2.INTER_AREA)
            sheet[y : y + side, x : x + side] = picture
    grey = sheet if (sheet != sheet[..., :1]).any() else sheet[..., 0]
    if variants:
        write_atomically(output / "preview.png", cv2.imencode(".png", grey)[1].tobytes(), output)


def print_classes(ledger: sqlite3.Connection) -> None:
    """Print how many slices (and patients) of each class there are to train with, and what a comparison lacks."""
    where = "split = 'train' AND status = 'ok'"
    number = "count(*) || ' (' || coalesce(nullif(count(DISTINCT nullif(patient, '')), 0), 'unknown') || ')'"
    counts = dict(ledger.execute(f"SELECT label, {number} FROM files WHERE {where} GROUP BY label"))
    if not counts:
        return
    lines = [f"{label} {counts[label]}" for label in class_order(counts)]
    more = len(lines) - CLASSES_SHOWN
    print(
        f"training slices (patients): {', '.join(lines[:CLASSES_SHOWN])}{f', and {more} classes more' * (more > 0)}"
    )
    missing = [label for label in CLASSES if label not in counts]
    if missing and set(counts) & set(CLASSES[1:]):  # healthy alone: another question, bleed or none
        others = "; the others can be compared" * (len(counts) > 1)
        print(f"note: no usable training slice of {', '.join(missing)}{others}")
    if len(counts) == 1:
        print("note: only one class has usable slices; to compare, put another into TrainingData/<its name>/")


def print_report(ledger: sqlite3.Connection, written: int) -> int:
    """Print what became of every file, the bad ones with their reasons; return how many failed."""
    found, failed = count_files(ledger, "1"), count_files(ledger, "status = 'failed'")
    for row in islice(pages(ledger, "status = 'failed'"), FAILED_SHOWN):
        print(f"failed: {row['source']!r}: {row['reason']}", file=sys.stderr)
    if failed > FAILED_SHOWN:
        print(f"failed: {failed - FAILED_SHOWN} more, see manifest.csv", file=sys.stderr)
    several = "study != '' GROUP BY study HAVING count(DISTINCT nullif(patient, '')) > 1"
    apart = "in studies of several PatientIDs: who has several may be on both sides of a split"
    notes = {
        "without a usable window in the header, shown in the brain window": "window_source = 'default'",
        "with 12-bit values that had wrapped, repaired": "hu_repaired = '1'",
        "blank, or nearly so: not trained on": "blank = '1'",
        "without PatientID: any of them in training makes all results optimistic": "status = 'ok' AND patient = ''",
        apart: f"study IN (SELECT study FROM files WHERE {several})",
        "with warnings, see manifest.csv": "warnings != ''",
    }
    for note, where in notes.items():
        if number := count_files(ledger, where):
            print(f"note: {number} {note}")
    print(f"found {found} = written {written} + up to date {found - failed - written} + failed {failed}")
    return failed


def run(args: argparse.Namespace) -> int:
    """Convert what is missing or changed, write manifest and preview, report; return the exit status."""
    started, preview = time.monotonic(), args.output / "preview.png"
    with closing(open_ledger(args.output)) as ledger:
        settings = Settings(args.output.resolve(), args.roi_window, read_patient_key(args.output))
        rsna = args.rsna and find_rsna_inputs(args)
        if removed := list_inputs(ledger, rsna or find_inputs(args.raw_data), args.output):
            print(f"removed the pictures of {removed} inputs that are gone or were moved")
            preview.unlink(missing_ok=True)
        ledger.commit()
        try:
            written = convert_all(ledger, settings, args)
        finally:
            ledger.commit()
            write_manifest(ledger, args.output)
        if rsna:
            write_test_labels(rsna, args.output)
        else:
            print_classes(ledger)
        if not preview.exists():
            draw_preview(ledger, args.output)
        failed = print_report(ledger, written)
    print(f"{args.output}: {time.monotonic() - started:.1f} s, {args.dask or f'{args.jobs} processes'}")
    return 1 if failed else 0


# ---------------------------------------- where they come from: folders


def walk(top: Path) -> Iterator[Path]:
    """Yield what lies below a folder in a fixed order; of linked and unreadable folders, these themselves.

    Hidden files, and those that nobody would take for a slice, are passed over silently.
    """
    unreadable: list[OSError] = []
    for folder, subfolders, names in os.walk(top, onerror=unreadable.append):
        subfolders.sort()
        for name in sorted([*names, *(name for name in subfolders if Path(folder, name).is_symlink())]):
            lower = name.lower()
            if not (name[0] == "." or lower in STRAY_FILES or Path(lower).suffix in STRAY_ENDINGS):
                yield Path(folder, name)
    yield from (Path(err.filename) for err in unreadable)


def refusal_of_path(path: Path, root: Path) -> str:
    """Return why a path can't be used, '' where it can: links that loop, end nowhere or leave the input."""
    try:
        if path.is_dir():
            return "a linked or unreadable folder: put the folder itself here, check the permissions"
        inside = not path.is_symlink() or path.resolve(strict=True).is_relative_to(root)
    except (OSError, RuntimeError):  # ends nowhere or where one may not look; loops
        return "a link that ends nowhere, or where you may not look: remove it, or check the permissions"
    outside = "a link out of the input folder: copy the file here, or name its own folder with --raw-data"
    return "" if inside else outside


def find_classes(training: Path) -> dict[str, str]:
    """Return {folded name: class} of the usual classes and of all folders below TrainingData but hidden ones."""
    classes = {folded(label): label for label in CLASSES}
    for name in sorted(next(os.walk(training), ("", [], []))[1]):
        if name[0] != ".":
            classes.setdefault(folded(name), name)
    return classes


def find_inputs(raw_data: Path) -> Iterator[Input]:
    """Yield every file below TrainingData/<class>/ and TestingData/ but stray ones."""
    root, classes = raw_data.resolve(), find_classes(raw_data / "TrainingData")
    test_labels = read_test_labels(raw_data / "TestingData_labels.csv", classes)
    unused = set(test_labels)
    for path in walk(raw_data / "TrainingData") if (raw_data / "TrainingData").exists() else ():
        source = path.relative_to(raw_data).as_posix()
        folder, _, below = source.partition("/")[2].partition("/")
        label = classes.get(folded(folder), "") if below else ""
        homeless = "" if label else "in no class folder: move it to TrainingData/<its class>/"
        yield Input(source, path, source, "train", label, refusal_of_path(path, root) or homeless)
    for path in walk(raw_data / "TestingData") if (raw_data / "TestingData").exists() else ():
        source = path.relative_to(raw_data).as_posix()
        image = label_key(source.partition("/")[2])
        unused.discard(image)
        yield Input(source, path, source, "test", test_labels.get(image, ""), refusal_of_path(path, root))
    if unused:
        print(f"note: {len(unused)} rows of TestingData_labels.csv match no file, such as {min(unused)!r}")


def label_key(image: str) -> str:
    """Return the name by which a file and its row of TestingData_labels.csv find each other."""
    return without_dcm(unicodedata.normalize("NFC", image.replace("\\", "/")))


def read_test_labels(path: Path, classes: dict[str, str]) -> dict[str, str]:
    """Return {image: class} from TestingData_labels.csv, {} where there is none; classes as of find_classes."""
    if not path.exists():
        return {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (UnicodeError, csv.Error) as err:
        raise UsageError(f"{path} can't be read ({err}): save it as CSV UTF-8") from err
    if not {"image", "label"} <= set(reader.fieldnames or ()):
        begins = f"has to begin with the line image,label, with a comma, and not with {reader.fieldnames}"
        raise UsageError(f"{path} {begins}")
    pairs = [((row.get("image") or "").strip(), (row.get("label") or "").strip()) for row in rows]
    wrong = sorted({label for _, label in pairs if folded(label) not in classes})
    if wrong or not all(image for image, _ in pairs):
        known = ", ".join(class_order(classes.values()))
        raise UsageError(
            f"{path} needs in each row an image and a label of {known}; found {wrong or 'no image'}"
        )
    labels = {label_key(image): classes[folded(label)] for image, label in pairs}
    twice = [image for image, label in pairs if labels[label_key(image)] != classes[folded(label)]]
    if twice:
        raise UsageError(f"{path} gives {min(twice)!r} two labels: keep one row of it")
    return labels


def write_test_labels(inputs: Iterable[Input], output: Path) -> None:
    """Write TestingData_labels.csv (image,label) for what was chosen of a download."""
    rows = [f"{Path(i.target).name},{i.label}\n" for i in inputs if i.split == "test"]
    write_atomically(output / "TestingData_labels.csv", "".join(["image,label\n", *rows]).encode(), output)


# ---------------------------------------- where they come from: Kaggle's RSNA-2019 download


def find_rsna_files(rsna: Path) -> tuple[Path, dict[str, Path]]:
    """Return the label file of the unpacked download and {slice id: path} of its training slices."""
    for top in (rsna, rsna / "rsna-intracranial-hemorrhage-detection"):
        for folder in (top / "stage_2_train_images", top / "stage_2_train"):
            if (top / "stage_2_train.csv").is_file() and folder.is_dir():
                paths = (Path(entry) for entry in os.scandir(folder) if entry.is_file())
                return top / "stage_2_train.csv", {p.stem: p for p in paths if p.suffix == ".dcm"}
    beside = "no stage_2_train.csv beside stage_2_train_images/"
    raise UsageError(f"{rsna} has {beside}: unpack the download there, or give the folder of both")


def read_rsna_labels(path: Path, files: set[str], by: str):
    """Return the slices of stage_2_train.csv that have a file and one class, and count the others.

    The file has a row for each slice and subtype (ID_x_epidural,1) and one for any of them (ID_x_any,1).
    by: "subtype", of which a slice with several is left out, never forced into one class; or "any".
    Columns slice, label, subtypes (how many it has).
    """
    import pandas as pd  # here, as the worker processes need not wait for it

    try:
        rows = pd.read_csv(path, dtype=str, usecols=["ID", "Label"])
    except ValueError as err:  # of encoding, columns or their number
        wrong = f"{path} is no table with ID and Label ({one_line(err)})"
        raise UsageError(f"{wrong}: unpack the download again") from err
    rows["Label"] = pd.to_numeric(rows["Label"], errors="coerce")
    rows[["slice", "subtype"]] = rows["ID"].str.extract(r"(.+)_(\w+)$")
    subtypes = list(CLASSES[1:])
    columns = [*subtypes, "any"] if by == "any" else subtypes
    if absent := set(columns) - set(rows["subtype"]):
        raise UsageError(f"{path} has no row of {', '.join(sorted(absent))}: unpack the download again")
    different = rows.drop_duplicates(["ID", "Label"]).groupby(["slice", "subtype"])["Label"]
    table = different.agg(["size", "max"]).unstack()
    contradicting = (table["size"] > 1).any(axis=1)
    complete = table["max"].loc[~contradicting, columns].dropna() > 0
    count = complete[subtypes].sum(axis=1)
    healthy, bleed = RSNA_CLASSES["any"]
    if by == "any":
        usable, why_not = complete["any"] == (count > 0), "slices whose row 'any' contradicts their subtypes"
    else:
        usable, why_not, bleed = count <= 1, "slices with several subtypes", complete.idxmax(axis=1)
    chosen = pd.DataFrame({"label": np.where(count > 0, bleed, healthy), "subtypes": count})[usable]
    has_file = chosen.index.isin(files)
    left_out = {
        "files without a row": len(files.difference(rows["slice"])),
        "rows whose Label is no number": int(rows["Label"].isna().sum()),
        "rows that repeat another": int(rows.duplicated(["ID", "Label"]).sum()),
        "slices with contradicting rows": int(contradicting.sum()),
        "slices without a row for each subtype": int((~contradicting).sum()) - len(complete),
        why_not: int((~usable).sum()),
        "slices without a file": int((~has_file).sum()),
    }
    return chosen[has_file].rename_axis("slice").reset_index(), left_out


def read_patient_id(path: Path) -> str:
    """Return a file's PatientID, '' where it can't be read."""
    try:  # of what is converted, warnings go to the manifest
        with refusing("unreadable header", ""), warnings.catch_warnings(record=True):
            ds = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["PatientID"])
            return str(ds.get("PatientID") or "").strip()
    except (UnsuitableFile, MemoryError):
        return ""


def choose_slices(candidates, per_class: int, test_per_class: int, seed: int):
    """Choose balanced slices of as many patients as possible, none of them on both sides.

    candidates: DataFrame (slice, label, patient). Returns the chosen rows with a column split, train or test.
    Patients go to the test side class by class, the rarest class first, in proportion, at most half of a
    class's; then each side takes one slice of each patient, a second one of each, and so on.
    """
    rows = candidates.sample(frac=1, random_state=seed)
    test_patients: set[str] = set()
    rarer: set[str] = set()  # patients of the classes before: who of them trains, goes on training
    share = test_per_class / max(per_class + test_per_class, 1)
    counts = rows.groupby("label")["patient"].nunique().sort_values(kind="stable")
    for label in counts.index if test_per_class else ():
        sizes = rows[rows["label"] == label].groupby("patient", sort=False).size()
        most = len(sizes) // 2
        free = sizes.index[~sizes.index.isin(rarer - test_patients)]
        rarer.update(sizes.index)
        sizes = sizes[sorted(free, key=lambda patient: patient not in test_patients)]
        enough = 1 + (sizes.cumsum() < test_per_class).sum()  # so many patients have that many slices
        wanted = max(enough, min(test_per_class, math.ceil(share * len(sizes))))
        test_patients.update(sizes.index[: min(wanted, most)])
    rows = rows.assign(split=np.where(rows["patient"].isin(test_patients), "test", "train"))
    turn = rows.groupby(["label", "patient"]).cumcount().sort_values(kind="stable")
    rows = rows.loc[turn.index]
    quota = rows["split"].map({"train": per_class, "test": test_per_class})
    return rows[rows.groupby(["split", "label"]).cumcount() < quota].sort_values("slice")


def find_rsna_inputs(args: argparse.Namespace) -> list[Input]:
    """Choose slices of the RSNA download and return them; print what was taken, what was not, and why."""
    rsna, classes = args.rsna, RSNA_CLASSES[args.rsna_labels]
    quotas = {"train": args.per_class, "test": args.test // len(classes)}
    csv_path, paths = find_rsna_files(rsna)
    labels, left_out = read_rsna_labels(csv_path, set(paths), args.rsna_labels)
    shuffled = labels.sample(frac=1, random_state=args.seed)
    pool = shuffled.groupby("label").head(RSNA_CANDIDATES * sum(quotas.values())).sort_values("slice")
    pool["patient"] = [read_patient_id(paths[name]) for name in tqdm(pool["slice"], "patients", disable=None)]
    left_out["slices without a readable PatientID"] = nameless = int((pool["patient"] == "").sum())
    chosen = choose_slices(pool[pool["patient"] != ""], quotas["train"], quotas["test"], args.seed)
    left_out["usable slices that were not chosen"] = len(labels) - len(chosen) - nameless
    print_rsna_table(classes, labels, chosen, quotas)
    for reason, number in left_out.items():
        print(f"left out: {number} {reason}")
    if chosen.empty:
        raise UsageError(f"no slice of {rsna} can be used: the lines above say why")
    inputs = []
    for name, label, split in chosen[["slice", "label", "split"]].itertuples(index=False):
        folder = f"TrainingData/{label}" if split == "train" else "TestingData"
        source = paths[name].relative_to(rsna).as_posix()
        inputs.append(Input(source, paths[name], f"{folder}/{name}", split, label))
    return inputs


def print_rsna_table(classes: Iterable[str], labels, chosen, quotas: dict[str, int]) -> None:
    """Print slices and patients of each class: available, and taken for each split."""
    print(f"{'class':18}{'available':>10}{'training':>10}{'patients':>10}{'testing':>10}{'patients':>10}")
    for label in classes:
        line, short = f"{label:18}{(labels['label'] == label).sum():10}", []
        for split, quota in quotas.items():
            mine = chosen[(chosen["label"] == label) & (chosen["split"] == split)]
            line += f"{len(mine):10}{mine['patient'].nunique():10}"
            if len(mine) < quota:
                short.append(f"{quota - len(mine)} too few for {split}ing")
        print(line + ("  missing" if label not in set(chosen["label"]) else "  " + ", ".join(short)))
    if several := int((chosen["subtypes"] > 1).sum()):
        print(f"of those taken, {several} slices have several subtypes")


# ---------------------------------------- command line


def roi_window(text: str) -> tuple[float, float] | None:
    """Parse --roi-window: brain, header, or centre,width in HU."""
    if text in ("brain", "header"):
        return BRAIN_WINDOW if text == "brain" else None
    try:
        center, width = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not brain, header or centre,width such as 40,80"
        ) from None
    if not (math.isfinite(center) and math.isfinite(width) and width >= 1):
        raise argparse.ArgumentTypeError(f"{text!r}: the width has to be 1 HU or more")
    return center, width


def variant_names(text: str) -> list[str]:
    """Parse one of --variants: a folder name, its number, or all; or several with commas between them."""
    if "," in text:
        return [name for part in text.split(",") for name in variant_names(part.strip())]
    match = [name for name in KNOWN_VARIANTS if text in (name, name.split("_")[0], "all")]
    if len(match) != 1 and text != "all":
        unknown = f"is none of {', '.join(KNOWN_VARIANTS)}, nor the number of one, nor all"
        wrong = f"may be {' or '.join(match)}: write the whole name" if match else unknown
        raise argparse.ArgumentTypeError(f"{text!r} {wrong}")
    return match


def whole_number(text: str, smallest: int = 1) -> int:
    """Parse a whole number, the smallest or more, of 32 bits, as NumPy's seeds are."""
    if not text.isdecimal() or not smallest <= int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {smallest} to {2**32 - 1}")
    return int(text)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Return the command line's settings; usage errors end the program with status 2."""
    from dask.system import CPU_COUNT  # a container's limit counts; here, as worker processes need not wait

    (title, _, rest), as_it_is = __doc__.partition("\n"), argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=title, epilog=rest, formatter_class=as_it_is)

    def add(name: str, text: str, default: object, shown: object = None, **options) -> None:
        text += f" (default: {default if shown is None else shown})"
        parser.add_argument(name, default=default, help=text.replace("%", "%%"), **options)

    here, zero_or_more = Path(__file__).resolve().parent, partial(whole_number, smallest=0)
    add("--raw-data", "input folder", here / "raw_data", type=Path)
    add("--output", "output folder", here / "data_preprocessing", type=Path)
    choice = f"folder names or numbers of {' '.join(KNOWN_VARIANTS)}, or all"
    add("--variants", choice, [list(VARIANTS)], f"the first {len(VARIANTS)}", type=variant_names, nargs="+")
    add("--jobs", "processes", CPU_COUNT, f"all cores, here {CPU_COUNT}", type=whole_number)
    window = "window that ROI shows: brain (40,80), header (the file's own), or centre,width; =-20,90 below 0"
    add("--roi-window", window, "brain", type=roi_window, metavar="WINDOW")
    add("--force", "make everything again", False, "only what is missing or changed", action="store_true")
    add("--rsna", "Kaggle's unpacked RSNA-2019 download as the input", None, "off", type=Path, metavar="DIR")
    both = "subtype: slices with one subtype at most, six classes; any: all slices, healthy and hemorrhage"
    add("--rsna-labels", f"classes of --rsna, {both}", "subtype", choices=RSNA_CLASSES)
    add("--per-class", "training slices of each class, with --rsna", 1000, type=whole_number, metavar="N")
    add("--test", "testing slices, all classes together, with --rsna", 600, type=zero_or_more, metavar="N")
    add("--seed", "seed of the random choice of slices, with --rsna", 0, type=zero_or_more)
    add("--dask", "send the work to the Dask scheduler at this address", None, "off", metavar="ADDRESS")
    args = parser.parse_args(argv)
    args.input = args.rsna or args.raw_data
    args.variants = list(dict.fromkeys(chain.from_iterable(args.variants)))
    if args.rsna and 0 < args.test < (fewest := len(RSNA_CLASSES[args.rsna_labels])):
        parser.error(f"--test {args.test} is less than one slice a class: give 0, or {fewest} or more")
    if not args.rsna and not any((args.raw_data / s).is_dir() for s in ("TrainingData", "TestingData")):
        remedy = "put the slices there, or give the folder that holds them as --raw-data"
        parser.error(f"{args.raw_data} has neither TrainingData/<class>/ nor TestingData/: {remedy}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    args = parse_args(argv)
    go_on = "what was done stays, and the same command goes on from there"
    try:
        check_variants()
        return run(args)
    except UsageError as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    except (OSError, sqlite3.OperationalError) as err:  # of the output or the input folder, not of one file
        held = ": close it in other programs, or check the permissions" * isinstance(err, PermissionError)
        print(f"error: stopped, {err}{held}; {go_on}, once this is mended", file=sys.stderr)
        return 1
    except sqlite3.DatabaseError:
        print(f"error: {args.output / '.ledger.sqlite3'} {DAMAGED}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; {go_on}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # Jupyter's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # classes of any letters
    sys.exit(main())
