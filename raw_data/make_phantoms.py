"""Draw head-CT phantoms of six classes and write them as DICOM: sample data that is nobody's scan.

    python raw_data/make_phantoms.py                                    # the sample data beside this script
    python raw_data/make_phantoms.py --train-per-class 1000 --test 600 --output D:/phantoms
    python raw_data/make_phantoms.py --seed 1 --jobs 4 --output /tmp/phantoms

Output:  <output>/TrainingData/<class>/PHANTOM-0001-1.dcm   CT Image Storage, 512 x 512
         <output>/TestingData/PHANTOM-0002-1.dcm            other patients than those of TrainingData
         <output>/TestingData_labels.csv                    image,label

A slice takes a quarter of a second on one core: the sample data half a minute, 6,600 slices half an hour, or
four minutes on eight cores.

One seed gives the same bytes each time, whatever --jobs is (for one set of library versions). The anatomy is
an atlas: tables of ellipses in millimetres at levels from vertex (0) to skull base (7), interpolated between
levels, then bent by smooth noise, scaled, turned, tilted and aged for each patient. x runs to the right of
the picture, y to the back of the head; the origin is the middle of the skull.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import joblib
import numpy as np
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from tqdm import tqdm

# ---------------------------------------- configuration: the data set

CLASSES = ("healthy", "intraparenchymal", "intraventricular", "subarachnoid", "subdural", "epidural")
SIZE = 512  # rows and columns
BLEEDING_SLICES = (1, 1, 2)  # of a bleeding patient, drawn from these
HEALTHY_SLICES = (1, 1, 2, 3)  # of a healthy patient
HEALTHY_SHARE = 0.4  # of the healthy slices that come from bleeding patients, at levels without the bleed
BRUISED_SHARE = 0.6  # of all patients: blood in the scalp, as bright as that in the head
OBVIOUS_SHARE = 0.65  # of the bleeding patients; the others' bleeds are subtle
OBVIOUS, SUBTLE = (0.6, 1.0), (0.15, 0.45)  # ranges of severity
LEVEL_GAP = 0.35  # between two slices of one patient

LEVELS = (
    1.7,
    3.6,
    6.3,
)  # lowest, likeliest, highest level: one triangle for all classes, as a level tells ...
RANGES = {  # ... no class, but that a bleed needs its place
    "healthy": ((0.6, 7.0),),
    "intraparenchymal": ((1.0, 6.6),),
    "intraventricular": ((2.35, 4.6), (5.65, 6.5)),
    "subarachnoid": ((1.0, 6.4),),
    "subdural": ((1.0, 6.2),),
    "epidural": ((1.0, 6.6),),
}


@dataclass(frozen=True)
class Scanner:
    """How one scanner writes its slices; the values are those of headers in public head-CT collections."""

    share: float  # of the patients
    bits: int
    signed: bool
    intercept: str
    center: str | list[str]
    width: str | list[str]
    rim: int  # HU outside the circular field of view
    implicit: bool = False


SCANNERS = (
    Scanner(0.24, 12, False, "-1024", ["00036", "00036"], ["00080", "00080"], -1000, implicit=True),
    Scanner(0.22, 16, True, "-1024", "30", "80", -3024),
    Scanner(0.14, 16, True, "-1024", "40", "150", -2048),
    Scanner(0.11, 12, False, "-1024", ["00040", "00040"], ["00080", "00080"], -1024),
    Scanner(0.10, 16, True, "-1024.000000", "35.000000", "135.000000", -1000),
    Scanner(0.05, 12, False, "-1024", ["00100", "00100"], ["00600", "00600"], -1000),
    Scanner(0.06, 16, True, "-1024", "50", "100", -2048),
    Scanner(0.04, 12, False, "-1000", ["00040", "00040"], ["00080", "00080"], -1000),
    Scanner(0.04, 16, True, "0", "40", "100", -3024),
)
SYNTAXES = (  # share of the patients, transfer syntax; None: as the scanner writes it, uncompressed
    (0.55, uid.JPEGLSLossless),
    (0.30, uid.JPEG2000Lossless),
    (0.06, uid.RLELossless),
    (0.09, None),
)
ENCODERS = {uid.JPEGLSLossless: "pyjpegls", uid.JPEG2000Lossless: "pylibjpeg", uid.RLELossless: "pydicom"}
UID_ROOT = "1.2.826.0.1.3680043.8.498."  # pydicom's own, free for all
IMPLEMENTATION_UID = uid.UID(UID_ROOT + "20200000000000000000000000000000000001")

# ---------------------------------------- configuration: tissues, HU

AIR, FAT, SKIN, MUSCLE, CSF, VITREOUS = -1000, -95, 45, 55, 6, 12
WHITE, GREY, NUCLEI, BRAINSTEM = 28.5, 37.0, 37.0, 31.0
DURA, SINUS, CALCIUM, TABLE_BONE, DIPLOE, BASE_BONE = 56, 62, 350, 1250, 650, 850
FOAM, WALL = -880, 260
OEDEMA = 19

# ---------------------------------------- configuration: the atlas, mm

OUTLINE = np.array(  # of the brain's box, by level
    [  # level, half length, half width, broader behind by, squareness, skull thickness, its edge's softness
        (0, 44, 36, 0.04, 2.05, 12.0, 5.0),
        (1, 66, 53, 0.09, 2.15, 8.5, 2.2),
        (2, 78, 63, 0.12, 2.20, 7.2, 1.2),
        (3, 84, 67, 0.14, 2.25, 6.6, 0.8),
        (4, 86, 68, 0.13, 2.30, 6.5, 0.7),
        (5, 85, 67, 0.10, 2.35, 6.5, 0.8),
        (6, 82, 65, 0.08, 2.35, 6.5, 1.0),
        (7, 79, 63, 0.06, 2.35, 6.5, 1.0),
    ]
)


@dataclass(frozen=True)
class Part:
    """A structure of the atlas: an ellipse at some levels, absent above the first and below the last.

    frames: rows of level, x, y, half axis across, half axis along, degrees that its front leans outwards.
    """

    paired: bool
    frames: tuple[tuple[float, float, float, float, float, float], ...]


def paired(*frames) -> Part:
    """Return a part on the right of the picture, which the left mirrors."""
    return Part(True, frames)


def single(*frames) -> Part:
    """Return a part at the midline."""
    return Part(False, frames)


# fmt: off
VENTRICLES = {
    "frontal horn": paired(
        (2.15, 11, -4, 1, 8, 3), (2.5, 11, -5, 4.5, 24, 3), (3, 10, -12, 5, 24, 8), (3.5, 9, -21, 5, 17, 14),
        (4, 8.5, -27, 4.5, 12, 22), (4.6, 9, -30, 3, 8, 30), (5, 10, -31, 1, 2, 30),
    ),
    "body": paired(
        (2.35, 13, 8, 1, 6, -10), (2.6, 14, 9, 4, 17, -12), (3.1, 15, 12, 3.5, 13, -18),
        (3.4, 16, 15, 1, 5, -20),
    ),
    "trigone": paired(
        (2.25, 15, 18, 1, 6, -18), (2.7, 17, 21, 5, 15, -20), (3.3, 22, 29, 7, 16, -24),
        (4, 27, 37, 6.5, 13, -16), (4.6, 30, 38, 3, 8, -8), (5, 32, 34, 1, 3, -8),
    ),
    "temporal horn": paired((4.7, 34, 2, 1, 2, 20), (5.4, 33, -5, 2, 8, 28), (6.3, 34, -8, 1, 4, 28)),
    "third ventricle": single(
        (3.4, 0, 0, 0.8, 3, 0), (4, 0, 1, 2.2, 12, 0), (4.7, 0, -4, 2, 9, 0), (5.1, 0, -8, 1, 3, 0),
    ),
    "fourth ventricle": single(
        (5.3, 0, 20, 1, 2, 0), (5.8, 0, 23, 5, 4.5, 0), (6.3, 0, 25, 7.5, 6, 0), (7, 0, 27, 4, 3, 0),
    ),
}
CISTERNS = {
    "around the midbrain": single((4.5, 0, 12, 8, 8, 0), (4.9, 0, 3, 17.5, 17, 0), (5.5, 0, 3, 17.5, 17, 0)),
    "quadrigeminal": single(
        (4, 0, 25, 3, 3, 0), (4.7, 0, 23, 10, 5, 0), (5.2, 0, 22, 7, 4, 0), (5.6, 0, 22, 2, 2, 0),
    ),
    "suprasellar": single(
        (4.6, 0, -18, 4, 5, 0), (5, 0, -20, 11, 8, 0), (5.5, 0, -19, 12, 7, 0), (5.8, 0, -18, 8, 3, 0),
    ),
    "star arm": paired((4.7, 14, -22, 2, 6, 70), (5.1, 17, -24, 2.4, 13, 66), (5.6, 16, -24, 2, 9, 66)),
    "prepontine": single((5.5, 0, -13, 16, 4, 0), (6.1, 0, -13, 18, 4, 0), (7, 0, -6, 14, 5, 0)),
    "cerebellopontine": paired((5.7, 18, -6, 3, 6, -35), (6.3, 21, -4, 4, 9, -40), (7, 18, 2, 4, 7, -40)),
    "magna": single((6.2, 0, 72, 3, 2, 0), (6.6, 0, 70, 7, 4, 0), (7, 0, 66, 11, 8, 0)),
    "insular": paired(
        (3.3, 45, -4, 0.8, 6, -4), (4, 42, -8, 1.7, 16, -8), (4.5, 39, -15, 2, 13, -22),
        (4.9, 33, -22, 2, 9, -55),
    ),
    "sylvian": paired(
        (3.1, 58, 4, 0.8, 9, -75), (3.6, 55, -2, 1.2, 12, -76), (4, 53, -14, 1.5, 13, -80),
        (4.7, 49, -23, 1.5, 14, -76), (5.2, 43, -26, 1.5, 15, -72), (5.5, 42, -27, 0.9, 12, -72),
    ),
}
NUCLEUS = {
    "caudate": paired(
        (2.8, 17, -14, 2, 12, 6), (3.4, 16, -22, 4, 12, 12), (4, 15, -25, 5, 8, 20),
        (4.7, 14, -27, 4, 5, 20),
    ),
    "lentiform": paired((3.5, 26, -5, 4, 9, -8), (4, 26, -6, 7.5, 15, -12), (4.7, 23, -13, 6, 9, -20)),
    "thalamus": paired((3.3, 10, 6, 5, 8, -20), (4, 11, 9, 8.5, 13, -22), (4.6, 9, 11, 6, 7, -20)),
}
BRAIN_STEM = {
    "tectum": single((4.6, 0, 9, 9, 7, 0), (4.9, 0, 7, 14, 10.5, 0), (5.5, 0, 6, 15, 11, 0)),
    "peduncle": paired((4.7, 8, -2, 3, 5, 20), (4.9, 9, -4, 6, 9, 22), (5.5, 9, -4, 7, 10, 24)),
    "pons": single(
        (5.4, 0, 3, 14, 12, 0), (6, 0, 4, 18, 14, 0), (6.6, 0, 6, 16, 13, 0), (7, 0, 10, 10, 10, 0),
    ),
}
CEREBELLUM = {
    "vermis": single(
        (4.7, 0, 40, 5, 8, 0), (5.1, 0, 42, 16, 18, 0), (5.6, 0, 46, 22, 26, 0), (6, 0, 46, 16, 26, 0),
    ),
    "hemisphere": paired(
        (5, 10, 44, 8, 10, 0), (5.4, 19, 46, 20, 22, 12), (6, 26, 46, 28, 29, 10), (7, 25, 44, 27, 28, 10),
    ),
}
BONES = {
    "petrous": paired(
        (5.6, 58, 11, 3, 9, -62), (6, 46, 5, 5, 25, -62), (6.5, 40, 2, 8, 29, -62), (7, 38, 3, 10, 30, -62),
    ),
    "mastoid": paired((5.9, 62, 16, 4, 6, 0), (6.5, 60, 19, 10, 13, 0), (7, 58, 21, 12, 16, 0)),
    "sphenoid wing": paired(
        (4.9, 62, -40, 2, 5, -65), (5.5, 53, -37, 3, 17, -70), (6.2, 45, -42, 4.5, 26, -74),
        (7, 41, -46, 5, 25, -78),
    ),
    "clinoid": paired((5.3, 11, -29, 2, 5, 10), (5.8, 12, -30, 3, 7, 15)),
    "clivus": single(
        (5.3, 0, -17, 3, 1.2, 0), (5.8, 0, -18, 10, 2.5, 0), (6.3, 0, -20, 13, 5, 0), (7, 0, -17, 13, 7, 0),
    ),
    "sphenoid": single((5.8, 0, -34, 8, 5, 0), (6.3, 0, -36, 17, 13, 0), (7, 0, -36, 20, 16, 0)),
    "orbital roof": paired(
        (5.4, 30, -68, 4, 10, 20), (5.75, 31, -69, 15, 13, -14), (6, 31, -69, 19, 19, -16),
        (6.3, 32, -69, 20, 24, -18), (7, 33, -70, 21, 26, -18),
    ),
    "ethmoid": single((5.9, 0, -66, 6, 12, 0), (6.4, 0, -66, 12, 24, 0), (7, 0, -68, 14, 26, 0)),
    "zygoma": paired((6, 56, -66, 3, 8, -35), (7, 56, -64, 4, 13, -30)),
}
FACE = single((5.9, 0, -76, 30, 8, 0), (6.2, 0, -74, 60, 24, 0), (7, 0, -72, 66, 32, 0))
ORBIT = paired(
    (5.95, 32, -72, 11, 7, -18), (6.1, 32, -71, 15, 17, -18), (6.5, 33, -72, 17.5, 22, -18),
    (7, 34, -73, 18, 23, -18),
)
GLOBE = paired((6.05, 34, -75, 5, 5, 0), (6.3, 34, -76, 10, 10, 0), (7, 34, -77, 12, 12, 0))
ORBIT_SOFT = {
    "superior rectus": paired(
        (5.9, 32, -70, 5, 5, -10), (6.1, 30, -66, 4.5, 11, 8), (6.35, 28, -62, 2, 7, 15),
    ),
    "optic nerve": paired((6.3, 26, -58, 1.4, 8, 22), (7, 26, -58, 1.8, 11, 22)),
    "medial rectus": paired((6.2, 19, -68, 1.4, 10, 10), (7, 19, -68, 2, 13, 10)),
    "lateral rectus": paired((6.2, 42, -62, 1.4, 10, 36), (7, 42, -61, 2, 13, 36)),
}
SINUS_AIR = {
    "sphenoid sinus": paired((6.2, 6, -36, 3, 4, 0), (6.5, 7.5, -37, 6, 8, 0), (7, 8.5, -38, 7.5, 11, 0)),
    "nasal": paired((6.6, 4, -74, 1.5, 8, 0), (7, 4, -78, 2.5, 12, 0)),
}
CELLS = {  # honeycombs of air in bone
    "mastoid cells": paired((6, 62, 17, 3, 5, 0), (6.5, 60, 20, 8, 10, 0), (7, 58, 22, 10, 13, 0)),
    "ethmoid cells": single((6, 0, -66, 4, 9, 0), (6.4, 0, -66, 10, 21, 0), (7, 0, -66, 12, 23, 0)),
    "middle ear": paired((6.3, 46, 5, 2, 4, -60), (7, 45, 5, 3, 6, -60)),
}
NOSE = single((6.4, 0, -90, 6, 6, 0), (7, 0, -93, 8, 14, 0))
PLEXUS = paired((3, 19, 28, 1.5, 3, -20), (3.5, 23, 33, 2.2, 4, -20), (4.1, 26, 37, 1.6, 3, -16))
PINEAL = single((4, 0, 18, 1.5, 1.5, 0), (4.3, 0, 18.5, 2.5, 2.5, 0), (4.7, 0, 19, 1.5, 1.5, 0))
# fmt: on

LATERAL = ("frontal horn", "body", "trigone")
BASE_LEVEL = 4.8  # below lie skull base and face
TENTORIUM = (4.7, 5.75)  # levels at which its edges are cut
JOINED = 3.45  # above this level these parts of a lateral ventricle are one

HEMATOMA_SITES = (  # (levels, x, y) of intraparenchymal bleeds: deep ones, lobar ones, posterior fossa
    ((3.4, 4.8), 26, -6),  # putamen
    ((3.3, 4.7), 13, 9),  # thalamus
    ((1.0, 3.4), 34, -32),  # frontal
    ((3.0, 5.0), 34, -48),
    ((1.0, 3.4), 38, 22),  # parietal
    ((2.6, 4.8), 40, 46),  # occipital
    ((4.4, 5.5), 46, 2),  # temporal
    ((5.3, 6.5), 44, -19),
    ((5.5, 6.7), 27, 50),  # cerebellum
)


# ---------------------------------------- patients


@dataclass(frozen=True)
class Patient:
    """What stays the same in all slices of one patient."""

    number: int
    seed: int
    scanner: int  # index in SCANNERS
    syntax: int  # index in SYNTAXES
    spacing: float  # mm a pixel
    kvp: int
    scale: tuple[float, float]  # of the head across and along
    egg: float
    skull: float  # thickness, of the atlas's
    scalp: float  # mm
    muscle: float  # mm at the temples
    turn: float  # degrees
    tilt: tuple[float, float]  # levels by which front and right lie lower than the middle
    shift: tuple[float, float]  # mm
    age: int
    atrophy: float  # 0 to 1
    noise: float  # HU
    cupping: float  # HU
    brightness: float  # HU, how the scanner's calibration is off
    holder: str
    plexus: bool
    pineal: bool
    falx_calcium: bool
    pale: float  # 0 to 1, how pale the white matter round the ventricles is, as in old age
    pallidum: float  # HU above the grey matter of calcified basal ganglia, 0 for none
    dense_sinus: float  # HU
    ventricles: float  # mm by which they are wider than the atlas's
    bruise: tuple[float, float, float, float, float]  # mm, radians, half width, level, HU: blood in the scalp
    side: int  # of the bleed, +1 or -1
    place: float  # of the bleed along its structure, 0 to 1
    kind: float  # of the bleed among its class's kinds, 0 to 1
    severity: float
    blood_hu: float


def make_patient(number: int, seed: int) -> Patient:
    """Draw patient PHANTOM-<number> of the data set with this seed; knows nothing of classes."""
    rng = np.random.default_rng([seed, number])
    age = int(rng.integers(20, 91))
    return Patient(
        number=number,
        seed=seed,
        scanner=int(rng.choice(len(SCANNERS), p=[scanner.share for scanner in SCANNERS])),
        syntax=int(rng.choice(len(SYNTAXES), p=[share for share, _ in SYNTAXES])),
        spacing=round(float(rng.uniform(0.44, 0.5)), 6),
        kvp=int(rng.choice([120, 120, 120, 130, 140])),
        scale=(float(rng.uniform(0.93, 1.05)), float(rng.uniform(0.93, 1.04))),
        egg=float(rng.uniform(-0.05, 0.05)),
        skull=float(rng.uniform(0.8, 1.3)),
        scalp=float(rng.uniform(3.5, 7.0)),
        muscle=float(rng.uniform(2, 11)),
        turn=float(rng.normal(0, 6)),
        tilt=tuple(map(float, rng.normal(0, (0.12, 0.08)))),
        shift=(float(rng.uniform(-8, 8)), float(rng.uniform(-7, 5))),
        age=age,
        atrophy=float(np.clip((age - 35) / 55 + rng.normal(0, 0.18), 0, 1)),
        noise=float(rng.uniform(3.0, 5.5)),
        cupping=float(rng.uniform(1, 4)),
        brightness=float(rng.uniform(-2.5, 2.5)),
        holder=str(rng.choice(["cradle", "cradle", "table", "table", "both", "none"])),
        plexus=bool(rng.random() < 0.2 + 0.6 * (age > 45)),
        pineal=bool(rng.random() < 0.6),
        falx_calcium=bool(rng.random() < 0.25),
        pale=float(rng.uniform(0.2, 1) if rng.random() < age / 90 - 0.2 else 0),
        pallidum=float(rng.uniform(15, 60) if age > 45 and rng.random() < 0.2 else 0),
        dense_sinus=float(rng.uniform(-4, 10)),
        ventricles=float((age - 55) / 40 + rng.normal(0, 0.8)),
        bruise=(
            float(rng.uniform(3, 13) if rng.random() < BRUISED_SHARE else 0),
            *map(float, rng.uniform((-np.pi, 0.25, 1, 50), (np.pi, 0.8, 6, 70))),
        ),
        side=int(rng.choice([-1, 1])),
        place=float(rng.random()),
        kind=float(rng.random()),
        severity=float(rng.uniform(*OBVIOUS) if rng.random() < OBVIOUS_SHARE else rng.uniform(*SUBTLE)),
        blood_hu=float(rng.uniform(56, 73)),
    )


def draw_level(label: str, rng: np.random.Generator) -> float:
    """Draw where a slice of this class lies: 0 at the vertex, 7 at the skull base."""
    while True:
        level = rng.triangular(*LEVELS) if rng.random() < 0.9 else rng.uniform(0.6, 7.0)
        if any(low <= level <= high for low, high in RANGES[label]):
            return float(level)


# ---------------------------------------- geometry


def soft(distance: np.ndarray, width: float) -> np.ndarray:
    """Turn a signed distance in mm, inside positive, into coverage from 0 to 1 with an edge this wide."""
    return np.clip(distance / width + 0.5, 0, 1)


def smooth_noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Return a smooth random field, float32 (size, size), deviation about 1, of so many bumps a side."""
    coarse = rng.standard_normal((cells + 3, cells + 3), np.float32)
    fine = cv2.resize(coarse, None, fx=size / cells, fy=size / cells, interpolation=cv2.INTER_CUBIC)
    start = int(1.5 * size / cells)
    return fine[start : start + size, start : start + size] * 1.3


def interpolate(part: Part, level: float) -> np.ndarray | None:
    """Return the part's x, y, half axes and angle at a level, None where it is absent."""
    frames = np.array(part.frames)
    if not frames[0, 0] <= level <= frames[-1, 0]:
        return None
    return np.array([np.interp(level, frames[:, 0], column) for column in frames[:, 1:].T])


@dataclass
class Frame:
    """Where each pixel lies: fields are float32 (size, size), mm unless said otherwise."""

    size: int
    pixel: float  # mm
    level: float
    x: np.ndarray  # atlas coordinates of the skull
    y: np.ndarray
    down: np.ndarray  # along gravity, the patient lying on the back
    theta: np.ndarray  # radians round the head, 0 in front, positive to the right
    radius: np.ndarray  # of the inner table in that direction
    depth: np.ndarray  # below the inner table, negative outside
    brain_x: np.ndarray  # atlas coordinates of the brain, which a bleed displaces
    brain_y: np.ndarray
    to_pixel: np.ndarray  # 2 x 3, from atlas to column and row
    tilt: tuple[float, float]  # levels by which front and right lie lower than the middle
    slack: float = 6.0  # mm by which displacement may move a structure

    def window(self, x: float, y: float, reach: float) -> tuple[slice, slice]:
        """Return the pixels within this reach of a point, as slices."""
        column, row = self.to_pixel @ (x, y, 1)
        reach = (reach + self.slack) * 1.08 / self.pixel
        low = np.clip(np.floor([row - reach, column - reach]), 0, self.size).astype(int)
        high = np.clip(np.ceil([row + reach, column + reach]), 0, self.size).astype(int)
        return np.s_[low[0] : high[0], low[1] : high[1]]


def outline_at(level: float) -> np.ndarray:
    """Return the columns of OUTLINE, but the level, at a level."""
    return np.array([np.interp(level, OUTLINE[:, 0], column) for column in OUTLINE[:, 1:].T])


def make_frame(patient: Patient, level: float, size: int, rng: np.random.Generator) -> Frame:
    """Lay the atlas over the pixels of a slice."""
    pixel = patient.spacing * SIZE / size
    angle = np.radians(patient.turn)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    half = (size - 1) / 2
    matrix = turn @ np.diag(patient.scale) / pixel
    offset = half + np.array(patient.shift) / pixel
    to_pixel = np.column_stack([matrix, offset]).astype(np.float64)
    inverse = np.linalg.inv(matrix).astype(np.float32)
    rows, columns = np.mgrid[:size, :size].astype(np.float32)
    columns -= np.float32(offset[0])
    rows -= np.float32(offset[1])
    x = inverse[0, 0] * columns + inverse[0, 1] * rows
    y = inverse[1, 0] * columns + inverse[1, 1] * rows
    fixed = np.random.default_rng([patient.seed, patient.number, 1])  # no head is symmetrical
    x += 1.0 * smooth_noise(fixed, size, 4) + 0.25 * smooth_noise(rng, size, 6)
    y += 1.0 * smooth_noise(fixed, size, 4) + 0.25 * smooth_noise(rng, size, 6)

    length, width, egg, square, *_ = outline_at(level)
    v = y / length
    u = x / (width * (1 + (egg + patient.egg) * np.clip(v, -1.5, 1.5)))
    if level > 4.6:  # the temples: the forehead is narrower than the temporal lobes
        u = u * (1 + np.interp(level, (4.6, 5.6, 6, 6.4, 7), (0, 0.14, 0.1, 0, -0.08)) * soft(-y - 50, 40))
    rho = np.maximum((np.abs(u) ** square + np.abs(v) ** square) ** (1 / square), 1e-3)
    radius = np.hypot(x, y) / rho
    return Frame(
        size=size,
        pixel=pixel,
        level=level,
        x=x,
        y=y,
        down=rows * pixel,
        theta=np.arctan2(x, -y),
        radius=radius,
        depth=(1 - rho) * radius,
        brain_x=x + 0.6 * smooth_noise(rng, size, 20) + 1.1 * smooth_noise(rng, size, 9),
        brain_y=y + 0.6 * smooth_noise(rng, size, 20) + 1.1 * smooth_noise(rng, size, 9),
        to_pixel=to_pixel,
        tilt=patient.tilt,
    )


def ellipse(frame: Frame, values: np.ndarray, edge: float, brain: bool, grow: float = 0.0):
    """Return the window and coverage of one ellipse; grow widens it by so many mm."""
    cx, cy, across, along, lean = values
    across, along = max(across + grow, 0.2), max(along + grow, 0.2)
    window = frame.window(cx, cy, max(across, along) + edge)
    x, y = (frame.brain_x, frame.brain_y) if brain else (frame.x, frame.y)
    dx, dy, lean = x[window] - np.float32(cx), y[window] - np.float32(cy), np.radians(lean)
    u = (dx * np.float32(np.cos(lean)) + dy * np.float32(np.sin(lean))) / np.float32(across)
    v = (dy * np.float32(np.cos(lean)) - dx * np.float32(np.sin(lean))) / np.float32(along)
    return window, soft((1 - np.sqrt(u * u + v * v)) * np.float32(min(across, along)), edge)


def sides(part: Part, frame: Frame):
    """Yield (side, ellipse) of a part where the slice cuts it: side +1 and -1 if it is paired, 0 if not."""
    front = -part.frames[0][2] / 85
    for side in (1, -1) if part.paired else (0,):
        level = frame.level + frame.tilt[0] * front + frame.tilt[1] * side
        values = interpolate(part, min(level, OUTLINE[-1, 0]))
        if values is not None:
            yield side, values * (side, 1, 1, 1, side) if part.paired else values


def cover(
    frame: Frame, parts, edge: float = 0.8, brain: bool = True, grow: float = 0.0, only: int = 0
) -> np.ndarray:
    """Return the coverage of all these parts together, float32 (size, size); only: of one side, +1 or -1."""
    total = np.zeros((frame.size, frame.size), np.float32)
    for part in parts:
        for side, values in sides(part, frame):
            if only and side != only:
                continue
            window, coverage = ellipse(frame, values, edge, brain, grow)
            np.maximum(total[window], coverage, out=total[window])
    return total


def blend(hu: np.ndarray, coverage: np.ndarray, value) -> None:
    """Paint a tissue over hu, in place."""
    hu += coverage * (value - hu)


# ---------------------------------------- bleeds: where, how big, what they push


@dataclass(frozen=True)
class Bleed:
    """A bleed as planned, before it is drawn."""

    label: str
    kind: str
    severity: float
    side: int
    hu: float
    angle: float = 0.0  # radians round the head, of bleeds at the skull
    half: float = 0.0  # mm, half its length along the skull
    thick: float = 0.0  # mm
    x: float = 0.0
    y: float = 0.0
    radius: float = 0.0  # mm, of a haematoma
    fill: float = 0.0  # of the ventricles


def plan_bleed(patient: Patient, level: float, label: str, severity: float | None) -> Bleed | None:
    """Decide on a bleed; it belongs to the patient, so that neighbouring slices show the same one."""
    if label == "healthy":
        return None
    s, side, place = patient.severity if severity is None else severity, patient.side, patient.place
    small = np.interp(level, (0, 1, 2), (0.5, 0.75, 1))  # bleeds near the vertex are smaller
    common = {
        "label": label,
        "severity": s,
        "side": side,
        "hu": patient.blood_hu + 5 * s + 5 * (label == "subarachnoid"),
    }
    if label == "epidural":
        low, high = (62, 108) if level > 4.8 else (40, 140)
        angle = np.radians(low + (high - low) * place)
        if level > 5.6 and patient.kind < 0.4:
            angle = np.radians(142)
        thick, half = (9 + 17 * s) * small, (19 + 17 * s) * small
        return Bleed(**common, kind="convexity", angle=side * angle, half=half, thick=thick)
    if label == "subdural":
        if patient.kind < 0.2 and level < 4.4:
            return Bleed(
                **common, kind="falx", thick=4 + 5 * s, half=(25 + 35 * s) * small, y=-15 + 50 * place
            )
        if patient.kind > 0.75 and 4.8 < level < 5.6:
            return Bleed(**common, kind="tentorium", thick=3 + 4 * s)
        angle, half = np.radians(75 + 30 * place), (55 + 45 * s) * small
        return Bleed(**common, kind="convexity", angle=side * angle, half=half, thick=(4 + 9 * s) * small)
    if label == "intraparenchymal":
        fitting = [site for site in HEMATOMA_SITES if site[0][0] <= level <= site[0][1]]
        _, x, y = fitting[int(patient.kind * len(fitting))]
        scale = np.interp(level, (1, 2.5), (0.65, 1))
        radius = (7 + 12 * s) * small * (0.75 if level > 5.4 else 1)
        return Bleed(**common, kind="haematoma", x=side * x * scale, y=y * scale, radius=radius)
    if label == "intraventricular":
        kind = "cast" if patient.kind < 0.45 or level > 5 else "level"
        return Bleed(**common, kind=kind, fill=0.25 + 0.45 * s)
    kind = "basal" if level > 3.8 else "convexity"
    return Bleed(**common, kind=kind, angle=side * np.radians(50 + 80 * place), half=45 + 55 * s)


def arc_thickness(frame: Frame, bleed: Bleed) -> np.ndarray:
    """Return how thick a bleed at the skull is in each pixel's direction, mm."""
    turn = np.angle(np.exp(1j * (frame.theta - bleed.angle))).astype(np.float32)
    along = np.abs(turn) * frame.radius / np.float32(bleed.half)
    power, root = (2.2, 1.0) if bleed.label == "epidural" else (2.6, 0.75)
    return np.float32(bleed.thick) * np.clip(1 - along**power, 0, 1) ** root


def beside(frame: Frame, bleed: Bleed) -> np.ndarray:
    """Return how near to the bleed's place at the skull each direction is, 0 to 1."""
    turn = np.angle(np.exp(1j * (frame.theta - bleed.angle))).astype(np.float32)
    return np.exp(-((turn * frame.radius / np.float32(bleed.half)) ** 4))


def displace(frame: Frame, bleed: Bleed | None) -> None:
    """Push the brain aside: change where its pixels take their anatomy from."""
    if bleed is None:
        return
    x, y = frame.brain_x, frame.brain_y
    if bleed.kind == "haematoma":
        dx, dy = x - bleed.x, y - bleed.y
        near = np.exp(-(dx * dx + dy * dy) / (2.2 * bleed.radius) ** 2)
        frame.brain_x, frame.brain_y = x - 0.5 * dx * near, y - 0.5 * dy * near
        push, cx, cy = 0.25 * bleed.radius * bleed.severity, bleed.x, bleed.y
    elif bleed.kind == "convexity" and bleed.label != "subarachnoid":
        push = 0.55 * bleed.thick
        cx, cy = 66 * np.sin(bleed.angle), -80 * np.cos(bleed.angle)
    else:
        return
    # the midline gives way, most in the middle of the head and nearest to the bleed
    weight = push * np.exp(-((x - 0.35 * cx) ** 2 + (y - 0.6 * cy) ** 2) / 55**2)
    length = max(np.hypot(cx, cy), 1)
    frame.brain_x = frame.brain_x + weight * np.float32(cx / length)
    frame.brain_y = frame.brain_y + weight * np.float32(cy / length)
    frame.slack += push + 0.5 * bleed.radius


# ---------------------------------------- the brain


@dataclass
class Brain:
    """What the drawing of the brain leaves for the bleeds: coverages, float32 (size, size)."""

    hu: np.ndarray
    sulci: np.ndarray
    cisterns: np.ndarray
    midline: np.ndarray  # interhemispheric fissure
    ventricles: np.ndarray


def polar_noise(rng: np.random.Generator, frame: Frame, around: int, deep: int) -> np.ndarray:
    """Return smooth noise in the chart (angle, depth): so many bumps round the head and in 60 mm of depth."""
    chart = rng.standard_normal((deep + 3, around), np.float32)
    chart = np.hstack([chart[:, -2:], chart, chart[:, :2]])
    fine = 1440 // around  # lookups of the nearest of so many values a bump: 0.3 mm
    chart = cv2.resize(chart, None, fx=fine, fy=48, interpolation=cv2.INTER_CUBIC)
    columns = ((frame.theta / (2 * np.pi) + 0.5) * (around * fine - 1)).astype(np.intp) + 2 * fine
    rows = (np.clip(frame.depth, 0, 60) / 60 * deep * 48 + 48).astype(np.intp)
    return 1.3 * chart[rows, columns]


def midline_presence(frame: Frame) -> np.ndarray:
    """Return where the hemispheres are apart: everywhere high up, in front and behind lower down."""
    level, y = frame.level, frame.brain_y
    front = soft(-y - np.interp(level, (2.2, 2.8, 4.0, 5.0, 6.0), (-60, 34, 42, 40, 46)), 6)
    if level < 4.9:
        back = soft(y - np.interp(level, (2.2, 2.8, 4.0, 4.9), (-60, 38, 44, 56)), 6)
        return np.maximum(front, back)
    return front


def squeeze(frame: Frame, bleed: Bleed | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the depth below the brain's surface, lower under a bleed, and how effaced sulci are, 0 to 1."""
    if bleed is not None and bleed.label in ("epidural", "subdural") and bleed.kind == "convexity":
        lowered = arc_thickness(frame, bleed) * np.clip(1 - frame.depth / 70, 0, 1)
        return frame.depth - lowered, soft(frame.x * bleed.side, 30) * min(1, bleed.thick / 12) * 0.85
    if bleed is not None and bleed.kind == "haematoma":
        away = np.hypot(frame.x - bleed.x, frame.y - bleed.y)
        return frame.depth, 0.9 * np.exp(-((away / (2.6 * bleed.radius)) ** 2))
    return frame.depth, np.zeros_like(frame.x)


def convex_cortex(frame: Frame, patient: Patient, bleed: Bleed | None, squeezed, rng) -> tuple:
    """Return sulci, the gap below the skull and grey matter: wavy lines run inwards, here deep, there not."""
    depth, tight = squeezed
    count = int(np.interp(frame.level, (0, 2), (22, 30)))
    wave = 1.5 * polar_noise(rng, frame, 14, 2) + 0.55 * polar_noise(rng, frame, 40, 4)
    apart = np.abs(np.sin(frame.theta * count / 2 + wave)) * (2 * frame.radius / count)  # mm from a sulcus
    reach = 13 + 7 * polar_noise(rng, frame, 40, 1)
    opening = (
        (0.55 + 1.7 * patient.atrophy) * (1 - tight) * np.interp(frame.level, (0, 2, 5), (1.35, 1.1, 0.85))
    )
    if bleed is not None and bleed.label == "subarachnoid":  # sulci full of blood are wide
        near = np.maximum(beside(frame, bleed), bleed.severity - 0.4)
        opening, reach = np.maximum(opening, (1.2 + 1.6 * bleed.severity) * near), reach + 7 * near
    taper = np.clip(1.15 - depth / np.maximum(reach, 1), 0, 1)
    sulci = soft(opening * taper - apart, 1.6) * soft(reach - depth, 4)
    gap = (0.5 + 2.0 * patient.atrophy) * (1 - tight)
    ribbon = soft(3.6 - apart, 1.6) * soft(reach + 3.2 - depth, 2)
    return sulci, soft(gap - depth, 1.2), np.maximum(ribbon, soft(3.8 + gap - depth, 1.8))


def medial_cortex(frame: Frame, patient: Patient, tight: np.ndarray, present: np.ndarray, rng) -> tuple:
    """Return the sulci of the medial surfaces, the fissure between these, and grey matter."""
    aside, wave = np.abs(frame.brain_x), 1.2 * smooth_noise(rng, frame.size, 14)
    fissure = soft(0.6 + 1.3 * patient.atrophy * (1 - 0.8 * tight) - aside, 1.0) * present
    bands = np.abs(np.sin(frame.brain_y * (np.pi / 13) + wave + np.sign(frame.brain_x))) * 4.2
    medial = soft(10 + 3 * smooth_noise(rng, frame.size, 12) - aside, 3) * present * soft(frame.depth - 3, 4)
    sulci = soft((0.4 + 1.4 * patient.atrophy) * (1 - tight) - bands, 1.6) * medial
    return sulci, fissure, present * np.maximum(soft(4.6 - aside, 1.6), soft(3.4 - bands, 1.6) * medial)


def cerebellar_cortex(frame: Frame, patient: Patient, rng: np.random.Generator) -> tuple:
    """Return the cerebellum, the fine clefts between its leaves, and its grey matter."""
    cerebellum = cover(frame, CEREBELLUM.values(), 2.0)
    behind = soft(frame.y - 14, 6) * np.float32(np.clip(frame.level - 5.5, 0, 0.5) * 2)
    curve = np.hypot(frame.x * 0.8, frame.brain_y - 18) * (np.pi / 5.5) + smooth_noise(rng, frame.size, 14)
    clefts = soft(0.5 + patient.atrophy - 3.5 * np.abs(np.sin(curve)), 1.5)
    clefts = 0.55 * clefts * soft(frame.depth - 1, 3) * soft(24 - frame.depth, 6)
    return (
        np.maximum(cerebellum, behind),
        clefts,
        0.85 - 0.55 * cover(frame, CEREBELLUM.values(), 5.0, grow=-9),
    )


def draw_brain(frame: Frame, patient: Patient, bleed: Bleed | None, rng: np.random.Generator) -> Brain:
    """Draw grey and white matter, CSF, dura and calcifications; the skull comes later."""
    squeezed, present = squeeze(frame, bleed), midline_presence(frame)
    sulci, surface, grey = convex_cortex(frame, patient, bleed, squeezed, rng)
    medial, fissure, medial_grey = medial_cortex(frame, patient, squeezed[1], present, rng)
    sylvian = cover(frame, [CISTERNS["sylvian"], CISTERNS["insular"]], 1.6, grow=3.8)
    sulci, grey = np.maximum(sulci, medial), np.maximum.reduce([grey, medial_grey, sylvian])
    if frame.level > 4.9:
        cerebellum, clefts, leaves = cerebellar_cortex(frame, patient, rng)
        blend(sulci, cerebellum, clefts)
        blend(grey, cerebellum, leaves)
        fissure = fissure * (1 - cerebellum)
    stem = cover(frame, BRAIN_STEM.values(), 1.2)
    cisterns = cover(frame, CISTERNS.values(), 1.0, grow=0.9 * patient.atrophy - 0.2) * (1 - stem)
    uneven = 1.2 * smooth_noise(rng, frame.size, 9)
    hu = (WHITE + (GREY - WHITE) * grey + uneven).astype(np.float32)
    blend(hu, cover(frame, NUCLEUS.values(), 3.0), NUCLEI)

    wide = float(np.clip(patient.ventricles, -1, 2.5))
    if bleed is not None and bleed.label == "intraventricular":
        wide = max(wide, 0.2) + 0.6 * bleed.severity  # the outflow is blocked
    if patient.pale:
        halo = cover(frame, [VENTRICLES[name] for name in LATERAL], 9.0, grow=wide + 6 * patient.pale)
        blend(hu, 0.8 * halo * soft(uneven + 1.2, 2.5), OEDEMA + 1)
    blend(hu, stem, BRAINSTEM)
    blend(hu, np.maximum.reduce([sulci, surface, fissure, cisterns]) * (1 - stem), CSF)
    ventricles = cover(frame, VENTRICLES.values(), 1.2, grow=wide)
    blend(hu, ventricles, CSF)
    draw_dura(hu, frame, patient, present)
    draw_calcium(hu, frame, patient, present, rng)
    return Brain(hu, sulci * (1 - ventricles), cisterns * (1 - ventricles), fissure, ventricles)


def draw_calcium(hu: np.ndarray, frame: Frame, patient: Patient, present: np.ndarray, rng) -> None:
    """Draw what is as bright as blood or brighter, and is none, in place."""
    speckles = smooth_noise(rng, frame.size, 90)
    if patient.pallidum:
        inner = cover(frame, [NUCLEUS["lentiform"]], 2.5, grow=-3)
        blend(hu, inner * soft(speckles + 0.4, 1.5), NUCLEI + patient.pallidum)
    if patient.plexus:
        blend(hu, cover(frame, [PLEXUS], 1.5) * soft(speckles + 0.7, 0.8), CALCIUM * 0.6)
    if patient.pineal:
        blend(hu, cover(frame, [PINEAL], 1.2, grow=-0.6), CALCIUM)
    if patient.falx_calcium and frame.level < 4.3:
        x = 0.5 * (frame.x + frame.brain_x)
        blend(hu, 0.6 * soft(0.7 - np.abs(x), 0.9) * soft(5 - np.abs(frame.y + 52), 4) * present, CALCIUM)


def tentorium(level: float, side: int, thick: float) -> np.ndarray:
    """Return the tentorium's edge on one side: from the middle, behind, forwards and outwards."""
    x, lean = np.interp(level, TENTORIUM, (10, 33)), np.interp(level, TENTORIUM, (12, 42))
    return np.array([side * x, 47, thick, 32, side * lean])


def draw_dura(hu: np.ndarray, frame: Frame, patient: Patient, present: np.ndarray) -> None:
    """Draw falx, tentorium and the venous sinuses, in place."""
    level, length, sinus = frame.level, outline_at(frame.level)[0], SINUS + patient.dense_sinus
    blend(hu, 0.8 * soft(0.55 - 0.5 * np.abs(frame.x + frame.brain_x), 0.9) * present, DURA)
    if level < 5.2:  # the sagittal sinus, cut behind and in front
        for end, size in ((1, 4.5), (-1, 2.5 if level < 3.5 else 1.2)):
            tip = np.array([0, end * (length - 2.2), size * 0.75, size, 0])
            window, coverage = ellipse(frame, tip, 1.5, brain=False)
            blend(hu[window], coverage, sinus)
    if TENTORIUM[0] < level < TENTORIUM[1]:
        for side in (1, -1):
            window, coverage = ellipse(frame, tentorium(level, side, 1.1), 1.2, brain=False)
            blend(hu[window], coverage * 0.5, DURA)
    if level > 5.2:  # the transverse sinuses, along the inner table behind
        turn = np.abs(frame.theta)
        behind = soft(turn - np.radians(118), 0.1) * soft(np.radians(172) - turn, 0.1)
        fade = np.interp(level, (5.2, 5.5, 6.4, 6.9), (0, 1, 1, 0)) * np.where(frame.x > 0, 1, 0.7)
        blend(hu, soft(4.0 - frame.depth, 1.5) * behind * fade, sinus)


# ---------------------------------------- blood


def blood_coverage(frame: Frame, brain: Brain, bleed: Bleed, rng: np.random.Generator) -> np.ndarray:
    """Return the coverage of blood, float32 (size, size)."""
    rough = 0.6 * smooth_noise(rng, frame.size, 24)
    if bleed.label == "intraparenchymal":
        return soft(within_haematoma(frame, bleed), 2.2)
    if bleed.label == "intraventricular":
        return ventricle_blood(frame, brain, bleed)
    if bleed.label == "subarachnoid":
        return cistern_blood(frame, brain, bleed, rng)
    if bleed.kind == "falx":
        x = 0.5 * (frame.x + frame.brain_x) * bleed.side
        taper = np.clip(1 - ((frame.y - bleed.y) / bleed.half) ** 4, 0, 1)
        band = np.minimum(x + 0.3, bleed.thick * taper + 0.6 * rough - x)
        return soft(band, 1.2) * soft(taper - 0.05, 0.1) * midline_presence(frame)
    if bleed.kind == "tentorium":
        band = np.zeros_like(frame.x)
        edge = tentorium(frame.level, bleed.side, bleed.thick)
        window, band[window] = ellipse(frame, edge, 2.0, brain=False)
        return band
    thick = arc_thickness(frame, bleed)
    return soft(thick + rough - frame.depth, 1.8) * soft(thick - 0.8, 1.0)


def within_haematoma(frame: Frame, bleed: Bleed) -> np.ndarray:
    """Return the distance inside a lobed haematoma, negative outside, mm; the same each time."""
    rng = np.random.default_rng(int(1e6 * bleed.radius))
    lobes = 0.16 * smooth_noise(rng, frame.size, 9) + 0.1 * smooth_noise(rng, frame.size, 20)
    return bleed.radius * (1 + lobes) - np.hypot(frame.x - bleed.x, 0.85 * (frame.y - bleed.y))


def oedema_coverage(frame: Frame, bleed: Bleed, rng: np.random.Generator) -> np.ndarray:
    """Return the coverage of the pale rim round a haematoma."""
    rim = (2.5 + 0.3 * bleed.radius) * (1 + 0.35 * smooth_noise(rng, frame.size, 8))
    return soft(within_haematoma(frame, bleed) + rim, 3.0) * (0.4 + 0.4 * bleed.severity)


def ventricle_blood(frame: Frame, brain: Brain, bleed: Bleed) -> np.ndarray:
    """Fill the ventricles: from the back up to a fluid level, or as a cast of one side and the middle."""
    filled = np.zeros_like(frame.x)
    low = frame.level < JOINED  # frontal horn, body and trigone are one chamber with one fluid level
    chambers = [[VENTRICLES[name] for name in LATERAL]] if low else []
    chambers += [[part] for part in VENTRICLES.values() if not low or not part.paired]
    for parts in chambers:
        for side in (1, -1) if parts[0].paired else (0,):
            chamber = cover(frame, parts, 1.2, grow=3.5, only=side) * brain.ventricles
            if not (chamber > 0.5).any():
                continue
            if bleed.kind == "cast":
                share = 1.1 if side in (0, bleed.side) or bleed.severity > 0.75 else 0.0
            else:
                share = bleed.fill * (1.0 if side in (0, bleed.side) else 0.6)
            down = frame.down[chamber > 0.5]
            surface = down.max() + 1 - share * (np.ptp(down) + 2)
            np.maximum(filled, chamber * soft(frame.down - surface, 1.5), out=filled)
    return filled


def cistern_blood(frame: Frame, brain: Brain, bleed: Bleed, rng: np.random.Generator) -> np.ndarray:
    """Fill cisterns, fissures and sulci: the base of the brain all round, or the sulci of one region."""
    near = beside(frame, bleed)
    patchy = np.clip(0.85 + 0.4 * smooth_noise(rng, frame.size, 9), 0, 1)
    one_side = 1 - (1 - bleed.severity) * soft(-frame.x * bleed.side, 12)
    cisterns = brain.cisterns * one_side
    if bleed.kind == "basal":
        sulci = np.maximum(near, 0.5 * bleed.severity) * patchy
        return np.maximum.reduce([cisterns, brain.midline * bleed.severity, brain.sulci * sulci])
    both = np.maximum(near, max(0.0, bleed.severity - 0.3)) * patchy
    return np.maximum.reduce([cisterns, brain.sulci * both, brain.midline * both * bleed.severity])


# ---------------------------------------- skull, skull base, face and scalp


@dataclass(frozen=True)
class Layers:
    """How thick the layers round the brain are in each direction, mm, and where each pixel lies in them."""

    skull: np.ndarray
    bruise: np.ndarray
    muscle: np.ndarray  # coverage of the directions in which there is any
    beyond: np.ndarray  # outside the inner table
    under_skin: np.ndarray


def measure_layers(frame: Frame, patient: Patient, rng: np.random.Generator) -> Layers:
    """Return the layers of this patient's head at this level."""
    level, turn = frame.level, np.abs(frame.theta)
    low = np.float32(np.clip(level - 4.8, 0, 1))
    front = soft(np.radians(24) - turn, 0.25)
    temple = soft(0.5 - np.abs(turn - np.radians(68)), 0.5)
    behind = soft(turn - np.radians(150), 0.5)
    skull = outline_at(level)[4] * patient.skull * (1 + 0.06 * polar_noise(rng, frame, 12, 1))
    skull = skull * (1 + 0.7 * low * front + 0.3 * behind - 0.35 * low * temple)
    temporal = np.float32(np.clip((level - 3.2) / 1.6, 0, 1)) * temple
    thick, angle, half, center, _ = patient.bruise
    away = np.abs(np.angle(np.exp(1j * (frame.theta - angle)))).astype(np.float32) / np.float32(half)
    bruise = np.float32(thick * np.clip(1.8 - abs(level - center), 0, 1)) * np.exp(-(away**3))
    scalp = patient.scalp * (1 + 0.15 * polar_noise(rng, frame, 9, 1)) + bruise
    scalp = scalp + patient.muscle * temporal + 10 * behind * np.clip(level - 6, 0, 1)
    under_skin = skull + scalp + frame.depth
    return Layers(skull, bruise, np.maximum(temporal, behind * low), -frame.depth, under_skin)


def draw_scalp(hu: np.ndarray, layers: Layers, patient: Patient, rng: np.random.Generator) -> None:
    """Draw muscle on the bone, blood, fat and skin, in place."""
    outer = (FAT + 12 * smooth_noise(rng, len(hu), 40)).astype(np.float32)
    on_bone = layers.beyond - layers.skull
    blend(outer, 0.95 * layers.muscle * soft(on_bone - 0.8, 1.0) * soft(layers.under_skin - 3, 1.5), MUSCLE)
    blend(outer, soft(1.15 * layers.bruise - on_bone, 1.5) * soft(layers.bruise - 1.5, 1), patient.bruise[4])
    blend(outer, soft(1.8 - layers.under_skin, 0.8), SKIN)
    np.copyto(hu, outer, where=on_bone > 0)


def draw_calvaria(hu: np.ndarray, frame: Frame, layers: Layers, rng: np.random.Generator):
    """Draw outer table, diploe and inner table, in place; return their coverage. The face has none."""
    in_bone = np.minimum(layers.beyond, layers.skull - layers.beyond)
    bone = soft(layers.beyond, outline_at(frame.level)[5]) * soft(layers.skull - layers.beyond, 0.8)
    bone_hu = np.full_like(hu, TABLE_BONE)
    blend(bone_hu, soft(in_bone - 0.27 * layers.skull, 1.4), DIPLOE + 120 * smooth_noise(rng, len(hu), 70))
    if frame.level > BASE_LEVEL:
        open_face = cover(frame, [FACE], 2.0, brain=False) * soft(-frame.y - 52, 8)
        bone = bone * (1 - 0.9 * open_face)
    blend(hu, bone, bone_hu)
    return bone


def draw_base(hu: np.ndarray, frame: Frame, layers: Layers, rng: np.random.Generator) -> np.ndarray:
    """Draw the bones of skull base and face, in place; return their coverage."""
    rough = replace(
        frame,
        x=frame.x + 1.2 * smooth_noise(rng, frame.size, 22),
        y=frame.y + 1.2 * smooth_noise(rng, frame.size, 22),
    )
    base = cover(rough, BONES.values(), 1.6, brain=False) * (layers.beyond < layers.skull + 1)
    blend(hu, base, BASE_BONE + 220 * smooth_noise(rng, frame.size, 50))
    return base


def draw_orbits(hu: np.ndarray, frame: Frame, layers: Layers) -> np.ndarray:
    """Draw fat, muscles, optic nerves and globes, in place; return the coverage of the orbits."""
    orbit = cover(frame, [ORBIT], 1.0, brain=False) * (layers.under_skin > 2)
    blend(hu, orbit, FAT)
    blend(hu, orbit * cover(frame, ORBIT_SOFT.values(), 1.0, brain=False), MUSCLE - 5)
    blend(hu, cover(frame, [GLOBE], 1.0, brain=False), MUSCLE - 10)
    blend(hu, cover(frame, [GLOBE], 1.0, brain=False, grow=-1.6), VITREOUS)
    return orbit


def air_coverage(frame: Frame, layers: Layers, rng: np.random.Generator) -> np.ndarray:
    """Return the coverage of air: in the sinuses, the nose, and the honeycombs of mastoid and ethmoid."""
    size, level = frame.size, frame.level
    honeycomb = soft(smooth_noise(rng, size, 60) + 0.25, 0.5)
    cells = cover(frame, CELLS.values(), 1.0, brain=False) * honeycomb
    spread = np.radians(8 + 12 * np.interp(level, (4.75, 5.4, 5.8, 6.2), (0, 1, 0.5, -1)))
    spread = spread * (1 + 0.25 * smooth_noise(rng, size, 5))
    frontal = soft(np.minimum(layers.beyond, layers.skull - layers.beyond) - 2.2, 0.8)
    frontal = frontal * soft(spread - np.abs(frame.theta), 0.05) * soft(np.abs(frame.x + 3) - 0.6, 0.6)
    sinuses = cover(frame, SINUS_AIR.values(), 0.8, brain=False)
    return np.maximum.reduce([cells, sinuses, frontal]) * (layers.under_skin > 4)


def draw_skull(hu: np.ndarray, frame: Frame, patient: Patient, rng: np.random.Generator):
    """Draw all outside the brain, in place; return coverage of bone and of the brain's box, and the head."""
    layers = measure_layers(frame, patient, rng)
    nose = cover(frame, [NOSE], 0.6, brain=False)
    inside = soft(frame.depth, outline_at(frame.level)[5])
    draw_scalp(hu, layers, patient, rng)
    low = frame.level > BASE_LEVEL
    if low:
        face = cover(frame, [FACE], 2.0, brain=False)
        blend(hu, face * (layers.under_skin > 2.5), FAT + 70 * soft(smooth_noise(rng, frame.size, 26), 1.0))
    bone = draw_calvaria(hu, frame, layers, rng)
    if low:
        base = draw_base(hu, frame, layers, rng)
        orbits = draw_orbits(hu, frame, layers)
        air = air_coverage(frame, layers, rng)
        blend(hu, air, AIR)
        bone = np.maximum(bone, base) * (1 - orbits) * (1 - air)
        inside = inside * (1 - np.maximum(face, base))
        blend(hu, nose * (layers.under_skin < 3), SKIN - 20)
    return bone, inside, (layers.under_skin > 0) | (nose > 0.5)


def draw_holder(hu: np.ndarray, frame: Frame, patient: Patient, head: np.ndarray) -> np.ndarray:
    """Draw table and head holder round the head, in place; return them, bool, foam included."""
    columns = (np.arange(frame.size, dtype=np.float32) - (frame.size - 1) / 2) * frame.pixel
    x, y = np.meshgrid(columns, columns)
    solid, foam = np.zeros_like(hu), np.zeros_like(hu)
    bottom, half = float(y[head].max()), float(np.abs(x[head]).max())
    if patient.holder in ("cradle", "both"):
        q = np.hypot(x / (half + 13), (y - bottom + 85) / 96)
        out = (q - 1) * 95
        arc = soft(y - (bottom - 95), 3)
        solid = np.maximum(solid, soft(1.4 - np.abs(out), 0.6) * arc)
        foam = np.maximum(foam, soft(-out, 1) * soft(out + 9, 3) * soft(y - bottom + 60, 4))
    if patient.holder in ("table", "both"):
        out = np.hypot(x, (y - bottom - 14 + 190)) - 190
        solid = np.maximum(solid, soft(1.8 - np.abs(out), 0.6) * soft(115 - np.abs(x), 2))
        foam = np.maximum(foam, soft(out, 1) * soft(22 - out, 2) * soft(112 - np.abs(x), 2))
    reach = max(1, round(4 / frame.pixel))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    near = cv2.dilate(head.astype(np.uint8), disc) > 0
    foam, solid = foam * ~head, solid * ~near
    blend(hu, foam, FOAM)
    blend(hu, solid, WALL)
    return ((solid > 0.05) | (foam > 0.5)) & ~head


# ---------------------------------------- the scanner


def reconstruction_noise(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return noise as filtered back projection leaves it: band-limited, deviation 1, float32."""
    white = rng.standard_normal((size, size), np.float32)
    fine = cv2.GaussianBlur(white, (0, 0), max(0.3, 0.95 * size / SIZE))
    band = fine - cv2.GaussianBlur(fine, (0, 0), 5.0 * size / SIZE)
    return band / band.std()


def scan(
    hu: np.ndarray, frame: Frame, patient: Patient, head: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Blur, cup, streak and make noisy what was drawn, as a scanner does; HU, float32."""
    scale = frame.size / SIZE
    hu = cv2.GaussianBlur(hu, (0, 0), 0.85 * max(scale, 0.5))
    halo = cv2.GaussianBlur(head.astype(np.float32), (0, 0), 3 * scale)
    artefact = patient.brightness + patient.cupping * (np.exp(-np.abs(frame.depth) / 9) - 0.4)
    level = frame.level
    if level > 5.5:  # beam hardening between the petrous bones, and streaks that fan out from the base
        strength = min(level - 5.5, 1)
        lines = cv2.resize(
            rng.standard_normal((40, 3), np.float32), (frame.size, frame.size), interpolation=cv2.INTER_CUBIC
        )
        dark = np.exp(-(((frame.y - 4) / 9) ** 2)) * soft(48 - np.abs(frame.x), 20)
        artefact = artefact - strength * dark * (5 + 5 * lines)
        fan = np.arctan2(frame.y + 10, np.abs(frame.x) - 55)
        artefact = artefact + 1.6 * strength * np.sin(fan * 31 + 2 * lines) * np.exp(
            -(((frame.y - 6) / 26) ** 2)
        )
    noise = reconstruction_noise(rng, frame.size) * patient.noise * (1 + 0.25 * (level > 5.5))
    noise = noise * (0.85 + 0.3 * np.clip(frame.depth / 60, 0, 1))
    return hu + (artefact + noise) * np.clip(halo * 1.2 - 0.1, 0, 1)


# ---------------------------------------- one slice


@dataclass(frozen=True)
class Phantom:
    """A slice and what is true of it; hu int16, the others bool, all (size, size)."""

    hu: np.ndarray
    head: np.ndarray  # within the skin, sinuses included
    bone: np.ndarray
    bleed: np.ndarray  # more than half blood, and no bone mixed in
    table: np.ndarray  # table, head holder and foam
    ventricles: np.ndarray
    depth: np.ndarray  # float32, mm below the inner table
    kind: str  # of the bleed
    severity: float


def render(
    patient: Patient,
    level: float,
    label: str,
    rng: np.random.Generator,
    size: int = SIZE,
    severity: float | None = None,
) -> Phantom:
    """Draw one slice of a patient at a level; severity, 0 to 1, replaces the patient's own."""
    frame = make_frame(patient, level, size, rng)
    bleed = plan_bleed(patient, level, label, severity)
    displace(frame, bleed)
    brain = draw_brain(frame, patient, bleed, rng)
    hu, blood = brain.hu, np.zeros_like(brain.hu)
    if bleed is not None:
        blood = blood_coverage(frame, brain, bleed, rng)
        if bleed.kind == "haematoma":
            blend(hu, oedema_coverage(frame, bleed, rng) * (hu > 20), OEDEMA)
        blend(hu, blood, bleed.hu + 2.5 * smooth_noise(rng, size, 12))
    bone, inside, head = draw_skull(hu, frame, patient, rng)
    hu[~head] = AIR
    table = draw_holder(hu, frame, patient, head)
    spread = 0.85 * max(size / SIZE, 0.5)
    mixed = cv2.GaussianBlur(bone, (0, 0), 1.2 * spread)
    hu = scan(hu, frame, patient, head, rng)
    corner = np.hypot(*np.meshgrid(*[np.arange(size) - (size - 1) / 2] * 2)) > size / 2
    hu[corner] = np.where(head[corner], hu[corner], SCANNERS[patient.scanner].rim)
    return Phantom(
        hu=np.clip(np.rint(hu), -3024, 3000).astype(np.int16),
        head=head,
        bone=(bone > 0.5) & head,
        bleed=(blood * inside > 0.5) & (mixed < 0.01) & head,
        table=table & ~corner,
        ventricles=(brain.ventricles > 0.5) & (inside > 0.5),
        depth=frame.depth,
        kind=bleed.kind if bleed else "",
        severity=bleed.severity if bleed else 0.0,
    )


# ---------------------------------------- DICOM


def make_uid(*parts: object) -> str:
    """Return a UID that depends on these parts alone."""
    return uid.generate_uid(prefix=UID_ROOT, entropy_srcs=["make_phantoms", *map(str, parts)])


def to_dicom(hu: np.ndarray, patient: Patient, level: float, slice_number: int) -> Dataset:
    """Return a CT Image Storage data set, compressed if the patient's transfer syntax is (PS3.3 A.3.3)."""
    scanner, (_, syntax) = SCANNERS[patient.scanner], SYNTAXES[patient.syntax]
    rng = np.random.default_rng([patient.seed, patient.number, 2])
    ids = (patient.seed, patient.number)
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = (
        uid.ImplicitVRLittleEndian if scanner.implicit else uid.ExplicitVRLittleEndian
    )
    ds.file_meta.ImplementationClassUID = IMPLEMENTATION_UID
    ds.file_meta.ImplementationVersionName = "MAKE_PHANTOMS"
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = uid.CTImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = make_uid(*ids, "slice", slice_number)
    ds.StudyInstanceUID, ds.SeriesInstanceUID = make_uid(*ids, "study"), make_uid(*ids, "series")
    ds.FrameOfReferenceUID = make_uid(*ids, "frame")
    ds.ImageType, ds.Modality, ds.BodyPartExamined = ["ORIGINAL", "PRIMARY", "AXIAL"], "CT", "HEAD"
    ds.Manufacturer, ds.SeriesDescription = "make_phantoms.py", "Phantom, drawn by a program"
    ds.PatientID, ds.PatientName = f"PHANTOM-{patient.number:04}", f"Phantom^{patient.number:04}"
    ds.PatientAge, ds.PatientSex, ds.PatientBirthDate = f"{patient.age:03}Y", "O", ""
    ds.StudyDate = ds.StudyTime = ds.AccessionNumber = ds.ReferringPhysicianName = ""
    ds.StudyID, ds.SeriesNumber, ds.AcquisitionNumber = "1", 2, 1
    ds.PatientPosition, ds.PositionReferenceIndicator, ds.KVP = "HFS", "", patient.kvp
    ds.InstanceNumber = int(rng.integers(1, 40)) + round((7 - level) * 4) + slice_number
    corner = -(SIZE - 1) / 2 * patient.spacing
    height = rng.uniform(-600, 600) - 18 * level  # mm
    ds.ImagePositionPatient = [f"{corner:.4f}", f"{corner:.4f}", f"{height:.2f}"]
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.PixelSpacing, ds.SliceThickness = [f"{patient.spacing:.6f}"] * 2, "5"
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = hu.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, scanner.bits, scanner.bits - 1
    ds.PixelRepresentation = int(scanner.signed)
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = scanner.intercept, "1", "HU"
    ds.WindowCenter, ds.WindowWidth = scanner.center, scanner.width
    low, high = (-(2**15), 2**15 - 1) if scanner.signed else (0, 2**scanner.bits - 1)
    stored = np.clip(hu.astype(np.int32) - int(float(scanner.intercept)), low, high)
    ds.PixelData = stored.astype("<i2" if scanner.signed else "<u2").tobytes()
    ds["PixelData"].VR = "OW"
    if syntax:
        ds.compress(syntax, encoding_plugin=ENCODERS[syntax], generate_instance_uid=False)
    return ds


# ---------------------------------------- the data set


@dataclass(frozen=True)
class Slice:
    """One file to write."""

    path: str  # below the output folder
    label: str
    patient: int
    number: int  # among the patient's slices, from 1
    level: float


def plan_patients(wanted: dict[str, int], rng: np.random.Generator) -> list[list[str]]:
    """Return, for each patient of a split, the labels of the slices; of each class as many as wanted."""
    patients = []
    for label in CLASSES[1:]:
        left = wanted[label]
        while left:
            count = min(left, int(rng.choice(BLEEDING_SLICES)))
            patients.append([label] * count)
            left -= count
    healthy = wanted["healthy"]
    mixed = min(round(HEALTHY_SHARE * healthy), len(patients))
    for index in rng.permutation(len(patients))[:mixed]:
        patients[index].append("healthy")
    left = healthy - mixed
    while left:
        count = min(left, int(rng.choice(HEALTHY_SLICES)))
        patients.append(["healthy"] * count)
        left -= count
    return patients


def draw_levels(labels: list[str], rng: np.random.Generator) -> list[float]:
    """Draw the levels of one patient's slices, apart from each other; healthy ones farther from the bleed."""
    levels: list[float] = []
    for label in labels:
        for _ in range(200):
            level = draw_level(label, rng)
            gaps = [
                abs(level - other) / (1 if label == of else 3)
                for other, of in zip(levels, labels, strict=False)
            ]
            if min(gaps, default=9.0) >= LEVEL_GAP:
                break
        levels.append(level)
    return levels


def plan_slices(train_per_class: int, test: int, seed: int) -> list[Slice]:
    """Decide on all files: classes, patients (each in one split only) and levels."""
    rng = np.random.default_rng([seed, 0])
    train = plan_patients(dict.fromkeys(CLASSES, train_per_class), rng)
    shares = {label: test // len(CLASSES) + (i < test % len(CLASSES)) for i, label in enumerate(CLASSES)}
    patients = [("train", labels) for labels in train] + [
        ("test", labels) for labels in plan_patients(shares, rng)
    ]
    slices = []
    for number, index in enumerate(rng.permutation(len(patients)), 1):  # so that numbers tell nothing
        split, labels = patients[index]
        levels = draw_levels(labels, rng)
        for count, (level, label) in enumerate(sorted(zip(levels, labels, strict=True)), 1):
            folder = f"TrainingData/{label}" if split == "train" else "TestingData"
            slices.append(Slice(f"{folder}/PHANTOM-{number:04}-{count}.dcm", label, number, count, level))
    return slices


def write_slice(item: Slice, seed: int, output: Path) -> None:
    """Draw one slice and write its file."""
    cv2.setNumThreads(1)
    patient = make_patient(item.patient, seed)
    rng = np.random.default_rng([seed, item.patient, 2 + item.number])
    hu = render(patient, item.level, item.label, rng).hu
    to_dicom(hu, patient, item.level, item.number).save_as(output / item.path, enforce_file_format=True)


def write_all(args: argparse.Namespace) -> int:
    """Write the data set and return the number of files; what an earlier run left there goes."""
    slices = plan_slices(args.train_per_class, args.test, args.seed)
    folders = [args.output / "TrainingData" / label for label in CLASSES] + [args.output / "TestingData"]
    planned = {args.output / item.path for item in slices}
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("PHANTOM-*.dcm"):
            if path not in planned:
                path.unlink()
    work = joblib.Parallel(n_jobs=args.jobs, return_as="generator_unordered")
    done = work(joblib.delayed(write_slice)(item, args.seed, args.output) for item in slices)
    for _ in tqdm(done, total=len(slices), desc="drawing", unit="slice", disable=None):
        pass
    rows = sorted(
        (Path(item.path).name, item.label) for item in slices if item.path.startswith("TestingData")
    )
    text = "".join(f"{name},{label}\n" for name, label in [("image", "label"), *rows])
    (args.output / "TestingData_labels.csv").write_bytes(text.encode())
    return len(slices)


# ---------------------------------------- command line


def whole_number(smallest: int, largest: int = 10**6):
    """Return a parser of whole numbers in this range."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not smallest <= int(text) <= largest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {smallest} to {largest}")
        return int(text)

    return parse


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Return the command line's settings; usage errors end the program with status 2."""
    title, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=title, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    count, cores = whole_number(1), joblib.cpu_count()
    here = Path(__file__).resolve().parent
    add = parser.add_argument
    add(
        "--train-per-class",
        type=count,
        default=15,
        metavar="N",
        help="training slices of each class (default: 15)",
    )
    add(
        "--test",
        type=whole_number(0),
        default=15,
        metavar="N",
        help="test slices, all classes together (default: 15)",
    )
    add(
        "--seed",
        type=whole_number(0, 2**32 - 1),
        default=0,
        metavar="N",
        help="of all that is drawn (default: 0)",
    )
    add(
        "--jobs", type=count, default=cores, metavar="N", help=f"processes (default: all cores, here {cores})"
    )
    add(
        "--output",
        type=Path,
        default=here,
        metavar="DIR",
        help="output folder (default: that of this script)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    args = parse_args(argv)
    try:
        count = write_all(args)
    except OSError as err:
        print(f"error: stopped, {err}; free the folder or name another one with --output", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again", file=sys.stderr)
        return 130
    print(f"{args.output}: {count} slices")
    return 0


if __name__ == "__main__":
    sys.exit(main())
