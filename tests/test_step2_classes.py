"""Classes come from the data: two or eight of them, with any names, with and without healthy."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score
from step2_helpers import (
    CLASSES,
    VARIANTS,
    best_among,
    known_slices,
    make_comparison_for,
    random_table,
    some_slices,
    write_pictures,
)

from step2 import engine, explain, figures, runs, summary
from step2.classes import classes_of, guesses, order_classes, short_names
from step2.endpoints import endpoint_table
from step2.folds import fold_table, make_folds
from step2.metrics import metric_table, patient_counts
from step2.report import describe_runs
from step2.slices import count_classes, read_slices
from step2.statistics import compare, contrast_table, score_testing

FOREIGN = ("0", "1")  # as in TrainingData/0/, TrainingData/1/, which a table reads as numbers
PAIR = ("healthy", "stroke")
FIVE = CLASSES[:-1]
EIGHT = (*CLASSES, "all", "bleeding")  # words that this program might use itself
BLEEDS = CLASSES[1:]
CASES = [FOREIGN, PAIR, FIVE, EIGHT, BLEEDS]
IDS = ["foreign", "pair", "five", "eight", "no healthy"]


def test_six_come_first_in_their_order_and_others_by_name():
    assert order_classes(["tumour", "subdural", "abscess", "healthy", "tumour"]) == (
        *("healthy", "subdural"),
        *("abscess", "tumour"),
    )
    assert order_classes(reversed(CLASSES)) == CLASSES


def test_classes_of_a_table_are_its_probabilities():
    assert classes_of(pd.DataFrame(columns=["patient", "predicted", "p_b", "p_a", "p_p_c"])) == (
        "b",
        "a",
        "p_c",
    )


def test_short_names_are_the_fields_and_long_ones_take_several_lines():
    assert short_names(("healthy", "subdural", "1")) == ["healthy", "SDH", "1"]
    left, right = short_names(("hemorrhage_frontal_left", "hemorrhage_frontal_right"))
    assert (left, right) == ("hemorrhage_\nfrontal_left", "hemorrhage_\nfrontal_right")


# ---------------------------------------- the manifest and the folds


@pytest.mark.parametrize("classes", CASES, ids=IDS)
def test_classes_are_the_labels_of_the_training_slices(tmp_path, classes):
    write_pictures(tmp_path, variants=(), classes=classes)
    slices = read_slices(tmp_path)
    assert slices.classes == classes
    assert list(count_classes(slices).index) == [*classes, "together"]
    table = fold_table(slices.training, make_folds(slices.training, 2, 0)[None], 2, True)
    assert list(table.columns.unique(0)) == list(classes)


def test_missing_classes_are_named_once(tmp_path):
    manifest = write_pictures(tmp_path, variants=(), classes=(*FIVE, "tumour"))
    manifest.loc[manifest["label"] == "tumour", "blank"] = "1"
    manifest.to_csv(tmp_path / "manifest.csv", index=False)
    slices = read_slices(tmp_path)
    assert slices.classes_in_words() == f"5 classes: {', '.join(FIVE)}; no usable slice of epidural, tumour"
    assert slices.warnings() == []


def test_all_six_leave_nothing_to_name(tmp_path):
    write_pictures(tmp_path, variants=())
    assert read_slices(tmp_path).classes_in_words() == f"6 classes: {', '.join(CLASSES)}"


def test_single_class_is_refused_with_what_to_do(tmp_path):
    write_pictures(tmp_path, variants=(), classes=("subdural",))
    sentence = (
        "all usable slices of TrainingData are subdural: put those of another class into a folder beside"
    )
    with pytest.raises(ValueError, match=sentence):
        read_slices(tmp_path)


def test_class_with_one_patient_is_refused_with_what_to_do():
    with pytest.raises(
        ValueError, match="stroke has 1 patient for 2 folds: put more into TrainingData/stroke/"
    ):
        make_folds(some_slices({"healthy": 5, "stroke": 1}), 2, 0)


def test_testing_slices_of_another_class_are_not_scored_and_named(tmp_path):
    manifest = write_pictures(tmp_path, variants=(), classes=FIVE)
    manifest.loc[manifest["image"] == "TestingData/healthy.png", "label"] = "epidural"
    manifest.to_csv(tmp_path / "manifest.csv", index=False)
    slices = read_slices(tmp_path)
    warning = "1 slices of TestingData are not scored, nothing was trained on epidural"
    assert slices.warnings() == [warning]
    table = random_table(5, 1, ["1_ROI"], classes=FIVE)[: len(slices.testing)]
    found = {"1_ROI": table.assign(image=slices.testing["image"])}
    assert score_testing(found, slices.testing, [], n_draws=10)["slices"].tolist() == [2]


# ---------------------------------------- a comparison


@pytest.mark.parametrize("classes", CASES, ids=IDS)
def test_comparison_of_any_classes_from_training_to_grad_cam(tmp_path, classes):
    write_pictures(tmp_path / "data", 2, classes=classes)
    comparison = make_comparison_for(tmp_path / "data", tmp_path / "results", epochs=1)
    engine.train_all(comparison)
    predictions = runs.collect_predictions(comparison)
    assert classes_of(predictions) == classes and set(predictions["label"]) == set(classes)
    assert set(predictions["predicted"]) <= set(classes)
    found = {variant: runs.average_testing(comparison, variant) for variant in VARIANTS}
    assert classes_of(found["1_ROI"]) == classes
    assert (
        score_testing(found, comparison.slices.testing, [], n_draws=10)["slices"].tolist()
        == [min(len(classes), 3)] * 2
    )
    network = {key: value.shape for key, value in last_weights(comparison).items()}
    assert network["_fc.bias"] == (len(classes),)
    assert describe_runs(comparison)["classes"] == classes
    figure = explain.draw_cams(comparison, predictions)
    heads = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert heads == [name for name in classes if name != "healthy"]
    plt.close(figure)


def last_weights(comparison):
    """Return the weights that the first run ended with."""
    kept = {}
    network = type("Network", (), {"load_state_dict": lambda self, weights: kept.update(weights)})()
    runs.load_last(comparison, comparison.runs[0], network)
    return kept


def test_other_classes_are_other_runs_in_other_folders(tmp_path):
    manifest = write_pictures(tmp_path / "data", classes=PAIR)
    first = make_comparison_for(tmp_path / "data", tmp_path / "results")
    manifest.replace({"label": {"stroke": "tumour"}}).to_csv(tmp_path / "data/manifest.csv", index=False)
    second = make_comparison_for(tmp_path / "data", tmp_path / "results")
    assert not set(first.folders.values()) & set(second.folders.values())
    assert first.identity() != second.identity()


def test_the_same_classes_in_another_order_are_other_runs(tmp_path):
    """The labels of a run's slices don't tell which output is whose."""
    write_pictures(tmp_path / "data", classes=PAIR)
    first = make_comparison_for(tmp_path / "data", tmp_path / "results")
    turned = replace(first.slices)
    turned.__dict__["classes"] = PAIR[::-1]
    assert not set(first.folders.values()) & set(replace(first, slices=turned).folders.values())


# ---------------------------------------- metrics, figures, words


def table_of(classes: tuple[str, ...]) -> pd.DataFrame:
    """Return made-up predictions of enough patients for intervals."""
    return random_table(40 * len(classes), 1, VARIANTS, folds=2, classes=classes)


@pytest.mark.parametrize("classes", CASES, ids=IDS)
def test_any_hemorrhage_is_every_class_but_healthy_or_left_out(classes):
    table = table_of(classes)
    names = set(metric_table(table, n_draws=20)["metric"])
    any_names = {"any_auc", "any_sensitivity", "any_specificity"}
    assert names & any_names == (any_names if "healthy" in classes else set())
    assert endpoint_table(table, n_draws=20).empty == ("healthy" not in classes)
    assert {f"sensitivity_{name}" for name in classes} <= names


def test_of_two_classes_any_hemorrhage_is_the_other_one():
    table = random_table(90, 1, ["1_ROI"], classes=PAIR)
    found = metric_table(table, n_draws=50).set_index("metric")
    for metric, same in (
        ("any_sensitivity", "sensitivity_stroke"),
        ("any_specificity", "specificity_stroke"),
    ):
        assert found.loc[metric, "value"] == found.loc[same, "value"]
        assert found.loc[metric, "ci_low"] == pytest.approx(found.loc[same, "ci_low"])
    assert found.loc["any_auc", "value"] == pytest.approx(
        roc_auc_score(table["label"] == "stroke", table["p_stroke"])
    )


def test_words_of_this_program_may_be_classes():
    counts = patient_counts(table_of(EIGHT))
    assert counts.behind("sensitivity_all") < counts.behind("accuracy")
    assert counts.behind("sensitivity_bleeding") < counts.behind("any_sensitivity")


@pytest.mark.parametrize("classes", CASES, ids=IDS)
def test_figures_and_summary_follow_the_classes(classes):
    table = table_of(classes)
    metrics, compared = metric_table(table, n_draws=20), compare(table, n_draws=100)
    drawn = [
        figures.draw_accuracy(table, metrics),
        figures.draw_sensitivities(table, metrics, True),
        figures.draw_confusions(table, VARIANTS),
    ]
    (chance,) = (line for line in drawn[0].axes[0].lines if line.get_label() == "chance")
    assert np.allclose(chance.get_xdata(), 100 / len(classes))
    heads = [label.get_text().split("\n")[0] for label in drawn[1].axes[0].get_xticklabels()]
    assert heads == list(classes)
    assert [len(axis.get_xticks()) for axis in drawn[2].axes] == [len(classes)] * 3
    for figure in drawn:
        figure.canvas.draw()
        plt.close(figure)
    endpoints = endpoint_table(table, n_draws=20)
    given = (table, contrast_table(compared), metrics, best_among(compared), "caption", known_slices())
    text = summary.summarize(*given, endpoints=endpoints, testing=pd.DataFrame())
    assert f"{len(classes)} classes ({', '.join(classes)})" in text and "nan" not in text
    assert ("AUC" in text) == ("healthy" in classes)
    assert ("Left out: no class is called healthy." in text) == ("healthy" not in classes)
    assert ("It means every class but healthy, so" in text) == (classes in (PAIR, EIGHT))


def test_uneven_classes_show_what_always_saying_the_commonest_would_get():
    even = random_table(6, 1, ["1_ROI"])
    assert guesses(even) == (1 / 6, None)
    uneven = random_table(90, 1, ["1_ROI"], classes=PAIR).assign(label=["stroke"] * 72 + ["healthy"] * 18)
    assert guesses(uneven) == (0.5, 0.8)
    assert guesses(uneven.assign(label=["stroke"] * 48 + ["healthy"] * 42)) == (0.5, 48 / 90)
    close = pd.DataFrame({"label": ["stroke"] * 101 + ["healthy"] * 99, "p_healthy": 0.5, "p_stroke": 0.5})
    assert guesses(close) == (0.5, None)  # 0.505
    figure = figures.draw_accuracy(uneven, metric_table(uneven, n_draws=20))
    assert {"chance", "commonest class"} <= {line.get_label() for line in figure.axes[0].lines}
    plt.close(figure)


def test_classes_of_other_names_alone_miss_nothing(tmp_path):
    write_pictures(tmp_path, variants=(), classes=FOREIGN)
    assert read_slices(tmp_path).classes_in_words() == "2 classes: 0, 1"


def test_grad_cam_of_one_class_of_bleeds_shows_five_patients(tmp_path):
    write_pictures(tmp_path / "data", 12, classes=("healthy", "stroke"))
    comparison = make_comparison_for(tmp_path / "data", tmp_path / "results", epochs=1)
    engine.train_all(comparison)
    figure = explain.draw_cams(comparison, runs.collect_predictions(comparison))
    assert [axis.get_title() for axis in figure.axes if axis.get_title()] == ["stroke"] * 5
    plt.close(figure)
