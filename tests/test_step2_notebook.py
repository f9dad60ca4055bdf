"""The notebook, whole: run with papermill, in two processes, on tiny pictures and with an eighth variant."""

import ast
import json
import re
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from conftest import ROOT
from papermill.exceptions import PapermillExecutionError
from sklearn.metrics import accuracy_score
from step2_helpers import CLASSES, TINY, write_pictures

from step2.settings import Settings

pytestmark = pytest.mark.processes

NOTEBOOK = ROOT / "Step2_EfficientNet_Model.ipynb"
EIGHTH = "7_ROI+Bilateral"
VARIANTS = ("0_Dicom2PNG", "1_ROI", EIGHTH)
FIGURES = (
    *("variants", "augmented", "learning_rate", "learning_curves", "forest", "accuracy", "sensitivity"),
    *("pairs", "confusion", "any_hemorrhage", "costs", "mistakes", "grad_cam"),
)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """Return a copy of the project with one more line in Step 1's table, and pictures of three variants."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "step2", folder / "step2", ignore=shutil.ignore_patterns("__pycache__"))
    script = (ROOT / "Step1_Image_Preprocessing.py").read_text(encoding="utf-8")
    line = '    "1_ROI": ("roi",),\n'
    assert line in script
    script = script.replace(line, f'{line}    "{EIGHTH}": ("roi", "bilateral"),\n')
    (folder / "Step1_Image_Preprocessing.py").write_text(script, encoding="utf-8")
    write_pictures(folder / "data_preprocessing", variants=VARIANTS)
    return folder


def run(folder: Path, **parameters) -> nbformat.NotebookNode:
    """Execute the notebook in a folder, as papermill does for users."""
    usual = {**TINY, "processes": 2, "control_run": True}
    return papermill.execute_notebook(NOTEBOOK, None, usual | parameters, progress_bar=False, cwd=folder)


@pytest.fixture(scope="module")
def whole(project) -> tuple[Path, nbformat.NotebookNode]:
    """Run the notebook; return its results folder and the executed notebook."""
    return project / "results", run(project)


@pytest.fixture(scope="module")
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


# ---------------------------------------- its shape


def test_notebook_is_short_enough_to_step_through(notebook):
    code = [cell.source.splitlines() for cell in notebook.cells if cell.cell_type == "code"]
    lines = [sum(bool(line.strip()) for line in cell) for cell in code]
    assert len(notebook.cells) <= 75 and len(code) <= 35
    assert sum(lines) <= 350 and max(len(cell) for cell in code) <= 20
    assert NOTEBOOK.stat().st_size < 2.5e6


def test_notebook_defines_no_function_and_shows_its_headline_figure(notebook):
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert not re.search(r"^\s*(def|class) ", code, re.MULTILINE)
    assert "forest.png" in notebook.cells[0].attachments


def test_cells_take_settings_not_the_parameters_which_may_be_none(notebook):
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    after = next(i for i, text in enumerate(code) if "read_settings(globals()" in text)
    names = {
        node.id for text in code[after:] for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)
    }
    assert not names & set(Settings.model_fields)


def test_committed_notebook_was_run_whole(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error"]


def test_no_text_counts_the_comparisons(notebook):
    """One more line in Step 1's table is one more comparison."""
    texts = [cell.source for cell in notebook.cells]
    texts += [path.read_text(encoding="utf-8") for path in (ROOT / "step2").glob("*.py")]
    found = re.findall(r"\b(?:six|seven|6|7) (?:primary|contrasts|comparisons)", "\n".join(texts))
    assert not found


def test_look_at_one_batch_keeps_no_graph(notebook):
    """A B7's, of eight pictures in fp32, would take 30 GB of memory as long as the kernel lives."""
    look = next(cell.source for cell in notebook.cells if "model(normalise(batch))" in cell.source)
    assert look.index("torch.no_grad()") < look.index("model(normalise(batch))")


def test_no_cell_takes_what_another_comparison_found_for_this_ones(notebook):
    """As where training is stopped after a parameter was changed, and a reader goes on with the cells that draw."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    forgotten = ("predictions", "history", "contrasts", "compared")
    assert any("read_slices(" in text and " = ".join(forgotten) + " = None" in text for text in code)
    collected = next(i for i, text in enumerate(code) if "collect_predictions(" in text)
    for text in code[collected + 1 :]:
        names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
        assert names & {*forgotten, "comparison"} or "report." not in text, text


def test_papermill_command_of_the_readme_has_its_output_folder():
    command = re.search(r"papermill \S+ (\S+)/run\.ipynb", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert command and (ROOT / command[1] / ".gitignore").is_file()  # the one tracked file in it


# ---------------------------------------- a whole run


def test_whole_run_leaves_every_promised_file(whole):
    results, _ = whole
    tables = ("oof_predictions", "control_predictions", "history", "convergence", "contrasts", "metrics")
    tables += ("pairs", "best", "endpoints")
    for name in (*(f"{table}.csv" for table in tables), "settings.json", "summary.md"):
        assert (results / name).is_file(), name
    for variant in VARIANTS:
        assert (results / f"testing_predictions_{variant}.csv").is_file()
        assert len(list((results / "runs" / variant).glob("repeat1_fold?-*/last.pt"))) == 2
    for figure in FIGURES:
        assert (results / f"{figure}.png").is_file() and (results / f"{figure}.svg").is_file(), figure
    assert not list(results.glob("runs/*/*/checkpoint.pt")) + list(results.rglob("*.tmp"))


def test_each_usable_slice_is_predicted_once_in_each_variant(whole, project):
    table = pd.read_csv(whole[0] / "oof_predictions.csv")
    probabilities = [f"p_{c}" for c in CLASSES]
    first = ["variant", "repeat", "fold", "patient", "image", "label", "predicted"]
    assert list(table.columns) == [*first, *probabilities]
    manifest = pd.read_csv(project / "data_preprocessing/manifest.csv")
    manifest = manifest.query("split == 'train' and status == 'ok' and blank == 0")
    for _, rows in table.groupby("variant"):
        assert sorted(rows["image"]) == sorted(manifest["image"])
        assert (rows.groupby("patient")["fold"].nunique() == 1).all()
    np.testing.assert_allclose(table[probabilities].sum(axis=1), 1, atol=1e-6)
    assert (table["predicted"] == np.array(CLASSES)[table[probabilities].to_numpy().argmax(1)]).all()


def test_predictions_are_those_of_the_last_epoch(whole):
    table = pd.read_csv(whole[0] / "oof_predictions.csv")
    history = pd.read_csv(whole[0] / "history.csv")
    last = history[(history["epoch"] == 2) & ~history["control"]].set_index(["variant", "fold"])
    for key, rows in table.groupby(["variant", "fold"]):
        expected = accuracy_score(rows["label"], rows["predicted"])
        assert last.loc[key, "val_accuracy"] == pytest.approx(expected, abs=1e-6)


def test_testing_predictions_are_the_mean_of_the_folds(whole):
    columns = [f"p_{c}" for c in CLASSES]
    table = pd.read_csv(whole[0] / "testing_predictions_1_ROI.csv")
    assert list(table.columns) == ["image", "predicted", *columns, "label", "patient"]
    folds = [pd.read_csv(p)[columns] for p in whole[0].glob("runs/1_ROI/*/testing-*.csv")]
    assert len(folds) == 2
    np.testing.assert_allclose(table[columns], sum(folds) / 2, atol=1e-8)


def test_eighth_variant_by_one_line_is_in_every_table_and_figure(whole):
    results, _ = whole
    contrasts = pd.read_csv(results / "contrasts.csv").set_index("contrast")
    assert contrasts.loc[EIGHTH, "kind"] == "primary"
    assert (contrasts["kind"] == "primary").sum() == len(VARIANTS) - 1
    assert contrasts.loc["effect of bilateral", ["a", "b"]].tolist() == [EIGHTH, "1_ROI"]
    for name in ("oof_predictions", "metrics", "history", "convergence", "best"):
        assert EIGHTH in set(pd.read_csv(results / f"{name}.csv")["variant"]), name
    assert EIGHTH in (results / "summary.md").read_text(encoding="utf-8")
    for figure in ("forest", "accuracy", "sensitivity", "any_hemorrhage", "costs"):  # texts stand in comments
        assert EIGHTH in (results / f"{figure}.svg").read_text(encoding="utf-8"), figure
    for figure in ("variants", "learning_curves", "grad_cam"):
        drawn = (results / f"{figure}.svg").read_text(encoding="utf-8")
        assert "7_ROI" in drawn and "+Bilateral" in drawn, figure


def test_settings_say_what_made_the_results(whole):
    facts = json.loads((whole[0] / "settings.json").read_text(encoding="utf-8"))
    assert facts["settings"]["seed"] == 3
    assert torch.__version__.startswith(facts["made_with"]["versions"][0]["torch"])
    assert facts["initial_weights"]["used"] == "none" and facts["left_out"]["blank, no brain to see"] == 1
    caption = "quick profile with epochs 2, batch_size 8, folds 2, efficientnet-narrow at 32 px, "
    caption += "48 slices of 24 patients"
    assert facts["caption"].startswith(caption)


def test_output_is_quiet_under_papermill(whole):
    texts = [o.text for c in whole[1].cells for o in c.get("outputs", []) if o.output_type == "stream"]
    assert "%|" not in "".join(texts)  # no bars
    assert sum(text.count("\n") for text in texts) < 100


# ---------------------------------------- wrong starts


def sentence_of(folder: Path, **parameters) -> str:
    """Return the error that ends the notebook."""
    with pytest.raises(PapermillExecutionError) as caught:
        run(folder, **parameters)
    return f"{caught.value.ename}: {caught.value.evalue}"


def test_misspelt_parameter_is_refused_with_the_right_name(project):
    said = sentence_of(project, epoch=1)
    assert "epoch is no parameter of this notebook: did you mean epochs?" in said


def test_notebook_away_from_its_modules_says_what_to_do(tmp_path):
    said = sentence_of(tmp_path)
    assert said.startswith("ModuleNotFoundError") and "start it in the folder of the clone" in said
    assert str(tmp_path) in said


def test_reliability_counts_the_slices_that_were_tested(notebook):
    """Of a single split, or of some folds, they are fewer than there are for training."""
    cell = next(cell.source for cell in notebook.cells if "draw_reliability" in cell.source)
    assert 'predictions["image"].nunique()' in cell and "len(slices.training)" not in cell
