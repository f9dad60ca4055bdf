"""The notebook of step 2: run whole once, in two processes, on tiny pictures; then its functions one by one.

Nothing is downloaded and no GPU is needed. Pictures are grey noise with a square whose place is the class.
"""

import itertools
import json
import multiprocessing
import os
import socket
import time
from pathlib import Path

import cv2
import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from conftest import ROOT, load_notebook
from efficientnet_pytorch import EfficientNet
from sklearn.metrics import accuracy_score

CLASSES = ("healthy", "intraparenchymal", "intraventricular", "subarachnoid", "subdural", "epidural")
VARIANTS = ("0_Dicom2PNG", "1_ROI")
SIZE = 32
TINY = {
    **{"profile": "quick", "image_size": SIZE, "epochs": 2, "batch_size": 8, "folds": 2, "weights": "none"},
    **{"seed": 3, "progress": False},
}


def write_pictures(data: Path, per_class: int = 4, variants: tuple[str, ...] = VARIANTS) -> pd.DataFrame:
    """Write what Step 1 would: two slices of each of per_class patients a class, 3 of testing, a manifest.

    One more slice is blank, and one more file was refused.
    """
    rows = []
    for number, label in enumerate(CLASSES):
        for patient in range(per_class):
            for k in range(2):
                image = f"TrainingData/{label}/{patient}.{k}.png"
                rows.append([image, "train", label, f"patient {number}-{patient}", "ok", "0"])
    rows.append(["TrainingData/healthy/blank.png", "train", "healthy", "patient 0-0", "ok", "1"])
    rows.append(["TrainingData/healthy/bad.png", "train", "healthy", "", "failed", ""])
    rows += [[f"TestingData/{label}.png", "test", label, f"test {label}", "ok", "0"] for label in CLASSES[:3]]
    manifest = pd.DataFrame(rows, columns=["image", "split", "label", "patient", "status", "blank"])
    for variant in variants:
        for index, row in manifest[manifest["status"] == "ok"].iterrows():
            picture = np.random.default_rng([index, len(variant)]).integers(0, 90, (SIZE, SIZE), np.uint8)
            place = CLASSES.index(row["label"])
            picture[8 * (place // 3) + 6 :][:7, 9 * (place % 3) + 3 :][:, :7] = 250
            path = data / variant / row["image"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(cv2.imencode(".png", picture)[1].tobytes())
    manifest.to_csv(data / "manifest.csv", index=False)
    return manifest


def make_study(notebook: dict, data: Path, results: Path, variants: tuple = VARIANTS, **given):
    """Return the study that the notebook's cells would make, with one process unless told otherwise."""
    results.mkdir(exist_ok=True)
    names = ("mixed_precision", "processes", "workers", "threads", "cache", "control_run")
    usual = {name: notebook[name] for name in names} | {"processes": 1, "control_run": False}
    options = {**usual, **TINY, **given}
    settings = notebook["resolve_settings"](options.pop("profile"), options, gpus=0)
    slices = notebook["read_manifest"](data)
    fold_of = notebook["make_folds"](slices.training, settings["folds"], settings["seed"])[None]
    digests = {v: notebook["content_digest"](data / v, slices.training["image"]) for v in variants}
    testing = {v: notebook["content_digest"](data / v, slices.testing["image"]) for v in variants}
    units = notebook["list_units"](list(variants), settings)
    start = notebook["settle_start"](settings, results)
    tables = (slices.training, slices.testing)
    return notebook["Study"](data, results, settings, *tables, fold_of, digests, testing, start, units)


def trained_files(results: Path) -> dict[str, bytes]:
    """Return the predictions of all units, by unit folder."""
    return {
        str(p.relative_to(results)): p.read_bytes()
        for p in results.glob("runs/*/*/*.csv")
        if p.name != "history.csv"
    }  # which has times


@pytest.fixture(scope="module")
def notebook() -> dict:
    """Return the notebook's definitions; tests that change one load their own."""
    return load_notebook()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Return a small output folder of Step 1."""
    folder = tmp_path_factory.mktemp("data_preprocessing")
    write_pictures(folder)
    return folder


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> tuple[Path, nbformat.NotebookNode]:
    """Run the whole notebook once, in two processes; return its results folder and the executed notebook."""
    results = tmp_path_factory.mktemp("run") / "results"
    parameters = {**TINY, "data": str(data), "results": str(results), "variants": "0,1", "processes": 2}
    executed = papermill.execute_notebook(
        ROOT / "Step2_EfficientNet_Model.ipynb", None, parameters, progress_bar=False, cwd=results.parent
    )
    return results, executed


# ---------------------------------------- the whole notebook


@pytest.mark.processes
def test_whole_run_leaves_every_promised_file(whole):
    results, _ = whole
    for name in ("oof_predictions.csv", "control_predictions.csv", "history.csv", "settings.json"):
        assert (results / name).is_file(), name
    for variant in VARIANTS:
        assert (results / f"testing_predictions_{variant}.csv").is_file()
        assert len(list((results / "runs" / variant).glob("repeat1_fold?-*/best.pt"))) == 2
    for figure in ("variants", "augmented", "learning_curves", "mistakes", "grad_cam"):
        assert (results / f"{figure}.png").is_file() and (results / f"{figure}.svg").is_file(), figure
    assert not list(results.glob("runs/*/*/checkpoint.pt")) + list(results.glob("runs/*/*/claim.json"))


@pytest.mark.processes
def test_each_usable_slice_is_predicted_once_in_each_variant(whole, data):
    table = pd.read_csv(whole[0] / "oof_predictions.csv")
    probabilities = [f"p_{c}" for c in CLASSES]
    first = ["variant", "repeat", "fold", "patient", "image", "label", "predicted"]
    assert list(table.columns) == [*first, *probabilities]
    manifest = pd.read_csv(data / "manifest.csv").query("split == 'train' and status == 'ok' and blank == 0")
    for _, rows in table.groupby("variant"):
        assert sorted(rows["image"]) == sorted(manifest["image"])
        assert (rows.groupby("patient")["fold"].nunique() == 1).all()
    np.testing.assert_allclose(table[probabilities].sum(axis=1), 1, atol=1e-6)
    assert (table["predicted"] == np.array(CLASSES)[table[probabilities].to_numpy().argmax(1)]).all()


@pytest.mark.processes
def test_predictions_are_those_of_the_last_epoch(whole):
    table = pd.read_csv(whole[0] / "oof_predictions.csv")
    history = pd.read_csv(whole[0] / "history.csv")
    last = history[(history["epoch"] == 2) & ~history["control"]].set_index(["variant", "fold"])
    for key, rows in table.groupby(["variant", "fold"]):
        expected = accuracy_score(rows["label"], rows["predicted"])
        assert last.loc[key, "val_accuracy"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.processes
def test_testing_predictions_are_the_mean_of_the_folds(whole):
    columns = [f"p_{c}" for c in CLASSES]
    table = pd.read_csv(whole[0] / "testing_predictions_1_ROI.csv")
    assert list(table.columns) == ["image", "predicted", *columns]
    folds = [pd.read_csv(p)[columns] for p in whole[0].glob("runs/1_ROI/*/testing-*.csv")]
    assert len(folds) == 2
    np.testing.assert_allclose(table[columns], sum(folds) / 2, atol=1e-8)


@pytest.mark.processes
def test_settings_say_what_made_the_results(whole):
    facts = json.loads((whole[0] / "settings.json").read_text())
    assert facts["settings"]["seed"] == 3 and facts["versions"]["torch"] == torch.__version__
    assert facts["initial_weights"]["used"] == "none" and facts["left_out"]["blank, no brain to see"] == 1
    caption = "quick profile with epochs 2, folds 2, efficientnet-narrow at 32 px, 48 slices of"
    assert facts["caption"].startswith(caption)


@pytest.mark.processes
def test_output_is_quiet_under_papermill(whole):
    texts = [o.text for c in whole[1].cells for o in c.get("outputs", []) if o.output_type == "stream"]
    assert "%|" not in "".join(texts)  # no bars
    assert sum(text.count("\n") for text in texts) < 150


@pytest.mark.processes
def test_one_process_gives_the_same_bytes_as_two(whole, notebook, data, tmp_path):
    study = make_study(notebook, data, tmp_path / "one", control_run=True)
    notebook["launch"](study)
    assert trained_files(tmp_path / "one") == trained_files(whole[0])


# ---------------------------------------- nothing is lost


@pytest.mark.processes
def test_killed_run_goes_on_and_ends_with_the_same_numbers(notebook, data, tmp_path):
    unbroken = make_study(notebook, data, tmp_path / "unbroken", ("1_ROI",), epochs=4)
    notebook["launch"](unbroken)
    killed = make_study(notebook, data, tmp_path / "killed", ("1_ROI",), epochs=4)
    process = multiprocessing.get_context("fork").Process(
        target=notebook["work"], args=(0, killed, torch.zeros(1, 2), False)
    )
    process.start()
    while not (checkpoints := list((tmp_path / "killed").glob("runs/*/*/checkpoint.pt"))):
        time.sleep(0.005)
    process.kill()
    process.join()
    assert checkpoints[0].is_file() and not (checkpoints[0].parent / "done.json").exists()
    notebook["launch"](killed)
    assert trained_files(tmp_path / "killed") == trained_files(tmp_path / "unbroken")


def test_resume_at_each_epoch_equals_an_unbroken_run(data, tmp_path):
    notebook = load_notebook()
    unbroken = make_study(notebook, data, tmp_path / "unbroken", ("1_ROI",), folds=1, epochs=3)
    notebook["launch"](unbroken)
    broken = make_study(notebook, data, tmp_path / "broken", ("1_ROI",), folds=1, epochs=3)
    train_epoch, stops = notebook["train_epoch"], []

    def stop_before_each_epoch(trainer, loader, truth, epoch, report):
        if epoch not in stops:
            stops.append(epoch)
            raise KeyboardInterrupt
        return train_epoch(trainer, loader, truth, epoch, report)

    notebook["train_epoch"] = stop_before_each_epoch
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            notebook["launch"](broken)
    notebook["launch"](broken)
    assert stops == [0, 1, 2]
    assert trained_files(tmp_path / "broken") == trained_files(tmp_path / "unbroken")


def test_finished_units_are_not_trained_again_unless_a_picture_changes(tmp_path):
    notebook, data = load_notebook(), tmp_path / "data"
    write_pictures(data)
    notebook["launch"](make_study(notebook, data, tmp_path / "r", folds=1, epochs=1))
    trained, train_unit = [], notebook["train_unit"]

    def train_and_tell(study, unit, *rest):
        trained.append(unit.variant)
        train_unit(study, unit, *rest)

    notebook["train_unit"] = train_and_tell
    notebook["launch"](make_study(notebook, data, tmp_path / "r", folds=1, epochs=1, workers=1))
    assert trained == []
    picture = cv2.imencode(".png", np.zeros((SIZE, SIZE), np.uint8))[1].tobytes()
    (data / "1_ROI/TrainingData/subdural/1.0.png").write_bytes(picture)
    notebook["launch"](make_study(notebook, data, tmp_path / "r", folds=1, epochs=1))
    assert trained == ["1_ROI"]


def test_new_testing_slices_are_predicted_without_training(tmp_path):
    notebook, data = load_notebook(), tmp_path / "data"
    write_pictures(data)
    notebook["launch"](make_study(notebook, data, tmp_path / "r", ("1_ROI",), folds=1, epochs=1))
    (data / "1_ROI/TestingData/healthy.png").write_bytes(
        (data / "1_ROI/TestingData/intraventricular.png").read_bytes()
    )
    notebook["train_unit"] = None
    study = make_study(notebook, data, tmp_path / "r", ("1_ROI",), folds=1, epochs=1)
    notebook["launch"](study)
    table = notebook["average_testing"](study, "1_ROI")
    assert np.allclose(table.iloc[0, 2:].astype(float), table.iloc[2, 2:].astype(float))


def test_damaged_checkpoint_is_named_and_refused(notebook, data, tmp_path):
    study = make_study(notebook, data, tmp_path / "r", ("1_ROI",), folds=1)
    checkpoint = notebook["unit_folder"](study, study.units[0]) / "checkpoint.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"PK half a checkpoint")
    with pytest.raises(ValueError, match=r"checkpoint\.pt is missing, damaged .* delete it"):
        notebook["launch"](study)


@pytest.mark.processes
def test_damaged_checkpoint_is_named_by_the_parent_of_many_processes(notebook, data, tmp_path):
    study = make_study(notebook, data, tmp_path / "r", ("1_ROI",), processes=2)
    for unit in study.units:
        folder = notebook["unit_folder"](study, unit)
        folder.mkdir(parents=True)
        (folder / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"training stopped: .*checkpoint\.pt is missing, damaged"):
        notebook["launch"](study)


def test_checkpoint_with_code_in_it_is_refused_and_not_run(notebook, tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"model": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="holds more than weights"):
        notebook["load_weights"](tmp_path / "checkpoint.pt")
    assert not (tmp_path / "ran").exists()


def test_claim_of_a_living_process_is_respected_and_of_a_dead_one_taken(notebook, tmp_path):
    claim = tmp_path / "claim.json"
    for owner, mine in ((os.getppid(), False), (2**22 + 5, True)):  # above the largest process id of Linux
        claim.write_text(json.dumps({"host": socket.gethostname(), "pid": owner}))
        with notebook["claimed"](tmp_path) as got:
            assert got is mine
    assert not claim.exists()
    claim.write_text(json.dumps({"host": "another machine", "pid": 1}))
    with notebook["claimed"](tmp_path) as got:
        assert not got
    os.utime(claim, (time.time() - 3600,) * 2)
    with notebook["claimed"](tmp_path) as got:
        assert got


@pytest.mark.parametrize("content", ["", '{"host": '], ids=["empty", "half"])
def test_claim_that_is_not_yet_written_counts_until_it_is_old(notebook, tmp_path, content):
    claim = tmp_path / "claim.json"
    claim.write_text(content)
    with notebook["claimed"](tmp_path) as got:
        assert not got
    os.utime(claim, (time.time() - 3600,) * 2)
    with notebook["claimed"](tmp_path) as got:
        assert got
    assert not list(tmp_path.iterdir())


# ---------------------------------------- parameters


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"folds": 0}, "folds = 0: set a whole number from 1"),
        ({"epochs": 2.5}, "epochs = 2.5: set a whole number"),
        ({"batch_size": True}, "batch_size = True: set"),
        ({"image_size": 16}, "image_size = 16: set a whole number from 32"),
        ({"repeats": -1}, "repeats = -1"),
        ({"seed": "one"}, "seed = 'one'"),
        ({"model_name": "resnet"}, "model_name = 'resnet': choose of efficientnet-b0"),
        ({"weights": "nowhere.pt"}, "weights = 'nowhere.pt': no such file"),
        ({"mixed_precision": "fp8"}, "mixed_precision = 'fp8': choose of auto"),
        ({"profile": "fast"}, "profile = 'fast': choose of auto, full, quick"),
        ({"control_run": "false"}, "control_run = 'false': set True or False"),
    ],
)
def test_wrong_parameter_gets_a_sentence(notebook, data, tmp_path, given, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_study(notebook, data, tmp_path, **given)


def test_variants_are_chosen_by_name_or_number_in_step_1_order(notebook, data):
    choose = notebook["choose_variants"]
    for wanted in (None, "1, 0", ["1_ROI", "0_Dicom2PNG"]):
        assert choose(wanted, data) == list(VARIANTS)
    assert choose([1], data) == ["1_ROI"]
    with pytest.raises(ValueError, match=r"\['7'\] unknown, choose of 0_Dicom2PNG"):
        choose("0,7", data)
    with pytest.raises(ValueError, match=r"2_ROI\+CLAHE has no TrainingData: run Step1_Image_Preprocessing"):
        choose("2", data)
    with pytest.raises(ValueError, match=r"has no manifest.csv: run Step1_Image_Preprocessing"):
        choose(None, data / "nowhere")


def test_gpu_selects_the_full_profile(notebook):
    given = {"seed": 0, "processes": None, "workers": None, "threads": 1, "mixed_precision": "auto"}
    full, quick = (notebook["resolve_settings"]("auto", given, gpus=gpus) for gpus in (2, 0))
    assert (full["profile"], full["model_name"], full["image_size"]) == ("full", "efficientnet-b7", 600)
    assert (full["epochs"], full["batch_size"], full["processes"]) == (25, 8, 2)
    assert quick["profile"] == "quick"


def test_title_says_profile_changes_and_missing_patients(data):
    notebook = load_notebook()
    given = {"epochs": 1, "seed": 0, "processes": 1, "workers": 0, "threads": 1, "mixed_precision": "no"}
    settings = notebook["resolve_settings"]("quick", given, 0)
    slices = pd.DataFrame({"patient": ["a", "b", "b"]})
    caption = notebook["describe_study"](settings, slices, True, "phantoms", "random initial weights")
    assert caption.startswith("quick profile with epochs 1, efficientnet-narrow at ")
    assert caption.endswith("px, 3 phantom slices of 2 patients, random initial weights")
    notebook.update(CAPTION=caption, patient_level=False)
    figure = notebook["titled"](notebook["plt"].figure(), "Accuracy")
    words = [text.get_text() for text in figure.texts]
    assert words[0] == "Accuracy (slice-level, optimistic)" and "quick profile" in words[1]
    notebook["plt"].close(figure)


# ---------------------------------------- data


def test_blank_and_refused_slices_are_left_out_and_counted(notebook, data):
    slices = notebook["read_manifest"](data)
    assert (len(slices.training), len(slices.testing), slices.patient_level) == (48, 3, True)
    assert list(slices.left_out.values()) == [1, 1]
    assert not slices.training["image"].str.contains("blank|bad").any()


def test_manifest_that_knows_no_blank_slices_asks_for_a_roi_variant(notebook, tmp_path):
    manifest = write_pictures(tmp_path, variants=())
    manifest.assign(blank="").to_csv(tmp_path / "manifest.csv", index=False)
    with pytest.raises(ValueError, match="which slices are blank"):
        notebook["read_manifest"](tmp_path)


def test_manifest_without_patients_is_slice_level(notebook, tmp_path):
    manifest = write_pictures(tmp_path, variants=())
    manifest.drop(columns="patient").to_csv(tmp_path / "manifest.csv", index=False)
    slices = notebook["read_manifest"](tmp_path)
    assert not slices.patient_level and slices.training["patient"].is_unique


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "missing", "text"])
def test_damaged_png_is_named_and_refused(notebook, tmp_path, damage):
    path = tmp_path / "slice.png"
    whole = cv2.imencode(".png", np.arange(64 * 64).reshape(64, 64).astype(np.uint8))[1].tobytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    content = {"truncated": whole[:-20], "flipped": bytes(flipped), "empty": b"", "text": b"<html>"}
    if damage != "missing":
        path.write_bytes(content[damage])
    for read, size in (("read_png", (64,)), ("read_content", ())):
        with pytest.raises(ValueError, match=r"slice\.png is (damaged|missing).* run Step1_Image_Prepro"):
            notebook[read](path, *size)


def test_picture_that_is_no_square_is_padded_not_stretched(notebook, tmp_path):
    path = tmp_path / "wide.png"
    path.write_bytes(cv2.imencode(".png", np.full((20, 40), 200, np.uint8))[1].tobytes())
    picture = notebook["read_png"](path, 40)
    assert picture.shape == (40, 40)
    assert (picture[10:30] == 200).all() and (picture[:10] == 0).all() and (picture[30:] == 0).all()


def test_cached_streamed_and_worker_loaded_pictures_are_the_same(notebook, data):
    settings = notebook["PROFILES"]["quick"] | {"image_size": 40, "workers": 0}
    images = list(notebook["read_manifest"](data).training["image"])
    pictures = [notebook["Pictures"](data / "1_ROI", images, settings, 5, cached) for cached in (True, False)]
    batches = notebook["Batches"](np.arange(48), 8, 5)
    pairs = zip(pictures, (0, 2), strict=True)
    loaders = [notebook["make_loader"](p, batches, settings | {"workers": w}) for p, w in pairs]
    for (first, i), (second, j) in zip(*loaders, strict=True):
        assert torch.equal(first, second) and torch.equal(i, j)


def test_augmentation_follows_from_seed_epoch_and_slice_alone(notebook, data):
    settings = notebook["PROFILES"]["full"] | {"image_size": SIZE}
    make = notebook["Pictures"]
    images = ["TrainingData/healthy/0.0.png"] * 2
    first, second = (make(data / "1_ROI", images, settings, seed=1) for _ in range(2))
    here = first[3, 0][0]
    assert torch.equal(here, second[3, 0][0]) and torch.equal(first[None, 0][0], first[None, 1][0])
    for epoch, index in ((4, 0), (3, 1), (None, 0)):
        assert not torch.equal(here, first[epoch, index][0])


def test_augmentation_of_nothing_changes_nothing_and_gaps_are_black(notebook):
    none = {"rotation": 0, "shift": 0, "zoom": 0, "flips": ""}
    picture = np.random.default_rng(0).integers(1, 255, (31, 31), np.uint8)
    augment = notebook["augment"]
    assert np.array_equal(augment(picture, np.random.default_rng(0), none), picture)
    white = np.full((31, 31), 255, np.uint8)
    turned = [augment(white, np.random.default_rng(s), none | {"rotation": 45}) for s in range(9)]
    assert any(t[0, 0] == 0 for t in turned) and all(t[15, 15] == 255 for t in turned)
    flips = [augment(picture, np.random.default_rng(s), none | {"flips": "hv"}) for s in range(20)]
    expected = [picture, picture[::-1], picture[:, ::-1], picture[::-1, ::-1]]
    assert {f.tobytes() for f in flips} == {np.ascontiguousarray(e).tobytes() for e in expected}


# ---------------------------------------- folds


def some_slices(patients: dict[str, int], each: int = 3) -> pd.DataFrame:
    """Return a table of slices: so many patients of each class, each with as many slices."""
    rows = [(label, f"{label} {p}") for label, count in patients.items() for p in range(count)] * each
    table = pd.DataFrame(sorted(rows), columns=["label", "patient"])
    return table.assign(image=[f"{i}.png" for i in range(len(table))])


def test_folds_are_patient_disjoint_stratified_and_repeatable(notebook):
    slices = some_slices(dict.fromkeys(CLASSES, 10))
    fold_of = notebook["make_folds"](slices, 5, seed=0)
    assert pd.Series(fold_of).groupby(slices["patient"]).nunique().max() == 1
    assert (pd.crosstab(fold_of, slices["label"]) == 6).to_numpy().all()
    assert np.array_equal(fold_of, notebook["make_folds"](slices, 5, seed=0))
    assert not np.array_equal(fold_of, notebook["make_folds"](slices, 5, seed=1))


def test_folds_do_not_depend_on_how_patients_are_called(notebook):
    """Pseudonyms are keyed by the output folder: the same data would get other folds on each machine."""
    slices = some_slices(dict.fromkeys(CLASSES, 10))
    renamed = {name: f"{k * 7919 % 1009:04}" for k, name in enumerate(sorted(set(slices["patient"])))}
    folds = [
        notebook["make_folds"](table, 5, seed=0)
        for table in (slices, slices.assign(patient=slices["patient"].map(renamed)))
    ]
    assert np.array_equal(*folds)


def test_patients_with_slices_of_several_classes_are_still_spread_evenly(notebook):
    rng = np.random.default_rng(0)
    pairs = [(CLASSES[c], f"p{p}") for p in range(60) for c in rng.choice(6, 2)]
    rows = [pair for pair in pairs for _ in range(rng.integers(1, 4))]
    slices = pd.DataFrame(rows, columns=["label", "patient"]).assign(image="x.png")
    table = pd.crosstab(notebook["make_folds"](slices, 3, seed=0), slices["label"])
    assert (table.max() - table.min() <= 5).all() and (table.min() >= 4).all()


def test_one_fold_is_a_single_split_of_a_fifth(notebook):
    fold_of = notebook["make_folds"](some_slices(dict.fromkeys(CLASSES, 10)), 1, seed=0)
    assert set(fold_of) == {0, 1} and (fold_of == 0).mean() == pytest.approx(0.2)


def test_leaking_patient_is_found(notebook):
    slices = some_slices(dict.fromkeys(CLASSES, 2))
    with pytest.raises(ValueError, match=r"patients in more than one fold: \['epidural 0'"):
        notebook["check_folds"](slices, np.arange(len(slices)) % 2, 2)


def test_fold_without_a_class_is_found(notebook):
    slices = some_slices(dict.fromkeys(CLASSES, 2))
    fold_of = slices["patient"].str.endswith("1").to_numpy().astype(int)
    fold_of[slices["label"] == "subdural"] = 0
    with pytest.raises(ValueError, match="training side of fold 1 has no subdural: lower folds"):
        notebook["check_folds"](slices, fold_of, 2)


@pytest.mark.parametrize(
    ("patients", "sentence"),
    [
        (dict.fromkeys(CLASSES[:-1], 4), "no slice of epidural: put some into TrainingData/epidural/"),
        (dict.fromkeys(CLASSES, 4) | {"subdural": 2}, "subdural has 2 patients for 3 folds: set folds to 2"),
        (dict.fromkeys(CLASSES, 1), "healthy has 1 patients for 3 folds: put more into TrainingData"),
    ],
)
def test_too_few_patients_get_a_sentence(notebook, patients, sentence):
    with pytest.raises(ValueError, match=sentence):
        notebook["make_folds"](some_slices(patients), 3, seed=0)


def test_one_patient_with_everything_is_refused(notebook):
    slices = some_slices(dict.fromkeys(CLASSES, 3)).assign(patient="the only one")
    with pytest.raises(ValueError, match="1 patients for 3 folds"):
        notebook["make_folds"](slices, 3, seed=0)


# ---------------------------------------- model and training


def test_rates_of_the_full_profile_are_the_five_of_the_predecessor(notebook):
    settings = notebook["PROFILES"]["full"]
    rates = [notebook["learning_rate"](epoch * 10, 250, settings) for epoch in range(25)]
    assert rates == [6e-5] * 5 + [3e-5] * 5 + [1e-5] * 5 + [8e-6] * 5 + [1e-6] * 5
    assert notebook["learning_rate"](249, 250, settings) == 1e-6


def test_one_cycle_rises_to_its_peak_and_falls_to_nothing(notebook):
    settings = notebook["PROFILES"]["quick"]
    rates = np.array([notebook["learning_rate"](step, 400, settings) for step in range(400)])
    peak = settings["rates"][0]
    assert rates.argmax() in (99, 100) and rates.max() == pytest.approx(peak, rel=1e-3)
    assert (np.diff(rates[:100]) > 0).all() and (np.diff(rates[100:]) < 0).all()
    assert rates[0] < 0.05 * peak and 0 < rates[-1] < 1e-4 * peak


def test_grey_is_repeated_and_normalised_as_imagenet_weights_expect(notebook):
    result = notebook["normalise"](torch.tensor([[[[0, 255]]]], dtype=torch.uint8))
    expected = torch.tensor([[-0.485 / 0.229, 0.515 / 0.229], [-0.456 / 0.224, 0.544 / 0.224]])
    assert result.shape == (1, 3, 1, 2)
    assert torch.allclose(result[0, :2, 0], expected)
    assert torch.allclose(result[0, 2, 0], torch.tensor([-0.406 / 0.225, 0.594 / 0.225]))


@pytest.mark.parametrize("size", [33, 64, 97])
def test_padding_is_that_of_the_image_size(notebook, size):
    torch.manual_seed(0)
    model = notebook["build_model"]("efficientnet-b0", size, 0.1).eval()
    dynamic = EfficientNet.from_name("efficientnet-b0", num_classes=6, image_size=None).eval()
    default = EfficientNet.from_name("efficientnet-b0", num_classes=6).eval()  # built for 224
    for other in (dynamic, default):
        other.load_state_dict(model.state_dict())
    picture = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        right, ours, wrong = (m.extract_features(picture) for m in (dynamic, model, default))
    assert torch.allclose(ours, right, atol=1e-5)
    if size == 33:
        assert ours.shape != wrong.shape or not torch.allclose(ours, wrong, atol=1e-5)


def test_short_runs_get_a_larger_batch_norm_momentum_and_silu(notebook):
    assert notebook["batch_norm_momentum"](200) == 0.1 and notebook["batch_norm_momentum"](14_650) == 0.01
    model = notebook["build_model"]("efficientnet-narrow", SIZE, 0.1)
    assert model._bn0.momentum == pytest.approx(0.1) and isinstance(model._swish, torch.nn.SiLU)


def test_batches_have_every_slice_once_and_repeat(notebook):
    positions = np.arange(100, 160)
    batches, again = (notebook["Batches"](positions, 16, seed=9) for _ in range(2))
    epochs = []
    for epoch in range(2):
        batches.epoch = again.epoch = epoch
        listed = list(batches)
        assert listed == list(again) and [len(b) for b in listed] == [15, 15, 15, 15]
        assert sorted(i for batch in listed for e, i in batch if e == epoch) == list(positions)
        epochs.append(listed)
    assert [i for b in epochs[0] for _, i in b] != [i for b in epochs[1] for _, i in b]
    many = notebook["Batches"](np.arange(1003), 8, seed=9)
    assert len(many) == 125 and {len(batch) for batch in many} == {8}


def make_trainer(notebook: dict, part: int):
    """Return a trainer of a network without batch norm, whose gradients must not depend on the parts."""
    settings = notebook["PROFILES"]["quick"] | {"image_size": SIZE}
    levers = notebook["Levers"]("no", False, False, False, part, ())
    trainer = notebook["Trainer"](settings, levers, 0.1)
    torch.manual_seed(0)
    trainer.model = trainer.forward = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIZE**2, 6))
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.0)
    trainer.optimizer = trainer.accelerator.prepare_optimizer(optimizer)
    return trainer


def some_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return seven pictures and labels."""
    torch.manual_seed(1)
    pictures = torch.randint(256, (7, 1, SIZE, SIZE), dtype=torch.uint8)
    return pictures, torch.arange(7) % 6


def test_gradients_in_parts_are_those_of_the_whole_batch(notebook):
    found = []
    for part in (7, 3):
        trainer = make_trainer(notebook, part)
        loss = trainer.gradients(*some_batch())
        found.append((loss, trainer.model[1].weight.grad))
    assert torch.allclose(found[0][0], found[1][0]) and torch.allclose(found[0][1], found[1][1], atol=1e-6)


def test_batch_that_ends_the_memory_is_taken_in_halves(notebook):
    small, plain = make_trainer(notebook, 7), make_trainer(notebook, 7)

    def scarce(pictures: torch.Tensor) -> torch.Tensor:
        if len(pictures) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return small.model(pictures)

    small.forward = scarce
    losses = [notebook["train_step"](trainer, *some_batch(), 1e-3) for trainer in (small, plain)]
    assert small.part == 2 and plain.part == 7
    assert torch.allclose(*losses) and torch.allclose(small.model[1].weight, plain.model[1].weight, atol=1e-6)


def test_levers_on_a_cpu_are_fixed_and_give_reasons(notebook, data, tmp_path):
    study = make_study(notebook, data, tmp_path)
    cpu = torch.device("cpu")
    levers = notebook["choose_levers"](study, cpu, *notebook["choose_precision"]("auto", cpu))
    assert (levers.precision, levers.compiled, levers.part) == ("no", False, 8)
    assert len(levers.reasons) == 2 and all(":" in reason for reason in levers.reasons)


@pytest.mark.parametrize(
    ("steps", "compiled", "channels_last", "on"),
    [(2000, 0.02, 0.05, (True, True)), (500, 0.02, 0.05, (True, False)), (2000, None, 0.2, (False, False))],
)
def test_levers_on_a_gpu_are_those_that_pay(steps, compiled, channels_last, on):
    notebook = load_notebook()

    def seconds(settings, levers):
        if levers.compiled and compiled is None:
            raise RuntimeError("no backend")
        return (compiled, 20.0) if levers.compiled else (channels_last if levers.channels_last else 0.1, 0.0)

    notebook.update(time_levers=seconds, why_not_compile=lambda: "")
    base = notebook["Levers"]("bf16", False, True, False, 8, ("bf16: asked for",))
    levers = notebook["measure_levers"]({}, base, steps)
    assert (levers.channels_last, levers.compiled) == on and levers.part == 8 and levers.precision == "bf16"
    assert [reason.split(":")[0] for reason in levers.reasons] == [
        *("bf16", "8 slices at a time", f"channels_last {'on' if on[0] else 'off'}"),
        f"torch.compile {'on' if on[1] else 'off'}",
    ]


def test_slices_at_a_time_are_as_many_as_fit():
    notebook = load_notebook()

    def seconds(settings, levers):
        if levers.part > 3 or levers.channels_last:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
        return 0.1, 0.0

    notebook.update(time_levers=seconds, why_not_compile=lambda: "no compiler")
    base = notebook["Levers"]("bf16", False, True, False, 8, ())
    levers = notebook["measure_levers"]({}, base, 100)
    assert (levers.part, levers.channels_last) == (3, False)


def test_loading_draws_nothing_from_the_generator_of_the_training(notebook, tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((32, 32), np.uint8))
    settings = {**notebook["PROFILES"]["quick"], "image_size": 32, "workers": 0}
    pictures = notebook["Pictures"](tmp_path, ["a.png"], settings)
    before = torch.get_rng_state()
    list(notebook["make_loader"](pictures, [[(None, 0)]], settings))
    assert torch.equal(before, torch.get_rng_state())


def test_same_seed_for_all_variants_and_another_for_the_control(notebook):
    unit, seed_of = notebook["Unit"], notebook["unit_seed"]
    assert seed_of(0, unit("a", 1, 1)) == seed_of(0, unit("b", 1, 1))
    places = itertools.product((1, 2), (1, 2), (False, True))
    others = {seed_of(seed, unit("a", *place)) for place in places for seed in (0, 1)}
    assert len(others) == 16


# ---------------------------------------- initial weights


def test_weights_of_a_file_are_used_and_its_classifier_replaced(notebook, data, tmp_path):
    torch.manual_seed(1)
    given = EfficientNet.from_name("efficientnet-b0", num_classes=1000, image_size=SIZE)
    torch.save(given.state_dict(), tmp_path / "b0.pt")
    options = {"weights": str(tmp_path / "b0.pt"), "model_name": "efficientnet-b0"}
    study = make_study(notebook, data, tmp_path / "r", **options)
    model = notebook["build_model"]("efficientnet-b0", SIZE, 0.1)
    notebook["start_model"](model, study.start)
    assert study.start.used == "file"
    assert torch.equal(model._conv_stem.weight, given._conv_stem.weight) and model._fc.out_features == 6
    with pytest.raises(ValueError, match=r"b0\.pt is for another network"):
        notebook["start_model"](notebook["build_model"]("efficientnet-b1", SIZE, 0.1), study.start)


def test_failed_download_falls_back_to_none_only_if_that_is_allowed(data, tmp_path):
    notebook = load_notebook()

    def no_network(name: str) -> Path:
        raise OSError("no route to host")

    notebook["download_imagenet"] = no_network
    options = {"model_name": "efficientnet-b0"}
    study = make_study(notebook, data, tmp_path, weights="auto", **options)
    assert study.start.used == "none" and "no route to host" in study.start.note
    with pytest.raises(ValueError, match=r"weights = 'imagenet': .*no route to host"):
        make_study(notebook, data, tmp_path, weights="imagenet", **options)
    notebook["download_imagenet"] = lambda name: pytest.fail("what was settled once must stay")
    assert make_study(notebook, data, tmp_path, weights="auto", **options).start == study.start


def test_narrow_network_has_no_imagenet_weights(notebook, data, tmp_path):
    assert "there are none" in make_study(notebook, data, tmp_path, weights="auto").start.note


# ---------------------------------------- looking at slices


class Corner(torch.nn.Module):
    """A network whose scores depend on the upper left corner of 12 x 12 pixels alone."""

    def __init__(self):
        super().__init__()
        self._blocks = torch.nn.ModuleList([torch.nn.Conv2d(3, 1, 1, bias=False)])
        torch.nn.init.ones_(self._blocks[0].weight)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self._blocks[0](pictures)[:, 0, :12, :12].mean((1, 2))[:, None].repeat(1, 6)


def test_grad_cam_finds_the_pixels_that_the_class_depends_on(notebook):
    white = torch.full((2, 1, 48, 48), 255, dtype=torch.uint8)
    maps = notebook["grad_cam"](Corner(), white, torch.tensor([0, 3]))
    assert np.allclose(maps[:, :12, :12], 1) and (maps[:, 12:] == 0).all() and (maps[:, :, 12:] == 0).all()


def test_grad_cam_of_a_real_network_is_a_map_from_0_to_1(notebook):
    pictures = torch.randint(256, (3, 1, 96, 96), dtype=torch.uint8)
    model = notebook["build_model"]("efficientnet-narrow", 96, 0.1)
    maps = notebook["grad_cam"](model, pictures, torch.tensor([0, 1, 2]))
    assert maps.shape == (3, 96, 96) and maps.min() >= 0 and maps.max() <= 1


def test_worst_mistakes_are_wrong_sure_and_different_slices(notebook):
    columns = ["variant", "image", "label", "predicted", *(f"p_{c}" for c in CLASSES)]
    rows = [
        ("a", "1", "healthy", "subdural", 0.1, 0, 0, 0, 0.9, 0),
        ("b", "1", "healthy", "subdural", 0.2, 0, 0, 0, 0.8, 0),
        ("a", "2", "healthy", "healthy", 1.0, 0, 0, 0, 0, 0),
        ("a", "3", "subdural", "healthy", 0.95, 0, 0, 0, 0.05, 0),
    ]
    worst = notebook["worst_mistakes"](pd.DataFrame(rows, columns=columns), 5)
    assert list(zip(worst["variant"], worst["image"], strict=True)) == [("a", "3"), ("a", "1")]
