"""Parameters of the notebook and the choice of variants: what is wrong gets a sentence on what to do."""

import math
import shutil

import pytest
from step2_helpers import VARIANTS, make_settings, write_pictures

from step2.settings import read_settings
from step2.variants import choose_variants


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return a small output folder of Step 1; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("data_preprocessing")
    write_pictures(folder, per_class=1)
    return folder


# ---------------------------------------- parameters


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"folds": 0}, r"^folds = 0: should be .* equal to 1 \(1 is a single hold-out split\)$"),
        ({"epochs": 2.5}, r"^epochs = 2\.5: should be a valid integer"),
        ({"epochs": "2"}, r"^epochs = '2': should be a valid integer"),
        ({"batch_size": True}, "^batch_size = True: should be a valid integer"),
        ({"image_size": 16}, r"^image_size = 16: should be greater than or equal to 32 \(pixels\)$"),
        ({"repeats": -1}, "^repeats = -1: should be greater than or equal to 1"),
        ({"seed": "one"}, "^seed = 'one': should be a valid integer"),
        (
            {"rates": "6e-5,3e-5"},
            r"^rates = \(6e-05, 3e-05\): one cycle has one peak, set one rate, or schedule to 'steps'$",
        ),
        (
            {"model_name": "resnet"},
            r"^model_name = 'resnet': should match .*efficientnet-.* \(-b0 to -b8, or -narrow\)$",
        ),
        (
            {"weights": "nowhere.pt"},
            "^weights = 'nowhere.pt': there is no such file: correct the path, or choose one of auto, imagenet, none$",
        ),
        ({"mixed_precision": "fp8"}, "^mixed_precision = 'fp8': should be 'auto', 'bf16', 'fp16' or 'no'$"),
        ({"profile": "fast"}, "^profile = 'fast': choose one of auto, full, medium, quick$"),
        ({"profile": 1}, "^profile = 1: choose one of auto, full, medium, quick$"),
        ({"control_run": "false"}, "^control_run = 'false': should be a valid boolean$"),
        ({"cluster": "nowhere"}, r"^cluster = 'nowhere': should match pattern .*tcp://scheduler:8786"),
        ({"data": 5}, "^data = 5: set the path of a folder, as text$"),
        ({"results": 5}, "^results = 5: set the path of a folder, as text$"),
        ({"dataset": 5}, "^dataset = 5: should be a valid string$"),
        ({"weights": 5}, r"^weights = 5: should be a valid string \(imagenet, none, auto, or a file\)$"),
        ({"epoch": 3}, r"^epoch is no parameter of this notebook: did you mean epochs\?$"),
        ({"quux": 3}, "^quux is no parameter of this notebook: choose one of model_name, image_size, "),
    ],
)
def test_wrong_parameter_gets_a_sentence(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_settings(**given)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("equivalence", 0), ("equivalence", 51.0), ("batch_size", 3), ("label_smoothing", 1.0)),
        *(("zoom", 1.0), ("rotation", 181.0), ("shift", -1.0), ("weight_decay", math.inf), ("seed", 2**31)),
    ],
)
def test_limits(name, value):
    with pytest.raises(ValueError, match=f"^{name} = .*: should be "):
        make_settings(**{name: value})


def test_every_wrong_parameter_is_named_at_once():
    with pytest.raises(ValueError, match=r"^image_size = 1: .*\nepochs = 0: .*\nfolds = 0: "):
        make_settings(folds=0, epochs=0, image_size=1)


def test_more_processes_than_gpus_are_refused():
    with pytest.raises(ValueError, match=r"^processes = 3, but there are 2 GPUs: set processes to 2$"):
        read_settings({"weights": "none", "processes": 3}, gpus=2)


def test_gpus_select_the_full_profile_and_a_process_each():
    full = read_settings({}, gpus=2)
    assert (full.profile, full.model_name, full.image_size) == ("full", "efficientnet-b7", 600)
    assert (full.epochs, full.batch_size, full.processes) == (25, 8, 2)


@pytest.mark.parametrize(
    ("cores", "gpus", "processes", "workers"), [(6, 0, 6, 0), (64, 0, 8, 0), (6, 2, 2, 3), (64, 2, 2, 16)]
)
def test_cores_give_8_processes_and_16_loading_threads_at_most(monkeypatch, cores, gpus, processes, workers):
    monkeypatch.setattr("step2.settings.CPU_COUNT", cores)
    settings = read_settings({}, gpus=gpus)
    assert (settings.processes, settings.workers) == (processes, workers)


def test_full_is_the_predecessors_recipe():
    """Adam, +-20 degrees, +-2 pixels, flips both ways; its rates have a test of their own."""
    full = read_settings({}, gpus=1)
    assert (full.rotation, full.shift, full.zoom, full.flips) == (20, 2, 0, "hv")
    assert (full.weight_decay, full.label_smoothing, full.weights) == (0, 0, "auto")


def test_no_gpu_selects_the_quick_profile():
    assert read_settings({}, gpus=0).profile == "quick"


@pytest.mark.parametrize(
    ("gpus", "memory", "profile"),
    [
        (0, math.inf, "quick"),
        (1, 15.8e9, "medium"),
        (2, 22.9e9, "medium"),
        (1, 23.6e9, "full"),
        (8, 85e9, "full"),
    ],
)
def test_gpu_memory_selects_the_profile_and_says_why(gpus, memory, profile):
    settings = read_settings({}, gpus, memory)
    assert settings.profile == profile and settings.why
    assert read_settings({"profile": "quick"}, gpus, memory).why == "asked for"


def test_what_nobody_can_set_is_not_offered():
    with pytest.raises(ValueError, match="quux is no parameter") as caught:
        read_settings({"quux": 3})
    offered = str(caught.value).partition("choose one of ")[2].split(", ")
    assert {"epochs", "processes"} <= set(offered) and not {"why", "gpus"} & set(offered)


def test_a_gpu_that_pytorch_does_not_see_is_no_missing_one(monkeypatch):
    monkeypatch.setattr(
        "step2.settings.shutil.which", lambda name: (name == "nvidia-smi" and "found") or None
    )
    assert "PyTorch sees no GPU: if there is one" in read_settings({}, gpus=0).why
    monkeypatch.setattr("step2.settings.shutil.which", lambda name: None)
    assert read_settings({}, gpus=0).why == "there is no CUDA GPU"


def test_none_means_the_profiles_own_value():
    assert read_settings({"profile": "full", "epochs": None, "folds": 3}).changed() == {"folds": 3}


def test_names_that_are_older_than_the_parameters_are_no_parameters():
    namespace = {"pd": None, "epoch": 1, "_": 2, "epochs": 3, "profile": "quick"}
    assert read_settings(namespace, before=["pd", "epoch"]).epochs == 3
    with pytest.raises(ValueError, match=r"epoch is no parameter .* did you mean epochs\?"):
        read_settings(namespace, before=["pd"])


def test_what_is_imported_is_no_parameter():
    """As by the cell of the plan, run before the parameters, or by a reader's own cell."""
    namespace = {"plan_table": make_settings, "math": math, "epochs": 3, "profile": "quick"}
    assert read_settings(namespace, before=[]).epochs == 3


def test_cell_that_reads_the_parameters_can_be_run_again():
    """By then later cells have made names, and one of them may look like a misspelt parameter."""
    namespace = {"epochs": 3, "profile": "quick"}
    namespace |= {"settings": read_settings(namespace, before=[]), "batches": 1, "epochs": 4}
    assert read_settings(namespace, before=[]).epochs == 4


# ---------------------------------------- variants


@pytest.mark.parametrize("wanted", [None, "1, 0", ["1_ROI", "0_Dicom2PNG"], "0,1,1_ROI", (1, 0)])
def test_variants_come_in_step_1_order(data, wanted):
    assert choose_variants(wanted, data) == VARIANTS


@pytest.mark.parametrize("wanted", [[1], 1, "1", "1_ROI"])
def test_one_variant_is_chosen_by_name_or_number(data, wanted):
    assert choose_variants(wanted, data) == ("1_ROI",)


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ("0,12", "^variants: '12' unknown, choose one of 0_Dicom2PNG"),
        (
            "0,7",
            r"7_Window has no TrainingData: run Step1_Image_Preprocessing\.py as for .*, but --variants 7_Window$",
        ),
        ("", "^variants: '' unknown, choose one of 0_Dicom2PNG"),
        ([], "^variants: the list is empty"),
        (
            "2",
            r"2_ROI\+CLAHE has no TrainingData: run Step1_Image_Preprocessing\.py as for .*, but --variants 2_ROI",
        ),
        (0.4, r"^variants: '0\.4' unknown, choose one of 0_Dicom2PNG, .*, or a number$"),
        ([0.4], r"^variants: '0\.4' unknown, choose one of 0_Dicom2PNG"),
        (True, "^variants: 'True' unknown, choose one of 0_Dicom2PNG"),
    ],
)
def test_wrong_variants_get_a_sentence(data, wanted, sentence):
    with pytest.raises(ValueError, match=sentence):
        choose_variants(wanted, data)


def test_folder_without_a_manifest_is_refused(data):
    with pytest.raises(ValueError, match=r"has no manifest\.csv: run Step1_Image_Preprocessing"):
        choose_variants(None, data / "nowhere")


def test_manifest_without_any_variant_is_refused(tmp_path):
    write_pictures(tmp_path, variants=())
    with pytest.raises(ValueError, match="has no variant folder with a TrainingData: run Step1_Image"):
        choose_variants(None, tmp_path)


@pytest.fixture
def with_extra(data, tmp_path):
    """Return an output folder with one of Step 1's extra variants beside the usual ones."""
    shutil.copytree(data, tmp_path / "data")
    shutil.copytree(data / "1_ROI", tmp_path / "data" / "10_ROI+noskull")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        (None, VARIANTS),
        ("all", (*VARIANTS, "10_ROI+noskull")),
        ("10,0", ("0_Dicom2PNG", "10_ROI+noskull")),
        (["10_ROI+noskull"], ("10_ROI+noskull",)),
    ],
)
def test_extra_variants_are_compared_when_asked_for(with_extra, wanted, chosen):
    assert choose_variants(wanted, with_extra) == chosen


def test_folder_with_extra_variants_alone_needs_them_asked_for(with_extra):
    for variant in VARIANTS:
        shutil.rmtree(with_extra / variant)
    with pytest.raises(ValueError, match=r"has no variant folder with a TrainingData: .* variants to 'all'$"):
        choose_variants(None, with_extra)


@pytest.fixture
def crowded(data, tmp_path):
    """Return an output folder with a folder 4_Other beside 4_ROI+noblank."""
    shutil.copytree(data, tmp_path / "data")
    for variant in ("4_ROI+noblank", "4_Other"):
        shutil.copytree(data / "1_ROI", tmp_path / "data" / variant)
    return tmp_path / "data"


def test_number_that_two_folders_share_is_refused(crowded):
    with pytest.raises(ValueError, match=r"'4' may be 4_ROI\+noblank or 4_Other: write the whole name$"):
        choose_variants("0,4", crowded)


def test_folder_beside_step_1s_table_comes_last(crowded):
    assert choose_variants("4_Other, 4_ROI+noblank", crowded) == ("4_ROI+noblank", "4_Other")


@pytest.mark.parametrize("given", [0.01, "0.01", [0.01]])
def test_rates_can_be_set_as_papermill_gives_them(given):
    assert read_settings({"profile": "quick", "rates": given}).rates == (0.01,)


@pytest.mark.parametrize("given", [(-1.0,), (0.0,)])
def test_rates_are_positive(given):
    with pytest.raises(ValueError, match="rates"):
        read_settings({"profile": "quick", "rates": given})
