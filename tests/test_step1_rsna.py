"""Step 1 on the layout of Kaggle's RSNA-2019 download, made small in a temporary folder."""

import csv
import os
from collections import Counter

import pandas as pd
import pytest
from conftest import plain_head, save_ct

import Step1_Image_Preprocessing as step1

SUBTYPES = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural")


def csv_rows(slice_id, *positive):
    """Return a slice's six lines of stage_2_train.csv."""
    values = {name: int(name in positive) for name in SUBTYPES} | {"any": int(bool(positive))}
    return [(f"{slice_id}_{name}", value) for name, value in values.items()]


@pytest.fixture
def download(tmp_path):
    """Return a download of 9 slices a class, of 3 patients each, and one slice with two subtypes."""
    folder, rows = tmp_path / "kaggle", []
    for label in step1.CLASSES:
        for number in range(9):
            name = f"ID_{label[:9]}{number}"
            hu = plain_head(48, 20 + number)
            patient = f"{label}-{number // 3}"
            save_ct(
                folder / "stage_2_train_images" / f"{name}.dcm",
                hu,
                PatientID=patient,
                WindowCenter=40,
                WindowWidth=80,
            )
            rows += csv_rows(name, *([] if label == "healthy" else [label]))
    save_ct(folder / "stage_2_train_images" / "ID_both.dcm", plain_head(48))
    rows += csv_rows("ID_both", "epidural", "subdural")
    write_csv(folder, rows)
    (folder / "stage_2_test_images").mkdir()
    return folder


def write_csv(folder, rows, header=("ID", "Label")):
    with (folder / "stage_2_train.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def read_csv(folder):
    with (folder / "stage_2_train.csv").open(newline="", encoding="utf-8") as file:
        return [tuple(row) for row in csv.reader(file)][1:]


def run(download, *options, output="out"):
    """Run Step 1 on the download, in this process; return its manifest."""
    out = download.parent / output
    assert step1.main(["--rsna", str(download), "--output", str(out), *options]) == 0
    return pd.read_csv(out / "manifest.csv", keep_default_na=False)


@pytest.fixture(autouse=True)
def no_processes(monkeypatch):
    monkeypatch.setattr(
        step1, "in_processes", lambda tasks, settings, jobs: ((t, step1.process(t, settings)) for t in tasks)
    )


def test_takes_balanced_classes_into_the_usual_layout(download):
    rows = run(download, "--per-class", "4", "--test", "12")
    assert rows.groupby(["split", "label"]).size().to_dict() == {
        (split, label): count for split, count in (("test", 2), ("train", 4)) for label in step1.CLASSES
    }
    out = download.parent / "out"
    for row in rows.itertuples():
        folder = f"TrainingData/{row.label}" if row.split == "train" else "TestingData"
        assert row.image == f"{folder}/{row.source.split('/')[1][:-4]}.png"
        assert (out / "6_ROI+noblank+CLAHE+Bilateral" / row.image).exists()


def test_no_patient_is_on_both_sides(download):
    rows = run(download, "--per-class", "4", "--test", "12")
    sides = rows.groupby("patient")["split"].nunique()
    assert len(sides) >= 12
    assert (sides == 1).all()


def test_takes_as_many_patients_as_possible(download):
    rows = run(download, "--per-class", "3", "--test", "0")
    assert (rows.groupby("label")["patient"].nunique() == 3).all()


def test_same_seed_same_slices_and_another_seed_others(download):
    first = set(run(download, "--per-class", "3", "--test", "6")["image"])
    assert set(run(download, "--per-class", "3", "--test", "6", output="again")["image"]) == first
    assert (
        set(run(download, "--per-class", "3", "--test", "6", "--seed", "1", output="other")["image"]) != first
    )


def test_headers_are_read_of_20_slices_for_each_one_wanted_and_others_by_another_seed(tmp_path, monkeypatch):
    """So 6 classes of 1,000 slices and 600 for testing are 132,000 headers."""
    labels = {f"ID_{label[:9]}{number}": label for label in step1.CLASSES for number in range(70)}
    (tmp_path / "stage_2_train_images").mkdir()
    for name in labels:
        (tmp_path / "stage_2_train_images" / f"{name}.dcm").touch()
    write_csv(tmp_path, [row for name in labels for row in csv_rows(name, *{labels[name]} - {"healthy"})])
    read = []
    monkeypatch.setattr(step1, "read_patient_id", lambda path: read.append(path.stem) or path.stem)

    def read_with(seed):
        read.clear()
        options = ["--rsna", str(tmp_path), "--per-class", "2", "--test", "6", "--seed", seed]
        step1.find_rsna_inputs(step1.parse_args(options))
        return sorted(read)

    first = read_with("0")
    assert Counter(labels[name] for name in first) == dict.fromkeys(step1.CLASSES, 20 * (2 + 1))
    assert read_with("0") == first and read_with("1") != first


def test_labels_of_the_test_slices_are_written(download):
    rows = run(download, "--per-class", "4", "--test", "12")
    labels = pd.read_csv(download.parent / "out" / "TestingData_labels.csv")
    test = rows[rows["split"] == "test"]
    expected = {
        image.removeprefix("TestingData/").removesuffix(".png"): label
        for image, label in zip(test["image"], test["label"], strict=True)
    }
    assert dict(labels.itertuples(index=False)) == expected
    assert len(expected) == 12


def test_slice_with_two_subtypes_is_left_out_and_counted(download, capsys):
    rows = run(download, "--per-class", "9", "--test", "0")
    assert not rows["image"].str.contains("ID_both").any()
    assert "left out: 1 slices with several subtypes" in capsys.readouterr().out


def test_repeated_rows_and_an_index_column_change_nothing(download, capsys):
    first = set(run(download, "--per-class", "3", "--test", "6")["image"])
    rows = read_csv(download)
    write_csv(download, [(i, *row) for i, row in enumerate(rows + rows[:7])], header=("", "ID", "Label"))
    assert set(run(download, "--per-class", "3", "--test", "6", output="again")["image"]) == first
    assert "left out: 7 rows that repeat another" in capsys.readouterr().out


@pytest.mark.parametrize("other", [0, 2, "x"])
def test_contradicting_rows_are_left_out_and_counted(other, download, capsys):
    write_csv(download, [*read_csv(download), ("ID_epidural0_epidural", other)])
    rows = run(download, "--per-class", "9", "--test", "0")
    assert not rows["image"].str.contains("ID_epidural0").any()
    assert "left out: 1 slices with contradicting rows" in capsys.readouterr().out


def test_incomplete_slices_are_left_out_and_counted(download, capsys):
    write_csv(download, [row for row in read_csv(download) if row[0] != "ID_healthy0_subdural"])
    rows = run(download, "--per-class", "9", "--test", "0")
    assert not rows["image"].str.contains("ID_healthy0").any()
    assert "left out: 1 slices without a row for each subtype" in capsys.readouterr().out


def test_labels_that_are_no_numbers_count_as_absent(download, capsys):
    rows = [(i, "yes" if i == "ID_epidural0_epidural" else value) for i, value in read_csv(download)]
    write_csv(download, rows)
    assert not run(download, "--per-class", "9", "--test", "0")["image"].str.contains("ID_epidural0").any()
    assert "left out: 1 slices without a row for each subtype" in capsys.readouterr().out


def test_rows_without_a_file_and_files_without_a_row_are_counted(download, capsys):
    (download / "stage_2_train_images" / "ID_healthy0.dcm").unlink()
    save_ct(download / "stage_2_train_images" / "ID_new.dcm", plain_head(48))
    rows = run(download, "--per-class", "9", "--test", "0")
    assert not rows["image"].str.contains("ID_healthy0|ID_new").any()
    output = capsys.readouterr().out
    assert "left out: 1 slices without a file" in output
    assert "left out: 1 files without a row" in output


def test_class_that_is_missing_or_too_small_is_reported_and_the_run_goes_on(download, capsys):
    write_csv(download, [row for row in read_csv(download) if not row[0].startswith("ID_epidural")])
    rows = run(download, "--per-class", "10", "--test", "0")
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("epidural")).endswith("missing")
    assert next(line for line in lines if line.startswith("subdural")).endswith("1 too few for training")
    assert set(rows["label"]) == set(step1.CLASSES) - {"epidural"}


def test_the_nested_folders_of_the_original_archive_are_found(download):
    inner = download.parent / "archive" / "rsna-intracranial-hemorrhage-detection"
    inner.parent.mkdir()
    download.rename(inner)
    (inner / "stage_2_train_images").rename(inner / "stage_2_train")
    assert len(run(inner.parent, "--per-class", "1", "--test", "0")) == 6


def test_folder_that_is_no_download_is_a_usage_error(tmp_path, capsys):
    assert step1.main(["--rsna", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "stage_2_train.csv" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [b"", b"ID,Label\n1,2,3,4\n", "ID,Label\n\xe9_epidural,1\n".encode("latin-1"), b"ID,Label\n12345,0\n"],
    ids=["empty", "ragged", "another encoding", "ids without subtype"],
)
def test_damaged_label_file_is_a_usage_error(download, capsys, content):
    (download / "stage_2_train.csv").write_bytes(content)
    assert step1.main(["--rsna", str(download), "--output", str(download.parent / "out")]) == 2
    assert "unpack the download again" in capsys.readouterr().err


def test_label_file_without_any_row_of_a_subtype_is_a_usage_error(download, capsys):
    write_csv(download, [row for row in read_csv(download) if not row[0].endswith("_epidural")])
    assert step1.main(["--rsna", str(download), "--output", str(download.parent / "out")]) == 2
    assert "no row of epidural" in capsys.readouterr().err


def test_download_of_which_nothing_can_be_used_is_a_usage_error(download, capsys):
    write_csv(download, [(i, "no number") for i, _ in read_csv(download)])
    assert step1.main(["--rsna", str(download), "--output", str(download.parent / "out")]) == 2
    output = capsys.readouterr()
    assert "left out: 330 rows whose Label is no number" in output.out
    assert "no slice of" in output.err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on Windows")
def test_fifo_among_the_files_blocks_nothing(download, capsys):
    (download / "stage_2_train_images" / "ID_healthy0.dcm").unlink()
    os.mkfifo(download / "stage_2_train_images" / "ID_healthy0.dcm")
    run(download, "--per-class", "2", "--test", "0")
    assert "left out: 1 slices without a file" in capsys.readouterr().out


# ---------------------------------------- --rsna-labels any

SMALL = {  # slice: (patient, its subtypes); by hand: 4 healthy, 6 bleeds, of which 3 with several subtypes
    "ID_a1": ("a", ()),
    "ID_a2": ("a", ("epidural", "subdural")),
    "ID_b1": ("b", ("subdural",)),
    "ID_b2": ("b", SUBTYPES),
    "ID_c1": ("c", ()),
    "ID_c2": ("c", ("subarachnoid",)),
    "ID_d1": ("d", ()),
    "ID_d2": ("d", ("intraventricular", "intraparenchymal")),
    "ID_e1": ("e", ()),
    "ID_f1": ("f", ("intraparenchymal",)),
}


@pytest.fixture
def small(tmp_path):
    """Return a download of the ten slices of SMALL."""
    folder = tmp_path / "kaggle"
    for name, (patient, _) in SMALL.items():
        save_ct(folder / "stage_2_train_images" / f"{name}.dcm", plain_head(48), PatientID=patient)
    write_csv(folder, [row for name, (_, found) in SMALL.items() for row in csv_rows(name, *found)])
    return folder


def test_any_takes_slices_with_several_subtypes(small, capsys):
    rows = run(small, "--rsna-labels", "any", "--per-class", "10", "--test", "0")
    assert {
        image.rsplit("/", 1)[1][:-4]: label for image, label in zip(rows.image, rows.label, strict=True)
    } == {name: "hemorrhage" if found else "healthy" for name, (_, found) in SMALL.items()}
    output = capsys.readouterr().out
    healthy, bleeds = (line.split() for line in output.splitlines() if line.startswith("he"))
    assert healthy[:6] == ["healthy", "4", "4", "4", "0", "0"]
    assert bleeds[:6] == ["hemorrhage", "6", "6", "5", "0", "0"]
    assert "of those taken, 3 slices have several subtypes" in output
    assert "slices with several" not in output


def test_subtype_leaves_out_what_any_takes(small, capsys):
    rows = run(small, "--rsna-labels", "subtype", "--per-class", "10", "--test", "0")
    assert rows["label"].value_counts().to_dict() == {
        **{"healthy": 4, "subdural": 1, "subarachnoid": 1, "intraparenchymal": 1}
    }
    output = capsys.readouterr().out
    assert "left out: 3 slices with several subtypes" in output
    assert "of those taken" not in output


def test_any_parts_patients_and_halves_the_test_slices(small):
    rows = run(small, "--rsna-labels", "any", "--per-class", "2", "--test", "2")
    assert rows.groupby(["split", "label"]).size().to_dict() == {
        (split, label): count
        for split, count in (("test", 1), ("train", 2))
        for label in ("healthy", "hemorrhage")
    }
    assert (rows.groupby("patient")["split"].nunique() == 1).all()
    labels = pd.read_csv(small.parent / "out" / "TestingData_labels.csv")
    assert sorted(labels["label"]) == ["healthy", "hemorrhage"]


def test_any_that_contradicts_the_subtypes_is_left_out_and_counted(small, capsys):
    swapped = {"ID_a1_any": "1", "ID_b1_any": "0"}
    write_csv(small, [(i, swapped.get(i, value)) for i, value in read_csv(small)])
    rows = run(small, "--rsna-labels", "any", "--per-class", "10", "--test", "0")
    assert len(rows) == 8 and not rows["image"].str.contains("ID_a1|ID_b1").any()
    assert "left out: 2 slices whose row 'any' contradicts their subtypes" in capsys.readouterr().out


def test_label_file_without_any_row_of_any_is_a_usage_error(small, capsys):
    write_csv(small, [row for row in read_csv(small) if not row[0].endswith("_any")])
    options = ["--rsna", str(small), "--output", str(small.parent / "out")]
    assert step1.main([*options, "--rsna-labels", "any"]) == 2
    assert "no row of any" in capsys.readouterr().err
    assert step1.main(options) == 0  # of which the usual labels need nothing


def test_other_labels_move_the_pictures(small, capsys):
    run(small, "--per-class", "10", "--test", "0")
    rows = run(small, "--rsna-labels", "any", "--per-class", "10", "--test", "0")
    there = {
        p.relative_to(small.parent / "out" / "1_ROI").as_posix() for p in small.parent.rglob("1_ROI/**/*.png")
    }
    assert there == set(rows["image"])


@pytest.mark.parametrize("labels, fewest", [("any", 2), ("subtype", 6)])
def test_fewer_test_slices_than_classes_are_a_usage_error(small, capsys, labels, fewest):
    with pytest.raises(SystemExit):
        run(small, "--rsna-labels", labels, "--test", str(fewest - 1))
    assert f"give 0, or {fewest} or more" in capsys.readouterr().err


def test_any_on_the_real_download_sample(real_ct, tmp_path, capsys):
    out = tmp_path / "out"
    labels = pd.read_csv(real_ct / "rsna_sample" / "stage_2_train.csv")
    bleeds = labels["Label"][labels["ID"].str.endswith("_any")].sum()
    options = ["--rsna", str(real_ct / "rsna_sample"), "--output", str(out), "--test", "0"]
    assert step1.main([*options, "--rsna-labels", "any", "--variants", "0"]) == 0
    text = capsys.readouterr().out
    assert next(line for line in text.splitlines() if line.startswith("hemorrhage")).split()[1] == str(bleeds)
    assert "of those taken, 6 slices have several subtypes" in text


def test_patient_with_several_classes_stays_on_one_side():
    rows = [
        (f"{label}{patient}{number}", label, f"p{patient}")
        for label in step1.CLASSES
        for patient in range(20)
        for number in range(2)
    ]
    candidates = pd.DataFrame(rows, columns=["slice", "label", "patient"])
    chosen = step1.choose_slices(candidates, per_class=10, test_per_class=4, seed=0)
    assert (chosen.groupby("patient")["split"].nunique() == 1).all()
    assert chosen.groupby(["split", "label"]).size().to_dict() == {
        (split, label): count for split, count in (("test", 4), ("train", 10)) for label in step1.CLASSES
    }


@pytest.mark.parametrize(
    ("patients", "test_per_class", "tested"),
    [(4, 100, 2), (10, 4, 4)],
    ids=["at most half of a class's patients", "as many as have that many slices"],
)
def test_patients_of_the_test_side(patients, test_per_class, tested):
    """A slice each; the share of 4 in 34 slices alone would be two of the ten patients."""
    rows = [(f"ID_{i}", "healthy", f"P{i}") for i in range(patients)]
    candidates = pd.DataFrame(rows, columns=["slice", "label", "patient"])
    chosen = step1.choose_slices(candidates, per_class=30, test_per_class=test_per_class, seed=0)
    assert (chosen["split"] == "test").sum() == tested and len(chosen) == patients


def test_real_download_sample(real_ct, tmp_path, capsys):
    out = tmp_path / "out"
    assert step1.main(["--rsna", str(real_ct / "rsna_sample"), "--output", str(out)]) == 0
    text = capsys.readouterr().out
    assert "left out: 6 slices with several subtypes" in text
    assert next(line for line in text.splitlines() if line.startswith("epidural")).endswith("missing")


def test_no_class_loses_more_than_half_of_its_patients_to_the_test_side():
    """Each patient has healthy slices and two subtypes; the rarest class has four patients."""
    pairs = [("epidural", c) for c in step1.CLASSES[1:5]] + [
        (a, b) for a in step1.CLASSES[1:5] for b in step1.CLASSES[1:5] if a < b
    ] * 2
    rows = [(f"{i}{label}", label, f"p{i}") for i, pair in enumerate(pairs) for label in ("healthy", *pair)]
    candidates = pd.DataFrame(rows, columns=["slice", "label", "patient"])
    for seed in range(10):
        chosen = step1.choose_slices(candidates, per_class=1000, test_per_class=100, seed=seed)
        trained = chosen[chosen["split"] == "train"].groupby("label")["patient"].nunique()
        assert trained.get("epidural", 0) == 2 and len(trained) == 6, (seed, dict(trained))


def test_spaces_round_a_patient_id_make_no_second_patient(tmp_path):
    """They mean nothing (PS3.5 6.2, LO), and the manifest's pseudonym is of the id without them."""
    path = save_ct(tmp_path / "a.dcm", plain_head(48), PatientID=" P1 ")
    assert step1.read_patient_id(path) == "P1"


def test_warnings_about_a_header_go_to_the_manifest_alone(small, recwarn):
    path = small / "stage_2_train_images" / "ID_e1.dcm"
    content = save_ct(path, plain_head(48), SpecificCharacterSet="ISO_IR 100").read_bytes()
    path.write_bytes(content.replace(b"ISO_IR 100", b"SECRET-CS "))
    rows = run(small, "--per-class", "10", "--test", "0")
    assert not [w for w in recwarn if "SECRET-CS" in str(w.message)]
    assert "Unknown encoding ..." in "".join(rows["warnings"])


def test_slices_without_a_patientid_are_left_out_and_counted(small, capsys):
    save_ct(small / "stage_2_train_images" / "ID_e1.dcm", plain_head(48), PatientID=None)
    rows = run(small, "--per-class", "10", "--test", "0")
    assert (rows["patient"] != "").all()
    said = capsys.readouterr().out
    assert "left out: 1 slices without a readable PatientID" in said
    assert "left out: 0 usable slices that were not chosen" in said
