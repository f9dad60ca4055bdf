"""Step 1 on hostile input: every kind of bad file, decoders that crash, kills, full disks, fuzz."""

import csv
import ctypes
import os
import random
import signal
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
from conftest import make_ct, plain_head, save_ct
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    LegacyConvertedEnhancedCTImageStorage,
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
)

import Step1_Image_Preprocessing as step1

SCRIPT = Path(step1.__file__)
WINDOW = {"WindowCenter": 40, "WindowWidth": 80}
ENCODERS = {RLELossless: "pydicom", JPEGLSLossless: "pyjpegls", JPEG2000Lossless: "pylibjpeg"}


def convert(path, tmp_path):
    """Return the manifest fields of one file, as a worker makes them."""
    task = step1.Task(path.name, path, "x.png", tuple(step1.VARIANTS))
    return step1.process(task, step1.Settings(tmp_path / "out", (40.0, 80.0), b"k" * 32))


def reason_of(path, tmp_path):
    """Return why a file is refused."""
    row = convert(path, tmp_path)
    assert row["status"] == "failed", row
    assert "\n" not in row["reason"]
    return row["reason"]


def variant0(tmp_path):
    return cv2.imread(str(tmp_path / "out" / "0_Dicom2PNG" / "x.png"), cv2.IMREAD_UNCHANGED)


def save(path, ds):
    ds.save_as(path, enforce_file_format=True)
    return path


# ---------------------------------------- what is accepted


def save_in(syntax, path):
    """Write the same head in a transfer syntax."""
    ct = make_ct(plain_head(64), **WINDOW)
    if syntax in ENCODERS:
        ct.compress(syntax, encoding_plugin=ENCODERS[syntax])
    elif syntax == ExplicitVRBigEndian:
        ct = make_ct(plain_head(64).astype(">i2"), **WINDOW)
    ct.file_meta.TransferSyntaxUID = syntax
    return save(path, ct)


@pytest.mark.parametrize(
    "syntax", [*ENCODERS, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian], ids=lambda uid: uid.name[:24]
)
def test_every_lossless_syntax_gives_the_same_picture(syntax, tmp_path):
    assert convert(save_ct(tmp_path / "plain", plain_head(64), **WINDOW), tmp_path)["status"] == "ok"
    plain = variant0(tmp_path)
    assert convert(save_in(syntax, tmp_path / "other"), tmp_path)["status"] == "ok"
    assert np.array_equal(variant0(tmp_path), plain)


def lossless_jpeg(image):
    """Return a lossless JPEG (process 14, selection value 1) of a uint16 image: one Huffman code for all.

    ITU-T T.81 annex H. Differences are coded by their number of bits, 0 to 16, each with a code of 5 bits.
    """
    rows, columns = image.shape
    head = b"\xff\xd8\xff\xc3" + struct.pack(">HBHHB3B", 11, 16, rows, columns, 1, 1, 0x11, 0)
    huffman = struct.pack(">HB", 19 + 17, 0) + bytes([0] * 4 + [17] + [0] * 11) + bytes(range(17))
    head += b"\xff\xc4" + huffman + b"\xff\xda" + struct.pack(">HB2B3B", 8, 1, 1, 0, 1, 0, 0)
    bits = []
    values = image.tolist()
    for y in range(rows):
        for x in range(columns):
            before = values[y][x - 1] if x else values[y - 1][0] if y else 1 << 15
            difference = (values[y][x] - before + 32767) % 65536 - 32767
            size = abs(difference).bit_length()
            bits.append(f"{size:05b}")
            if 0 < size < 16:
                bits.append(f"{difference if difference > 0 else difference + (1 << size) - 1:0{size}b}")
    text = "".join(bits)
    text += "1" * (-len(text) % 8)
    data = int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\x00")
    return head + data + b"\xff\xd9"


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"])
def test_lossless_jpeg_is_converted(syntax, tmp_path):
    stored = (plain_head(64) + 1024).astype(np.uint16)
    assert (
        convert(save_ct(tmp_path / "a", stored, RescaleIntercept=-1024, **WINDOW), tmp_path)["status"] == "ok"
    )
    plain = variant0(tmp_path)
    ct = make_ct(stored, RescaleIntercept=-1024, **WINDOW)
    ct.PixelData = encapsulate([lossless_jpeg(stored)])
    ct.file_meta.TransferSyntaxUID = syntax
    row = convert(save(tmp_path / "b", ct), tmp_path)
    assert row["status"] == "ok", row
    assert np.array_equal(variant0(tmp_path), plain)


def test_baseline_jpeg_is_converted(tmp_path):
    grey = np.full((64, 64), 100, np.uint8)
    ct = make_ct(grey.astype(np.uint16), **WINDOW)
    ct.BitsAllocated, ct.BitsStored, ct.HighBit, ct.RescaleIntercept = 8, 8, 7, -60
    ct.PixelData = encapsulate([cv2.imencode(".jpg", grey)[1].tobytes()])
    ct.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    assert convert(save(tmp_path / "a", ct), tmp_path)["status"] == "ok"
    assert abs(int(variant0(tmp_path)[30, 30]) - round(40 * 255 / 79)) <= 4  # 40 HU


def test_compressed_frames_beyond_what_the_header_says_are_refused(tmp_path):
    ct = make_ct(plain_head(64), **WINDOW)
    ct.compress(RLELossless, encoding_plugin=ENCODERS[RLELossless])
    frame = get_frame(ct.PixelData, 0, number_of_frames=1)
    ct.PixelData = encapsulate([frame, frame], has_bot=True)
    row = convert(save(tmp_path / "a", ct), tmp_path)
    assert row["status"] == "failed" and "decodes to (2, 64, 64)" in row["reason"]


@pytest.mark.parametrize("extra", [1, 2, 500, 100_000])  # the last, more than a frame
def test_uncompressed_pixels_that_are_too_long_are_converted_with_a_warning(extra, tmp_path):
    assert convert(save_ct(tmp_path / "a", GOOD, **WINDOW), tmp_path)["warnings"] == ""
    right = variant0(tmp_path)
    ct = make_ct(GOOD, **WINDOW)
    ct.PixelData += b"\x7f" * extra
    row = convert(save(tmp_path / "b", ct), tmp_path)
    assert row["status"] == "ok" and "bytes of excess padding" in row["warnings"]
    assert np.array_equal(variant0(tmp_path), right)


def test_the_one_byte_that_makes_an_odd_length_even_is_no_warning(tmp_path):
    ct = make_ct(np.zeros((3, 3), np.uint16), RescaleIntercept=-1000, **WINDOW)
    ct.BitsAllocated, ct.BitsStored, ct.HighBit = 8, 8, 7
    ct.PixelData = bytes(9) + b"\0"
    row = convert(save(tmp_path / "a", ct), tmp_path)
    assert (row["status"], row["warnings"]) == ("ok", "")


@pytest.mark.parametrize("syntax", ENCODERS, ids=lambda uid: uid.name[:24])
def test_bytes_after_a_compressed_frame_do_no_harm(syntax, tmp_path):
    """The codestream tells its own end, so nothing is too long and no warning is due."""
    ct = make_ct(plain_head(64), **WINDOW)
    assert convert(save(tmp_path / "plain", ct), tmp_path)["status"] == "ok"
    right = variant0(tmp_path)
    ct.compress(syntax, encoding_plugin=ENCODERS[syntax])
    ct.PixelData = encapsulate([get_frame(ct.PixelData, 0, number_of_frames=1) + bytes(500)])
    row = convert(save(tmp_path / "longer", ct), tmp_path)
    assert row["status"] == "ok", row
    assert np.array_equal(variant0(tmp_path), right)


@pytest.mark.parametrize("dtype", [np.int16, np.uint16])
def test_bits_above_bits_stored_are_masked(dtype, tmp_path):
    stored = np.where(plain_head(64) > 0, 40, -200 if dtype == np.int16 else 5).astype(dtype)
    elements = {"BitsStored": 12, "HighBit": 11, "RescaleIntercept": 0 if dtype == np.int16 else -100}
    clean = step1.hounsfield(stored, make_ct(stored, **elements))[0]
    ct = make_ct((stored.view(np.uint16) & 0x0FFF | 0x5000).view(dtype), **elements)
    assert np.array_equal(step1.hounsfield(step1.decode(ct), ct)[0], clean)


def test_several_padding_values_are_all_air(tmp_path):
    stored = np.array([[-2000, -1500, 40]], np.int16)
    ct = make_ct(stored)
    ct.add_new(0x00280120, "SS", [-2000, -1500])
    assert step1.hounsfield(stored, ct)[0].tolist() == [[-1000, -1000, 40]]


@pytest.mark.parametrize("replaced", ["2.25.1234567890", "ID_0123abcd", "", None])
def test_slice_whose_sop_class_an_anonymiser_replaced_is_converted(replaced, tmp_path):
    assert convert(save_ct(tmp_path / "a", GOOD, SOPClassUID=replaced), tmp_path)["status"] == "ok"


def test_first_complete_window_counts_where_the_first_is_not():
    ct = make_ct(np.zeros((1, 1), np.int16), WindowCenter=[600, 40], WindowWidth=[0.5, 80])
    assert step1.header_window(ct) == (40, 80)


@pytest.mark.parametrize("value", [-1000, 0, 40])
def test_constant_slice_is_converted_and_blank(value, tmp_path):
    row = convert(save_ct(tmp_path / "a", np.full((64, 64), value, np.int16)), tmp_path)
    assert (row["status"], row["blank"]) == ("ok", 1)


def test_metal_is_no_reason_to_refuse(tmp_path):
    hu = plain_head(128)
    hu[60, 60:70] = 31_000  # 0.06 % of the pixels
    assert convert(save_ct(tmp_path / "a", hu), tmp_path)["status"] == "ok"


# ---------------------------------------- what is refused, and why

GOOD = plain_head(32)


def changed(**elements):
    return lambda path: save_ct(path, GOOD, **elements)


def raw_bytes(data):
    def write(path):
        path.write_bytes(data)
        return path

    return write


def cut(syntax, share):
    """Return a maker of a file of this syntax that is cut off after a share of its bytes."""

    def write(path):
        whole = save_in(syntax, path).read_bytes() if syntax else save_ct(path, GOOD).read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
        return path

    return write


def wrong_stream(syntax, rows=64, columns=64):
    """Return a maker of a file whose codestream is of another size than its header says."""

    def write(path):
        ct = make_ct(plain_head(48), **WINDOW)
        ct.compress(syntax, encoding_plugin=ENCODERS[syntax])
        ct.Rows, ct.Columns = rows, columns
        return save(path, ct)

    return write


def other_object(**elements):
    """Return a maker of a DICOM object without pixels."""

    def write(path):
        ds = make_ct(GOOD, **elements)
        del ds.PixelData
        return save(path, ds)

    return write


def dicomdir(path):
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    ds.DirectoryRecordSequence = []
    return save(path, ds)


def float_pixels(path):
    ds = make_ct(GOOD)
    del ds.PixelData
    ds.FloatPixelData = GOOD.astype(np.float32).tobytes()
    return save(path, ds)


def deflate_bomb(path):
    whole = save_in(DeflatedExplicitVRLittleEndian, path).read_bytes()
    meta_end = 144 + struct.unpack("<I", whole[140:144])[0]
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(512)) + packer.flush()
    path.write_bytes(whole[:meta_end] + bomb)
    return path


REFUSED = {
    "encapsulated, against its syntax": (
        lambda path: save(path, make_ct(GOOD, PixelData=encapsulate([GOOD.tobytes()]))),
        "is encapsulated",
    ),
    "dose report": (
        changed(SOPClassUID=SecondaryCaptureImageStorage, ConversionType="WSD", RescaleType="HU"),
        "SOPClassUID (0008,0016) is Secondary Capture Image Storage",
    ),
    "screen": (changed(SOPClassUID=MultiFrameGrayscaleWordSecondaryCaptureImageStorage), "is Multi-frame"),
    "slope missing": (changed(RescaleSlope=None), "RescaleSlope"),
    "slope 0": (changed(RescaleSlope=0), "RescaleSlope"),
    "BitsStored": (changed(BitsStored=17, HighBit=16), "BitsStored (0028,0101) is absent or wrong"),
    "map of attenuation": (changed(RescaleType="PCT"), "RescaleType (0028,1054) is PCT, a map"),
    "map of atomic numbers": (changed(RescaleType="Z_EFF"), "RescaleType (0028,1054) is Z_EFF, a map"),
    "slope not finite": (changed(RescaleSlope="nan"), "RescaleSlope"),
    "intercept missing": (changed(RescaleIntercept=None), "RescaleIntercept"),
    "intercept not finite": (changed(RescaleIntercept="inf"), "RescaleIntercept"),
    "sign unknown": (changed(PixelRepresentation=None), "PixelRepresentation"),
    "HighBit": (changed(HighBit=11), "HighBit"),
    "no columns": (changed(Columns=None), "Columns (0028,0011) is absent or 0"),
    "impossible HU": (changed(RescaleSlope=1000), "20,000 HU"),
    "no pixels": (changed(PixelData=None), "PixelData"),
    "float pixels": (float_pixels, "float"),
    "colour": (changed(PhotometricInterpretation="RGB", SamplesPerPixel=3), "Photometric"),
    "three samples": (changed(SamplesPerPixel=3), "PhotometricInterpretation (0028,0004) is not grey"),
    "palette": (changed(PhotometricInterpretation="PALETTE COLOR"), "Photometric"),
    "MR": (changed(Modality="MR"), "Modality"),
    "no modality": (changed(Modality=None), "Modality"),
    "localizer": (changed(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "LOCALIZER"),
    "multi-frame": (changed(NumberOfFrames=2), "NumberOfFrames"),
    "enhanced CT": (changed(SOPClassUID=EnhancedCTImageStorage), "is Enhanced CT Image Storage"),
    "enhanced CT of old slices": (
        changed(SOPClassUID=LegacyConvertedEnhancedCTImageStorage),
        "is Legacy Converted",
    ),
    "DICOMDIR": (dicomdir, "DICOMDIR"),
    "RT structures": (other_object(Modality="RTSTRUCT"), "Modality"),
    "video": (changed(Modality="ES", NumberOfFrames=9), "Modality"),
    "text": (raw_bytes(b"this is no DICOM file at all, only words\n" * 9), "not DICOM"),
    "zeros": (raw_bytes(bytes(5000)), "DICOM"),
    "empty": (raw_bytes(b""), "not DICOM"),
    "one byte": (raw_bytes(b"D"), "not DICOM"),
    "preamble only": (raw_bytes(bytes(128) + b"DICM"), "not DICOM"),
    "cut in the header": (cut(None, 0.12), "truncated"),
    "cut in the pixels": (cut(None, 0.9), "PixelData"),
    "RLE cut": (cut(RLELossless, 0.8), "truncated"),
    "JPEG-LS cut": (cut(JPEGLSLossless, 0.8), "truncated"),
    "JPEG 2000 cut": (cut(JPEG2000Lossless, 0.8), "truncated"),
    "deflate cut": (cut(DeflatedExplicitVRLittleEndian, 0.8), "truncated"),
    "fewer pixels than rows": (changed(Rows=33), "PixelData"),
    "RLE of another size": (wrong_stream(RLELossless), "PixelData"),
    "JPEG-LS of another size": (wrong_stream(JPEGLSLossless), "codestream"),
    "JPEG 2000 of another size": (wrong_stream(JPEG2000Lossless), "codestream"),
    "huge header": (changed(Rows=60_000, Columns=60_000), "pixels"),
    "long and thin": (lambda p: save_ct(p, np.zeros((2, 4001), np.int16)), "2 x 4001 pixels"),
    "no rows": (changed(Rows=None), "Rows"),
    "deflate bomb": (deflate_bomb, "deflated"),
    "unknown syntax": (
        lambda path: save(path, _with_syntax("1.2.840.10008.1.2.4.51")),
        "TransferSyntaxUID",
    ),
}


def _with_syntax(syntax):
    ct = make_ct(GOOD)
    ct.PixelData = encapsulate([GOOD.tobytes()])
    ct.file_meta.TransferSyntaxUID = syntax
    return ct


@pytest.mark.parametrize("make, word", REFUSED.values(), ids=REFUSED)
def test_refused_with_the_reason(make, word, tmp_path):
    reason = reason_of(make(tmp_path / "file"), tmp_path)
    assert word in reason
    assert ": " in reason or ", " in reason  # what is wrong, and what to do
    assert not list((tmp_path / "out").rglob("*.png"))


def test_codestream_that_claims_too_much_is_refused_before_a_decoder_takes_the_memory(tmp_path, monkeypatch):
    ct = make_ct(plain_head(64))
    ct.compress(JPEG2000Lossless, encoding_plugin="pylibjpeg")
    data = bytearray(ct.PixelData)
    siz = data.find(b"\xff\x4f\xff\x51")
    data[siz + 8 : siz + 16] = struct.pack(">II", 50_000, 50_000)
    ct.PixelData = bytes(data)
    decoded = []
    monkeypatch.setattr(step1, "pixel_array", lambda ds, **options: decoded.append(ds))
    assert "50000" in reason_of(save(tmp_path / "a", ct), tmp_path)
    assert not decoded


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on Windows")
def test_fifo_is_refused_and_blocks_nothing(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    assert "no regular file" in reason_of(tmp_path / "fifo", tmp_path)


def test_reasons_name_no_patient(tmp_path):
    path = save_ct(tmp_path / "a", GOOD, NumberOfFrames="1234567890")
    path.write_bytes(path.read_bytes().replace(b"1234567890", b"SECRET-ID "))
    with pytest.raises(step1.UnsuitableFile) as refused:
        step1.decode(step1.read_dicom(path))
    assert "SECRET-ID" in str(refused.value.__cause__)  # else this test shows nothing
    row = convert(path, tmp_path)
    assert row["status"] == "failed"
    assert "SECRET" not in str(row)


def test_decoder_in_rust_that_panics_costs_its_file_alone(tmp_path, monkeypatch):
    class PanicException(BaseException):
        """As pyo3's, which is no Exception."""

    def panic(ds, **options):
        raise PanicException("index out of bounds")

    monkeypatch.setattr(step1, "pixel_array", panic)
    assert "can't be decoded (index out of bounds)" in reason_of(save_ct(tmp_path / "a", GOOD), tmp_path)


def test_interrupt_in_a_decoder_is_no_fault_of_its_file(tmp_path, monkeypatch):
    def interrupted(ds, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(step1, "pixel_array", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(save_ct(tmp_path / "a", GOOD), tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux alone")
def test_memory_limit_of_the_system_that_is_lower_than_ours_is_no_obstacle(tmp_path):
    code = """
import resource, sys
from pathlib import Path
import Step1_Image_Preprocessing as step1
resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))
folder = Path(sys.argv[1])
row = step1.process(step1.Task("a", folder / "a", "a.png", ("0_Dicom2PNG",)), step1.Settings(folder, None, b"k"))
print(row["status"])
"""
    save_ct(tmp_path / "a", GOOD)
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=SCRIPT.parent, capture_output=True, text=True, check=False)
    assert done.stdout == "ok\n", done.stderr


# ---------------------------------------- whole runs


@pytest.fixture
def raw(tmp_path):
    """Return a raw_data folder with twelve good slices in one class."""
    for number in range(12):
        save_ct(
            tmp_path / "raw" / "TrainingData" / "healthy" / f"{number:02}.dcm",
            plain_head(64, 20 + number),
            **WINDOW,
        )
    return tmp_path / "raw"


def run(raw, *options, output="out"):
    return step1.main(["--raw-data", str(raw), "--output", str(raw.parent / output), "--jobs", "2", *options])


def rows_of(raw, output="out"):
    with (raw.parent / output / "manifest.csv").open(encoding="utf-8", newline="") as file:
        return {Path(row["source"]).name: row for row in csv.DictReader(file)}


def pngs_of(raw, output="out"):
    folder = raw.parent / output
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.png") if p.parent != folder
    }


def misbehaving(task, settings):
    """Stand in for step1.process in a worker: a decoder that crashes, hangs or eats memory on some files."""
    replace = pytest.MonkeyPatch().setattr  # for the rest of the worker's life
    if task.source.endswith("03.dcm"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if task.source.endswith("05.dcm"):
        step1.TIME_LIMIT_S = 1
        asleep = ctypes.PyDLL(None).sleep  # holds the interpreter lock
        replace(step1, "pixel_array", lambda ds, **options: asleep(60))
    if task.source.endswith("07.dcm"):
        replace(step1, "pixel_array", lambda ds, **options: np.ones(3 << 27))  # 3 GB
    return step1.process(task, settings)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux alone")
@pytest.mark.processes
def test_decoder_that_crashes_hangs_or_eats_memory_costs_its_file_alone(raw, monkeypatch, capsys):
    monkeypatch.setattr(step1, "process", misbehaving)
    started = time.monotonic()
    assert run(raw) == 1
    assert time.monotonic() - started < 30
    rows = rows_of(raw)
    failed = {name: row["reason"] for name, row in rows.items() if row["status"] == "failed"}
    assert set(failed) >= {"03.dcm", "05.dcm", "07.dcm"}
    assert "crashed" in failed["03.dcm"]
    assert "crashed" in failed["05.dcm"]
    assert "memory" in failed["07.dcm"]
    assert "found 12" in capsys.readouterr().out


@pytest.mark.parametrize("error", [MemoryError(), cv2.error("Insufficient memory")], ids=["numpy", "OpenCV"])
def test_step_that_runs_out_of_memory_costs_its_file_alone(raw, monkeypatch, error):
    def fail(hu):
        raise error

    if isinstance(error, cv2.error):
        error.code = cv2.Error.StsNoMem
    monkeypatch.setattr(step1, "head_mask", fail)
    assert "memory" in reason_of(next((raw / "TrainingData").rglob("*.dcm")), raw.parent)


def test_tasks_are_taken_no_further_ahead_of_the_results_than_asked():
    taken, waiting = [], {}

    def submit(task):
        taken.append(task)
        future = Future()
        if task == 0:
            future.set_result({})
        return future

    for results, _ in enumerate(step1.bounded(submit, range(20), 3, waiting, ())):
        assert len(taken) <= results + 3
        for oldest in list(waiting)[:1]:
            oldest.set_result({})
    assert taken == list(range(20))


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.processes
def test_processes_killed_from_outside_are_replaced_and_no_file_is_lost(raw):
    many(raw, 60)
    process = start(raw)
    wait_for_png(raw.parent / "out")
    for _ in range(4):
        for worker in children(process.pid):
            os.kill(worker, signal.SIGKILL)
        time.sleep(0.2)
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    assert run(raw) == 0  # those that were at work in a killed process are tried again
    assert {row["status"] for row in rows_of(raw).values()} == {"ok"}


def children(pid):
    """Return the processes that another one started with Step 1's spawn."""
    found = []
    for child in psutil.Process(pid).children():
        with suppress(psutil.Error):  # it has just ended
            found += [child.pid] * ("spawn_main" in " ".join(child.cmdline()))
    return found


def seconds_at_work(pids):
    """Return the processor time of the busiest of these processes, 0 where there is none."""
    return max((psutil.Process(pid).cpu_times().user for pid in pids), default=0)


def start(raw, output="out", new_session=False):
    """Start Step 1, with Ctrl-C as in a terminal, even where these tests run with it ignored (nohup)."""
    command = [
        sys.executable,
        str(SCRIPT),
        "--raw-data",
        str(raw),
        "--output",
        str(raw.parent / output),
        "--jobs",
        "2",
    ]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command,
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=new_session,
        preexec_fn=None if os.name == "nt" else partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def wait_until(there):
    limit = time.monotonic() + 60
    while not there():
        assert time.monotonic() < limit
        time.sleep(0.01)


def wait_for_png(folder):
    wait_until(lambda: any(folder.rglob("*.png")))


def many(raw, count):
    """Add slices that take a while."""
    for number in range(count):
        save_ct(
            raw / "TrainingData" / "healthy" / f"m{number:03}.dcm",
            plain_head(256, 20 + number % 50),
            **WINDOW,
        )


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.processes
def test_killed_at_any_moment_only_whole_files_stay_and_the_next_run_completes_them(raw):
    many(raw, 30)
    assert run(raw, output="unbroken") == 0
    for delay in (0, 0.1, 0.3):
        process = start(raw)
        wait_for_png(raw.parent / "out")
        time.sleep(delay)
        process.kill()
        process.communicate()
        for content in pngs_of(raw).values():
            assert cv2.imdecode(np.frombuffer(content, np.uint8), -1) is not None
    assert run(raw) == 0
    assert pngs_of(raw) == pngs_of(raw, "unbroken")
    assert not list((raw.parent / "out" / ".tmp").iterdir())
    patients = {"patient", "fingerprint"}  # keyed by each output folder's own key
    strip = lambda rows: [{k: v for k, v in row.items() if k not in patients} for row in rows.values()]  # noqa: E731
    assert strip(rows_of(raw)) == strip(rows_of(raw, "unbroken"))


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.processes
def test_interrupt_stops_before_the_rest_is_done_and_says_how_to_go_on(raw):
    many(raw, 60)
    process = start(raw)
    wait_for_png(raw.parent / "out")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "" in {row["status"] for row in rows_of(raw).values()}
    assert process.returncode == 130
    assert "the same command goes on" in errors
    assert "Traceback" not in errors


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.processes
def test_interrupt_while_the_processes_start_is_as_clean(raw):
    """As a terminal sends it: to the program and all of its processes."""
    many(raw, 60)
    process = start(raw, new_session=True)
    wait_until(lambda: seconds_at_work(children(process.pid)) > 0.1)  # so they import
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors


@pytest.mark.parametrize("broken", ["No space left on device", "Read-only file system"])
def test_output_that_can_no_longer_be_written_is_one_clear_line(raw, monkeypatch, capsys, broken):
    def write(path, data, output):
        raise OSError(28, broken)

    monkeypatch.setattr(step1, "write_atomically", write)
    monkeypatch.setattr(
        step1, "in_processes", lambda tasks, settings, jobs: ((t, step1.process(t, settings)) for t in tasks)
    )
    assert run(raw) == 1
    errors = capsys.readouterr().err
    assert broken in errors
    assert "Traceback" not in errors


def test_input_that_vanishes_midway_is_one_clear_line_and_keeps_what_was_done(raw, monkeypatch, capsys):
    def then_unplug(tasks, settings, jobs):
        for number, task in enumerate(tasks):
            if number == 5:
                raw.rename(raw.parent / "unplugged")
            yield task, step1.process(task, settings)

    monkeypatch.setattr(step1, "in_processes", then_unplug)
    assert run(raw) == 1
    assert "is gone" in capsys.readouterr().err
    assert len(pngs_of(raw)) == 5 * 7
    (raw.parent / "unplugged").rename(raw)
    monkeypatch.undo()
    assert run(raw) == 0
    assert "written 7 + up to date 5" in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_links_that_loop_or_leave_the_input_are_refused(raw, tmp_path):
    folder = raw / "TrainingData" / "healthy"
    save_ct(tmp_path / "outside.dcm", GOOD)
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "leaves").symlink_to(tmp_path / "outside.dcm")
    (folder / "folder").symlink_to(raw, target_is_directory=True)
    (folder / "inside").symlink_to("00.dcm")
    assert run(raw) == 1
    rows = rows_of(raw)
    assert "a link that ends nowhere" in rows["loop"]["reason"]
    assert "a link that ends nowhere" in rows["dangling"]["reason"]
    assert "out of the input folder" in rows["leaves"]["reason"]
    assert "linked" in rows["folder"]["reason"]
    assert rows["inside"]["status"] == "ok"
    assert len(rows) == 17


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names themselves")
def test_names_of_any_bytes_cost_at_most_themselves(raw):
    folder = raw / "TrainingData" / "healthy"
    for name in (
        "new\nline.dcm",
        "-dash.dcm",
        " space .dcm",
        "a.b.c.dcm",
        "\u200f\u0634.dcm",
        "x" * 251 + ".dcm",
    ):
        save_ct(folder / name, GOOD)
    save_ct(folder / "tmp", GOOD).rename(folder / os.fsdecode(b"\xff\xfe.dcm"))
    assert run(raw) == 1
    failed = [row for row in rows_of(raw).values() if row["status"] == "failed"]
    assert [row["reason"] for row in failed] == [
        "its path is not valid Unicode, or has a carriage return: rename it"
    ]
    assert len(pngs_of(raw)) == 18 * 7


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names themselves")
def test_class_folder_of_any_bytes_costs_its_own_slices_alone(raw):
    save_ct(raw / "TrainingData" / "new" / "b.dcm", GOOD)
    (raw / "TrainingData" / "new").rename(raw / "TrainingData" / os.fsdecode(b"\xff"))
    assert run(raw) == 1
    rows = rows_of(raw)
    assert rows["b.dcm"]["reason"] == "its path is not valid Unicode, or has a carriage return: rename it"
    assert [row["status"] for row in rows.values()].count("ok") == len(rows) - 1


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_link_to_where_one_may_not_look_costs_itself_alone(raw, monkeypatch):
    (raw / "TrainingData" / "healthy" / "forbidden").symlink_to(raw / "elsewhere")
    is_dir = Path.is_dir

    def forbidden(path, **options):  # as Python 3.11 does; a test that runs as root may look anywhere
        if path.name == "forbidden":
            raise PermissionError(13, "Permission denied", str(path))
        return is_dir(path, **options)

    monkeypatch.setattr(Path, "is_dir", forbidden)
    assert run(raw) == 1
    rows = rows_of(raw)
    assert "where you may not look" in rows["forbidden"]["reason"]
    assert [row["status"] for row in rows.values()].count("ok") == len(rows) - 1


def test_two_runs_on_one_output_do_not_mix(raw, capsys):
    (raw.parent / "out").mkdir()
    ledger = step1.open_ledger(raw.parent / "out")
    assert run(raw) == 2
    assert "another run" in capsys.readouterr().err
    ledger.close()


def test_nothing_written_names_the_patient(raw):
    run(raw)
    everything = b"".join(p.read_bytes() for p in (raw.parent / "out").rglob("*") if p.is_file())
    for secret in (b"SECRET-ID", b"Secret^Name", b"1.2.826.0.1.3680043.8.498"):
        assert secret not in everything


# ---------------------------------------- fuzz


def mutate(data, rng):
    """Return bytes with a few flips, or cut short."""
    data = bytearray(data)
    if rng.random() < 0.2:
        return bytes(data[: rng.randrange(len(data))])
    for _ in range(rng.choice((1, 4, 32))):
        data[rng.randrange(len(data) if rng.random() < 0.5 else min(len(data), 1200))] = rng.randrange(256)
    return bytes(data)


def fuzz(folder, count, seed):
    """Write damaged files of several syntaxes."""
    rng = random.Random(seed)
    whole = [save_ct(folder / "w", plain_head(32), **WINDOW).read_bytes()]
    whole += [save_in(s, folder / "w").read_bytes() for s in (*ENCODERS, DeflatedExplicitVRLittleEndian)]
    ct = make_ct((plain_head(32) + 1024).astype(np.uint16), RescaleIntercept=-1024)
    ct.PixelData = encapsulate([lossless_jpeg((plain_head(32) + 1024).astype(np.uint16))])
    ct.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.70"
    whole.append(save(folder / "w", ct).read_bytes())
    (folder / "w").unlink()
    for number in range(count):
        (folder / f"{number:05}").write_bytes(mutate(rng.choice(whole), rng))


@pytest.mark.processes
def test_damaged_files_are_converted_or_refused_and_never_end_the_run(tmp_path):
    """ICH_FUZZ=10000 runs the long version."""
    count = int(os.environ.get("ICH_FUZZ", "300"))
    folder = tmp_path / "raw" / "TestingData"
    folder.mkdir(parents=True)
    fuzz(folder, count, seed=count)
    assert run(tmp_path / "raw", "--variants", "0", "1") in (0, 1)
    rows = rows_of(tmp_path / "raw")
    assert len(rows) == count
    assert {row["status"] for row in rows.values()} == {"ok", "failed"}
    assert all(row["reason"] for row in rows.values() if row["status"] == "failed")


@pytest.mark.parametrize("syntax", ["1.2.77.19371203", "SECRET^Name"])
def test_transfer_syntax_without_a_name_is_not_quoted(syntax, tmp_path):
    """It is a UID of the header or, in a damaged file, anything."""
    path = save_ct(tmp_path / "a", GOOD)
    known = b"1.2.840.10008.1.2.1\0"
    path.write_bytes(path.read_bytes().replace(known, syntax.encode().ljust(len(known), b"\0"), 1))
    reason = reason_of(path, tmp_path)
    assert "TransferSyntaxUID" in reason and syntax not in reason


def test_file_that_ends_within_a_sequence_is_damaged_not_unreadable(tmp_path):
    """pydicom says so by an OSError of its own, as if it were the disk."""
    ct = make_ct(GOOD, ReferencedImageSequence=[Dataset()])
    ct["ReferencedImageSequence"].is_undefined_length = True
    path = save(tmp_path / "a", ct)
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"\x08\x00\x40\x11SQ") + 16])
    reason = reason_of(path, tmp_path)
    assert "damaged" in reason and "permissions" not in reason


def test_jpeg_ls_that_happens_to_hold_a_jpeg_2000_marker_is_converted(tmp_path):
    """The pixels' bits may do that by chance, here a comment (ITU-T T.81 B.2.4.5) does."""
    ct = make_ct(plain_head(64), **WINDOW)
    ct.compress(JPEGLSLossless, encoding_plugin=ENCODERS[JPEGLSLossless])
    stream = get_frame(ct.PixelData, 0, number_of_frames=1)
    comment = b"\xff\x4f\xff\x51" + bytes(40)
    segment = struct.pack(">HH", 0xFFFE, 2 + len(comment)) + comment
    ct.PixelData = encapsulate([stream[:2] + segment + stream[2:]])
    row = convert(save(tmp_path / "a", ct), tmp_path)
    assert row["status"] == "ok", row
