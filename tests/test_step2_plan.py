"""The plan before training: costs that were counted elsewhere, arithmetic by hand, and what it says in words."""

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from conftest import ROOT
from step2_helpers import make_settings, write_pictures

from step2 import pace, plan
from step2.pace import Pace, estimate_pace, measure_paces
from step2.plan import Size, choices, plan_in_words, plan_row, plan_table, plan_to_show
from step2.settings import read_settings

KAGGLE = Size(6000, 2000, 7)


def profile(name: str, **given):
    """Return a profile's settings on one GPU."""
    return read_settings({"profile": name, "weights": "none", "processes": 1} | given, gpus=1)


@pytest.mark.parametrize(
    ("name", "size", "gflop", "weights"),
    [
        ("efficientnet-b0", 224, 0.77, 4.0e6),
        ("efficientnet-b2", 260, 2.0, 7.7e6),
        ("efficientnet-b7", 600, 75.5, 63.8e6),
    ],
)
def test_operations_and_weights_are_those_counted_by_hand(name, size, gflop, weights):
    """Twice the multiplications that Tan and Le give (0.39, 1.0 and 37 billion), with six outputs."""
    cost = pace.network_cost(profile("full", model_name=name, image_size=size), half=True)
    assert cost.gflop == pytest.approx(gflop, rel=0.02) and cost.weights == pytest.approx(weights, rel=0.02)


def test_memory_of_full_is_what_pytorchs_memory_tracker_found():
    """15.5 GB at the peak of a step of 8 slices in bf16, by torch.distributed._tools.mem_tracker."""
    assert estimate_pace(profile("full"), "H100").memory == pytest.approx(15.5e9, rel=0.15)


@pytest.fixture(scope="module", autouse=True)
def counted_once():
    """Count what each network costs once: B7 takes seconds, and every plan asks for it."""
    known, count = {}, pace.network_cost

    def remembered(settings, half):
        key = settings.model_name, settings.image_size, half
        if key not in known:
            known[key] = count(settings, half)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pace, "network_cost", remembered)
        yield


@pytest.fixture(scope="module")
def on_a_t4():
    """What the choices for 6,000 slices would cost on a T4."""
    return plan_table(profile("medium"), KAGGLE, "T4").set_index("choice")


def test_full_goes_in_parts_on_a_small_gpu_and_hours_are_those_of_the_readme(on_a_t4):
    medium, full = on_a_t4.loc["as set"], on_a_t4.loc["profile full"]
    assert (medium["at_a_time"], full["at_a_time"]) == (32, 4)
    assert (medium["hours"], full["hours"]) == pytest.approx((3.7, 134), rel=0.02)


def test_hours_by_hand():
    """Two of three folds train 60 slices in 2 batches of 30, for 10 epochs, each looked at; 3 s a slice and
    1 s to load it, 1 + 1 s to predict it; 24 runs by two processes."""
    settings = make_settings(epochs=10, batch_size=30, folds=3, processes=2)
    row = plan_row("as set", settings, Size(90, 63, 7), Pace(1000, 3.0, 1.0, 5e9, 30, "by hand"))
    assert row["runs"] == 24 and row["pictures"] == 24 * 600
    assert row["hours"] == pytest.approx(24 * (600 * 4 + 300 * 2) / 2 / 3600)
    assert row["trained_per_s"] == pytest.approx(1 / 3) and row["loaded_per_s"] == 1
    assert row["disk_gb"] == pytest.approx((2 * 24 + 12 * 2) * 1000 / 1e9)


def test_hours_on_a_cluster_are_those_of_one_worker_and_say_so():
    given = {"epochs": 10, "batch_size": 30, "folds": 3, "processes": 2}
    pace = Pace(1000, 3.0, 1.0, 5e9, 30, "by hand")
    size = Size(90, 63, 7)
    here = plan_row("as set", make_settings(**given), size, pace)
    there = plan_row("as set", make_settings(**given, cluster="tcp://scheduler:8786"), size, pace)
    assert there["hours"] == pytest.approx(2 * here["hours"])
    assert here["basis"] == "by hand" and "one worker of the cluster" in there["basis"]


def test_memory_here_is_no_limit_of_a_cluster(tmp_path):
    there = make_settings(results=tmp_path, cluster="tcp://scheduler:8786")
    assert plan.room_here(there)[1] == np.inf > plan.room_here(make_settings(results=tmp_path))[1]


def test_threads_load_while_the_network_trains():
    assert (
        Pace(1, 3.0, 1.0, 0, 1, "").seconds(workers=2) == 3
        and Pace(1, 3.0, 4.0, 0, 1, "").seconds(workers=2) == 4
    )
    assert Pace(1, 3.0, 1.0, 0, 1, "").seconds(workers=0) == 4


def test_each_choice_differs_from_what_is_set_and_comes_once():
    for settings in (profile("full"), profile("medium", folds=3), make_settings(folds=1, repeats=3)):
        names = [name for name, *_ in choices(settings, KAGGLE)]
        assert names[0] == "as set" and len(set(names)) == len(names)
        assert f"folds {settings.folds}" not in names and f"profile {settings.profile}" not in names
        assert "profile quick" not in names and ("profile full" in names) == (settings.profile != "full")


def test_fewer_folds_slices_and_repeats_cost_less_and_find_less(on_a_t4):
    table = on_a_t4
    for fewer in ("folds 1", "folds 3", "a third of the slices", "a tenth of the slices"):
        assert table.loc[fewer, "hours"] < table.loc["as set", "hours"]
        assert table.loc[fewer, "detectable"] > table.loc["as set", "detectable"]
    assert table.loc["repeats 3", "hours"] == pytest.approx(3 * table.loc["as set", "hours"])


def row(**changed):
    """Return the first row of a plan, as a table."""
    usual = {"choice": "as set", "profile": "full", "folds": 5, "repeats": 1, "slices": 90, "patients": 63}
    usual |= {
        "runs": 40,
        "pictures": 72_000,
        "hours": 0.5,
        "memory_gb": 15.5,
        "batch_size": 8,
        "at_a_time": 8,
    }
    usual |= {
        "disk_gb": 1.0,
        "detectable": 9.0,
        "basis": "timed",
        "loaded_per_s": 600.0,
        "trained_per_s": 100.0,
    }
    return pd.DataFrame([usual | changed])


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({}, r"40 runs train 72,000 pictures in about 30 minutes \(timed\)$"),
        ({"hours": 30.0}, r"about 30\.0 hours .*: 1\.2 days; think of fewer slices"),
        (
            {"hours": 30.0},
            r"^where a session ends after 12 hours, that is 3 .* a week, 1\.0 weeks\)",
        ),
        ({"at_a_time": 4}, "^memory holds 4 of a batch's 8 slices: it is taken in parts$"),
        ({"at_a_time": 0}, "^a single slice doesn't fit in the GPU's memory: lower image_size"),
        (
            {"trained_per_s": 700.0},
            "^loading pictures takes longer than training: raise the parameter workers$",
        ),
        ({"disk_gb": 3.0}, r"^results take 3\.0 GB, and there is room for 2\.0 GB: make more first$"),
        ({"memory_gb": 17.0}, r"^each process needs 17\.0 GB of memory and has 16\.0: lower processes"),
        ({"hours": 0.01}, r"^40 runs train 72,000 pictures in less than a minute \(timed\)$"),
        ({"detectable": np.nan}, "^with so few patients, or a single variant, no difference could be found$"),
        ({}, r"\(if two .* fifth of the slices, and training again moves accuracy by 1 point\)$"),
        ({"folds": 1}, r"\(if two variants differ on a fifth of the slices\)$"),
        ({}, r"^a difference of 9\.0 points in accuracy would be found in 8 of 10"),
    ],
)
def test_what_the_plan_says(changed, sentence):
    said = plan_in_words(row(**changed), disk=2e9, memory=16e9)
    assert [line for line in said if pd.Series([line]).str.contains(sentence, regex=True)[0]], said


def test_small_batch_that_was_asked_for_is_no_want_of_memory():
    assert not [line for line in plan_in_words(row(batch_size=4, at_a_time=4)) if "memory" in line]


@pytest.mark.parametrize(
    ("hours", "shown"), [(0.0213, "0.021"), (9.96, "10"), (163.4, "163"), (2239, "2,239")]
)
def test_hours_are_shown_as_far_as_they_are_known_and_never_as_a_power_of_ten(hours, shown):
    assert plan_to_show(row(hours=hours))["hours"].item() == shown


def test_plan_to_show_has_a_line_for_each_choice_without_nan():
    shown = plan_to_show(pd.concat([row(), row(choice="a tenth", detectable=np.nan)]))
    assert list(shown.index) == ["as set", "a tenth"] and list(shown["finds, points"]) == ["9.0", "-"]


def test_a_step_is_timed_here():
    (pace,) = measure_paces([make_settings()])
    assert pace.train > 0 and pace.load > 0 and pace.part == 8 and pace.basis.startswith("timed on this cpu")


@pytest.mark.parametrize(
    ("lever", "without"), [(True, "torch.compile"), (False, "channels_last and torch.compile")]
)
def test_a_step_on_a_gpu_says_what_it_was_timed_without(monkeypatch, lever, without):
    levers = []
    real = pace.what_fits
    monkeypatch.setattr(pace, "what_fits", lambda s, speed, d: levers.append(speed) or real(s, speed, d))
    found = pace.pace_on_gpu(make_settings(), torch.device("cpu"), channels_last=lever)
    assert [speed.channels_last for speed in levers] == [lever]
    assert found.train > 0 and found.part == 8 and found.basis.endswith(f", without {without}")


def test_on_a_gpu_only_what_is_set_waits_for_channels_last(monkeypatch):
    monkeypatch.setattr(pace, "find_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(pace, "pace_on_gpu", lambda settings, device, lever: (settings.image_size, lever))
    several = [make_settings(image_size=size) for size in (48, 32, 40)]
    assert measure_paces(several) == [(48, True), (32, False), (40, False)]


def test_a_step_is_timed_in_as_many_processes_as_train_and_takes_the_mean(monkeypatch):
    """Threads stand for the processes; the whole notebook's test starts real ones."""
    started, found = [], [([1.0, 10.0], [0.1, 0.5]), ([3.0, 30.0], [0.3, 0.7])]
    monkeypatch.setattr(
        pace, "ProcessPoolExecutor", lambda count, *how: started.append(count) or ThreadPoolExecutor(count)
    )
    monkeypatch.setattr(pace, "time_all", lambda given: found.pop())
    paces = measure_paces([make_settings(processes=2), make_settings(processes=2, image_size=40)])
    assert started == [2] and not found
    assert [each.train for each in paces] == [2.0, 20.0]
    assert [each.load for each in paces] == pytest.approx([0.2, 0.6])


def test_network_too_large_for_a_cpu_is_not_timed(monkeypatch):
    """It takes what its operations take at the speed of a smaller one."""
    monkeypatch.setattr(pace, "FEW_GFLOP", 2.5 * pace.network_cost(make_settings(), half=False).gflop)
    monkeypatch.setattr(pace, "STAND_IN", {"model_name": "efficientnet-narrow", "image_size": 32})
    small, large = measure_paces([make_settings(), make_settings(image_size=64)])
    assert large.basis == "from its operations, at the speed of efficientnet-narrow"
    assert large.train > small.train


def test_command_plans_for_another_machine(tmp_path, monkeypatch, capsys):
    arguments = ["--profile", "auto", "--slices", "6000", "--patients", "2000", "--gpu", "t4"]
    monkeypatch.setattr("sys.argv", ["plan", *arguments, "--results", str(tmp_path / "r")])
    monkeypatch.setattr(plan, "room_here", lambda settings: (2e6, 3e9))
    plan.main()
    said = capsys.readouterr().out
    assert said.startswith("medium profile: the GPU has 16 GB, full is for 24 and more\n")
    assert "estimated from the T4's data sheet" in said
    assert "there is room for 0.0 GB: make more first" in said and "GB of memory and has 3.0: lower" in said
    assert pd.read_csv(tmp_path / "r" / "plan.csv")["choice"][0] == "as set"


def test_command_plans_for_the_pictures_that_are_there(tmp_path, monkeypatch, capsys):
    write_pictures(tmp_path / "png")
    given = ["--data", str(tmp_path / "png"), "--profile", "quick", "--gpu", "T4", "--results", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["plan", *given])
    plan.main()
    assert "9 runs train" in capsys.readouterr().out  # two variants and the control, 3 folds


@pytest.mark.parametrize(("variants", "runs"), [("0,1", 15), ("0, 1,0", 15), ("all", 65)])
def test_command_plans_for_the_variants_that_are_named(tmp_path, monkeypatch, variants, runs):
    given = ["--profile", "full", "--slices", "6000", "--gpu", "T4", "--variants", variants]
    monkeypatch.setattr("sys.argv", ["plan", *given, "--results", str(tmp_path)])
    plan.main()
    as_set = pd.read_csv(tmp_path / "plan.csv").iloc[0]
    assert as_set["runs"] == runs  # and the control, 5 folds
    assert as_set["patients"] == 3000  # half as many as slices, where nothing is said


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            ["--profile", "huge", "--slices", "9"],
            "^profile = 'huge': choose one of auto, full, medium, quick$",
        ),
        (["--data", "nowhere"], "manifest"),
        (["--slices", "90", "--variants", "0,typo"], "'typo' is none of 0_Dicom2PNG"),
        (["--slices", "90", "--gpu", "T4", "--results", __file__], "test_step2_plan"),
    ],
)
def test_wrong_command_gets_a_sentence(tmp_path, monkeypatch, given, sentence):
    monkeypatch.setattr("sys.argv", ["plan", "--results", str(tmp_path), *given])
    with pytest.raises(SystemExit, match=sentence):
        plan.main()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--gpu", "T5"], r"--gpu: invalid choice: 'T5' \(choose from '?T4'?, '?P100'?, "),
        (["--patients", "30"], "error: --patients needs --slices too\n$"),
        (["--slices", "-5"], r"--slices: '-5' is not a whole number from 1"),
        (
            ["--slices", "2000", "--patients", "6000"],
            "error: 6000 patients of 2000 slices: each patient has at least one slice\n$",
        ),
    ],
)
def test_wrong_arguments_get_the_usage_and_a_sentence(tmp_path, monkeypatch, capsys, given, sentence):
    monkeypatch.setattr("sys.argv", ["plan", "--gpu", "T4", "--results", str(tmp_path), *given])
    with pytest.raises(SystemExit, match=r"^2$"):
        plan.main()
    said = capsys.readouterr().err
    assert said.startswith("usage: ") and re.search(sentence, said)


@pytest.mark.parametrize(("variants", "processes", "times"), [(2, 8, 2), (2, 4, 3), (2, 64, 1), (7, 8, 3)])
def test_hours_of_runs_that_are_no_multiple_of_the_processes(variants, processes, times):
    """Three folds: nine runs by eight processes take as long as two runs one after the other."""
    pace_, one = Pace(1000, 3.0, 1.0, 5e9, 30, "by hand"), make_settings(folds=3)
    alone = plan_row("as set", one, Size(90, 63, variants), pace_)
    several = plan_row("as set", make_settings(folds=3, processes=processes), Size(90, 63, variants), pace_)
    assert several["hours"] == pytest.approx(times * alone["hours"] / alone["runs"])


def test_other_profile_that_does_not_fit_on_this_gpu_is_a_row_and_no_crash(monkeypatch):
    def measure(settings, device, channels_last):
        if settings.profile == "full":
            raise RuntimeError("memory ended with one slice at a time (CUDA out of memory): lower image_size")
        return Pace(1000, 0.01, 0.001, 1e9, settings.batch_size, "timed")

    monkeypatch.setattr(pace, "find_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(pace, "device_name", lambda device: "MX450")
    monkeypatch.setattr(pace, "pace_on_gpu", measure)
    table = plan_table(profile("medium"), Size(90, 63, 7))
    shown = plan_to_show(table)
    assert shown.loc["profile full", "hours"] == shown.loc["profile full", "memory, GB"] == "-"
    assert "doesn't fit in the memory of this MX450" in shown.loc["profile full", "known"]
    assert plan_in_words(table)[0].startswith("40 runs train")
    with pytest.raises(RuntimeError, match="memory ended with one slice"):
        plan_table(profile("full"), Size(90, 63, 7))


def test_what_a_single_split_finds_is_marked_as_of_its_networks_alone():
    rows = [row(), row(folds=1), row(folds=1, repeats=3), row(folds=1, detectable=np.nan)]
    assert list(plan_to_show(pd.concat(rows))["finds, points"]) == ["9.0", "9.0 *", "9.0", "-"]
    assert plan_in_words(pd.concat(rows))[-1].startswith("* a single split can't tell how much trainings")
    for unmarked in (row(), pd.concat([row(), row(folds=1, detectable=np.nan)])):
        assert not plan_in_words(unmarked)[-1].startswith("*")


def test_sessions_are_as_long_as_max_hours_says():
    assert not [line for line in plan_in_words(row(hours=11.5)) if "session" in line]
    (said,) = [line for line in plan_in_words(row(hours=11.5), session=11) if "session" in line]
    assert said.startswith("where a session ends after 11 hours, that is 2 of them")
    assert "set max_hours" not in said and said.endswith("run again each time, it goes on")


def test_room_that_trained_runs_take_is_no_room_that_is_lacking(tmp_path, monkeypatch):
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: SimpleNamespace(free=5000))
    folder = tmp_path / "runs" / "0_Dicom2PNG" / "repeat1_fold1"
    folder.mkdir(parents=True)
    (folder / "last.pt").write_bytes(bytes(1000))
    settings = make_settings(results=tmp_path)
    assert plan.room_here(settings)[0] == 5000 and plan.room_here(settings, [folder])[0] == 6000


def test_a_plan_does_not_wait_for_scipys_distributions():
    """scipy.stats takes one to four seconds to import, in each process that times steps."""
    told = "import sys, step2.plan; sys.exit('scipy.stats' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", told], cwd=ROOT, check=False).returncode == 0


def test_plan_knows_how_unequal_patients_numbers_of_slices_are():
    slices = SimpleNamespace(training=pd.DataFrame({"patient": ["a", "b", "b", "b"]}))
    assert plan.size_of(slices, ["0_Dicom2PNG"], control=False) == Size(4, 2, 1, False, 1.25)  # 5 / 2^2
    sizes, pace_ = (Size(300, 100, 7, unequal=u) for u in (1, 2)), Pace(1000, 3.0, 1.0, 5e9, 30, "by hand")
    even, uneven = (plan_row("as set", make_settings(folds=3), size, pace_) for size in sizes)
    assert uneven["detectable"] > even["detectable"]


@pytest.mark.processes
def test_processes_that_time_end_with_a_notebook_that_is_killed():
    code = "from step2.pace import measure_paces\nfrom step2.settings import read_settings\n"
    code += (
        "if __name__ == '__main__':\n    measure_paces([read_settings({'profile': 'quick', 'processes': 2})])"
    )
    script = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    children, ends = [], time.monotonic() + 60
    try:
        while len(children) < 2 + (os.name != "nt"):  # one of them looks after semaphores
            assert time.monotonic() < ends, "no process that times was started"
            time.sleep(0.1)
            children = psutil.Process(script.pid).children(recursive=True)
    finally:
        script.kill()
        script.wait()
    _, left = psutil.wait_procs(children, timeout=60)
    for process in left:
        process.kill()
    assert not left


def test_network_of_few_operations_waits_for_its_launches():
    """A step of quick's seven blocks took 13 ms on an H200, whatever the pictures."""
    found = estimate_pace(profile("quick"), "H200")
    assert found.train * found.part == pytest.approx(0.013, rel=0.1)


def test_batch_goes_in_parts_where_memory_ends():
    """16 bytes a weight, 1 MB a slice, of 92 % of the memory."""
    cost, settings = pace.Cost(weights=10**6, blocks=7, gflop=1.0, saved=1e6), make_settings(batch_size=8)
    fits = [pace.part_that_fits(settings, cost, bytes_ / 0.92) for bytes_ in (24.1e6, 23.9e6, 16.9e6)]
    assert fits == [8, 4, 0] and pace.memory_needed(cost, 8) == 24e6
