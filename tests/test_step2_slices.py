"""Step 1's manifest: what is left out and counted, and that any other table is refused with a sentence."""

import pandas as pd
import pytest
from step2_helpers import CLASSES, write_pictures

from step2.slices import Slices, copies_in_words, count_classes, read_slices, what_pictures


@pytest.fixture
def manifest(tmp_path):
    """Return Step 1's manifest, which lies in tmp_path, as a table of texts."""
    return write_pictures(tmp_path, variants=())


def read_instead(folder, table):
    """Replace the manifest by this table and read it."""
    table.to_csv(folder / "manifest.csv", index=False)
    return read_slices(folder)


def test_blank_and_refused_slices_are_left_out_and_counted(manifest, tmp_path):
    slices = read_slices(tmp_path)
    assert (len(slices.training), len(slices.testing), slices.patient_level) == (48, 3, True)
    assert list(slices.left_out.values()) == [1, 1, 0, 0]
    assert not slices.training["image"].str.contains("blank|bad").any()
    left_out = read_instead(tmp_path, manifest[manifest["status"] == "ok"]).left_out
    assert left_out["refused by Step 1"] == 0 and left_out["blank, no brain to see"] == 1


def test_testing_slices_are_left_out_like_training_slices_and_counted_apart(manifest, tmp_path):
    tests = manifest.index[manifest["split"] == "test"]
    manifest.loc[tests[0], "blank"], manifest.loc[tests[1], "status"] = "1", "failed"
    slices = read_instead(tmp_path, manifest)
    assert list(slices.testing["image"]) == [manifest.loc[tests[2], "image"]]
    assert list(slices.left_out.values()) == [1, 1, 1, 1]


@pytest.mark.parametrize("window", ["40,80", "-50.5,130", "header", ""])
def test_roi_window_is_told_as_step_1_noted_it(manifest, tmp_path, window):
    assert read_slices(tmp_path).roi_window == ""  # of an older manifest
    manifest["roi_window"] = [window if status == "ok" else "" for status in manifest["status"]]
    assert read_instead(tmp_path, manifest).roi_window == window


@pytest.mark.parametrize(
    ("windows", "sentence"),
    [
        (["header", "40,80"], r"pictures of several ROI windows, \['40,80', 'header'\]: run Step1"),
        (["4080"], r"roi_window is \['4080'\], no centre,width: run Step1"),
    ],
)
def test_roi_windows_that_differ_or_are_none_are_refused(manifest, tmp_path, windows, sentence):
    manifest["roi_window"] = [windows[row % len(windows)] for row in range(len(manifest))]
    with pytest.raises(ValueError, match=rf"manifest\.csv.*{sentence}"):
        read_instead(tmp_path, manifest)


@pytest.mark.parametrize(("no", "yes"), [("0.0", "1.0"), ("False", "TRUE"), ("false", " true "), ("0 ", "1")])
def test_flags_are_understood_as_spreadsheets_write_them(manifest, tmp_path, no, yes):
    slices = read_instead(tmp_path, manifest.replace({"blank": {"0": no, "1": yes}}))
    assert (len(slices.training), slices.left_out["blank, no brain to see"]) == (48, 1)


def test_flag_that_is_neither_yes_nor_no_is_refused(manifest, tmp_path):
    with pytest.raises(ValueError, match=r"manifest\.csv: blank is \['maybe'\], neither 0 nor 1: run Step1"):
        read_instead(tmp_path, manifest.replace({"blank": {"1": "maybe"}}))


def test_manifest_that_knows_no_blank_slices_asks_for_a_roi_variant(manifest, tmp_path):
    with pytest.raises(
        ValueError, match=r"manifest\.csv doesn't know which slices are blank: .* ROI variant"
    ):
        read_instead(tmp_path, manifest.assign(blank=""))


@pytest.mark.parametrize("column", ["image", "split", "label", "status", "blank"])
def test_missing_column_is_named(manifest, tmp_path, column):
    with pytest.raises(ValueError, match=rf"manifest\.csv lacks the columns \['{column}'\]: run Step1"):
        read_instead(tmp_path, manifest.drop(columns=column))


@pytest.mark.parametrize(("column", "word"), [("status", "OK?"), ("split", "validation")])
def test_unknown_word_is_named(manifest, tmp_path, column, word):
    manifest.loc[5, column] = word
    with pytest.raises(
        ValueError, match=rf"manifest\.csv: {column} is \['{word[:3]}.*neither of .*run Step1"
    ):
        read_instead(tmp_path, manifest)


def test_manifest_of_a_step_1_that_was_stopped_is_known_as_such(manifest, tmp_path):
    manifest.loc[5:, "status"] = ""
    with pytest.raises(ValueError, match=r"manifest\.csv: Step 1 was stopped: run Step1"):
        read_instead(tmp_path, manifest)


def test_training_slice_without_a_label_is_refused(manifest, tmp_path):
    manifest.loc[5, "label"] = ""
    with pytest.raises(ValueError, match=r"manifest\.csv has training slices without a label: run Step1"):
        read_instead(tmp_path, manifest)


def test_testing_slices_may_have_no_label(manifest, tmp_path):
    tests = manifest.index[manifest["split"] == "test"]
    manifest.loc[tests[0], "label"] = ""
    warned = read_instead(tmp_path, manifest).warnings()
    assert warned == ["slices of TestingData without a label, which are not scored: 1"]
    manifest.loc[tests, "label"] = ""  # as in a competition
    slices = read_instead(tmp_path, manifest)
    assert len(slices.testing) == 3 and slices.warnings() == []


def test_usable_row_without_an_image_is_refused(manifest, tmp_path):
    manifest.loc[5, "image"] = ""
    with pytest.raises(ValueError, match=r"manifest\.csv has rows that are ok but name no image: run Step1"):
        read_instead(tmp_path, manifest)


def test_byte_order_mark_and_windows_line_ends_are_fine(manifest, tmp_path):
    expected = read_slices(tmp_path)
    text = manifest.to_csv(index=False, lineterminator="\r\n")
    (tmp_path / "manifest.csv").write_bytes(text.encode("utf-8-sig"))
    found = read_slices(tmp_path)
    assert found.training.equals(expected.training) and found.testing.equals(expected.testing)


@pytest.mark.parametrize(
    "content", [b"", b"\n", "image,split\n".encode("utf-16"), b"\x89PNG\r\n\x1a\n\xff", b'a,b\n"1,2\n']
)
def test_file_that_is_no_table_is_named(tmp_path, content):
    (tmp_path / "manifest.csv").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"manifest\.csv (can't be read as a table|lacks the columns).*run Step1"
    ):
        read_slices(tmp_path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"manifest\.csv can't be read as a table .*: run Step1"):
        read_slices(tmp_path)


def test_image_in_two_rows_is_named(manifest, tmp_path):
    manifest.loc[1, "image"] = manifest.loc[0, "image"]
    with pytest.raises(
        ValueError, match=r"manifest\.csv has more than one row for \['TrainingData/healthy/0\.0"
    ):
        read_instead(tmp_path, manifest)


@pytest.mark.parametrize("query", ["status == 'failed'", "split == 'test'", "blank == '1'", "image == ''"])
def test_manifest_without_a_usable_slice_is_refused(manifest, tmp_path, query):
    with pytest.raises(
        ValueError, match=r"manifest\.csv has no usable slice of TrainingData: put some there"
    ):
        read_instead(tmp_path, manifest.query(query))


# ---------------------------------------- patients


def test_manifest_without_patients_is_slice_level(manifest, tmp_path):
    slices = read_instead(tmp_path, manifest.drop(columns="patient"))
    assert not slices.patient_level and slices.training["patient"].is_unique


def test_one_slice_without_a_patient_makes_all_slice_level(manifest, tmp_path):
    manifest.loc[3, "patient"] = ""
    slices = read_instead(tmp_path, manifest)
    assert not slices.patient_level and (slices.training["patient"] != "").all()
    assert slices.warnings()[0].startswith(
        "1 of 48 slices have no PatientID (their patient in the manifest is empty"
    )
    assert slices.warnings()[0].endswith("all results are slice-level, optimistic")


def test_known_patients_on_one_side_are_no_reason_to_warn(manifest, tmp_path):
    assert read_slices(tmp_path).warnings() == []


def test_patient_in_training_and_testing_is_warned_of(manifest, tmp_path):
    manifest.loc[manifest["split"] == "test", ["patient", "label"]] = ["patient 0-0", "epidural"]
    expected = ["patients in both TrainingData and TestingData: 1, so the test is optimistic"]
    assert read_instead(tmp_path, manifest).warnings() == expected


def test_patient_of_testing_slices_without_a_label_makes_no_score_optimistic(manifest, tmp_path):
    manifest.loc[manifest["split"] == "test", ["patient", "label"]] = ["patient 0-0", ""]
    assert read_instead(tmp_path, manifest).warnings() == []


def test_testing_slices_without_a_patient_are_warned_of(manifest, tmp_path):
    manifest.loc[manifest["split"] == "test", ["patient", "label"]] = ["", "epidural"]
    slices = read_instead(tmp_path, manifest)
    expected = [
        "some labelled slices of TestingData have no PatientID: their test is slice-level, optimistic"
    ]
    assert slices.patient_level and slices.warnings() == expected


def test_slices_and_patients_of_each_class_are_counted(manifest, tmp_path):
    counts = count_classes(read_slices(tmp_path))
    assert counts.loc[list(CLASSES), counts.columns[:2]].to_numpy().tolist() == [[8, 4]] * 6
    assert counts.loc["together"].tolist() == [48, 24, 3, 3]
    assert counts["testing slices"].tolist() == [1, 1, 1, 0, 0, 0, 3]
    manifest.loc[manifest["split"] == "test", "patient"] = ""
    unknown = count_classes(read_instead(tmp_path, manifest))
    assert set(unknown["testing patients"]) == {"unknown"} and unknown["training patients"].iloc[-1] == 24
    unknown = count_classes(read_instead(tmp_path, manifest.assign(patient="")))
    assert set(unknown["training patients"]) == {"unknown"}


def test_pictures_are_phantoms_only_where_all_names_are_theirs(manifest, tmp_path):
    slices = read_instead(tmp_path, manifest.assign(source="TrainingData/epidural/PHANTOM-0001-1.dcm"))
    assert what_pictures("auto", slices) == "phantoms"
    assert what_pictures("my scanner", slices) == "my scanner"
    slices.testing.loc[0, "source"] = "TestingData/patient7.dcm"
    assert what_pictures("auto", slices) == ""


def test_pictures_are_rsnas_where_all_come_from_its_download(manifest, tmp_path):
    slices = read_instead(tmp_path, manifest.assign(source="stage_2_train_images/ID_1.dcm"))
    assert what_pictures("auto", slices) == "RSNA-2019"


def test_same_picture_of_two_patients_or_classes_is_warned_of(tmp_path):
    rows = pd.DataFrame(
        [
            ("a.png", "bleed", "P1"),
            ("b.png", "bleed", "P2"),
            ("c.png", "bleed", "P1"),
            ("d.png", "healthy", "P3"),
        ],
        columns=["image", "label", "patient"],
    )
    for name, content in zip("abcd", (b"1", b"1", b"1", b"2"), strict=True):
        (tmp_path / f"{name}.png").write_bytes(content)
    known = Slices(rows, rows.iloc[:0], {}, True)
    (said,) = copies_in_words(known, tmp_path)
    assert said.startswith(
        "3 pictures occur more than once and not under one patient and class, such as ['a.png', 'b.png']"
    )
    (tmp_path / "b.png").write_bytes(b"3")  # a.png and c.png are one patient's, in one class
    assert copies_in_words(known, tmp_path) == []
    (tmp_path / "e.png").write_bytes(b"2")  # the healthy slice once more, in TestingData
    other = pd.DataFrame([("e.png", "", "P9")], columns=rows.columns)
    assert "['d.png', 'e.png']" in copies_in_words(Slices(rows, other, {}, True), tmp_path)[0]
    for name in "ef":  # twice in TestingData alone
        (tmp_path / f"{name}.png").write_bytes(b"4")
    other = pd.DataFrame([("e.png", "", "P9"), ("f.png", "", "P8")], columns=rows.columns)
    assert copies_in_words(Slices(rows, other, {}, True), tmp_path) == []
    rows.loc[2, "label"] = "healthy"  # one patient's, in two classes
    assert copies_in_words(known, tmp_path)[0].startswith(
        "2 pictures occur more than once and not under one patient and class"
    )


def test_healthy_and_bleed_do_not_miss_the_subtypes(manifest, tmp_path):
    manifest["label"] = ["healthy" if label == "healthy" else "bleed" for label in manifest["label"]]
    assert read_instead(tmp_path, manifest).classes_in_words() == "2 classes: healthy, bleed"


def test_order_of_the_manifests_rows_does_not_matter(manifest, tmp_path):
    expected = read_slices(tmp_path)
    assert read_instead(tmp_path, manifest[::-1]).training.equals(expected.training)
