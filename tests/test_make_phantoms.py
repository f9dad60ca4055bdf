"""The phantoms: anatomy, bleeds where they belong, valid DICOM, the same bytes each time, and no shortcut.

Figures by hand, see no_shortcut below: 1,200 phantoms at 256 px (seed 11, 200 a class, 5 folds by patient,
chance 0.167): header 0.19, level of the slice 0.21, grey-level histogram 0.52. A small convolutional network
that sees the pictures at 96 px gets about 0.95 in the first of these folds.
"""

import hashlib
import importlib.util
import io
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from conftest import ROOT
from pydicom import uid
from sklearn.feature_extraction import DictVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import Step1_Image_Preprocessing as step1

SCRIPT = ROOT / "raw_data" / "make_phantoms.py"
TYPE_1 = (  # of CT Image Storage (PS3.3 A.3.3 and its modules): present, with a value
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"),
    *("Modality", "ImageType", "PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient"),
    *("SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns", "BitsAllocated", "BitsStored"),
    *("HighBit", "PixelRepresentation", "RescaleIntercept", "RescaleSlope", "RescaleType", "PixelData"),
    *("WindowCenter", "WindowWidth", "PatientID", "PatientName"),
)
TYPE_2 = (  # present, with a value or without
    *("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "ReferringPhysicianName", "StudyID"),
    *("AccessionNumber", "SeriesNumber", "Manufacturer", "PositionReferenceIndicator", "SliceThickness"),
    *("KVP", "AcquisitionNumber", "InstanceNumber", "PatientPosition"),
)


@pytest.fixture(scope="module")
def phantoms():
    """Return the script as a module."""
    spec = importlib.util.spec_from_file_location("make_phantoms", SCRIPT)
    module = sys.modules["make_phantoms"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw(phantoms, label, level, number=1, size=256, severity=0.8, **changes):
    """Render a slice of a patient with these fields changed."""
    patient = replace(phantoms.make_patient(number, 3), **changes)
    return phantoms.render(patient, level, label, np.random.default_rng(number), size, severity)


def run_script(*arguments):
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


# ---------------------------------------- anatomy


def test_tissues_have_their_hounsfield_units(phantoms):
    for number in range(1, 5):
        slice_ = draw(phantoms, "healthy", 4.0, number)
        deep = slice_.depth > 25
        assert -2 < np.median(slice_.hu[slice_.ventricles]) < 16
        assert 26 < np.median(slice_.hu[deep & ~slice_.ventricles]) < 42
        assert np.median(slice_.hu[slice_.bone]) > 600
        assert (slice_.hu[slice_.head & (slice_.depth < -8)] < -40).any()  # fat of the scalp
        assert slice_.hu[0, 0] == phantoms.SCANNERS[phantoms.make_patient(number, 3).scanner].rim
        assert slice_.hu[0, 128] == -1000


def test_grey_matter_is_brighter_than_white(phantoms):
    rng = np.random.default_rng(0)
    patient = replace(phantoms.make_patient(1, 3), pale=0.0, pallidum=0.0)
    frame = phantoms.make_frame(patient, 4.0, 256, rng)
    hu = phantoms.draw_brain(frame, patient, None, rng).hu
    nuclei = phantoms.cover(frame, phantoms.NUCLEUS.values(), 1.0, grow=-3) > 0.9
    white = (
        (frame.depth > 28) & (hu > 20) & (phantoms.cover(frame, phantoms.NUCLEUS.values(), 1.0, grow=6) < 0.1)
    )
    assert 5 < np.median(hu[nuclei]) - np.median(hu[white]) < 12


@pytest.mark.parametrize(
    ("level", "air", "ventricle"), [(1.2, 0, 0), (3.0, 0, 400), (4.0, 0, 300), (6.2, 300, 20), (6.9, 900, 5)]
)
def test_each_level_has_its_landmarks(phantoms, level, air, ventricle):
    """Air of the sinuses only low down, ventricles (mm2) only below the convexity."""
    slice_ = draw(phantoms, "healthy", level, 2, turn=0.0, spacing=0.48)
    area = (0.48 * 2) ** 2
    airy = (slice_.head & (slice_.hu < -400)).sum() * area
    assert airy >= air if air else airy < 60
    assert slice_.ventricles.sum() * area >= ventricle
    assert slice_.ventricles.any() == bool(ventricle)


def test_old_brains_have_more_csf_than_young_ones(phantoms):
    def csf(atrophy):
        slice_ = draw(phantoms, "healthy", 2.0, atrophy=atrophy, pale=0.0, noise=1.0)
        return ((slice_.depth > 2) & (slice_.hu < 20)).sum()

    assert csf(1.0) > 2 * csf(0.0)


@pytest.mark.parametrize("label", step1.CLASSES)
def test_every_class_has_the_mimics(phantoms, label):
    """Calcified plexus and pineal, brighter than any blood; the patient does not know the class."""
    slice_ = draw(phantoms, label, 4.1, 3, severity=0.3, plexus=True, pineal=True)
    assert ((slice_.depth > 20) & (slice_.hu > 130)).sum() > 4


# ---------------------------------------- bleeds


@pytest.mark.parametrize("label", step1.CLASSES[1:])
@pytest.mark.parametrize("level", [2.6, 4.0])
def test_bleeds_are_as_bright_as_blood(phantoms, label, level):
    """Subarachnoid blood is paler, as sulci are hardly wider than the scanner's blur."""
    for number in range(1, 4):
        slice_ = draw(phantoms, label, level, number)
        assert slice_.bleed.sum() > 40
        assert (42 if label == "subarachnoid" else 50) < np.median(slice_.hu[slice_.bleed]) < 90
        assert np.percentile(slice_.hu[slice_.bleed], 98) < 105


def test_healthy_slices_have_no_bleed(phantoms):
    assert not draw(phantoms, "healthy", 3.0).bleed.any()


def test_epidural_is_a_lens_on_the_inner_table(phantoms):
    for number in range(1, 5):
        slice_ = draw(phantoms, "epidural", 3.0, number)
        y, x = np.nonzero(slice_.bleed)
        pixel = 2 * phantoms.make_patient(number, 3).spacing
        length = np.hypot(np.ptp(x), np.ptp(y)) * pixel
        thick = slice_.depth[slice_.bleed].max()
        assert slice_.depth[slice_.bleed].min() < 3.5
        assert thick > 14
        assert thick > 0.22 * length


def test_subdural_is_a_long_thin_crescent_on_the_inner_table(phantoms):
    for number in range(1, 5):
        slice_ = draw(phantoms, "subdural", 3.0, number, kind=0.5)
        y, x = np.nonzero(slice_.bleed)
        length = np.hypot(np.ptp(x), np.ptp(y)) * 2 * phantoms.make_patient(number, 3).spacing
        thick = slice_.depth[slice_.bleed].max()
        assert slice_.depth[slice_.bleed].min() < 3.5
        assert thick < 16
        assert thick < 0.2 * length


def test_subdural_may_lie_along_falx_or_tentorium(phantoms):
    assert draw(phantoms, "subdural", 2.0, kind=0.1).kind == "falx"
    slice_ = draw(phantoms, "subdural", 5.2, kind=0.9)
    assert slice_.kind == "tentorium"
    assert np.median(slice_.depth[slice_.bleed]) > 8


@pytest.mark.parametrize("kind", [0.1, 0.9])
@pytest.mark.parametrize("level", [2.6, 3.8, 6.0])
def test_intraventricular_lies_in_the_ventricles(phantoms, kind, level):
    slice_ = draw(phantoms, "intraventricular", level, 2, kind=kind)
    assert (slice_.bleed & slice_.ventricles).sum() > 0.97 * slice_.bleed.sum()
    assert slice_.kind == ("cast" if kind < 0.5 or level > 5 else "level")


def test_intraventricular_blood_sinks_to_a_fluid_level(phantoms):
    """The patient lies on the back: in each ventricle blood is below, CSF above."""
    slice_ = draw(phantoms, "intraventricular", 2.7, 2, kind=0.9)
    rows = np.indices(slice_.hu.shape)[0]
    assert rows[slice_.bleed].mean() > rows[slice_.ventricles & ~slice_.bleed].mean() + 10


def test_intraparenchymal_lies_in_the_brain_within_a_rim_of_oedema(phantoms):
    slice_ = draw(phantoms, "intraparenchymal", 4.0, 2, kind=0.05, noise=1.0)
    calm = draw(phantoms, "healthy", 4.0, 2, kind=0.05, noise=1.0)
    assert slice_.depth[slice_.bleed].min() > 6
    near = step1.grow(slice_.bleed, 5) & ~step1.grow(slice_.bleed, 2)
    assert np.median(slice_.hu[near]) < np.median(calm.hu[near]) - 3


def test_subarachnoid_fills_what_was_csf(phantoms):
    """Most of the blood lies in narrow spaces: little is left of it after an erosion."""
    for level in (2.0, 5.1):
        slice_ = draw(phantoms, "subarachnoid", level, 2, size=512)
        rest = ~step1.grow(~slice_.bleed, 4)
        assert slice_.bleed.sum() > 300
        assert rest.sum() < 0.25 * slice_.bleed.sum()
        assert not (slice_.bleed & slice_.ventricles).any()


@pytest.mark.parametrize("label", ["epidural", "subdural"])
@pytest.mark.parametrize("side", [-1, 1])
def test_bleeds_on_the_brain_push_the_midline_away(phantoms, label, side):
    fixed = {"kind": 0.5, "side": side, "place": 0.5, "turn": 0.0, "ventricles": 0.5}
    column = [
        np.nonzero(draw(phantoms, name, 3.4, 2, severity=1.0, **fixed).ventricles)[1].mean()
        for name in ("healthy", label)
    ]
    assert (column[0] - column[1]) * side > 2


@pytest.mark.parametrize("label", step1.CLASSES[1:])
def test_severity_shows(phantoms, label):
    areas = [draw(phantoms, label, 3.0, 2, severity=s, kind=0.5).bleed.sum() for s in (0.2, 1.0)]
    assert areas[1] > 1.5 * areas[0] > 0


# ---------------------------------------- DICOM


def small_slice(phantoms, **changes):
    """Return a patient with these fields changed, and a small slice of it: HU, size 64."""
    patient = replace(phantoms.make_patient(9, 3), **changes)
    return patient, phantoms.render(patient, 4.0, "epidural", np.random.default_rng(0), 64).hu


def through_a_file(ds):
    """Write a data set to memory and read it again."""
    file = io.BytesIO()
    ds.save_as(file, enforce_file_format=True)
    file.seek(0)
    return pydicom.dcmread(file)


@pytest.mark.parametrize("syntax", range(4))
@pytest.mark.parametrize("scanner", range(9))
def test_every_scanner_and_syntax_comes_back_in_hounsfield_units(phantoms, scanner, syntax, tmp_path):
    patient, hu = small_slice(phantoms, scanner=scanner, syntax=syntax)
    ds = phantoms.to_dicom(hu, patient, 4.0, 1)
    ds.save_as(tmp_path / "x.dcm", enforce_file_format=True)
    profile = phantoms.SCANNERS[scanner]
    expected = np.maximum(hu, -32768 if profile.signed else int(float(profile.intercept)))

    read = pydicom.dcmread(tmp_path / "x.dcm")
    assert np.array_equal(read.pixel_array.astype(int) + int(float(profile.intercept)), expected)
    read = step1.read_dicom(tmp_path / "x.dcm")
    seen, repaired = step1.hounsfield(step1.decode(read), read)
    assert np.array_equal(seen, expected)
    assert not repaired


def test_headers_are_valid_ct_image_storage(phantoms):
    for number in range(1, 13):
        patient, hu = small_slice(phantoms, **vars(phantoms.make_patient(number, 5)))
        ds = through_a_file(phantoms.to_dicom(hu, patient, 3.2, 2))
        assert [name for name in TYPE_1 if name not in ds or ds[name].is_empty] == []
        assert [name for name in TYPE_2 if name not in ds] == []
        assert ds.SOPClassUID == ds.file_meta.MediaStorageSOPClassUID == uid.CTImageStorage
        assert ds.SOPInstanceUID == ds.file_meta.MediaStorageSOPInstanceUID
        assert all(element.value.is_valid for element in ds if element.VR == "UI")
        assert ds.PatientID == f"PHANTOM-{number:04}"
        assert ds.PatientName == f"Phantom^{number:04}"
        assert not ds.StudyDate  # none of today's


def test_slices_of_one_patient_share_study_but_no_instance_uid(phantoms):
    patient, hu = small_slice(phantoms)
    one, two = (phantoms.to_dicom(hu, patient, level, n) for n, level in ((1, 3.0), (2, 3.6)))
    assert one.StudyInstanceUID == two.StudyInstanceUID
    assert one.SOPInstanceUID != two.SOPInstanceUID
    assert one.ImagePositionPatient[2] - two.ImagePositionPatient[2] == pytest.approx(18 * 0.6, abs=0.02)


# ---------------------------------------- the data set


@pytest.mark.parametrize(("per_class", "test"), [(15, 15), (100, 60), (1, 0), (2, 1)])
def test_plan_has_the_slices_asked_for_and_no_patient_in_both_splits(phantoms, per_class, test):
    slices = phantoms.plan_slices(per_class, test, seed=4)
    train = [s for s in slices if s.path.startswith("TrainingData/")]
    tested = [s for s in slices if s.path.startswith("TestingData/")]
    assert Counter(s.label for s in train) == dict.fromkeys(step1.CLASSES, per_class)
    assert len(tested) == test
    assert max(Counter(s.label for s in tested).values(), default=0) <= -(-test // 6)
    assert not {s.patient for s in train} & {s.patient for s in tested}
    assert max(Counter(s.patient for s in slices).values()) <= 4
    assert all(s.path.split("/")[1] == s.label for s in train)
    assert len({s.path for s in slices}) == len(slices)


def test_default_plan_can_be_split_in_three_by_patient(phantoms):
    slices = [s for s in phantoms.plan_slices(15, 15, seed=0) if s.path.startswith("Train")]
    patients = defaultdict(set)
    for item in slices:
        patients[item.label].add(item.patient)
    assert min(map(len, patients.values())) >= 8
    assert any(len({s.label for s in slices if s.patient == p}) == 2 for p in patients["healthy"])
    labels, groups = [s.label for s in slices], [s.patient for s in slices]
    for _, fold in StratifiedGroupKFold(3, shuffle=True, random_state=0).split(labels, labels, groups):
        assert {labels[i] for i in fold} == set(step1.CLASSES)


def test_the_shipped_files_are_those_of_the_default_plan(phantoms):
    planned = {s.path: s for s in phantoms.plan_slices(15, 15, seed=0)}
    shipped = {p.relative_to(SCRIPT.parent).as_posix(): p for p in SCRIPT.parent.glob("T*/**/*.dcm")}
    assert shipped.keys() == planned.keys()
    assert sum(path.stat().st_size for path in shipped.values()) < 22e6
    lines = (SCRIPT.parent / "TestingData_labels.csv").read_text(encoding="utf-8").splitlines()
    truth = sorted(f"{p.partition('/')[2]},{s.label}" for p, s in planned.items() if p.startswith("Test"))
    assert lines == ["image,label", *truth]
    for path, item in list(planned.items())[::35]:
        patient = phantoms.make_patient(item.patient, 0)
        ds = phantoms.to_dicom(np.zeros((64, 64), np.int16), patient, item.level, item.number)
        assert pydicom.dcmread(shipped[path]).SOPInstanceUID == ds.SOPInstanceUID
    classes = step1.find_classes(SCRIPT.parent / "TrainingData")
    labels = step1.read_test_labels(SCRIPT.parent / "TestingData_labels.csv", classes)
    assert set(labels.values()) <= set(step1.CLASSES)


@pytest.mark.processes
def test_one_seed_gives_the_same_bytes_whatever_the_jobs(tmp_path):
    digests = []
    for folder, *options in (("a", "--jobs", 1), ("b", "--jobs", 2), ("c", "--jobs", 1, "--seed", 1)):
        done = run_script("--train-per-class", 1, "--test", 1, "--output", tmp_path / folder, *options)
        assert done.returncode == 0, done.stderr
        assert "7 slices" in done.stdout
        files = sorted(path for path in (tmp_path / folder).rglob("*") if path.is_file())
        assert len(files) == 8
        digests.append({hashlib.sha256(path.read_bytes()).hexdigest() for path in files})
    assert digests[0] == digests[1]
    assert len(digests[0] & digests[2]) <= 1  # the labels may agree


def test_what_an_earlier_run_left_goes_and_other_files_stay(phantoms, tmp_path):
    old = tmp_path / "TrainingData" / "epidural" / "PHANTOM-9999-1.dcm"
    own = old.with_name("mine.dcm")
    old.parent.mkdir(parents=True)
    old.touch()
    own.touch()
    args = ["--train-per-class", "1", "--test", "0", "--jobs", "1", "--output", str(tmp_path)]
    assert phantoms.main(args) == 0
    assert own.exists() and not old.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--train-per-class", "0"],
        ["--test", "-1"],
        ["--jobs", "0"],
        ["--seed", "x"],
        ["--train-per-class", "1.5"],
    ],
)
def test_bad_arguments_are_usage_errors_that_name_the_range(phantoms, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        phantoms.main(arguments)
    assert stop.value.code == 2
    assert f"argument {arguments[0]}: '{arguments[1]}' is not a whole number from" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_said_in_a_line(phantoms, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert phantoms.main(["--output", str(tmp_path / "file")]) == 1
    assert "--output" in capsys.readouterr().err


# ---------------------------------------- no shortcut


def header_fields(ds):
    """Return what a classifier may read off a header: no names, UIDs or pixels, which tell patients apart."""
    found = {"TransferSyntaxUID": str(ds.file_meta.TransferSyntaxUID)}
    for element in ds:
        if element.VR in ("UI", "PN", "OW", "OB") or element.keyword == "PatientID":
            continue
        if element.keyword in ("WindowCenter", "WindowWidth", "RescaleIntercept") or element.VM != 1:
            values = element.value if element.VM > 1 else [element.value]
            if element.keyword == "ImagePositionPatient":
                found["height"] = float(values[2])
            else:
                found[element.keyword] = "\\".join(map(str, values))
        elif element.VR in ("IS", "DS", "US"):
            found[element.keyword] = float(element.value)
        else:
            found[element.keyword] = str(element.value)
    return found


def histogram(hu):
    """Return the logarithm of the number of pixels in steps of HU, the finest where brain and blood lie."""
    edges = [
        -1100,
        -300,
        -150,
        -120,
        -90,
        -60,
        -30,
        *range(-20, 101, 5),
        150,
        200,
        300,
        500,
        800,
        1100,
        1500,
        3100,
    ]
    return np.log1p(np.histogram(hu, edges)[0])


def no_shortcut(phantoms, per_class, size, folds=5, seed=11):
    """Return the accuracy of logistic regression on headers, on levels and on histograms, by patient."""
    headers, levels, histograms, labels, groups = [], [], [], [], []
    for item in phantoms.plan_slices(per_class, 0, seed):
        patient = phantoms.make_patient(item.patient, seed)
        rng = np.random.default_rng([seed, item.patient, 2 + item.number])
        hu = phantoms.render(patient, item.level, item.label, rng, size).hu
        headers.append(header_fields(phantoms.to_dicom(hu, patient, item.level, item.number)))
        levels.append([item.level, item.level**2, item.level**3])
        histograms.append(histogram(hu))
        labels.append(item.label)
        groups.append(item.patient)
    found = []
    for features, steps in ((headers, [DictVectorizer(sparse=False)]), (levels, []), (histograms, [])):
        model = make_pipeline(*steps, StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        split = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
        found.append(cross_val_score(model, features, labels, groups=groups, cv=split).mean())
    return found


def test_neither_header_nor_histogram_tells_the_classes_apart(phantoms):
    """300 phantoms: three standard errors round chance are 0.167 +- 0.065."""
    header, level, grey = no_shortcut(phantoms, per_class=50, size=128)
    assert header < 0.24
    assert level < 0.29
    assert grey < 0.60


def test_labels_written_are_those_of_testing(phantoms, tmp_path, monkeypatch):
    monkeypatch.setattr(phantoms, "write_slice", lambda item, seed, output: None)
    args = ["--train-per-class", "1", "--test", "2", "--jobs", "1", "--output", str(tmp_path)]
    assert phantoms.main(args) == 0
    planned = [s for s in phantoms.plan_slices(1, 2, 0) if s.path.startswith("TestingData/")]
    lines = sorted(f"{Path(s.path).name},{s.label}" for s in planned)
    written = (tmp_path / "TestingData_labels.csv").read_text(encoding="utf-8").splitlines()
    assert written == ["image,label", *lines]


def test_header_has_the_geometry_and_the_window_of_its_scanner(phantoms):
    for number in range(1, 13):
        patient = phantoms.make_patient(number, 5)
        ds = phantoms.to_dicom(np.zeros((64, 64), np.int16), patient, 3.2, 2)
        profile = phantoms.SCANNERS[patient.scanner]
        window = tuple(float(np.ravel(value)[0]) for value in (profile.center, profile.width))
        assert step1.header_window(ds) == window
        assert list(ds.PixelSpacing) == pytest.approx([patient.spacing] * 2, abs=1e-6)
        assert list(ds.ImagePositionPatient)[:2] == pytest.approx([-255.5 * patient.spacing] * 2, abs=1e-3)
