"""All runs of a comparison: nothing is trained twice, nothing is lost, nothing damaged is believed."""

import errno
import json
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from step2_helpers import SIZE, make_comparison_for, write_pictures

from step2 import engine, files, runs, training
from step2.report import Report, make_caption
from step2.runs import Run, collect_predictions
from step2.slices import read_slices


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data_preprocessing")
    write_pictures(folder)
    return folder


def train(data: Path, results: Path, variants: tuple[str, ...] = ("1_ROI",), **given) -> pd.DataFrame:
    """Train what isn't trained yet and return the held-out predictions."""
    comparison = make_comparison_for(data, results, variants, **({"folds": 1, "epochs": 2} | given))
    engine.train_all(comparison)
    return collect_predictions(comparison)


def only_folder(results: Path) -> Path:
    """Return the folder of the only run."""
    (folder,) = results.glob("runs/*/*")
    return folder


# ---------------------------------------- nothing is trained twice


def test_finished_runs_are_not_trained_again_unless_a_picture_changes(tmp_path, monkeypatch):
    data, trained = tmp_path / "data", []
    write_pictures(data)
    train(data, tmp_path / "r", ("0_Dicom2PNG", "1_ROI"))
    finish_run = runs.finish_run
    monkeypatch.setattr(
        runs, "finish_run", lambda c, run, *rest: trained.append(run) or finish_run(c, run, *rest)
    )
    train(data, tmp_path / "r", ("0_Dicom2PNG", "1_ROI"), workers=1)
    assert trained == []
    picture = cv2.imencode(".png", np.zeros((SIZE, SIZE), np.uint8))[1].tobytes()
    (data / "1_ROI/TrainingData/subdural/1.0.png").write_bytes(picture)
    train(data, tmp_path / "r", ("0_Dicom2PNG", "1_ROI"))
    assert trained == [Run("1_ROI", 1, 1)]


@pytest.mark.parametrize("given", [{"epochs": 3}, {"seed": 4}, {"image_size": 33}, {"batch_size": 9}])
def test_another_recipe_is_another_run(data, tmp_path, given):
    first, second = (make_comparison_for(data, tmp_path, ("1_ROI",), **g) for g in ({}, given))
    assert first.folders[first.runs[0]] != second.folders[second.runs[0]]


@pytest.mark.parametrize("given", [{"processes": 2}, {"threads": 2}, {"workers": 1}, {"control_run": True}])
def test_who_trains_makes_no_other_run(data, tmp_path, given):
    first, second = (make_comparison_for(data, tmp_path, ("1_ROI",), **g) for g in ({}, given))
    assert first.folders[first.runs[0]] == second.folders[second.runs[0]]


def test_changed_code_makes_other_runs(data, tmp_path, monkeypatch):
    before = make_comparison_for(data, tmp_path, ("1_ROI",))
    monkeypatch.setattr(runs, "CODE", ("pictures", "network"))
    after = make_comparison_for(data, tmp_path, ("1_ROI",))
    assert before.code != after.code and before.folders != after.folders


def test_same_seed_for_all_variants_and_another_for_the_control(data, tmp_path):
    comparison = make_comparison_for(data, tmp_path, repeats=2, control_run=True)
    seeds = {run: comparison.seed(run) for run in comparison.runs}
    assert seeds[Run("0_Dicom2PNG", 1, 2)] == seeds[Run("1_ROI", 1, 2)]
    assert len(set(seeds.values())) == 2 * 2 * 2  # repeats, folds, control or not


# ---------------------------------------- nothing is lost


def test_resume_at_each_epoch_equals_an_unbroken_run(data, tmp_path, monkeypatch):
    unbroken = train(data, tmp_path / "unbroken", epochs=3)
    train_epoch, stops = training.train_epoch, []

    def stop_before_each_epoch(trainer, loader, truth, epoch, tell):
        if epoch not in stops:
            stops.append(epoch)
            raise KeyboardInterrupt
        return train_epoch(trainer, loader, truth, epoch, tell)

    monkeypatch.setattr(training, "train_epoch", stop_before_each_epoch)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            train(data, tmp_path / "broken", epochs=3)
    pd.testing.assert_frame_equal(train(data, tmp_path / "broken", epochs=3), unbroken)
    assert stops == [0, 1, 2]


def test_new_testing_slices_are_predicted_without_training(tmp_path, monkeypatch):
    data = tmp_path / "data"
    write_pictures(data)
    train(data, tmp_path / "r")
    same = data / "1_ROI/TestingData/intraventricular.png"
    (data / "1_ROI/TestingData/healthy.png").write_bytes(same.read_bytes())
    monkeypatch.setattr(runs, "finish_run", None)
    comparison = make_comparison_for(data, tmp_path / "r", ("1_ROI",), folds=1)
    engine.train_all(comparison)
    table = runs.average_testing(comparison, "1_ROI").set_index("image").drop(columns="predicted")
    healthy, other = table.loc["TestingData/healthy.png"], table.loc["TestingData/intraventricular.png"]
    assert np.allclose(healthy.astype(float), other.astype(float))


def test_renamed_testing_slice_has_its_new_name_in_the_predictions(tmp_path):
    data = tmp_path / "data"
    manifest = write_pictures(data)
    train(data, tmp_path / "r")
    old, new = "TestingData/healthy.png", "TestingData/head.png"
    for variant in ("0_Dicom2PNG", "1_ROI"):
        (data / variant / old).rename(data / variant / new)
    manifest.replace({"image": {old: new}}).to_csv(data / "manifest.csv", index=False)
    comparison = make_comparison_for(data, tmp_path / "r", ("1_ROI",), folds=1)
    engine.train_all(comparison)
    images = set(runs.average_testing(comparison, "1_ROI")["image"])
    assert new in images and old not in images
    assert len(list(only_folder(tmp_path / "r").glob("testing-*.csv"))) == 1


# ---------------------------------------- nothing wrong is believed


def test_patients_are_those_of_the_present_manifest(tmp_path):
    """Step 1's output made anew has another key, so other pseudonyms for the same people and pictures."""
    data = tmp_path / "data"
    manifest = write_pictures(data)
    train(data, tmp_path / "r")
    manifest.assign(patient="again " + manifest["patient"]).to_csv(data / "manifest.csv", index=False)
    both = train(data, tmp_path / "r", ("0_Dicom2PNG", "1_ROI"))
    assert both["patient"].str.startswith("again ").all()
    assert (both.groupby("variant")["patient"].nunique().unique() == both["patient"].nunique()).all()


def damaged(path: Path, how: str) -> None:
    """Damage a file in one of several ways."""
    content = path.read_bytes()
    if how == "delete":
        path.unlink()
    elif how == "cut at a line end":
        path.write_bytes(content[: content.rindex(b"\n", 0, len(content) - 1) + 1])
    elif how == "flip":
        place = len(content) // 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    else:
        path.write_bytes({"empty": b"", "braces": b"{}"}[how])


@pytest.mark.parametrize("how", ["cut at a line end", "empty", "braces", "delete", "flip"])
@pytest.mark.parametrize("name", ["predictions.csv", "history.csv", "last.pt", "done.json", "testing-*.csv"])
def test_damaged_result_is_noticed_and_made_again(data, tmp_path, capsys, name, how):
    expected = train(data, tmp_path / "r")
    (path,) = only_folder(tmp_path / "r").glob(name)
    try:
        damaged(path, how)
    except ValueError:
        pytest.skip("this file has no line end")
    capsys.readouterr()
    pd.testing.assert_frame_equal(train(data, tmp_path / "r"), expected)
    said = capsys.readouterr().out
    assert (name == "done.json" and how == "delete") or (path.name in said and "is damaged" in said)
    capsys.readouterr()
    train(data, tmp_path / "r")
    assert "damaged" not in capsys.readouterr().out


@pytest.mark.parametrize("how", ["empty", "flip", "braces"])
def test_damaged_checkpoint_starts_the_run_again(data, tmp_path, monkeypatch, capsys, how):
    expected, train_epoch = train(data, tmp_path / "whole"), training.train_epoch

    def stop_at_the_second(trainer, loader, truth, epoch, tell):
        if epoch:
            raise KeyboardInterrupt
        return train_epoch(trainer, loader, truth, epoch, tell)

    monkeypatch.setattr(training, "train_epoch", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        train(data, tmp_path / "r")
    monkeypatch.undo()
    damaged(only_folder(tmp_path / "r") / "checkpoint.pt", how)
    pd.testing.assert_frame_equal(train(data, tmp_path / "r"), expected)
    assert "checkpoint.pt is damaged" in capsys.readouterr().out


def test_table_damaged_after_training_is_refused_not_read(data, tmp_path):
    comparison = make_comparison_for(data, tmp_path / "r", ("1_ROI",), folds=1, epochs=1)
    engine.train_all(comparison)
    damaged(only_folder(tmp_path / "r") / "predictions.csv", "cut at a line end")
    with pytest.raises(ValueError, match=r"predictions\.csv is missing or damaged: run the cell that trains"):
        collect_predictions(comparison)


def test_unfinished_comparison_gives_no_table(data, tmp_path):
    comparison = make_comparison_for(data, tmp_path / "r")
    with pytest.raises(ValueError, match=r"done\.json is missing or damaged: run the cell that trains"):
        collect_predictions(comparison)


def test_results_of_another_comparison_move_to_a_dated_folder(tmp_path):
    first = Report(tmp_path, "caption", True, "first comparison")
    first.csv(pd.DataFrame({"a": [1]}), "contrasts.csv")
    (tmp_path / "my own notes.csv").write_text("kept")
    Report(tmp_path, "caption", True, "first comparison")
    assert (tmp_path / "contrasts.csv").is_file()
    Report(tmp_path, "caption", True, "second comparison")
    assert not (tmp_path / "contrasts.csv").exists() and (tmp_path / "my own notes.csv").is_file()
    assert [p.name for p in tmp_path.glob("earlier-*/*")] == ["contrasts.csv"]


def test_titles_of_a_single_split_say_what_was_tested(data, tmp_path):
    comparison = make_comparison_for(data, tmp_path, folds=1)
    settings, slices, fold_of = comparison.settings, comparison.slices, comparison.fold_of
    tested = slices.training[fold_of[0] == 0]
    caption = make_caption(settings, slices, fold_of, "", "random initial weights")
    patients = tested["patient"].nunique()
    assert f"48 slices of 24 patients, tested: {len(tested)} slices of {patients} patients" in caption


def test_what_made_a_run_is_stored_with_the_run(data, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "version", lambda name: "0.0.1")
    train(data, tmp_path / "r")
    monkeypatch.undo()
    comparison = make_comparison_for(data, tmp_path / "r", ("0_Dicom2PNG", "1_ROI"), folds=1, epochs=2)
    engine.train_all(comparison)
    facts = runs.describe_runs(comparison)
    assert {made["torch"] for made in facts["made_with"]["versions"]} > {"0.0.1"}
    assert any("runs differ in their versions" in line for line in facts["fallbacks"])
    json.dumps(facts)


# ---------------------------------------- the disk and the folder


def test_full_disk_is_said_and_leaves_nothing_half_done(tmp_path, monkeypatch):
    def full(path: Path, content: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"the disk is full, .*checkpoint\.pt could not be written"):
        files.write_sealed(tmp_path / "checkpoint.pt", b"weights")
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_killed_notebook_are_removed_at_the_next_start(tmp_path):
    leftover = tmp_path / "runs/1_ROI/repeat1_fold1-0/.checkpoint.pt.host.1.tmp"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    files.lock_results(tmp_path)
    assert not leftover.exists()


def test_results_that_is_a_file_gets_a_sentence(tmp_path):
    (tmp_path / "results").touch()
    with pytest.raises(ValueError, match="can't be written to: set results to another folder"):
        files.lock_results(tmp_path / "results")


def test_manifest_is_read_as_it_is(data):
    assert len(read_slices(data).training) == 48
