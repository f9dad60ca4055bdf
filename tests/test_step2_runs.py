"""All runs of a comparison: nothing is trained twice, nothing is lost, nothing damaged is believed."""

import errno
import io
import json
import os
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from step2_helpers import SIZE, VARIANTS, make_comparison_for, write_pictures

from step2 import engine, files, report, runs, training
from step2.explain import draw_cams
from step2.network import InitialWeights
from step2.pictures import read_png
from step2.report import Report, describe_runs, make_caption
from step2.runs import Run, collect_history, collect_predictions
from step2.training import OutOfTime


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


@pytest.fixture(scope="module")
def predicted(data, tmp_path_factory) -> tuple[Path, pd.DataFrame]:
    """Return the results folder of one finished run, and its held-out predictions."""
    results = tmp_path_factory.mktemp("trained") / "r"
    return results, train(data, results)


@pytest.fixture
def trained(predicted, tmp_path) -> Path:
    """Return a copy of that folder, to be changed."""
    return shutil.copytree(predicted[0], tmp_path / "trained")


@pytest.fixture
def expected(predicted) -> pd.DataFrame:
    """Return the held-out predictions of that run."""
    return predicted[1]


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
    left_by_a_kill = next((tmp_path / "r").glob("runs/*/*")) / "checkpoint.pt"
    left_by_a_kill.touch()
    train(data, tmp_path / "r", ("0_Dicom2PNG", "1_ROI"))
    assert trained == [] and not left_by_a_kill.exists()
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


def test_other_initial_weights_or_other_patients_held_out_are_other_runs(data, tmp_path):
    comparison = make_comparison_for(data, tmp_path, ("1_ROI",))
    mine = InitialWeights("mine.pt", "file", "mine.pt", "its hash", "")
    turned = replace(comparison, fold_of=np.roll(comparison.fold_of, 2, axis=1))
    for other in (replace(comparison, weights=mine), turned):
        assert not set(other.folders.values()) & set(comparison.folders.values())
    moved = replace(mine, path="elsewhere/mine.pt")
    assert replace(comparison, weights=moved).folders == replace(comparison, weights=mine).folders


def test_changed_code_makes_other_runs(data, tmp_path, monkeypatch):
    before, digest = make_comparison_for(data, tmp_path, ("1_ROI",)), runs.code_digest()
    monkeypatch.setattr(runs, "CODE", ("pictures", "network"))
    assert runs.code_digest() != digest == before.code
    assert replace(before, code=runs.code_digest()).folders != before.folders


def test_code_changed_since_it_was_loaded_asks_for_another_kernel(data, tmp_path, monkeypatch):
    """The files are new, but this process would train with what it loaded, under the new code's hash."""
    monkeypatch.setattr(runs, "code_digest", lambda: "of the changed files")
    with pytest.raises(ValueError, match="step2/ was changed since it was loaded: restart the kernel"):
        make_comparison_for(data, tmp_path, ("1_ROI",))


@pytest.mark.parametrize("part", ["TrainingData", "TestingData"])
def test_pictures_that_change_after_they_were_read_are_noticed(tmp_path, part):
    """As where Step 1 runs with another window while the notebook trains."""
    write_pictures(tmp_path / "data")
    comparison = make_comparison_for(tmp_path / "data", tmp_path / "r", ("1_ROI",), folds=1)
    first = next((tmp_path / "data/1_ROI" / part).rglob("*.png"))
    first.write_bytes(cv2.imencode(".png", np.zeros((SIZE, SIZE), np.uint8))[1].tobytes())
    with pytest.raises(ValueError, match=r"1_ROI was changed since the notebook read it: run the notebook"):
        engine.train_all(comparison)
    kept = {path.name for path in only_folder(tmp_path / "r").iterdir()}
    assert not kept & {"checkpoint.pt", comparison.testing_file(comparison.runs[0])}


def test_predictions_that_are_no_numbers_are_refused(data, tmp_path, monkeypatch):
    """As where activations overflow in fp16, though the training loss, of batches' own norms, does not."""
    predict = training.predict
    monkeypatch.setattr(training, "predict", lambda *given: predict(*given) * np.nan)
    with pytest.raises(
        ValueError, match="last epoch's predictions are no numbers: lower the profile's rates"
    ):
        train(data, tmp_path / "r")


def test_chance_of_augmentation_is_a_runs_own(data, tmp_path, monkeypatch):
    """Else the control, the same under another seed, would be too much alike."""
    comparison, seeds = make_comparison_for(data, tmp_path, ("1_ROI",), control_run=True), []
    monkeypatch.setattr(runs, "train_run", lambda job, *rest: seeds.append(job.pictures.seed) or 1 / 0)
    for run in comparison.runs:
        with pytest.raises(ZeroDivisionError):
            runs.complete_run(comparison, run, lambda epochs: None)
    assert seeds == [comparison.seed(run) for run in comparison.runs] and len(set(seeds)) == 4


# ---------------------------------------- nothing is lost


def test_resume_at_each_epoch_equals_an_unbroken_run(data, tmp_path, monkeypatch):
    unbroken = train(data, tmp_path / "unbroken", epochs=3)
    train_epoch, stops = training.train_epoch, []

    def stop_before_each_epoch(trainer, batches, steps, truth, epoch, tell):
        if epoch not in stops:
            stops.append(epoch)
            raise KeyboardInterrupt
        return train_epoch(trainer, batches, steps, truth, epoch, tell)

    monkeypatch.setattr(training, "train_epoch", stop_before_each_epoch)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            train(data, tmp_path / "broken", epochs=3)
    pd.testing.assert_frame_equal(train(data, tmp_path / "broken", epochs=3), unbroken)
    assert stops == [0, 1, 2]


def test_new_testing_slices_are_predicted_without_training(trained, tmp_path, monkeypatch):
    data = tmp_path / "data"
    write_pictures(data)
    same = data / "1_ROI/TestingData/intraventricular.png"
    (data / "1_ROI/TestingData/healthy.png").write_bytes(same.read_bytes())
    monkeypatch.setattr(runs, "finish_run", None)
    comparison = make_comparison_for(data, trained, ("1_ROI",), folds=1)
    engine.train_all(comparison)
    table = runs.average_testing(comparison, "1_ROI").set_index("image").drop(columns="predicted")
    healthy, other = table.loc["TestingData/healthy.png"], table.loc["TestingData/intraventricular.png"]
    assert np.allclose(healthy.astype(float), other.astype(float))


def test_renamed_testing_slice_has_its_new_name_in_the_predictions(trained, tmp_path):
    data = tmp_path / "data"
    manifest = write_pictures(data)
    old, new = "TestingData/healthy.png", "TestingData/head.png"
    for variant in ("0_Dicom2PNG", "1_ROI"):
        (data / variant / old).rename(data / variant / new)
    manifest.replace({"image": {old: new}}).to_csv(data / "manifest.csv", index=False)
    comparison = make_comparison_for(data, trained, ("1_ROI",), folds=1)
    engine.train_all(comparison)
    images = set(runs.average_testing(comparison, "1_ROI")["image"])
    assert new in images and old not in images
    assert len(list(only_folder(trained).glob("testing-*.csv"))) == 1


# ---------------------------------------- nothing wrong is believed


def test_patients_are_those_of_the_present_manifest(trained, tmp_path):
    """Step 1's output made anew has another key, so other pseudonyms for the same people and pictures."""
    data = tmp_path / "data"
    manifest = write_pictures(data)
    manifest.assign(patient="again " + manifest["patient"]).to_csv(data / "manifest.csv", index=False)
    both = train(data, trained, ("0_Dicom2PNG", "1_ROI"))
    assert both["patient"].str.startswith("again ").all()
    assert (both.groupby("variant")["patient"].nunique().unique() == both["patient"].nunique()).all()


def damaged(path: Path, how: str) -> None:
    """Damage a file in one of several ways."""
    content = path.read_bytes()
    if how == "delete":
        path.unlink()
    elif how == "flip":
        place = len(content) // 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    else:
        other = {"empty": b"", "braces": b"{}", "list": b"[1]", "number": b"1"}
        path.write_bytes((other | {"wrong types": b'{"files": 1, "sha256": []}'})[how])


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *(("predictions.csv", "flip"), ("history.csv", "flip"), ("last.pt", "flip"), ("last.pt", "delete")),
        *((name, how) for name in ("testing-*.csv", "done.json") for how in ("flip", "delete")),
    ],
)
def test_damaged_result_is_noticed_and_made_again(data, trained, expected, capsys, name, how):
    (path,) = only_folder(trained).glob(name)
    whole = path.read_bytes()
    damaged(path, how)
    capsys.readouterr()
    pd.testing.assert_frame_equal(train(data, trained), expected)
    said = capsys.readouterr().out
    again = "TestingData is predicted again" if "testing" in name else "this run is trained again"
    if (name, how) != ("done.json", "delete"):
        assert f"{path.name} is damaged or missing: {again}\n" in said
    if name not in ("history.csv", "done.json"):  # they tell how long it took
        assert path.read_bytes() == whole
    train(data, trained)
    assert "damaged" not in capsys.readouterr().out


@pytest.mark.parametrize("how", ["empty", "braces", "list", "number", "wrong types", "flip", "delete"])
def test_damaged_note_is_no_note(tmp_path, how):
    path = tmp_path / "done.json"
    files.write_json(path, {"files": {"last.pt": "its hash"}})
    assert files.read_json(path) == {"files": {"last.pt": "its hash"}}
    damaged(path, how)
    assert files.read_json(path) is None


def end_in_the_second_epoch(monkeypatch, error: type[BaseException]) -> None:
    """Let the next run end so."""
    train_epoch = training.train_epoch

    def stop(trainer, batches, steps, truth, epoch, tell):
        if epoch:
            raise error
        return train_epoch(trainer, batches, steps, truth, epoch, tell)

    monkeypatch.setattr(training, "train_epoch", stop)


def stop_in_the_second_epoch(monkeypatch, data: Path, results: Path, **given) -> Path:
    """Interrupt a run in its second epoch and return its checkpoint."""
    end_in_the_second_epoch(monkeypatch, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        train(data, results, **given)
    monkeypatch.undo()
    return only_folder(results) / "checkpoint.pt"


def test_damaged_checkpoint_starts_the_run_again(data, expected, tmp_path, monkeypatch, capsys):
    damaged(stop_in_the_second_epoch(monkeypatch, data, tmp_path / "r"), "flip")
    pd.testing.assert_frame_equal(train(data, tmp_path / "r"), expected)
    assert "checkpoint.pt is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("other", [{"variants": ("0_Dicom2PNG",)}, {"model_name": "efficientnet-b0"}])
def test_checkpoint_of_another_run_is_not_gone_on_from(data, expected, tmp_path, monkeypatch, capsys, other):
    own = stop_in_the_second_epoch(monkeypatch, data, tmp_path / "r")
    foreign = stop_in_the_second_epoch(monkeypatch, data, tmp_path / "other", **other)
    own.write_bytes(foreign.read_bytes())
    pd.testing.assert_frame_equal(train(data, tmp_path / "r"), expected)
    assert "checkpoint.pt is damaged: this run starts again" in capsys.readouterr().out


def test_files_of_another_run_are_not_taken_for_a_runs_own(data, trained, expected, tmp_path, capsys):
    """All files of the run of one variant lie in the folder of another one's, whole and sealed."""
    train(data, tmp_path / "other", ("0_Dicom2PNG",))
    shutil.copytree(only_folder(tmp_path / "other"), only_folder(trained), dirs_exist_ok=True)
    pd.testing.assert_frame_equal(train(data, trained), expected)
    assert "done.json is damaged or missing: this run is trained again" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("done.json", describe_runs),
        ("predictions.csv", collect_predictions),
        ("last.pt", lambda comparison: draw_cams(comparison, collect_predictions(comparison))),
        ("testing-*.csv", lambda comparison: runs.average_testing(comparison, "1_ROI")),
        ("history.csv", collect_history),
    ],
)
def test_whatever_is_read_of_a_run_is_checked(data, trained, name, read):
    comparison = make_comparison_for(data, trained, ("1_ROI",), folds=1)
    (path,) = only_folder(trained).glob(name)
    damaged(path, "flip")
    with pytest.raises(ValueError, match=rf"{path.name} is missing or damaged: run the training cell again"):
        read(comparison)


def test_unfinished_comparison_gives_no_table(data, tmp_path):
    comparison = make_comparison_for(data, tmp_path / "r")
    with pytest.raises(ValueError, match=r"done\.json is missing or damaged: run the training cell again"):
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


@pytest.mark.parametrize("how", ["delete", "flip", "braces"])
def test_tables_that_nothing_tells_the_origin_of_move_too(tmp_path, how):
    (tmp_path / "runs").mkdir()
    Report(tmp_path, "caption", True, "first comparison").csv(pd.DataFrame({"a": [1]}), "contrasts.csv")
    (tmp_path / "my own notes.txt").write_text("kept")
    damaged(tmp_path / "written.json", how)
    Report(tmp_path, "caption", True, "second comparison")
    assert not (tmp_path / "contrasts.csv").exists() and (tmp_path / "my own notes.txt").is_file()
    assert [p.name for p in tmp_path.glob("earlier-*/*")] == ["contrasts.csv"]


def test_files_in_a_folder_that_no_comparison_has_used_stay(tmp_path):
    (tmp_path / "my.csv").touch()
    Report(tmp_path, "caption", True, "first comparison")
    assert (tmp_path / "my.csv").is_file()


def test_move_that_was_killed_is_finished_at_the_next_start(tmp_path, monkeypatch):
    first = Report(tmp_path, "caption", True, "first comparison")
    for name in ("contrasts.csv", "metrics.csv"):
        first.csv(pd.DataFrame({"a": [1]}), name)
    replace, moved = Path.replace, []

    def kill(path, target):
        if path.name == "metrics.csv":
            raise KeyboardInterrupt
        moved.append(path.name)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        Report(tmp_path, "caption", True, "second comparison")
    monkeypatch.undo()
    Report(tmp_path, "caption", True, "second comparison")
    assert "contrasts.csv" in moved
    assert sorted(p.name for p in tmp_path.glob("earlier-*/*")) == ["contrasts.csv", "metrics.csv"]


def test_titles_of_a_single_split_say_what_was_tested(data, tmp_path):
    comparison = make_comparison_for(data, tmp_path, folds=1)
    tested = comparison.slices.training[comparison.fold_of[0] == 0]
    caption = make_caption(comparison, "")
    patients = tested["patient"].nunique()
    assert f"48 slices of 24 patients, tested: {len(tested)} slices of {patients} patients" in caption


def test_what_made_a_run_is_stored_with_the_run(data, trained, monkeypatch):
    monkeypatch.setattr(runs, "version", lambda name: "0.0.1")
    train(data, trained, ("0_Dicom2PNG", "1_ROI"))
    comparison = make_comparison_for(data, trained, ("0_Dicom2PNG", "1_ROI"), folds=1)
    slices = replace(comparison.slices, roi_window="50,130")
    facts = describe_runs(replace(comparison, slices=slices))
    assert {made["numpy"] for made in facts["made_with"]["versions"]} > {"0.0.1"}
    made = facts["made_with"]["versions"][0]
    assert (made["opencv"], made["torch"]) == (cv2.__version__, torch.__version__)
    assert (facts["roi_window"], facts["code"]) == ("50,130", runs.LOADED)
    assert any("runs differ in their versions" in line for line in facts["fallbacks"])
    json.dumps(facts)


def test_each_run_says_what_made_it(data, trained):
    train(data, trained, ("0_Dicom2PNG", "1_ROI"), threads=2)
    facts = describe_runs(make_comparison_for(data, trained, folds=1, threads=3))
    threads = {run["variant"]: facts["made_with"]["threads"][run["threads"]] for run in facts["runs"]}
    assert threads == {"0_Dicom2PNG": 2, "1_ROI": 1} and "threads" not in facts["settings"]
    assert [line.split(",")[0] for line in facts["fallbacks"]] == ["runs differ in their threads"]


# ---------------------------------------- the disk and the folder


def test_checkpoints_are_written_beside_training_each_of_its_own_epoch(data, tmp_path, monkeypatch):
    write, written, trained = training.write_checkpoint, [], []

    def slowly(path, kept):
        time.sleep(0.2)  # longer than an epoch
        written.append((len(kept["history"]), len(trained)))
        write(path, kept)

    train_epoch = training.train_epoch
    monkeypatch.setattr(training, "write_checkpoint", slowly)
    monkeypatch.setattr(training, "train_epoch", lambda *a: trained.append(1) or train_epoch(*a))
    train(data, tmp_path / "r", epochs=4)
    assert [epoch for epoch, _ in written] == [1, 2, 3, 4]
    assert [begun for _, begun in written] == [2, 3, 4, 4]


def no_room(path: Path, kept: dict) -> None:
    """Write a checkpoint to a disk that is full."""
    raise OSError(errno.ENOSPC, "the disk is full")


def test_disk_that_fills_while_the_next_epoch_trains_ends_the_run(data, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "write_checkpoint", no_room)
    for epochs in (1, 3):
        with pytest.raises(OSError, match="the disk is full"):
            train(data, tmp_path / str(epochs), epochs=epochs)
        assert not (only_folder(tmp_path / str(epochs)) / "done.json").exists()


@pytest.mark.parametrize("error", [OutOfTime, KeyboardInterrupt])
def test_disk_that_fills_is_said_whatever_else_ends_the_run(data, tmp_path, monkeypatch, error):
    monkeypatch.setattr(training, "write_checkpoint", no_room)
    end_in_the_second_epoch(monkeypatch, error)
    with pytest.raises(OSError, match="the disk is full") as caught:
        train(data, tmp_path / "r", epochs=3)
    assert isinstance(caught.value.__context__, error)


@pytest.mark.parametrize(
    ("given", "runs_each"),
    [
        ({"processes": 1}, 4),
        ({"processes": 3}, 2),
        ({"processes": 2, "cluster": "tcp://127.0.0.1:8786"}, 1),
        ({"batch_size": 9}, 0),  # 24 slices are taken 8 at a time
    ],
)
def test_what_compiling_earns_counts_the_runs_of_a_process(data, tmp_path, monkeypatch, given, runs_each):
    asked, choose = [], runs.choose_speed
    monkeypatch.setattr(runs, "choose_speed", lambda s, steps, d: asked.append(steps) or choose(s, steps, d))
    given = {"folds": 2, "epochs": 2, "batch_size": 12, **given}
    comparison = make_comparison_for(data, tmp_path / "r", ("0_Dicom2PNG", "1_ROI"), **given)
    runs.complete_run(comparison, comparison.runs[0], lambda epochs: None)
    assert len(comparison.runs) == 4 and asked == [runs_each * comparison.steps]


def full_disk(path: Path, mode: str, number: int = errno.ENOSPC) -> io.BytesIO:
    """Open a file on a disk that is full."""

    class FullFile(io.BytesIO):
        def writelines(self, lines: object) -> None:
            raise OSError(number, "No space left on device")

    path.touch()
    return FullFile()


@pytest.mark.parametrize(
    ("number", "what"), [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "your disk quota is used up")]
)
def test_full_disk_is_said_and_leaves_nothing_half_done(tmp_path, monkeypatch, number, what):
    monkeypatch.setattr(Path, "open", lambda path, mode: full_disk(path, mode, number))
    with pytest.raises(OSError, match=rf"{what}, .*checkpoint\.pt could not be written"):
        files.write_sealed(tmp_path / "checkpoint.pt", b"weights")
    assert not list(tmp_path.iterdir())


def test_full_disk_says_how_much_is_needed_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    files.write_sealed(tmp_path / "checkpoint.pt", b"epoch 1")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full_disk)
        with pytest.raises(OSError, match=r"\(it needs 39 bytes\): free some space there"):
            files.write_sealed(tmp_path / "checkpoint.pt", b"epoch 2")
    assert files.read_sealed(tmp_path / "checkpoint.pt") == b"epoch 1" and len(list(tmp_path.iterdir())) == 1


def test_leftovers_of_a_killed_notebook_are_removed_at_the_next_start(tmp_path):
    leftover = tmp_path / "runs/1_ROI/repeat1_fold1-0/.checkpoint.pt.host.1.tmp"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    (tmp_path / ".own.tmp").touch()
    files.lock_results(tmp_path)
    assert not leftover.exists() and (tmp_path / ".own.tmp").exists()


def test_process_number_of_a_gone_notebook_that_lives_again_holds_nothing(tmp_path):
    """As in a container that was started again: who holds the folder is told by its lock alone."""
    files.write_json(tmp_path / ".owner.json", {"pid": os.getppid(), "host": socket.gethostname()})
    (tmp_path / ".lock").touch()
    files.lock_results(tmp_path).release()


def test_results_that_is_a_file_gets_a_sentence(tmp_path):
    (tmp_path / "results").touch()
    with pytest.raises(ValueError, match="can't be written to: set results to another folder"):
        files.lock_results(tmp_path / "results")


def test_results_on_a_file_system_without_locks_get_a_sentence(tmp_path, monkeypatch):
    def refuse(lock):
        raise NotImplementedError

    monkeypatch.setattr(files.FileLock, "acquire", refuse)
    sentence = r"can't be written to: set results to another folder \(this file system has no locks\)$"
    with pytest.raises(ValueError, match=sentence):
        files.lock_results(tmp_path)


def test_history_has_numbers_also_where_an_epoch_did_not_look_at_the_held_out_slices(tmp_path, monkeypatch):
    write_pictures(tmp_path / "data")
    monkeypatch.setattr(training, "is_judged", lambda epoch, epochs: epoch == epochs - 1)
    comparison = make_comparison_for(tmp_path / "data", tmp_path / "r", VARIANTS[:1])
    engine.train_all(comparison)
    history = collect_history(comparison)
    assert history["val_loss"].dtype == history["val_accuracy"].dtype == float
    assert history.groupby("fold")["val_loss"].agg(lambda losses: losses.notna().sum()).tolist() == [1, 1]


def test_file_that_another_program_has_open_is_named(tmp_path, monkeypatch):
    """As Excel holds a table on Windows."""

    def refuse(self, target):
        raise PermissionError(13, "Access is denied", str(target))

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(
        PermissionError, match=r"metrics\.csv could not be written: close it in other programs"
    ):
        files.write_csv(tmp_path / "metrics.csv", pd.DataFrame({"a": [1]}))
    assert not list(tmp_path.iterdir())


def test_other_labels_of_testing_slices_are_another_comparison(data, tmp_path):
    comparison = make_comparison_for(data, tmp_path)
    testing = comparison.slices.testing.assign(label="")
    other = replace(comparison, slices=replace(comparison.slices, testing=testing))
    assert other.identity() != comparison.identity() and list(other.folders) == list(comparison.folders)


def test_other_testing_pictures_are_another_comparison_of_the_same_runs(data, tmp_path):
    comparison = make_comparison_for(data, tmp_path)
    digests = {variant: [training, "other"] for variant, (training, _) in comparison.digests.items()}
    other = replace(comparison, digests=digests)
    assert other.identity() != comparison.identity() and other.folders == comparison.folders


def test_file_that_is_held_for_a_moment_is_written_all_the_same(tmp_path, monkeypatch):
    """A virus scanner looks at each checkpoint on Windows."""
    replace, refused = Path.replace, []

    def held(self, target):
        if not refused:
            refused.append(PermissionError(13, "Access is denied", str(target)))
            raise refused[0]
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", held)
    files.write_sealed(tmp_path / "checkpoint.pt", b"epoch 1")
    assert refused and files.read_sealed(tmp_path / "checkpoint.pt") == b"epoch 1"


def test_table_that_excel_shows_is_named_when_another_comparison_begins(tmp_path, monkeypatch):
    files.put_aside(tmp_path, "one")
    files.write_json(tmp_path / "written.json", {"comparison": "one", "files": ["metrics.csv"]})
    (tmp_path / "metrics.csv").write_text("a\n")

    def held(self, target):
        raise PermissionError(13, "Access is denied", str(target))

    monkeypatch.setattr(Path, "replace", held)
    with pytest.raises(PermissionError, match=r"metrics\.csv could not be moved to .*: close it in other"):
        files.put_aside(tmp_path, "another")


@pytest.mark.parametrize("kind", ["json", "sealed"])
def test_file_that_can_not_be_read_now_is_not_taken_for_damaged(tmp_path, monkeypatch, kind):
    """A disk that wakes up, too many open files, another user's: what is whole must not be trained again."""
    path = tmp_path / "kept"
    getattr(files, f"write_{kind}")(path, {"a": 1} if kind == "json" else b"20 epochs")

    def fail(self, *how, **named):
        raise OSError(errno.EIO, "Input/output error", str(self))

    monkeypatch.setattr(Path, "read_bytes", fail)
    monkeypatch.setattr(Path, "read_text", fail)
    with pytest.raises(OSError, match=r"Input/output error: .*kept"):
        getattr(files, f"read_{kind}")(path)


def test_folder_that_is_gone_is_said_with_the_file_and_not_its_other_name(tmp_path, monkeypatch):
    def fail(self, missing_ok):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "unlink", fail)  # as of a disk that is gone too
    with pytest.raises(OSError, match=r"metrics\.csv could not be written \(No such file .*run again"):
        files.write_content(tmp_path / "gone" / "metrics.csv", b"")


def by_brightness(trainer, batches):
    """Return probabilities that tell pictures apart, in place of predict's."""
    light = np.concatenate([pictures.double().mean((1, 2, 3)).numpy() / 255 for pictures, _ in batches])
    return np.column_stack([light, 1 - light, *np.zeros((4, len(light)))])


def test_probabilities_stand_beside_their_own_slices(tmp_path, monkeypatch):
    """A network of few steps gives all slices the same ones, and would not show it."""
    write_pictures(tmp_path / "data", 3, ("1_ROI",))
    comparison = make_comparison_for(tmp_path / "data", tmp_path / "r", ("1_ROI",), folds=1)
    monkeypatch.setattr(training, "train_epoch", lambda *given: {"epoch": given[4] + 1, "seconds": 0.0})
    for module in (training, runs):
        monkeypatch.setattr(module, "predict", by_brightness)
    engine.train_all(comparison)
    for table in (collect_predictions(comparison), runs.average_testing(comparison, "1_ROI")):
        pictures = [read_png(tmp_path / "data/1_ROI" / image, SIZE) for image in table["image"]]
        assert list(table["p_healthy"]) == pytest.approx([picture.mean() / 255 for picture in pictures])


def test_testing_slices_are_predicted_by_the_network_that_training_ended_with(data, tmp_path, monkeypatch):
    seen, predict = [], runs.predict
    monkeypatch.setattr(
        runs, "predict", lambda trainer, b: seen.append(trainer.network) or predict(trainer, b)
    )
    train(data, tmp_path, epochs=1)
    last = torch.load(only_folder(tmp_path) / "last.pt", weights_only=True)
    own = seen[0].state_dict()
    assert all(torch.equal(own[name], value.to(own[name].dtype)) for name, value in last.items())


def test_fallbacks_are_named(data, tmp_path, monkeypatch):
    comparison = make_comparison_for(data, tmp_path, ("1_ROI",), folds=1)
    note = dict.fromkeys(("device", "speed", "threads", "system", "versions"), "same")
    monkeypatch.setattr(report, "read_note", lambda *given: note | {"part": 4, "seconds": 1.0})
    weights = InitialWeights("auto", "none", "", "", "random initial weights: no download")
    memory, random = describe_runs(replace(comparison, weights=weights))["fallbacks"]
    assert memory.endswith(": memory ended, 4 of 8 slices at a time") and random == weights.note
    assert len(describe_runs(comparison)["fallbacks"]) == 1  # weights = "none" was asked for
