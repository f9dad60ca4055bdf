"""Sessions that end: training stops in time, whole folds are reported, and the next start goes on where it was."""

import hashlib
import io
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from step2_helpers import (
    VARIANTS,
    best_among,
    make_comparison_for,
    make_settings,
    random_table,
    write_pictures,
)

from step2 import engine, training
from step2.explain import draw_cams
from step2.files import read_sealed
from step2.network import InitialWeights, settle_weights
from step2.report import make_caption
from step2.runs import Comparison, Run, average_testing, collect_history, collect_predictions
from step2.sessions import part_in_words, session_end, whole_part
from step2.statistics import ALONE, compare, contrast_table
from step2.summary import summarize
from step2.training import OutOfTime, epochs_in_time, tell_until

EPOCH_S = 60  # of the tests' clock


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data_preprocessing")
    write_pictures(folder)
    return folder


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Return [seconds], which stand still but for a minute after each training epoch."""
    now, train_epoch = [0.0], training.train_epoch

    def train(*given):
        row = train_epoch(*given)
        now[0] += EPOCH_S
        return row

    monkeypatch.setattr(training, "train_epoch", train)
    monkeypatch.setattr(training.time, "time", lambda: now[0])
    return now


def declare(data: Path, results: Path, **given) -> Comparison:
    """Return the comparison of both variants in three folds, with its control: nine runs of two epochs."""
    return make_comparison_for(data, results, **{"folds": 3, "control_run": True} | given)


def tables(comparison: Comparison) -> list[bytes]:
    """Return the tables of a comparison as they are written: predictions, of the control, of TestingData."""
    found = [collect_predictions(comparison), collect_predictions(comparison, control=True)]
    found += [average_testing(comparison, variant) for variant in comparison.variants]
    return [table.to_csv(index=False).encode() for table in found]


def epochs_done(comparison: Comparison, run: Run) -> int:
    """Return the epochs in a run's checkpoint."""
    sealed = read_sealed(comparison.folders[run] / "checkpoint.pt")
    return len(torch.load(io.BytesIO(sealed), weights_only=True)["history"]) if sealed else 0


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> Comparison:
    """Return the comparison, trained without a limit."""
    return engine.train_all(declare(data, tmp_path_factory.mktemp("undisturbed")))


# ---------------------------------------- when training ends


def test_without_a_limit_a_session_never_ends():
    assert session_end(None) == float("inf")
    assert session_end(0.5) == pytest.approx(time.time() + 1800, abs=5)


@pytest.mark.parametrize("hours", [0, -1, "2", float("nan")])
def test_hours_that_are_none_get_a_sentence(hours):
    with pytest.raises(ValueError, match=rf"^max_hours = {hours!r}: should be "):
        make_settings(max_hours=hours)


def test_hours_may_be_whole_and_make_no_other_run(data, tmp_path):
    assert declare(data, tmp_path).folders == declare(data, tmp_path, max_hours=9).folders


def test_runs_come_fold_by_fold_with_the_control_of_each(data, tmp_path):
    runs = declare(data, tmp_path, repeats=2).runs
    places = [(repeat, fold) for repeat in (1, 2) for fold in (1, 2, 3) for _ in range(3)]
    assert [(run.repeat, run.fold) for run in runs] == places
    assert runs[:3] == (Run(VARIANTS[0], 1, 1), Run(VARIANTS[1], 1, 1), Run(VARIANTS[0], 1, 1, True))


@pytest.mark.parametrize(
    ("lengths", "ends", "begun"),
    [
        ([60] * 4, 1000, 4),
        ([60] * 4, 60 + 66, 2),  # a tenth more than the longest so far
        ([60] * 4, 60 + 65, 1),
        ([60, 90, 60, 60], 150 + 98, 2),
        ([60] * 4, 0, 1),  # how long the first one takes is not known
        ([60] * 4, -1, 0),
    ],
)
def test_no_epoch_begins_that_would_end_too_late(clock, lengths, ends, begun):
    epochs = epochs_in_time([], 4, ends)
    for _ in range(begun):
        clock[0] += lengths[next(epochs)]
    with pytest.raises(StopIteration if begun == 4 else OutOfTime):
        next(epochs)


def test_epochs_of_an_earlier_session_tell_how_long_the_next_one_takes(clock):
    history = [{"seconds": 50.0}, {"seconds": 100.0}]
    assert next(epochs_in_time(history, 9, ends=111)) == 2
    with pytest.raises(OutOfTime, match="epoch 3 may take 110 s, more than are left"):
        next(epochs_in_time(history, 9, ends=109))


def test_first_epoch_that_takes_too_long_is_stopped(clock):
    told = []
    tell = tell_until(100, told.append)
    tell(0.5)
    clock[0] = 101
    with pytest.raises(OutOfTime):
        tell(0.75)
    assert told == [0.5, 0.75]


# ---------------------------------------- stop and go on


def test_three_sessions_end_with_the_tables_of_one(data, tmp_path, clock, undisturbed, capsys):
    comparison = declare(data, tmp_path)
    with pytest.raises(
        RuntimeError, match="is over, 0 of 9 runs are trained, no whole fold: run the notebook again"
    ):
        engine.train_all(comparison, ends=1.5 * EPOCH_S)
    assert [epochs_done(comparison, run) for run in comparison.runs] == [1] + [0] * 8

    part = engine.train_all(comparison, ends=clock[0] + 6.5 * EPOCH_S)
    said = "max_hours is over: what follows is about 1 of 3 folds alone; run the notebook again for the rest"
    assert said in capsys.readouterr().out
    assert [epochs_done(comparison, run) for run in comparison.runs] == [0] * 3 + [1] + [0] * 5
    whole = collect_predictions(undisturbed)
    expected = whole[whole["fold"] == 1].reset_index(drop=True)
    pd.testing.assert_frame_equal(collect_predictions(part), expected)
    assert set(collect_history(part)["fold"]) == set(collect_predictions(part, control=True)["fold"]) == {1}

    last = engine.train_all(part, ends=clock[0] + 100 * EPOCH_S)  # a part goes on to the whole
    assert part_in_words(last) == "" and tables(last) == tables(undisturbed)


@pytest.mark.processes
def test_two_processes_stop_and_go_on_too(data, tmp_path, monkeypatch, undisturbed):
    both, over = declare(data, tmp_path, processes=2), time.time()
    with monkeypatch.context() as patch:
        complete_run, trained = engine.complete_run, []

        def limited(comparison, run, tell, ends):
            trained.append(run)
            return complete_run(comparison, run, tell, over if run.fold == 3 else ends)

        patch.setattr(engine, "complete_run", limited)
        assert part_in_words(engine.train_all(declare(data, tmp_path), over + 600)) == "2 of 3 folds"
        assert trained == [*both.runs[:7]]
    assert part_in_words(engine.train_all(both, ends=over)) == "2 of 3 folds"
    assert tables(engine.train_all(both, ends=time.time() + 600)) == tables(undisturbed)


# ---------------------------------------- which folds are whole


@pytest.mark.parametrize(
    ("missing", "places", "words"),
    [
        ([], [(r, f) for r in (1, 2) for f in (1, 2, 3)], ""),
        ([(2, 3, True)], [(1, 1), (1, 2), (1, 3)], "1 of 2 repeats"),
        ([(1, 3, False)], [(2, 1), (2, 2), (2, 3)], "1 of 2 repeats"),
        ([(1, 3, False), (2, 1, True), (2, 2, True)], [(1, 1), (1, 2)], "2 of 3 folds of one of 2 repeats"),
        ([(1, 1, True), (1, 2, True), (2, 2, True)], [(2, 1), (2, 3)], "2 of 3 folds of one of 2 repeats"),
    ],
)
def test_all_slices_of_a_part_are_tested_equally_often(data, tmp_path, missing, places, words):
    whole = declare(data, tmp_path, repeats=2)
    part = whole_part(whole, [Run(VARIANTS[0], *place) for place in missing])
    assert list(part.places) == places and part_in_words(part) == words
    assert set(part.runs) <= set(whole.runs) and {run.control for run in part.runs} == {False, True}


@pytest.fixture
def last_two(undisturbed) -> Comparison:
    """Return the part of the trained comparison that lacks its first fold."""
    return whole_part(undisturbed, [Run(VARIANTS[0], 1, 1, True)])


def test_caption_and_summary_say_which_part_it_is(last_two):
    tested, training_slices = collect_predictions(last_two), last_two.slices.training
    patients = tested["patient"].nunique()
    caption = make_caption(last_two, "")
    said = f"tested: {tested['image'].nunique()} slices of {patients} patients (2 of 3 folds)"
    assert f"{len(training_slices)} slices of 24 patients, {said}" in caption
    compared = compare(tested, n_draws=100)
    metrics = pd.DataFrame(
        [
            (name, f"any_{m}", 0.5, 0.4, 0.6)
            for name in VARIANTS
            for m in ("auc", "sensitivity", "specificity")
        ]
        + [(name, "accuracy", 0.5, 0.4, 0.6) for name in VARIANTS],
        columns=["variant", "metric", "value", "ci_low", "ci_high"],
    )
    compared_ = contrast_table(compared), metrics, best_among(compared)
    given = (tested, *compared_, caption, last_two.slices)
    text = summarize(*given, endpoints=pd.DataFrame(), testing=pd.DataFrame(), part="2 of 3 folds")
    assert text.startswith("# Does preprocessing matter? (2 of 3 folds)\n")
    assert "; 2 of 3 folds of the cross-validation (an interim look: " in text


def test_caption_of_the_whole_says_nothing_of_parts(undisturbed):
    assert "tested" not in make_caption(undisturbed, "")


def test_heat_maps_are_of_a_fold_that_is_there(last_two):
    assert len(draw_cams(last_two, collect_predictions(last_two)).axes) == len(VARIANTS) * 5


def test_interval_of_a_single_fold_speaks_of_its_networks_alone():
    table = random_table(patients=300, slices=2, folds=5)
    for folds, alone in (({0}, True), ({0, 3, 4}, False)):
        verdicts = contrast_table(compare(table[table["fold"].isin(folds)], n_draws=100))["verdict"]
        assert {ALONE in verdict for verdict in verdicts} == {alone}


# ---------------------------------------- weights without internet


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Callable[[], InitialWeights]:
    """Let downloads fail, and data sets be mounted in tmp_path/input; return what settles B0's weights."""
    name = f"efficientnet-b0-{hashlib.sha256(b'weights').hexdigest()[:8]}.pth"

    def fail(*given, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("step2.network.url_map", {"efficientnet-b0": f"https://nowhere.invalid/{name}"})
    monkeypatch.setattr("step2.network.MOUNTED", tmp_path / "input")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    (tmp_path / "results").mkdir()
    wanted = {"model_name": "efficientnet-b0", "weights": "auto", "results": tmp_path / "results"}
    return lambda: settle_weights(make_settings(**wanted))


def mount(tmp_path: Path, folder: str, content: bytes) -> Path:
    """Write a file under the name of B0's weights into a folder that is mounted."""
    path = tmp_path / "input" / folder / f"efficientnet-b0-{hashlib.sha256(b'weights').hexdigest()[:8]}.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("folder", [".", "weights", "datasets/owner/weights", "weights/pytorch/b0/1"])
def test_weights_are_found_in_a_mounted_data_set(tmp_path, offline, folder):
    path = mount(tmp_path, folder, b"weights")
    found = offline()
    assert (found.used, Path(found.path)) == ("imagenet", path)
    assert found.digest == hashlib.sha256(b"weights").hexdigest()


def test_another_file_of_that_name_is_not_taken_for_the_weights(tmp_path, offline):
    mount(tmp_path, "damaged", b"weight")
    assert offline().used == "none"
    (tmp_path / "results/initial_weights_efficientnet-b0.json").unlink()
    whole = mount(tmp_path, "whole", b"weights")
    assert Path(offline().path) == whole


def test_weights_are_found_again_where_the_next_session_mounts_them(tmp_path, offline):
    first = mount(tmp_path, "weights", b"weights")
    offline()
    first.unlink()
    second = mount(tmp_path, "datasets/owner/weights", b"weights")
    assert Path(offline().path) == second
