"""Step 1 as a program: names, manifest, tally, second runs, bad files; small slices in a temporary folder."""

import csv
import faulthandler
import hashlib
import io
import os
import re
import runpy
import shutil
import sqlite3
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pydicom
import pytest
from conftest import ROOT, make_ct, plain_head, save_ct

import Step1_Image_Preprocessing as step1

SCRIPT = Path(step1.__file__)


@pytest.fixture
def raw(tmp_path):
    """Return a raw_data folder with three good training slices and one for testing."""
    folder = tmp_path / "raw"
    for name, label, hu in (("a", "healthy", 35), ("b", "epidural", 70), ("c", "subdural", 60)):
        window = {"WindowCenter": [40, 50], "WindowWidth": [80, 90]}
        save_ct(
            folder / "TrainingData" / label / f"{name}.dcm", plain_head(brain_hu=hu), PatientID=name, **window
        )
    save_ct(folder / "TestingData" / "t.dcm", plain_head())
    return folder


@pytest.fixture(autouse=True)
def no_processes(monkeypatch, request):
    """Run the work in this process, which is quick; tests marked `processes` use real ones."""

    def serially(tasks, settings, jobs):
        for task in tasks:
            yield task, step1.process(task, settings)

    if "processes" not in request.keywords:
        monkeypatch.setattr(step1, "in_processes", serially)


def run(raw, *options):
    """Run Step 1 and return its exit status."""
    return step1.main(["--raw-data", str(raw), "--output", str(raw.parent / "out"), "--jobs", "1", *options])


def manifest(raw):
    with (raw.parent / "out" / "manifest.csv").open(encoding="utf-8", newline="") as file:
        return {row["source"]: row for row in csv.DictReader(file)}


def pngs(raw):
    """Return {path below the output folder: content} of all variant PNGs."""
    out = raw.parent / "out"
    return {
        p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*.png") if p.name != "preview.png"
    }


def last_tally(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("found")][-1]


# ---------------------------------------- what a run leaves


def test_output_mirrors_the_input_under_each_variant(raw):
    assert run(raw) == 0
    files = ("TrainingData/healthy/a", "TrainingData/epidural/b", "TrainingData/subdural/c", "TestingData/t")
    assert set(pngs(raw)) == {f"{variant}/{file}.png" for variant in step1.VARIANTS for file in files}


def test_pngs_are_8_bit_grey(raw):
    run(raw)
    for content in pngs(raw).values():
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
        assert image.dtype == np.uint8
        assert image.ndim == 2


def test_variant_0_is_the_headers_picture(raw):
    run(raw)
    image = cv2.imread(str(raw.parent / "out" / "0_Dicom2PNG" / "TrainingData" / "epidural" / "b.png"), -1)
    hu = plain_head(brain_hu=70)
    assert image[64, 64] == round(70 * 255 / 79)  # LINEAR 40/80
    assert (image[hu == -1000] == 0).all()
    assert (image[hu == 900] == 255).all()


def test_manifest_row(raw):
    run(raw)
    row = manifest(raw)["TrainingData/epidural/b.dcm"]
    assert tuple(row) == step1.MANIFEST_COLUMNS
    head = plain_head() > -1000
    skull = plain_head() == 900
    expected = {
        "image": "TrainingData/epidural/b.png",
        "split": "train",
        "label": "epidural",
        "status": "ok",
        "reason": "",
        "rows": "128",
        "columns": "128",
        "window_center": "40.0",
        "window_width": "80.0",
        "window_source": "header",
        "hu_repaired": "0",
        "blank": "0",
        "head_fraction": str(round(head.mean(), 4)),
        "bone_fraction": str(round(skull.sum() / head.sum(), 4)),
        "crop": "20 20 109 109",
    }
    assert {key: row[key] for key in expected} == expected


def head_columns(raw):
    """Return what the manifest says of the head of one slice."""
    row = manifest(raw)["TrainingData/epidural/b.dcm"]
    return [row[column] for column in ("blank", "head_fraction", "bone_fraction", "crop")]


def test_the_heads_columns_come_with_the_variants_that_need_it(raw):
    run(raw, "--variants", "0")
    assert head_columns(raw) == ["", "", "", ""]
    run(raw, "--variants", "1")
    assert head_columns(raw)[0] == "0"
    assert [bool(value) for value in head_columns(raw)] == [True, True, False, False]
    run(raw)
    complete = head_columns(raw)
    assert "" not in complete
    run(raw, "--variants", "0", "--force")  # nothing changed, so the rest stays known
    assert head_columns(raw) == complete


@pytest.mark.parametrize(
    ("variant", "known"),
    [
        ("7", [0, 0, 0, 0]),
        ("8", [1, 1, 0, 0]),
        ("9", [1, 1, 1, 1]),
        ("10", [1, 1, 1, 1]),
        ("11", [1, 1, 0, 0]),
    ],
)
def test_the_heads_columns_of_extra_variants_are_those_of_the_seven(raw, variant, known):
    run(raw, "--variants", variant)
    found = head_columns(raw)
    run(raw)
    assert found == [value if there else "" for value, there in zip(head_columns(raw), known, strict=True)]


def test_head_columns_that_a_killed_run_left_empty_are_filled_by_the_next(raw):
    run(raw)
    complete = (raw.parent / "out" / "manifest.csv").read_text(encoding="utf-8")
    ledger = sqlite3.connect(raw.parent / "out" / ".ledger.sqlite3")
    lost = "made = '0_Dicom2PNG', blank = '', head_fraction = '', bone_fraction = '', crop = ''"
    ledger.execute(f"UPDATE files SET {lost}")
    ledger.commit()
    ledger.close()
    run(raw, "--variants", "0")
    assert manifest(raw)["TrainingData/epidural/b.dcm"]["blank"] == ""
    run(raw)
    assert (raw.parent / "out" / "manifest.csv").read_text(encoding="utf-8") == complete


def test_another_file_moved_to_the_same_name_is_noticed(raw):
    folder = raw / "TrainingData" / "healthy"
    for name, brain in (("d", 40), ("e", 60)):
        save_ct(folder / f"{name}.dcm", plain_head(brain_hu=brain), PatientID=name)
        os.utime(folder / f"{name}.dcm", (10**9, 10**9))
    run(raw)
    before = manifest(raw)
    (folder / "e.dcm").replace(folder / "d.dcm")
    run(raw)
    after = manifest(raw)["TrainingData/healthy/d.dcm"]
    assert after["patient"] == before["TrainingData/healthy/e.dcm"]["patient"]


def test_a_file_that_changed_keeps_nothing_of_its_row(raw):
    run(raw, "--variants", "4")
    save_ct(raw / "TrainingData" / "epidural" / "b.dcm", plain_head(brain_hu=60))
    for variant in step1.VARIANTS:
        shutil.rmtree(raw.parent / "out" / variant, ignore_errors=True)
    run(raw, "--variants", "0")
    assert manifest(raw)["TrainingData/epidural/b.dcm"]["crop"] == ""


def test_libraries_are_set_up_in_whatever_thread_converts(raw, monkeypatch):
    """OpenCV's switches are a thread's own, and Dask's workers never run the top of the script."""
    monkeypatch.setattr(pydicom.config.settings, "reading_validation_mode", pydicom.config.WARN)
    task = step1.Task("b", raw / "TrainingData" / "epidural" / "b.dcm", "b.png", ("0_Dicom2PNG",))

    def work():
        cv2.ipp.setUseIPP(True)
        cv2.ocl.setUseOpenCL(True)
        assert step1.process(task, step1.Settings(raw.parent / "o", None, b"k"))["status"] == "ok"
        return cv2.ipp.useIPP(), cv2.ocl.useOpenCL(), pydicom.config.settings.reading_validation_mode

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() == (False, False, pydicom.config.IGNORE)


@pytest.mark.parametrize(
    ("option", "noted"), [("brain", "40,80"), ("50.5,130", "50.5,130"), ("header", "header")]
)
def test_manifest_says_which_window_roi_shows(raw, option, noted):
    run(raw, "--variants", "0,1", "--roi-window", option)
    assert {row["roi_window"] for row in manifest(raw).values()} == {noted}


def test_missing_window_is_noted_in_the_manifest(raw):
    run(raw)
    assert manifest(raw)["TestingData/t.dcm"]["window_source"] == "default"


def test_test_labels_come_from_their_file(raw, capsys):
    (raw / "TestingData_labels.csv").write_text("image,label\nt,subarachnoid\n", encoding="utf-8")
    run(raw)
    row = manifest(raw)["TestingData/t.dcm"]
    assert (row["split"], row["label"]) == ("test", "subarachnoid")
    assert "match no file" not in capsys.readouterr().out


def test_test_labels_are_read_as_excel_saves_them(raw):
    (raw / "TestingData_labels.csv").write_text("image,label\nt,epidural\n", encoding="utf-8-sig")
    assert run(raw, "--variants", "0") == 0
    assert manifest(raw)["TestingData/t.dcm"]["label"] == "epidural"


def test_wrong_test_labels_are_a_usage_error(raw, capsys):
    (raw / "TestingData_labels.csv").write_text("image,label\nt,stroke\n", encoding="utf-8")
    assert run(raw) == 2
    assert "stroke" in capsys.readouterr().err


def test_test_labels_match_whatever_the_case_of_dcm_and_with_spaces(raw):
    save_ct(raw / "TestingData" / "T2.DCM", plain_head())
    text = "image,label\n T2.DCM , Epidural\nt.dcm,healthy\n"
    (raw / "TestingData_labels.csv").write_text(text, encoding="utf-8")
    assert run(raw) == 0
    assert [manifest(raw)[f"TestingData/{n}"]["label"] for n in ("T2.DCM", "t.dcm")] == [
        "epidural",
        "healthy",
    ]


def test_test_labels_match_whatever_the_system_they_were_typed_on(raw):
    """Decomposed names, as macOS has them, in the folder, and Windows' backslash in the table."""
    save_ct(raw / "TestingData" / "sub" / "mu\u0308ller.dcm", plain_head())
    (raw / "TestingData_labels.csv").write_text("image,label\nsub\\m\u00fcller,epidural\n", encoding="utf-8")
    assert run(raw, "--variants", "0") == 0
    assert manifest(raw)["TestingData/sub/mu\u0308ller.dcm"]["label"] == "epidural"


def test_test_labels_tell_folders_of_any_depth_apart(raw):
    wanted = {"a/deep/x": "epidural", "a/x": "subdural", "x": "healthy"}
    for name in wanted:
        save_ct(raw / "TestingData" / f"{name}.dcm", plain_head(64))
    rows = "".join(f"{name},{label}\n" for name, label in wanted.items())
    (raw / "TestingData_labels.csv").write_text(f"image,label\n{rows}", encoding="utf-8")
    assert run(raw, "--variants", "0") == 0
    assert {name: manifest(raw)[f"TestingData/{name}.dcm"]["label"] for name in wanted} == wanted


def test_test_labels_that_name_no_file_are_reported(raw, capsys):
    (raw / "TestingData_labels.csv").write_text("image,label\nu,healthy\n", encoding="utf-8")
    run(raw)
    assert "1 rows of TestingData_labels.csv match no file, such as 'u'" in capsys.readouterr().out


def test_test_labels_in_another_encoding_are_a_usage_error(raw, capsys):
    (raw / "TestingData_labels.csv").write_bytes("image,label\nt\xe9,healthy\n".encode("latin-1"))
    assert run(raw) == 2
    assert "UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "not hexadecimal", "ab" * 8])
def test_damaged_patient_key_is_a_usage_error(raw, capsys, content):
    run(raw)
    (raw.parent / "out" / ".patient_key").write_text(content, encoding="ascii")
    assert run(raw, "--force") == 2
    assert ".patient_key is damaged" in capsys.readouterr().err


def test_damaged_ledger_is_a_usage_error(raw, capsys):
    run(raw)
    (raw.parent / "out" / ".ledger.sqlite3").write_bytes(b"garbage " * 1000)
    assert run(raw) == 2
    assert "delete it" in capsys.readouterr().err


def test_ledger_of_another_version_of_the_script_is_begun_anew(raw, capsys):
    run(raw)
    before = manifest(raw)
    ledger = sqlite3.connect(raw.parent / "out" / ".ledger.sqlite3")
    ledger.execute("ALTER TABLE files RENAME COLUMN study TO examination")
    ledger.close()
    assert run(raw) == 0
    assert last_tally(capsys) == "found 4 = written 4 + up to date 0 + failed 0"
    assert manifest(raw) == before


def test_same_patient_same_pseudonym_and_never_the_id(raw):
    for name in ("d", "e"):
        save_ct(raw / "TrainingData" / "healthy" / f"{name}.dcm", plain_head(), PatientID="a")
    run(raw)
    patient = {Path(source).stem: row["patient"] for source, row in manifest(raw).items()}
    assert patient["a"] == patient["d"] == patient["e"]
    assert len({patient["a"], patient["b"], patient["c"]}) == 3
    everything = (raw.parent / "out" / "manifest.csv").read_text(encoding="utf-8")
    for secret in ("SECRET-ID", "Secret^Name", hashlib.sha256(b"a").hexdigest()[:16]):
        assert secret not in everything


def test_new_patient_key_makes_all_pseudonyms_anew(raw):
    """Else a new slice of a known patient would be somebody else's, on the other side of a split."""
    run(raw, "--variants", "0")
    (raw.parent / "out" / ".patient_key").unlink()
    save_ct(raw / "TrainingData" / "healthy" / "d.dcm", plain_head(brain_hu=50), PatientID="b")
    run(raw, "--variants", "0")
    rows = manifest(raw)
    assert rows["TrainingData/healthy/d.dcm"]["patient"] == rows["TrainingData/epidural/b.dcm"]["patient"]


def test_spaces_round_an_id_make_no_second_pseudonym():
    assert step1.pseudonym(" P1 ", b"k") == step1.pseudonym("P1", b"k")


def test_pseudonyms_differ_between_output_folders():
    assert step1.pseudonym("a", b"1" * 32) != step1.pseudonym("a", b"2" * 32)


def test_slice_without_patient_id_has_no_pseudonym(raw):
    save_ct(raw / "TrainingData" / "healthy" / "d.dcm", plain_head(), PatientID=None)
    run(raw)
    assert manifest(raw)["TrainingData/healthy/d.dcm"]["patient"] == ""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_patient_key_is_for_its_owner_alone(raw):
    run(raw)
    assert (raw.parent / "out" / ".patient_key").stat().st_mode & 0o777 == 0o600


def preview_tiles(raw, rows, columns):
    """Return preview.png as (rows, 200, columns, 200) or (rows, 200, columns, 200, 3), without its words."""
    sheet = cv2.imread(str(raw.parent / "out" / "preview.png"), cv2.IMREAD_UNCHANGED)
    assert sheet.shape[:2] == (44 + 200 * rows, 150 + 200 * columns)
    return sheet[44:, 150:].reshape(rows, 200, columns, 200, *sheet.shape[2:])


def test_preview_has_a_row_a_class_and_a_column_a_variant(raw):
    run(raw)
    tiles = preview_tiles(raw, 3, 7).max(axis=(1, 3))
    assert (tiles > 100).all()  # healthy, subdural, epidural, each in seven pictures


def test_preview_shows_extra_variants_that_were_made_in_colour(raw):
    run(raw, "--variants", "1", "11")
    tiles = preview_tiles(raw, 3, 2)
    assert (tiles[:, :, 0] == tiles[:, :, 0, :, :1]).all()
    assert tiles[0, 98, 1, 98].tolist() == [
        round(v) for v in (835 * 255 / 2799, 55 * 255 / 199, 35 * 255 / 79)
    ]


@pytest.mark.parametrize("variants", [("1", "4"), ("1",)])  # the second knows no crop, and no brain
def test_preview_ends_with_the_middle_of_the_brain_at_full_size(raw, variants):
    hu = plain_head(512)
    hu[:, 256:][hu[:, 256:] == 35] = 70  # a bleed that begins at x = 256
    save_ct(raw / "TrainingData" / "intraventricular" / "d.dcm", hu, WindowCenter=40, WindowWidth=80)
    run(raw, "--variants", *variants)
    last = preview_tiles(raw, 5, len(variants))[-1].transpose(1, 0, 2)[:, 20:176, :196]
    assert (last[:, :, :90] == round(35 * 255 / 79)).all()
    assert (last[:, :, 100:] == round(70 * 255 / 79)).all()


def test_preview_keeps_the_shape_of_a_slice_that_is_no_square(raw):
    save_ct(raw / "TrainingData" / "healthy" / "a.dcm", plain_head()[32:96], WindowCenter=40, WindowWidth=80)
    run(raw, "--variants", "0", "1")
    tile = preview_tiles(raw, 3, 2)[0, :, 0]
    assert tile[:96, :196].any(axis=1).all() and not tile[100:].any()  # its edge is smoothed


def test_preview_prefers_the_most_common_header_window(raw):
    """Not that of more bone, nor the first by name."""
    window = {"WindowCenter": 100, "WindowWidth": 600}
    save_ct(raw / "TrainingData" / "subdural" / "a.dcm", plain_head(brain_hu=10), **window)
    run(raw, "--variants", "0")
    assert preview_tiles(raw, 3, 1)[1, 98, 0, 98] == round(60 * 255 / 79)  # c.dcm, 40/80 as two others


def test_preview_prefers_the_slice_with_the_least_bone(raw):
    hu = plain_head(brain_hu=50)
    hu[50:60, 50:60] = 900  # more bone than c.dcm has
    window = {"WindowCenter": 40, "WindowWidth": 80}
    save_ct(raw / "TrainingData" / "subdural" / "a.dcm", hu, **window)
    run(raw, "--variants", "0", "4")
    assert preview_tiles(raw, 3, 2)[1, 98, 0, 98] == round(60 * 255 / 79)


@pytest.mark.processes
def test_two_processes_write_the_same_bytes_as_one(raw, tmp_path):
    run(raw)
    other = tmp_path / "two" / "out"
    assert step1.main(["--raw-data", str(raw), "--output", str(other), "--jobs", "2"]) == 0
    for name, content in pngs(raw).items():
        assert (other / name).read_bytes() == content


# ---------------------------------------- names


def names_of(sources):
    """Return the PNG names of these sources, found in this order."""
    taken, names = set(), []
    for source in sources:
        name, folded = step1.free_name(source, source, taken.__contains__)
        taken.add(folded)
        names.append(name)
    return names


def test_folder_named_like_a_picture_is_no_obstacle(raw):
    folder = raw / "TrainingData" / "healthy"
    save_ct(folder / "a.png" / "d.dcm", plain_head())
    assert run(raw) == 0
    assert "0_Dicom2PNG/TrainingData/healthy/a.pn~/d.png" in pngs(raw)


def test_only_a_final_dcm_is_cut():
    names = names_of(["T/1.2.840.1", "T/1.2.840.2", "T/x.dcm.dcm", "T/y.DCM", "T/z.dcm.bak"])
    assert names == ["T/1.2.840.1.png", "T/1.2.840.2.png", "T/x.dcm.png", "T/y.png", "T/z.dcm.bak.png"]


@pytest.mark.parametrize(
    "sources",
    [
        ["T/x", "T/x.dcm"],
        ["T/X.dcm", "T/x.dcm"],
        ["T/x", "T/x.DCM", "T/x.dcm", "T/X"],
        ["T/e\u0301.dcm", "T/\u00e9.dcm"],
        ["T/STRASSE.dcm", "T/stra\u00dfe.dcm"],
        ["T/" + "x" * 250, "T/" + "x" * 250 + ".dcm"],
    ],
    ids=["ending", "case", "four", "unicode forms", "sharp s", "long"],
)
def test_two_inputs_never_share_an_output(sources):
    names = names_of(sources)
    assert len({name.casefold() for name in names}) == len(sources)
    assert max(len(Path(name).name) for name in names) < 255


def test_colliding_files_all_get_their_own_pngs(raw):
    folder = raw / "TrainingData" / "healthy"
    save_ct(folder / "a", plain_head(brain_hu=50))
    assert run(raw) == 0
    rows = [row for source, row in manifest(raw).items() if Path(source).stem == "a"]
    images = [cv2.imread(str(raw.parent / "out" / "0_Dicom2PNG" / row["image"]), -1)[64, 64] for row in rows]
    assert sorted(images) == [round(35 * 255 / 79), round(50 * 255 / 79)]


@pytest.mark.parametrize("name", ["Schädel 07", "-x", "a.b.c", "頭部"])
def test_unusual_names_are_kept(raw, name):
    save_ct(raw / "TrainingData" / "healthy" / f"{name}.dcm", plain_head())
    assert run(raw) == 0
    assert f"1_ROI/TrainingData/healthy/{name}.png" in pngs(raw)


def test_stray_files_are_passed_over(raw, capsys):
    for name in ("Thumbs.db", ".DS_Store", "DICOMDIR", "notes.csv", "README.md"):
        (raw / "TrainingData" / "healthy" / name).write_bytes(b"x")
    assert run(raw) == 0
    assert last_tally(capsys) == "found 4 = written 4 + up to date 0 + failed 0"


# ---------------------------------------- classes


def classes_of(raw):
    """Return {source: class} of the manifest."""
    return {source: row["label"] for source, row in manifest(raw).items()}


def make_classes(folder, *labels):
    """Write a slice for each class; return the raw_data folder."""
    for number, label in enumerate(labels):
        save_ct(folder / "TrainingData" / label / "a.dcm", plain_head(64, 20 + number))
    return folder


def test_any_folder_below_trainingdata_is_a_class(tmp_path, capsys):
    raw = make_classes(tmp_path / "raw", "Stroke", "no stroke", "脑出血")
    assert run(raw) == 0
    assert set(classes_of(raw).values()) == {"Stroke", "no stroke", "脑出血"}
    assert (
        "training slices (patients): Stroke 1 (1), no stroke 1 (1), 脑出血 1 (1)\n" in capsys.readouterr().out
    )


def test_usual_classes_keep_their_order_and_spelling_and_others_follow(tmp_path, capsys):
    raw = make_classes(tmp_path / "raw", "tumor", "Epidural", "abscess", "healthy")
    assert run(raw) == 0
    assert classes_of(raw)["TrainingData/Epidural/a.dcm"] == "epidural"
    lines = capsys.readouterr().out.splitlines()
    assert "training slices (patients): healthy 1 (1), epidural 1 (1), abscess 1 (1), tumor 1 (1)" in lines
    missing = "note: no usable training slice of intraparenchymal, intraventricular, subarachnoid, subdural"
    missing += "; the others can be compared"
    assert [line for line in lines if "intraparenchymal" in line] == [missing]
    assert preview_tiles(raw, 4, 7).any()


def test_class_of_letters_that_the_console_lacks_is_no_obstacle(tmp_path):
    raw = make_classes(tmp_path / "raw", "脑出血", "other")
    command = [sys.executable, str(SCRIPT), "--raw-data", str(raw), "--output", str(tmp_path / "out")]
    console = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, env=console, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "training slices (patients): other 1 (1), \\u8111\\u51fa\\u8840 1 (1)" in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere they are one folder")
def test_folders_that_differ_by_case_alone_are_one_class(tmp_path):
    raw = make_classes(tmp_path / "raw", "stroke", "Stroke", "other")
    assert run(raw) == 0
    assert set(classes_of(raw).values()) == {"Stroke", "other"}


def test_single_class_is_converted_and_said(tmp_path, capsys):
    raw = make_classes(tmp_path / "raw", "stroke")
    assert run(raw) == 0
    assert len(pngs(raw)) == 7
    assert "note: only one class has usable slices; to compare, put another" in capsys.readouterr().out


def test_class_whose_every_file_is_refused_counts_as_missing(raw, capsys):
    (raw / "TrainingData" / "healthy" / "a.dcm").write_bytes(b"damaged")
    assert run(raw) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "training slices (patients): subdural 1 (1), epidural 1 (1)" in lines
    assert any(line.startswith("note: no usable training slice of healthy, ") for line in lines)


def test_many_classes_are_counted_and_not_all_named(tmp_path, capsys):
    raw = make_classes(tmp_path / "raw", *(f"p{number:02}" for number in range(15)))
    assert run(raw, "--variants", "0") == 0
    assert "p10 1 (1), p11 1 (1), and 3 classes more\n" in capsys.readouterr().out
    assert preview_tiles(raw, 12, 1).any()


@pytest.mark.parametrize("label", ["stroke", "STROKE", "epidural"])
def test_testing_slice_may_be_of_a_found_or_a_usual_class(tmp_path, label):
    raw = make_classes(tmp_path / "raw", "Stroke", "other")
    save_ct(raw / "TestingData" / "t.dcm", plain_head(64))
    (raw / "TestingData_labels.csv").write_text(f"image,label\nt,{label}\n", encoding="utf-8")
    assert run(raw) == 0
    assert classes_of(raw)["TestingData/t.dcm"] == label.capitalize().replace("Epidural", "epidural")


@pytest.mark.parametrize("line", ["t,tumor", "t,", ",Stroke"], ids=["unknown", "no class", "no image"])
def test_testing_label_that_is_no_class_is_a_usage_error(tmp_path, capsys, line):
    raw = make_classes(tmp_path / "raw", "Stroke", "other")
    (raw / "TestingData_labels.csv").write_text(f"image,label\n{line}\n", encoding="utf-8")
    assert run(raw) == 2
    assert "subdural, epidural, Stroke, other; found" in capsys.readouterr().err


# ---------------------------------------- second runs


def test_second_run_has_nothing_to_do(raw, capsys):
    run(raw)
    times = {p: p.stat().st_mtime_ns for p in (raw.parent / "out").rglob("*.png")}
    assert run(raw) == 0
    assert last_tally(capsys) == "found 4 = written 0 + up to date 4 + failed 0"
    assert times == {p: p.stat().st_mtime_ns for p in times}


def test_second_run_leaves_the_manifest_as_it_was(raw):
    run(raw)
    before = (raw.parent / "out" / "manifest.csv").read_bytes()
    run(raw)
    assert (raw.parent / "out" / "manifest.csv").read_bytes() == before


def test_changed_input_is_converted_again(raw, capsys):
    run(raw)
    before = pngs(raw)
    save_ct(raw / "TrainingData" / "healthy" / "a.dcm", plain_head(brain_hu=20), PatientID="a")
    assert run(raw) == 0
    assert last_tally(capsys) == "found 4 = written 1 + up to date 3 + failed 0"
    changed = {name for name, content in pngs(raw).items() if before[name] != content}
    assert changed == {f"{v}/TrainingData/healthy/a.png" for v in step1.VARIANTS}


def test_missing_png_is_made_again(raw, capsys):
    run(raw)
    before = pngs(raw)
    (raw.parent / "out" / "1_ROI" / "TestingData" / "t.png").unlink()
    assert run(raw) == 0
    assert last_tally(capsys) == "found 4 = written 1 + up to date 3 + failed 0"
    assert pngs(raw) == before


def test_other_settings_convert_all_again_also_variants_not_asked_for(raw, capsys):
    run(raw)
    before = pngs(raw)
    assert run(raw, "--variants", "1", "--roi-window", "50,130") == 0
    assert last_tally(capsys) == "found 4 = written 4 + up to date 0 + failed 0"
    after = pngs(raw)
    changed = {name.split("/")[0] for name in after if after[name] != before[name]}
    assert changed == set(step1.VARIANTS) - {"0_Dicom2PNG"}


def test_other_code_and_other_libraries_convert_all_again(tmp_path, monkeypatch):
    identities = [step1.run_identity(step1.Settings(tmp_path, None, b"k")) for _ in range(2)]
    monkeypatch.setattr(cv2, "__version__", "0")
    identities.append(step1.run_identity(step1.Settings(tmp_path, None, b"k")))
    (tmp_path / "changed.py").write_bytes(SCRIPT.read_bytes() + b"\n")
    monkeypatch.setattr(step1, "__file__", str(tmp_path / "changed.py"))
    identities.append(step1.run_identity(step1.Settings(tmp_path, None, b"k")))
    assert identities[0] == identities[1] and len(set(identities)) == 3


def test_force_makes_everything_again(raw, capsys):
    run(raw)
    assert run(raw, "--force") == 0
    assert last_tally(capsys) == "found 4 = written 4 + up to date 0 + failed 0"


def test_removed_input_leaves_the_manifest(raw):
    run(raw)
    (raw / "TestingData" / "t.dcm").unlink()
    run(raw)
    assert "TestingData/t.dcm" not in manifest(raw)


# ---------------------------------------- options


@pytest.mark.parametrize(
    "choice",
    [["0", "10"], ["0_Dicom2PNG", "10_ROI+noskull"], ["0,10"], ["0, 10_ROI+noskull", "0"]],
    ids=["numbers", "names", "comma", "commas and spaces"],
)
def test_variants_option(raw, choice):
    assert run(raw, "--variants", *choice) == 0
    assert {name.split("/")[0] for name in pngs(raw)} == {"0_Dicom2PNG", "10_ROI+noskull"}


@pytest.mark.parametrize("choice", [["all"], ["0", "all"]])
def test_all_variants_are_the_seven_and_the_extra_ones(raw, choice):
    assert run(raw, "--variants", *choice) == 0
    assert len({name.split("/")[0] for name in pngs(raw)}) == 7 + 5


def test_number_that_two_variants_share_is_a_usage_error(raw, capsys, monkeypatch):
    monkeypatch.setitem(step1.KNOWN_VARIANTS, "7_Mine", ("roi", "bilateral"))
    with pytest.raises(SystemExit, match="2"):
        run(raw, "--variants", "7")
    assert "'7' may be 7_Window or 7_Mine: write the whole name" in capsys.readouterr().err


def test_table_with_a_step_that_is_none_is_a_usage_error(raw, capsys, monkeypatch):
    monkeypatch.setitem(step1.KNOWN_VARIANTS, "7_Mine", ("blur",))
    assert run(raw) == 2
    assert "variant 7_Mine: no step 'blur'" in capsys.readouterr().err


def test_extra_variants_are_made_again_and_removed_with_the_others(raw):
    run(raw, "--variants", "all")
    before = pngs(raw)
    (raw / "TrainingData" / "subdural" / "c.dcm").unlink()
    run(raw, "--variants", "0", "--roi-window", "50,130")
    after = pngs(raw)
    assert {name for name in before if name not in after} == {n for n in before if n.endswith("/c.png")}
    changed = {name.split("/")[0] for name in after if after[name] != before[name]}
    assert changed == set(step1.KNOWN_VARIANTS) - {"0_Dicom2PNG", "8_Mask", "11_ROI+windows"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--variants 12", "argument --variants: '12' is none of 0_Dicom2PNG, 1_ROI, "),
        ("--roi-window wide", "argument --roi-window: 'wide' is not brain, header or centre,width such as"),
        ("--roi-window 40,0", "argument --roi-window: '40,0': the width has to be 1 HU or more"),
        ("--jobs 0", "argument --jobs: '0' is not a whole number from 1 to 4294967295"),
        ("--seed 4294967296", "argument --seed: '4294967296' is not a whole number from 0 to 4294967295"),
        ("--nonsense", "error: unrecognized arguments: --nonsense"),
    ],
)
def test_usage_errors_exit_with_2_and_say_what_is_wrong(raw, options, sentence, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        run(raw, *options.split())
    assert sentence in capsys.readouterr().err


def test_missing_raw_data_is_a_usage_error_that_says_what_to_do(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "nowhere")
    assert stop.value.code == 2
    assert "--raw-data" in capsys.readouterr().err


def test_help_states_the_defaults(capsys):
    with pytest.raises(SystemExit):
        step1.main(["--help"])
    text = capsys.readouterr().out
    options, words = re.findall(r"^  (--\S+)", text, re.MULTILINE), " ".join(text.split())
    assert words.count("(default: ") == len(options) == 12
    assert "1 some file failed or the run was stopped, 2 usage error, 130 Ctrl-C" in words


def test_defaults_are_those_of_the_readme():
    args = vars(step1.parse_args([]))
    assert args.pop("jobs") >= 1
    assert args == {
        **{"raw_data": ROOT / "raw_data", "input": ROOT / "raw_data", "output": ROOT / "data_preprocessing"},
        **{"variants": list(step1.VARIANTS), "roi_window": (40, 80), "force": False, "dask": None},
        **{"rsna": None, "rsna_labels": "subtype", "per_class": 1000, "test": 600, "seed": 0},
    }


# ---------------------------------------- bad files


def write_bad_files(folder):
    """Write one file for each way to be unsuitable; return {name: a word of its reason}."""
    good = plain_head(32)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "empty").write_bytes(b"")
    (folder / "text").write_bytes(b"this is no DICOM file at all, only words\n" * 9)
    whole = save_ct(folder / "whole", good).read_bytes()
    (folder / "whole").unlink()
    (folder / "half").write_bytes(whole[: len(whole) // 2])
    elements = {
        "mr": ({"Modality": "MR"}, "Modality"),
        "scout": ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "LOCALIZER"),
        "frames": ({"NumberOfFrames": 2}, "NumberOfFrames"),
        "colour": ({"PhotometricInterpretation": "RGB"}, "PhotometricInterpretation"),
        "nopixels": ({"PixelData": None}, "PixelData"),
        "noslope": ({"RescaleSlope": None}, "RescaleSlope"),
        "slope0": ({"RescaleSlope": 0}, "RescaleSlope"),
        "nointercept": ({"RescaleIntercept": None}, "RescaleIntercept"),
        "nosign": ({"PixelRepresentation": None}, "PixelRepresentation"),
        "highbit": ({"HighBit": 11}, "HighBit"),
        "huge": ({"Rows": 60_000, "Columns": 60_000}, "pixels"),
        "norows": ({"Rows": None}, "Rows"),
    }
    for name, (changes, _) in elements.items():
        save_ct(folder / name, good, **changes)
    reasons = {name: word for name, (_, word) in elements.items()}
    return reasons | {"empty": "DICOM", "text": "DICOM", "half": "PixelData"}


def test_each_bad_file_costs_itself_and_has_a_reason(raw, capsys):
    words = write_bad_files(raw / "TrainingData" / "healthy")
    assert run(raw) == 1
    output = capsys.readouterr()
    rows = {Path(source).name: row for source, row in manifest(raw).items()}
    for name, word in words.items():
        assert (rows[name]["status"], word in rows[name]["reason"]) == ("failed", True), rows[name]
        assert "\n" not in rows[name]["reason"]
        assert name in output.err
    tally = f"found {4 + len(words)} = written 4 + up to date 0 + failed {len(words)}"
    assert tally in output.out
    assert len(pngs(raw)) == 4 * 7


@pytest.mark.parametrize("place", ["x.dcm", ".hidden/x.dcm"])
def test_file_in_no_class_folder_is_refused_with_the_remedy(raw, place):
    save_ct(raw / "TrainingData" / place, plain_head())
    assert run(raw) == 1
    assert "move it to TrainingData/<its class>/" in manifest(raw)[f"TrainingData/{place}"]["reason"]


def test_input_that_is_gone_or_was_moved_loses_its_old_pngs(raw, capsys):
    run(raw)
    (raw / "TrainingData" / "healthy" / "a.dcm").rename(raw / "TrainingData" / "epidural" / "a.dcm")
    (raw / "TrainingData" / "subdural" / "c.dcm").unlink()
    assert run(raw) == 0
    assert {name.split("/", 1)[1] for name in pngs(raw)} == {
        *("TrainingData/epidural/a.png", "TrainingData/epidural/b.png", "TestingData/t.png")
    }
    assert "removed the pictures of 2 inputs" in capsys.readouterr().out


def test_thin_slice_is_drawn_in_the_preview(raw):
    save_ct(raw / "TrainingData" / "intraparenchymal" / "thin.dcm", np.full((4, 2000), 40, np.int16))
    strip = np.tile(np.arange(2000, dtype=np.int16) % 80, (4, 1))
    save_ct(raw / "TrainingData" / "intraventricular" / "thin.dcm", strip)
    assert run(raw) == 0


def test_manifest_of_another_program_is_not_overwritten(raw, capsys):
    own = raw / "manifest.csv"
    own.write_text("my own list", encoding="utf-8")
    assert run(raw, "--output", str(raw)) == 2
    assert own.read_text(encoding="utf-8") == "my own list"
    assert f"error: {own} is another program's" in capsys.readouterr().err


def test_preview_of_a_stopped_run_is_drawn_by_the_next(raw, monkeypatch):
    run(raw)
    before = (raw.parent / "out" / "preview.png").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(step1, "draw_preview", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(raw, "--roi-window", "50,130") == 130
    assert run(raw, "--roi-window", "50,130") == 0
    assert (raw.parent / "out" / "preview.png").read_bytes() != before


def test_file_that_went_bad_loses_its_old_pngs(raw):
    run(raw)
    (raw / "TrainingData" / "healthy" / "a.dcm").write_bytes(b"damaged")
    assert run(raw) == 1
    assert not [name for name in pngs(raw) if "healthy" in name]


def test_missing_decoder_names_the_package(monkeypatch):
    ct = make_ct(plain_head(32))
    ct.compress("1.2.840.10008.1.2.5", encoding_plugin="pydicom")
    monkeypatch.setattr(step1, "get_decoder", lambda syntax: type("Decoder", (), {"available_plugins": ()}))
    with pytest.raises(step1.UnsuitableFile, match="pip install pylibjpeg-rle"):
        step1.decode(ct)


@pytest.mark.parametrize(("implicit", "little"), [(True, True), (False, True), (False, False)])
def test_file_without_preamble_is_read_whatever_its_encoding(raw, implicit, little):
    ct = make_ct(plain_head().astype("<i2" if little else ">i2"), WindowCenter=40, WindowWidth=80)
    del ct.file_meta
    ct.save_as(raw / "TrainingData" / "healthy" / "bare", implicit_vr=implicit, little_endian=little)
    assert run(raw, "--variants", "0") == 0
    pictures = {name: content for name, content in pngs(raw).items() if "/healthy/" in name}
    assert len(pictures) == 2 and len(set(pictures.values())) == 1  # that of a.dcm


def test_what_python_tidies_up_meanwhile_is_no_warning_of_a_file(raw, monkeypatch):
    def convert(task, settings):
        warnings.warn("unclosed database", ResourceWarning, stacklevel=1)
        warnings.warn("odd header", UserWarning, stacklevel=1)
        return {"status": "ok"}

    monkeypatch.setattr(step1, "convert", convert)
    task = step1.Task("a", raw / "a", "a.png", ())
    assert step1.process(task, step1.Settings(raw, None, b"k"))["warnings"] == "odd header"


def test_rsna_style_ids_do_not_warn(raw, capsys):
    path = save_ct(raw / "TrainingData" / "healthy" / "a.dcm", plain_head(), StudyInstanceUID="1.2.3.4.5.67")
    path.write_bytes(path.read_bytes().replace(b"1.2.3.4.5.67", b"ID_000000e27"))
    assert run(raw, "--variants", "0") == 0
    assert manifest(raw)["TrainingData/healthy/a.dcm"]["warnings"] == ""
    assert "with warnings" not in capsys.readouterr().out


def test_unwritable_output_is_one_clear_line(raw, capsys):
    (raw.parent / "out").write_bytes(b"a file is in the way")
    assert run(raw) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: stopped")
    assert "Traceback" not in error


def test_relative_folders_are_those_of_where_it_was_started(raw, monkeypatch):
    run(raw)
    monkeypatch.chdir(raw.parent)
    assert step1.main(["--raw-data", raw.name, "--output", "there", "--jobs", "2"]) == 0
    here, there = raw.parent / "out", raw.parent / "there"
    names = [path.relative_to(here) for path in here.rglob("*.png")]
    assert names and all((here / name).read_bytes() == (there / name).read_bytes() for name in names)


def test_file_in_the_place_of_the_training_folder_costs_itself_alone(raw):
    shutil.rmtree(raw / "TrainingData")
    (raw / "TrainingData").write_bytes(b"a file")
    save_ct(raw / "TestingData" / "t.dcm", plain_head())
    assert run(raw) == 1
    rows = manifest(raw)
    assert (
        "in no class folder" in rows["TrainingData"]["reason"] and rows["TestingData/t.dcm"]["status"] == "ok"
    )


def test_script_runs_from_another_folder(raw, tmp_path):
    command = [sys.executable, str(SCRIPT), "--raw-data", str(raw), "--output", str(tmp_path / "o")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "found 4 = written 4 + up to date 0 + failed 0" in done.stdout


def test_a_stopped_run_that_renames_pictures_leaves_no_row_that_is_ok_without_one(raw, monkeypatch):
    assert run(raw, "--variants", "1") == 0
    path = next((raw / "TrainingData").rglob("*.dcm"))
    shutil.copy(path, path.with_suffix(""))  # x comes before x.dcm and takes its picture's name

    def stopped(tasks, settings, jobs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(step1, "in_processes", stopped)
        assert run(raw, "--variants", "1") == 130
    done = [row["image"] for row in manifest(raw).values() if row["status"] == "ok"]
    assert all((raw.parent / "out" / "1_ROI" / image).exists() for image in done)
    assert run(raw, "--variants", "1") == 0


def test_a_stopped_run_with_another_window_leaves_nothing_that_passes_for_done(raw, monkeypatch):
    assert run(raw, "--variants", "1") == 0
    before = pngs(raw)

    def stopped(tasks, settings, jobs):
        for task in tasks:
            step1.process(task, settings)  # its pictures are there, its result was not seen
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(step1, "in_processes", stopped)
        assert run(raw, "--variants", "1", "--roi-window", "80,200") == 130
    assert pngs(raw) != before
    assert {row["status"] for row in manifest(raw).values()} == {""}  # step 2 refuses that
    assert run(raw, "--variants", "1") == 0
    assert pngs(raw) == before


def test_testing_slice_with_two_labels_is_a_usage_error(raw, capsys):
    (raw / "TestingData_labels.csv").write_text(
        "image,label\nt,healthy\nt.dcm,epidural\nt,healthy\n", encoding="utf-8"
    )
    assert run(raw) == 2
    assert "two labels" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere they are one file")
def test_file_renamed_by_case_alone_leaves_no_old_picture(raw):
    run(raw)
    (raw / "TrainingData" / "healthy" / "a.dcm").rename(raw / "TrainingData" / "healthy" / "A.dcm")
    run(raw)
    assert len(pngs(raw)) == 4 * 7


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_file_replaced_by_a_link_out_loses_its_old_pictures(raw, tmp_path):
    run(raw)
    path = raw / "TrainingData" / "healthy" / "a.dcm"
    path.rename(tmp_path / "a.dcm")
    path.symlink_to(tmp_path / "a.dcm")
    assert run(raw) == 1
    assert len(pngs(raw)) == 3 * 7


def test_input_without_any_file_is_a_usage_error_and_takes_no_picture(raw, capsys):
    run(raw)
    for path in list(raw.rglob("*.dcm")):
        path.unlink()
    assert run(raw) == 2
    assert "no file to convert" in capsys.readouterr().err
    assert len(pngs(raw)) == 4 * 7


@pytest.mark.parametrize("first", ["t,healthy", "image;label"])
def test_testing_labels_without_their_first_line_are_a_usage_error(raw, capsys, first):
    (raw / "TestingData_labels.csv").write_text(f"{first}\n", encoding="utf-8")
    assert run(raw) == 2
    assert "has to begin with the line image,label, with a comma, and not with ['" in capsys.readouterr().err


def test_script_runs_where_output_is_no_terminals(monkeypatch):
    """As in a notebook, by %run."""
    monkeypatch.setattr("sys.stdout", io.StringIO())
    monkeypatch.setattr("sys.argv", ["Step1_Image_Preprocessing.py", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(ROOT / "Step1_Image_Preprocessing.py"), run_name="__main__")


def test_patients_of_each_class_are_counted_and_a_shared_patientid_shows(tmp_path, capsys):
    raw = tmp_path / "raw"
    for i, (label, patient) in enumerate(
        [("bleed", "P1"), ("bleed", "P2"), ("healthy", "X"), ("healthy", "X")]
    ):
        save_ct(raw / "TrainingData" / label / f"{i}.dcm", plain_head(64, 20 + i), PatientID=patient)
    assert run(raw) == 0
    out = capsys.readouterr().out
    assert "training slices (patients): healthy 2 (1), bleed 2 (2)\n" in out
    assert "training slice of" not in out  # bleed or none is a question of its own


def test_study_of_several_patientids_is_said(raw, capsys):
    """Some programs that take names away give each file an id of its own."""
    for number, study in enumerate(("1.2.3", "1.2.3", "1.2.4", "1.2.4")):
        ids = {"PatientID": f"P{min(number, 2)}", "StudyInstanceUID": study}
        save_ct(raw / "TrainingData" / "healthy" / f"{number}.dcm", plain_head(64), **ids)
    run(raw, "--variants", "0")
    assert "note: 2 in studies of several PatientIDs" in capsys.readouterr().out
    assert "1.2.3" not in (raw.parent / "out" / ".ledger.sqlite3").read_bytes().decode(errors="replace")


def test_warnings_in_the_manifest_name_no_folder_of_this_machine(raw, tmp_path):
    content = (ROOT / "raw_data/TrainingData/healthy").glob("*.dcm")
    cut = next(c for c in (p.read_bytes() for p in sorted(content)) if b"\xfe\xff\x00\xe0" in c)
    (raw / "TrainingData" / "healthy" / "cut.dcm").write_bytes(cut[: len(cut) * 3 // 4])
    assert run(raw) == 1
    text = (tmp_path / "out" / "manifest.csv").read_text(encoding="utf-8")
    assert "End of file reached" in text and str(tmp_path) not in text


@pytest.mark.parametrize("times", [1, 3])
def test_file_that_a_virus_scanner_holds_for_a_moment_ends_no_run(raw, monkeypatch, times):
    """As Windows says where another program looks at a file that has just been written."""
    replace, tried = Path.replace, []

    def held(self, target):
        tried.append(Path(target).name)
        if tried.count(tried[-1]) <= times:
            raise PermissionError(13, "Access is denied", str(target))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", held)
    monkeypatch.setattr(step1.time, "sleep", lambda seconds: None)
    assert run(raw, "--variants", "0") == 0
    assert {".patient_key", "a.png", "preview.png", "manifest.csv"} <= set(tried)


def test_patients_that_nothing_names_are_unknown_and_not_none(raw, capsys):
    save_ct(raw / "TrainingData" / "healthy" / "a.dcm", plain_head(), PatientID=None)
    assert run(raw, "--variants", "0") == 0
    assert "training slices (patients): healthy 1 (unknown), subdural 1 (1), " in capsys.readouterr().out


def test_class_alone_is_not_said_to_have_others(raw, capsys):
    for label in ("healthy", "subdural"):
        shutil.rmtree(raw / "TrainingData" / label)
    assert run(raw, "--variants", "0") == 0
    said = capsys.readouterr().out
    assert "no usable training slice of healthy, " in said and "can be compared" not in said


def test_manifest_that_excel_shows_is_said(raw, monkeypatch, capsys):
    replace = Path.replace

    def held(self, target):
        if Path(target).name == "manifest.csv":
            raise PermissionError(13, "Access is denied", str(target))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", held)
    monkeypatch.setattr(step1.time, "sleep", lambda seconds: None)
    assert run(raw, "--variants", "0") == 1
    said = capsys.readouterr().err
    assert "manifest.csv': close it in other programs" in said and "once this is mended" in said


def test_picture_whose_path_is_too_long_for_windows_costs_its_file_alone(raw, monkeypatch):
    replace = Path.replace

    def limited(self, target):
        if "healthy" in str(target):
            raise FileNotFoundError(2, "The filename or extension is too long", str(target))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", limited)
    assert run(raw) == 1
    reasons = {source: row["reason"] for source, row in manifest(raw).items() if row["status"] != "ok"}
    assert list(reasons) == ["TrainingData/healthy/a.dcm"] and "shorter --output" in reasons.popitem()[1]


@pytest.mark.parametrize(
    ("options", "lowest", "width"),
    [((), 0, 79), (("brain",), 0, 79), (("header",), -200, 599), (("50,130",), -15, 129)],
)
def test_roi_shows_the_brain_window_or_the_one_asked_for(raw, options, lowest, width):
    save_ct(raw / "TrainingData" / "healthy" / "a.dcm", plain_head(), WindowCenter=100, WindowWidth=600)
    run(raw, "--variants", "1", *(part for option in options for part in ("--roi-window", option)))
    image = cv2.imread(str(raw.parent / "out" / "1_ROI" / "TrainingData" / "healthy" / "a.png"), -1)
    assert image[64, 64] == round((35 - lowest) * 255 / width)  # LINEAR


def test_what_is_special_about_slices_is_counted_and_noted(raw, capsys):
    window, hu = {"WindowCenter": 40, "WindowWidth": 80}, plain_head()
    stored = np.where(hu < 0, hu + 4096, hu).astype(np.uint16)
    folder = raw / "TrainingData" / "healthy"
    save_ct(folder / "wrapped.dcm", stored, BitsStored=12, HighBit=11, **window)
    save_ct(folder / "blank.dcm", np.full((64, 64), -1000, np.int16), **window)
    save_ct(folder / "nameless.dcm", hu, PatientID=None, **window)
    ct = make_ct(hu, **window)
    ct.PixelData += bytes(500)  # of which pydicom warns
    ct.save_as(folder / "long.dcm", enforce_file_format=True)
    assert run(raw) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: 1 ")]
    assert [note.removeprefix("note: 1 ").partition(":")[0].partition(",")[0] for note in notes] == [
        *(
            "without a usable window in the header",
            "with 12-bit values that had wrapped",
            "blank",
            "without PatientID",
        ),
        "with warnings",
    ]
    repaired = [source for source, row in manifest(raw).items() if row["hu_repaired"] == "1"]
    assert repaired == ["TrainingData/healthy/wrapped.dcm"]


def test_preview_passes_over_blank_and_testing_slices(raw):
    window = {"WindowCenter": 40, "WindowWidth": 80}
    save_ct(raw / "TrainingData" / "subdural" / "a.dcm", np.full((128, 128), -1000, np.int16), **window)
    save_ct(raw / "TestingData" / "a.dcm", plain_head(brain_hu=20), **window)
    (raw / "TestingData_labels.csv").write_text("image,label\na,subdural\n", encoding="utf-8")
    run(raw, "--variants", "0", "4")
    assert preview_tiles(raw, 3, 2)[1, 98, 0, 98] == round(60 * 255 / 79)  # c.dcm


def test_preview_shows_no_slice_that_is_gone(raw):
    run(raw, "--variants", "0")
    (raw / "TrainingData" / "subdural" / "c.dcm").unlink()
    run(raw, "--variants", "0")
    assert preview_tiles(raw, 2, 1).any()


def test_many_bad_files_are_counted_and_not_all_named(raw, capsys, monkeypatch):
    monkeypatch.setattr(step1, "FAILED_SHOWN", 2)
    for number in range(5):
        (raw / "TestingData" / f"{number}").write_bytes(b"no DICOM")
    assert run(raw, "--variants", "0") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and lines[-1] == "failed: 3 more, see manifest.csv"


def test_manifest_is_sorted_by_source(raw):
    run(raw, "--variants", "0")
    assert list(manifest(raw)) == sorted(manifest(raw)) and len(manifest(raw)) == 4


def test_reasons_and_warnings_quote_no_value_and_no_uid():
    said = step1.one_line("Invalid value 'SECRET^Name' of\n 1.2.840.113619.2.55.3, and \"SECRET-ID\" too")
    assert "SECRET" not in said
    extended = (
        "Value 'ISO_IR 192' for Specific Character Set does not allow code extensions, ignoring: SECRET"
    )
    assert "SECRET" not in step1.one_line(extended)
    assert step1.one_line("Invalid UID 1.2.840.113619.2.55.3\n of it") == "Invalid UID ... of it"


def test_killed_run_with_another_window_leaves_no_manifest_that_vouches_for_its_pictures(raw, monkeypatch):
    assert run(raw, "--variants", "1") == 0
    before = pngs(raw)

    def killed(tasks, settings, jobs):
        step1.process(next(iter(tasks)), settings)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(step1, "in_processes", killed)
        patch.setattr(step1, "write_manifest", lambda *_: None)  # who is killed writes none
        run(raw, "--variants", "1", "--roi-window", "80,200")
    assert pngs(raw) != before
    assert not (raw.parent / "out" / "manifest.csv").exists()


def test_run_that_is_killed_loses_the_rows_of_its_last_seconds_alone(raw, monkeypatch, capsys):
    out, killed = raw.parent / "out", raw.parent / "killed"

    def in_processes(tasks, settings, jobs):
        for number, task in enumerate(tasks):
            if number == 2:
                shutil.copytree(out, killed)  # what is on disk, should it be killed now
            yield task, step1.process(task, settings)

    with monkeypatch.context() as patch:
        patch.setattr(step1.time, "monotonic", count(step=2.1).__next__)  # so much later at each look
        patch.setattr(step1, "in_processes", in_processes)
        run(raw, "--variants", "0")
    assert run(raw, "--variants", "0", "--output", str(killed)) == 0
    assert last_tally(capsys) == "found 4 = written 2 + up to date 2 + failed 0"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_carriage_return_in_a_name_breaks_no_line_of_the_manifest(raw):
    (raw / "TrainingData" / "healthy" / "Icon\r").touch()  # of macOS, in a folder with its own icon
    assert run(raw, "--variants", "1") == 0
    save_ct(raw / "TrainingData" / "healthy" / "a\rb.dcm", plain_head())
    assert run(raw, "--variants", "1") == 1
    rows = pd.read_csv(raw.parent / "out" / "manifest.csv", dtype=str, keep_default_na=False)
    assert list(rows.loc[rows["source"] == r"TrainingData/healthy/a\rb.dcm", "status"]) == ["failed"]
    assert len(rows) == 5


@pytest.mark.parametrize("name", [b"window_center", b"PRIMARY KEY (source)"])  # no text; nor the error of it
def test_ledger_whose_columns_are_no_text_any_more_is_to_be_deleted(raw, capsys, name):
    assert run(raw, "--variants", "1") == 0
    path = raw.parent / "out" / ".ledger.sqlite3"
    path.write_bytes(path.read_bytes().replace(name, name.replace(b"s", b"\xff").replace(b"w", b"\xff")))
    assert run(raw, "--variants", "1") == 2
    assert f"{path} is damaged: delete it" in capsys.readouterr().err


def test_ledger_found_damaged_midway_is_to_be_deleted(raw, capsys):
    assert run(raw, "--variants", "1") == 0
    path = raw.parent / "out" / ".ledger.sqlite3"
    content = path.read_bytes()
    path.write_bytes(content[:4096] + bytes(len(content) - 4096))  # all pages but the first
    assert run(raw, "--variants", "1") == 2
    assert f"{path} is damaged: delete it" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="so long a path needs rights on Windows")
def test_folder_of_the_longest_name_that_is_like_a_picture_ends_no_run(raw):
    save_ct(raw / "TrainingData" / "healthy" / ("d" * 251 + ".png") / "x", plain_head())
    assert run(raw, "--variants", "1") == 0


def test_time_limit_ends_with_its_file(raw, monkeypatch):
    """Else the process, a Dask worker too, would be ended a minute after its last file."""
    calls = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda limit, **how: calls.append(limit))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: calls.append("off"))
    (raw / "TestingData" / "bad.dcm").touch()
    run(raw, "--variants", "0")
    assert calls == [60, "off"] * 5


@pytest.mark.skipif(os.name == "nt", reason="Windows has other limits")
def test_longest_names_are_cut(raw):
    for end in "xy":
        save_ct(raw / "TestingData" / ("a" * 254 + end), plain_head())
    assert run(raw, "--variants", "0") == 0
    assert len(pngs(raw)) == 4 + 2


def test_file_that_goes_while_the_run_is_at_it_keeps_its_pictures(raw, monkeypatch):
    """As where a network's folder is away for a moment: variants not asked for would not be made again."""
    run(raw, "--variants", "0")
    before, process, path = pngs(raw), step1.process, raw / "TestingData" / "t.dcm"
    os.utime(path, (10**9, 10**9))
    monkeypatch.setattr(step1, "process", lambda *given: path.unlink() or process(*given))
    assert run(raw, "--variants", "0") == 1
    assert "gone meanwhile" in manifest(raw)["TestingData/t.dcm"]["reason"] and pngs(raw) == before
