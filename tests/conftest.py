"""Shared by the tests: DICOM slices made in memory, and where real slices lie, if anywhere."""

import os
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    """Give each process that runs tests one core: threads that wait for a busy one make both slow."""
    for library in ("OMP", "MKL", "OPENBLAS"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")


def make_ct(stored: np.ndarray, **elements) -> Dataset:
    """Return a CT slice with these stored values: 16 bits, sign by dtype, slope 1, intercept 0, no window.

    elements: DICOM keywords to set; None removes one.
    """
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = CTImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid()
    ds.Modality, ds.PatientID, ds.PatientName = "CT", "SECRET-ID", "Secret^Name"
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = stored.shape
    ds.PixelRepresentation = int(stored.dtype.kind == "i")
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
    ds.RescaleSlope, ds.RescaleIntercept = 1, 0
    ds.PixelData = stored.tobytes()
    ds["PixelData"].VR = "OW"
    for keyword, value in elements.items():
        if value is None:
            del ds[keyword]
        else:
            setattr(ds, keyword, value)
    return ds


def save_ct(path: Path, stored: np.ndarray, **elements) -> Path:
    """Write make_ct's slice to a file and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    make_ct(stored, **elements).save_as(path, enforce_file_format=True)
    return path


def disc(shape: tuple[int, int], center: tuple[float, float], radius: float) -> np.ndarray:
    """Return a filled circle, bool (rows, columns); center is (x, y)."""
    y, x = np.indices(shape)
    return (x - center[0]) ** 2 + (y - center[1]) ** 2 <= radius**2


def plain_head(size: int = 128, brain_hu: int = 35) -> np.ndarray:
    """Return HU, int16 (size, size): air round a disc of scalp, skull and, of one value, brain."""
    hu = np.full((size, size), -1000, np.int16)
    for radius, value in ((0.35, 40), (0.32, 900), (0.27, brain_hu)):
        hu[disc(hu.shape, (size / 2, size / 2), radius * size)] = value
    return hu


@pytest.fixture(scope="session")
def real_ct() -> Path:
    """Return the folder of real CT slices, which are not part of the project."""
    folder = os.environ.get("ICH_REAL_CT", "")
    if not Path(folder).is_dir() or not folder:
        pytest.skip("ICH_REAL_CT names no folder of real CT slices")
    return Path(folder).resolve()
