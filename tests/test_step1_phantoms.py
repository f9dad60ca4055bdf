"""Step 1's masks on phantoms, where the truth is known, and the sample pictures that ship."""

import importlib.util
import sys

import cv2
import numpy as np
import pytest
from conftest import ROOT

import Step1_Image_Preprocessing as step1

SLICES = 36


@pytest.fixture(scope="module")
def phantoms():
    """Return phantoms of all classes and levels at full size."""
    spec = importlib.util.spec_from_file_location("make_phantoms", ROOT / "raw_data" / "make_phantoms.py")
    module = sys.modules["make_phantoms"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = []
    for number in range(SLICES):
        label, rng = step1.CLASSES[number % 6], np.random.default_rng(number)
        patient = module.make_patient(number + 1, 7)
        made.append(module.render(patient, module.draw_level(label, rng), label, rng))
    return made


@pytest.fixture(scope="module")
def heads(phantoms):
    return [step1.head_mask(phantom.hu) for phantom in phantoms]


def test_nothing_of_the_head_is_lost(phantoms, heads):
    """Under 0.5 % of its soft tissue in the worst slice; measured in 60 slices: 0.3 % at most."""
    for phantom, head in zip(phantoms, heads, strict=True):
        soft = phantom.head & (phantom.hu >= 10) & (phantom.hu <= 75)
        assert soft.sum() > 5000
        assert (soft & ~head).sum() < 0.005 * soft.sum()


def test_nothing_of_table_and_holder_is_kept(phantoms, heads):
    """But a few mixed pixels where a holder touches the scalp."""
    for phantom, head in zip(phantoms, heads, strict=True):
        assert (phantom.table & head).sum() <= 10
    assert sum(phantom.table.sum() > 1000 for phantom in phantoms) > SLICES / 2


def test_no_bleed_is_taken_for_bone(phantoms, heads):
    for phantom, head in zip(phantoms, heads, strict=True):
        taken = step1.bone_mask(phantom.hu, head) & phantom.bleed
        assert taken.sum() <= 0.01 * phantom.bleed.sum()
    assert sum(phantom.bleed.any() for phantom in phantoms) == SLICES * 5 // 6


def test_the_skull_is_found(phantoms, heads):
    for phantom, head in zip(phantoms, heads, strict=True):
        dense = phantom.bone & head & (phantom.hu > step1.BONE_SEED_HU)
        assert (dense & ~step1.bone_mask(phantom.hu, head)).sum() < 0.05 * dense.sum()


# ---------------------------------------- what ships


def samples():
    """Return the 20 shipped slices, paths below raw_data: three of each class and two for testing."""
    raw = ROOT / "raw_data"
    folders = [(raw / "TrainingData" / label, 3) for label in step1.CLASSES] + [(raw / "TestingData", 2)]
    return [
        path.relative_to(raw) for folder, count in folders for path in sorted(folder.glob("*.dcm"))[:count]
    ]


@pytest.mark.parametrize("variant", step1.VARIANTS)
def test_shipped_pictures_are_what_step_1_makes_of_the_shipped_phantoms(variant, tmp_path):
    """A grey level of difference is left to other processors and OpenCV versions."""
    assert len(samples()) == 20
    for dicom in samples()[::4]:
        task = step1.Task("x", ROOT / "raw_data" / dicom, "x.png", (variant,))
        row = step1.process(task, step1.Settings(tmp_path, step1.BRAIN_WINDOW, b"k"))
        assert row["status"] == "ok", row
        made = cv2.imread(str(tmp_path / variant / "x.png"), cv2.IMREAD_UNCHANGED)
        kept = ROOT / "data_preprocessing" / variant / dicom.with_suffix(".png")
        assert np.abs(made.astype(int) - cv2.imread(str(kept), cv2.IMREAD_UNCHANGED)).max() <= 1
