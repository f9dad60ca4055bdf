"""Figures draw for few and many variants, and titles say what made them."""

import io
import re
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import pytest
from step2_helpers import (
    ALL_VARIANTS,
    CLASSES,
    SIZE,
    VARIANTS,
    make_settings,
    prediction_table,
    random_table,
    write_pictures,
)

from step2 import figures, summary
from step2.metrics import class_warnings, metric_table
from step2.network import InitialWeights
from step2.pictures import read_png
from step2.report import Report, make_caption, small_png
from step2.runs import Comparison
from step2.settings import read_settings
from step2.slices import Slices, read_slices
from step2.statistics import compare, contrast_table, pair_table
from step2.variants import KNOWN_VARIANTS

TWO = ("0_Dicom2PNG", "1_ROI")


@pytest.fixture(scope="module", params=[2, 7])
def tables(request):
    """Return predictions of so many variants, their metrics and what contrasts are made of."""
    table = random_table(24, 2, ALL_VARIANTS[: request.param], folds=3, repeats=2)
    return table, metric_table(table, n_draws=60), compare(table, n_draws=60)


@pytest.mark.parametrize(
    "draw",
    [
        lambda table, metrics, compared: figures.draw_forest(contrast_table(compared)),
        lambda table, metrics, compared: figures.draw_pairs(pair_table(compared)),
        lambda table, metrics, compared: figures.draw_accuracy(table, metrics, ["1_ROI"]),
        lambda table, metrics, compared: figures.draw_sensitivities(table, metrics, True),
        lambda table, metrics, compared: figures.draw_confusions(table, TWO),
        lambda table, metrics, compared: figures.draw_any_hemorrhage(table, metrics, TWO),
        lambda table, metrics, compared: figures.draw_reliability(table, metrics, TWO),
    ],
    ids=["forest", "pairs", "accuracy", "sensitivities", "confusions", "any_hemorrhage", "reliability"],
)
def test_figures_draw(tables, draw):
    figure = draw(*tables)
    figure.canvas.draw()
    plt.close(figure)


def axis_texts(figure: plt.Figure) -> str:
    """Return all that stands in a figure's axes."""
    texts = [text.get_text() for axis in figure.axes for text in axis.texts]
    return " ".join([*texts, *(axis.get_title() for axis in figure.axes)])


def test_forest_shows_training_noise_and_hides_a_band_out_of_reach():
    contrasts = contrast_table(compare(random_table(24, 2, ALL_VARIANTS, folds=3), n_draws=60))
    for noise, margin, words in ((0.03, 0.01, ["3.0: SD of a difference"]), (0.0, 0.9, ["equivalence band"])):
        figure = figures.draw_forest(contrasts.assign(seed_noise=noise), margin)
        (legend,) = (axis.get_legend() for axis in figure.axes)
        shown = [text.get_text() for text in legend.get_texts()]
        assert len(shown) == 1 and words[0] in shown[0]
        plt.close(figure)


def test_forest_has_one_heading_above_each_kind():
    contrasts = contrast_table(compare(random_table(24, 2, ALL_VARIANTS, folds=3), n_draws=60))
    figure = figures.draw_forest(contrasts)
    texts = [text.get_text() for axis in figure.axes for text in axis.texts]
    plt.close(figure)
    assert [texts.count(figures.KIND_LOOKS[kind][0]) for kind in contrasts["kind"].unique()] == [1, 1]


def test_difference_of_confusions_is_second_minus_first():
    table = random_table(40, 2, TWO, folds=3)
    first, second = ((table["variant"] == v) & (table["label"] == "healthy") for v in TWO)
    hits = [(table.loc[rows, "predicted"] == "healthy").sum() for rows in (first, second)]
    figure = figures.draw_confusions(table, TWO)
    corner = [axis.texts[0].get_text() for axis in figure.axes]
    assert corner == [str(hits[0]), str(hits[1]), f"{hits[1] - hits[0]}"]
    plt.close(figure)


def test_learning_curves_say_who_is_still_learning_and_skip_epochs_without_a_look():
    rows = [
        {"variant": v, "repeat": 1, "fold": 1, "control": False, "epoch": e, "train_loss": 1.0}
        | {"train_accuracy": 0.5, "val_loss": 1.5 if e != 2 else np.nan, "val_accuracy": 0.4}
        for v in TWO
        for e in (1, 2, 3)
    ]
    figure = figures.draw_learning(pd.DataFrame(rows), TWO, 6, ["1_ROI"])
    assert "1_ROI\nstill learning" in axis_texts(figure) and "1.50" in axis_texts(figure)
    assert axis_texts(figure).count("still learning") == 1
    plt.close(figure)


def test_no_variant_has_the_baselines_colour():
    names = [*KNOWN_VARIANTS, *(f"{n}_More" for n in range(12, 40))]
    colors = figures.variant_colors(names)
    assert [name for name in names if colors[name] == colors[ALL_VARIANTS[0]]] == [ALL_VARIANTS[0]]
    assert len({colors[name] for name in names[:15]}) == 15


# ---------------------------------------- titles and captions


def some_slices_of(patients: list[str], patient_level: bool = True) -> Slices:
    """Return a slice of each of these patients, in this order."""
    return Slices(pd.DataFrame({"patient": patients}), pd.DataFrame({"patient": []}), {}, patient_level)


def test_numbers_of_confusion_matrices_stand_out_from_their_cells():
    """Also the largest gains and losses, whose cells are dark."""
    table = prediction_table(
        {"0_Dicom2PNG": ["healthy"] * 12, "1_ROI": [*CLASSES, *CLASSES]},
        [*CLASSES, *CLASSES],
        [f"P{i}" for i in range(12)],
    )
    for axis in figures.draw_confusions(table, ["0_Dicom2PNG", "1_ROI"]).axes:
        cells = axis.images[0].to_rgba(axis.images[0].get_array())[..., :3].mean(axis=-1)
        for text in axis.texts:
            x, y = (int(place) for place in text.get_position())
            assert abs(cells[y, x] - (text.get_color() == "white")) > 0.4


def caption_of(settings, slices, fold_of, pictures, used="none"):
    """Return the caption of a comparison of these; nothing else about it matters."""
    weights = InitialWeights("auto", used, "", "", "")
    return make_caption(Comparison(settings, ("1_ROI",), slices, fold_of, weights, {}, {}), pictures)


def test_caption_says_profile_changes_network_data_and_weights():
    settings, slices = read_settings({"profile": "quick", "epochs": 1}), some_slices_of(["a", "b", "b"])
    caption = caption_of(settings, slices, np.zeros((1, 3)), "phantoms")
    assert caption.startswith("quick profile with epochs 1, efficientnet-narrow at ")
    assert caption.endswith("px, 3 phantom slices of 2 patients, random initial weights")
    assert "3 Paris slices of" in caption_of(settings, slices, np.zeros((1, 3)), "Paris")


def test_caption_of_unchanged_profile_and_unknown_patients():
    settings, slices = read_settings({"profile": "quick"}), some_slices_of(["a", "b"], False)
    caption = caption_of(settings, slices, np.zeros((1, 2)), "", "imagenet")
    assert caption.startswith("quick profile, efficientnet-narrow at ")
    assert caption.endswith("px, 2 slices of an unknown number of patients, ImageNet's initial weights")


@pytest.mark.parametrize(
    ("label", "words"), [("subdural", "slices with one subtype"), ("hemorrhage", "slices")]
)
def test_caption_of_rsnas_subtypes_says_that_slices_have_one(label, words):
    settings, slices = read_settings({"profile": "quick"}), some_slices_of(["a", "b"])
    slices = Slices(slices.training.assign(label=["healthy", label]), slices.testing, {}, True)
    caption = caption_of(settings, slices, np.zeros((1, 2)), "RSNA-2019")
    assert caption.endswith(f"px, 2 RSNA-2019 {words} of 2 patients, random initial weights")


def test_caption_of_a_single_split_says_what_was_tested():
    settings, slices = read_settings({"profile": "quick", "folds": 1}), some_slices_of(["a", "b", "b"])
    caption = caption_of(settings, slices, np.array([[1, 0, 0]]), "phantoms")
    assert "3 phantom slices of 2 patients, tested: 2 slices of 1 patients, random" in caption


@pytest.mark.parametrize(
    ("patient_level", "title"), [(True, "Accuracy"), (False, "Accuracy (slice-level, optimistic)")]
)
def test_titles_say_what_made_them_and_where_patients_are_missing(tmp_path, patient_level, title):
    figure = plt.figure()
    Report(tmp_path, "quick profile, 3 slices", patient_level, "identity").figure(figure, "Accuracy", "a")
    assert [text.get_text() for text in figure.texts] == [title, "quick profile, 3 slices"]
    assert (tmp_path / "a.png").is_file() and (tmp_path / "a.svg").is_file()


def test_table_is_printed_under_its_caption_outside_of_a_notebook(tmp_path, capsys):
    Report(tmp_path, "quick profile", False, "identity").table(pd.DataFrame({"a": [1]}), "Folds")
    assert capsys.readouterr().out.startswith("Folds (slice-level, optimistic): quick profile\n")


def test_table_in_a_notebook_has_no_needless_decimals(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("step2.report.get_ipython", lambda: True)
    monkeypatch.setattr("step2.report.display", shown.append)
    table = pd.DataFrame({"accuracy": [26.7, 100.0], "slices": [15, 1000], "whose": ["a", "b"]})
    Report(tmp_path, "quick profile", True, "identity").table(table, "Folds")
    cells = re.findall(r"<td[^>]*>(.*?)</td>", shown[0].to_html())
    assert cells == ["26.7", "15", "a", "100", "1000", "b"]


def test_slices_are_counted_in_digits():
    counts = np.array([[920.0, 80], [57, 1943]])
    said = summary.say_confusions(counts, ("healthy", "subdural"), "1_ROI")
    assert said == "1_ROI's most frequent confusion: healthy called subdural, 80 of 1000 slices."
    table = random_table(1500, 1, VARIANTS, classes=("healthy", "subdural"))
    figure = figures.draw_confusions(table, VARIANTS)
    assert not [t.get_text() for axis in figure.axes for t in axis.texts if "e+" in t.get_text()]
    plt.close(figure)


def test_dots_of_folds_stay_in_their_row():
    table = random_table(30, 1, ALL_VARIANTS[:3], folds=5, repeats=8)
    figure = figures.draw_accuracy(table, metric_table(table, n_draws=20))
    dots = [line.get_ydata() for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert all(y.max() < row + 0.55 for row, y in enumerate(dots))
    plt.close(figure)


def test_learning_curves_show_the_line_of_guessing():
    row = {
        "variant": "1_ROI",
        "repeat": 1,
        "fold": 1,
        "control": False,
        "train_accuracy": 0.5,
        "val_accuracy": 0.5,
    }
    history = pd.DataFrame([row | {"epoch": e, "train_loss": 1 / e, "val_loss": 0.8} for e in (1, 2, 3)])
    figure = figures.draw_learning(history, ["1_ROI"], 6)
    assert figure.axes[0].get_ylim()[1] > np.log(6)
    plt.close(figure)


def test_names_of_classes_in_a_confusion_matrix_do_not_overlap():
    names = (
        "healthy",
        "chronic subdural hematoma",
        "contusion of the frontal lobe",
        "infarct with hemorrhagic transformation",
    )
    figure = figures.draw_confusions(
        random_table(60, 2, VARIANTS, classes=(*names, "a", "b", "c", "d")), VARIANTS
    )
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert all(a.y0 >= b.y1 for a, b in pairwise(boxes))
    plt.close(figure)


def test_title_with_two_dollars_is_no_formula(tmp_path):
    Report(tmp_path, "of cost $5_$", True, "it").figure(plt.figure(), "scan$^$1.dcm", "steps")
    assert (tmp_path / "steps.svg").is_file()


def test_slices_of_partly_known_patients_are_counted():
    """Nine patients of two slices each and two slices without a patient, of each class."""
    labels = [c for c in ("healthy", "epidural") for _ in range(20)]
    patients = [f"{labels[i]} {i % 20 // 2}" if i % 20 < 18 else "" for i in range(40)]
    table = prediction_table({"0_Dicom2PNG": labels}, labels, patients).drop(
        columns=[f"p_{c}" for c in CLASSES if c not in labels]
    )
    figure = figures.draw_sensitivities(table, metric_table(table, n_draws=20), False)
    heads = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    plt.close(figure)
    assert heads == ["healthy\n20 slices", "epidural\n20 slices"]
    few = table[~table["patient"].isin(["healthy 0", "healthy 1", "healthy 2"])]
    (warning,) = class_warnings(few, False)
    assert "slices of unknown ones" in warning  # 14 slices: 6 known patients, 2 slices of nobody


def test_last_values_of_close_learning_curves_do_not_overlap():
    history = pd.DataFrame({"variant": "a", "control": False, "repeat": 1, "fold": 1, "epoch": [1, 2, 3]})
    history = history.assign(
        train_loss=[1.2, 0.8, 0.72], val_loss=0.68, train_accuracy=0.98, val_accuracy=0.97
    )
    figure = figures.draw_learning(history, ["a"], 2)
    figure.canvas.draw()
    for axis in figure.axes[:2]:
        high, low = sorted((text.get_window_extent() for text in axis.texts), key=lambda box: -box.y0)
        assert low.y1 <= high.y0 + 1
        inside = axis.get_ylim()[1]
        assert all(text.xy[1] <= inside for text in axis.texts)
    plt.close(figure)


def test_learning_curve_of_one_epoch_is_seen():
    row = {"variant": "a", "control": False, "repeat": 1, "fold": 1, "epoch": 1}
    row |= {"train_loss": 1.7, "val_loss": 1.6, "train_accuracy": 0.3, "val_accuracy": 0.2}
    figure = figures.draw_learning(pd.DataFrame([row]), ["a"], 6)
    seen = [line.get_label() for axis in figure.axes for line in axis.lines if line.get_marker() == "."]
    assert seen == ["training", "held out"] * 2
    plt.close(figure)


def test_learning_rate_of_the_last_step_is_drawn_to_its_end():
    figure = figures.draw_rates([0.1, 0.2, 0.05], 3)
    assert figure.axes[0].patches[0].get_path().vertices[:, 0].max() == 3
    plt.close(figure)


def test_colours_of_a_figure_survive_in_the_notebook():
    figure = figures.draw_forest(
        contrast_table(compare(random_table(63, 1, ALL_VARIANTS, folds=3), n_draws=60))
    )
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150, bbox_inches="tight")
    plt.close(figure)
    small = PIL.Image.open(io.BytesIO(small_png(drawn))).convert("RGB")
    full = PIL.Image.open(drawn).convert("RGB").resize(small.size, PIL.Image.Resampling.LANCZOS)
    apart = np.array(small, float) - np.array(full, float)
    assert np.sqrt((apart**2).sum(-1)).max() < 30  # a median cut: 75


def test_last_loss_beyond_the_axis_stands_at_its_edge():
    history = pd.DataFrame({"variant": "a", "control": False, "repeat": 1, "fold": 1, "epoch": [1, 2, 3]})
    history = history.assign(train_loss=0.7, val_loss=15.0, train_accuracy=0.9, val_accuracy=0.3)
    loss = figures.draw_learning(history, ["a"], 6).axes[0]
    assert [text.get_text() for text in loss.texts] == ["0.70", "15.00"]
    assert all(text.xy[1] <= loss.get_ylim()[1] for text in loss.texts)
    plt.close(loss.figure)


# ---------------------------------------- what stands where


def marked(axis: plt.Axes, marker: str = "s") -> list[tuple[float, float]]:
    """Return where single markers stand."""
    places = [line.get_xydata() for line in axis.lines if line.get_marker() == marker]
    return [(place[0, 0], place[0, 1]) for place in map(np.asarray, places) if len(place) == 1]


def some_metric(metric: str, values: tuple[float, float]) -> pd.DataFrame:
    """Return a metric of TWO, each with an interval of +-0.1."""
    rows = [(v, metric, x, x - 0.1, x + 0.1) for v, x in zip(TWO, values, strict=True)]
    return pd.DataFrame(rows, columns=["variant", "metric", "value", "ci_low", "ci_high"])


def test_accuracies_and_stars_stand_at_their_variants():
    table = random_table(12, 1, TWO)
    figure = figures.draw_accuracy(table, some_metric("accuracy", (0.3, 0.6)), ["1_ROI"])
    axis = figure.axes[0]
    plt.close(figure)
    assert marked(axis) == [(30, 0), (60, 1)]
    drawn = [line for line in axis.lines if line.get_marker() in ("s", "o") and np.size(line.get_xdata())]
    assert not any(line.get_clip_on() for line in drawn)  # whole at 0 and 100 %
    assert [text.get_text().endswith("\N{BLACK STAR}") for text in axis.texts] == [False, True]


def test_auc_of_each_variant_stands_at_its_value():
    table = random_table(20, 2, TWO)
    figure = figures.draw_any_hemorrhage(table, some_metric("any_auc", (0.7, 0.8)), TWO[:1])
    plt.close(figure)
    assert marked(figure.axes[0]) == [(0.7, 0), (0.8, 1)]
    assert figure.axes[0].get_xlim() == (0.4, 1.02)  # as wide for all data, with a marker at 1 whole


def test_forest_shows_each_difference_within_its_interval():
    rows = [("1_ROI", 0.03, 0.01, 0.06), ("2_ROI+CLAHE", -0.02, -0.05, 0.04)]
    table = pd.DataFrame(rows, columns=["contrast", "difference", "ci_low", "ci_high"])
    figure = figures.draw_forest(table.assign(kind="primary", p_holm=0.1, seed_noise=0.0))
    axis = figure.axes[0]
    plt.close(figure)
    assert marked(axis) == [(3, 1), (-2, 2)]
    level = [line for line in axis.lines if len(line.get_xdata()) == 2 and len(set(line.get_ydata())) == 1]
    assert [tuple(line.get_xdata()) for line in level] == [(1, 6), (-5, 4)]


def test_confusion_matrix_has_truth_in_rows():
    table = prediction_table({"a": ["epidural"] * 3}, ["healthy"] * 3, list("PQR"))
    figure = figures.draw_confusions(table, ["a"])
    axis = figure.axes[0]
    plt.close(figure)
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted", "true")
    assert [text.get_position() for text in axis.texts if text.get_text() == "3"] == [(5, 0)]


def test_reliability_has_confidence_across_and_accuracy_upwards():
    labels = ["epidural"] * 4
    table = prediction_table({"a": [*labels[:3], "healthy"]}, labels, list("PQRS"))
    rows = [("a", "calibration_error", 0.25, 0.1, 0.4)]
    metrics = pd.DataFrame(rows, columns=["variant", "metric", "value", "ci_low", "ci_high"])
    figure = figures.draw_reliability(table, metrics, ["a"])
    dots = figure.axes[0].collections[-1].get_offsets()
    plt.close(figure)
    assert dots.tolist() == [[50, 75]]


def test_own_variant_has_one_colour_in_every_figure():
    names = ("0_Dicom2PNG", "12_mine", "13_mine")
    table = random_table(60, 2, names)
    metrics = metric_table(table, n_draws=20)
    figure = figures.draw_reliability(table, metrics, ["13_mine"])
    drawn = figure.axes[0].lines[-1].get_color()
    plt.close(figure)
    assert drawn == figures.variant_colors(names)["13_mine"] != figures.variant_colors(["13_mine"])["13_mine"]


def test_learning_curves_name_their_side():
    history = pd.DataFrame({"variant": "a", "control": False, "repeat": 1, "fold": 1, "epoch": [1, 2]})
    history = history.assign(train_loss=0.2, val_loss=0.6, train_accuracy=0.9, val_accuracy=0.7)
    figure = figures.draw_learning(history, ["a"], 2)
    plt.close(figure)
    found = [{line.get_label(): line.get_ydata()[-1] for line in axis.lines} for axis in figure.axes]
    assert [(f["training"], f["held out"]) for f in found] == [(0.2, 0.6), (0.9, 0.7)]


def test_mistakes_say_truth_and_prediction(monkeypatch, tmp_path):
    monkeypatch.setattr(figures, "read_png", lambda path, size: np.zeros((size, size), np.uint8))
    columns = ["variant", "image", "label", "predicted", "confidence"]
    rows = pd.DataFrame([("1_ROI", "a.png", "subdural", "healthy", 0.9)], columns=columns)
    figure = figures.draw_mistakes(rows, tmp_path, 32)
    plt.close(figure)
    assert figure.axes[0].get_title() == "1_ROI\nis subdural\nsaid healthy, 90%"


def test_pairs_say_what_a_step_comes_on_top_of():
    columns = ["step", "a", "b", "difference", "ci_low", "ci_high"]
    pairs = pd.DataFrame([("CLAHE", "2_ROI+CLAHE", "1_ROI", 0.02, 0.01, 0.03)], columns=columns)
    figure = figures.draw_pairs(pairs)
    plt.close(figure)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["on top of\n1_ROI"]


def test_augmented_begins_with_the_picture_as_it_is(tmp_path):
    write_pictures(tmp_path, 1, ("1_ROI",))
    figure = figures.draw_augmented(make_settings(data=tmp_path), "1_ROI", read_slices(tmp_path).training, 1)
    plt.close(figure)
    plain, changed = (axis.images[0].get_array() for axis in figure.axes[:2])
    picture = read_png(tmp_path / "1_ROI/TrainingData/healthy/0.0.png", SIZE)
    assert np.array_equal(plain, picture) and not np.array_equal(changed, picture)
