"""Who trains: one process, a Dask cluster here, one elsewhere; and what happens when processes are killed."""

import math
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest
from conftest import ROOT
from distributed import Client
from distributed.scheduler import KilledWorker
from distributed.utils import json_load_robust
from jupyter_client.manager import start_new_kernel
from step2_helpers import make_comparison_for, write_pictures

from step2 import engine, runs
from step2.files import lock_results
from step2.network import InitialWeights
from step2.runs import Run, collect_predictions
from step2.settings import read_settings

pytestmark = pytest.mark.processes
EPOCHS = 12  # of 3 steps each: long enough to be killed in between
SCRIPT = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from step2_helpers import make_comparison_for
from step2.engine import train_all
if __name__ == "__main__":
    train_all(make_comparison_for(Path({data!r}), Path({results!r}), epochs={epochs}, processes=2))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data_preprocessing")
    write_pictures(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> pd.DataFrame:
    """Return the predictions of all runs, trained in this process one after the other."""
    comparison = make_comparison_for(data, tmp_path_factory.mktemp("undisturbed"), epochs=EPOCHS)
    engine.train_all(comparison)
    return collect_predictions(comparison)


def same_table(data: Path, results: Path, undisturbed: pd.DataFrame) -> None:
    """Check that all runs are there, and with the undisturbed predictions."""
    table = collect_predictions(make_comparison_for(data, results, epochs=EPOCHS))
    pd.testing.assert_frame_equal(table, undisturbed)


def start_training(data: Path, results: Path, script: Path, epochs: int = EPOCHS) -> subprocess.Popen:
    """Start a process that trains with two workers, and wait for the first checkpoint."""
    names = {"root": str(ROOT), "tests": str(ROOT / "tests"), "data": str(data), "results": str(results)}
    script.write_text(SCRIPT.format(**names, epochs=epochs), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    wait_for_checkpoint(results)
    return process


def wait_for_checkpoint(results: Path) -> None:
    """Wait until a run has a checkpoint."""
    ends = time.monotonic() + 90
    while not list(results.glob("runs/*/*/checkpoint.pt")):
        assert time.monotonic() < ends, "no run came to its first checkpoint"
        time.sleep(0.02)


def workers_of(pid: int) -> list[psutil.Process]:
    """Return the processes that train for a notebook or script, without those that end just now."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
    return found


def is_there(process: psutil.Process) -> bool:
    """Tell whether a process still runs."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


# ---------------------------------------- a cluster on this machine


def test_two_processes_give_the_table_of_one(data, tmp_path, undisturbed):
    engine.train_all(make_comparison_for(data, tmp_path, epochs=EPOCHS, processes=2))
    same_table(data, tmp_path, undisturbed)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_killed_worker_costs_its_run_an_epoch(data, tmp_path, undisturbed):
    process = start_training(data, tmp_path / "r", tmp_path / "train.py")
    workers_of(process.pid)[0].kill()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output.decode()
    same_table(data, tmp_path / "r", undisturbed)


def test_everything_killed_goes_on_from_the_checkpoints(data, tmp_path, undisturbed):
    process = start_training(data, tmp_path / "r", tmp_path / "train.py")
    workers = workers_of(process.pid)
    process.kill()
    process.wait()
    ends = time.monotonic() + 20
    while any(is_there(worker) for worker in workers):
        assert time.monotonic() < ends, "workers outlive what started them"
        time.sleep(0.1)
    engine.train_all(make_comparison_for(data, tmp_path / "r", epochs=EPOCHS, processes=2))
    same_table(data, tmp_path / "r", undisturbed)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_interrupted_kernel_stops_all_processes_and_leaves_none(data, tmp_path):
    manager, client = start_new_kernel(cwd=str(ROOT))
    try:
        given = f"Path({str(data)!r}), Path({str(tmp_path / 'r')!r}), epochs=2000, processes=2"
        code = f"""
            import sys; sys.path.insert(0, {str(ROOT / "tests")!r})
            from pathlib import Path; from step2_helpers import make_comparison_for
            from step2.engine import train_all; train_all(make_comparison_for({given}))"""
        client.execute(textwrap.dedent(code))
        wait_for_checkpoint(tmp_path / "r")
        workers = workers_of(manager.provisioner.pid)
        assert workers
        interrupted = time.monotonic()
        manager.interrupt_kernel()
        reply = {"msg_type": ""}
        while reply["msg_type"] != "execute_reply":  # a slow start leaves answers of other kinds
            reply = client.get_shell_msg(timeout=30)
        assert reply["content"]["ename"] == "KeyboardInterrupt"
        assert time.monotonic() - interrupted < 10
        assert not [worker for worker in workers if is_there(worker)]
    finally:
        manager.shutdown_kernel(now=True)
        client.stop_channels()


def test_wrong_picture_ends_all_runs_with_its_own_sentence(tmp_path):
    write_pictures(tmp_path / "data")
    comparison = make_comparison_for(tmp_path / "data", tmp_path / "r", processes=2)
    (tmp_path / "data/1_ROI/TrainingData/subdural/1.0.png").write_bytes(b"damaged since")
    with pytest.raises(ValueError, match=r"1\.0\.png is damaged: delete it, and run Step1"):
        engine.train_all(comparison)


def test_worker_that_the_system_keeps_killing_is_explained():
    class Killed:
        status = "error"

        def result(self):
            raise KilledWorker("train", None, 3)

    with pytest.raises(RuntimeError, match=r"1_ROI .* its worker process died 4 times, most often for want"):
        engine.result_of(Killed(), Run("1_ROI", 1, 1))


def test_workers_that_do_not_start_are_explained(data, tmp_path, monkeypatch):
    def killed(*args, **options):
        raise RuntimeError("Nanny failed to start.")

    monkeypatch.setattr(engine, "SpecCluster", killed)
    with pytest.raises(RuntimeError, match=r"could not be started .*for want of memory: lower processes, "):
        engine.train_all(make_comparison_for(data, tmp_path, processes=2))


# ---------------------------------------- a cluster that is there


@pytest.fixture
def cluster(tmp_path):
    """Yield a scheduler's address, its process and its two workers, who can't import step2 by themselves."""
    note = ["--scheduler-file", str(tmp_path / "scheduler.json")]  # of the port that it chose

    def spawn(program, *options):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": tmp_path}
        command = [sys.executable, "-m", f"distributed.cli.dask_{program}", *note, "--no-dashboard", *options]
        return subprocess.Popen(command, **quiet)

    scheduler = spawn("scheduler", "--host", "127.0.0.1", "--port", "0")
    workers = [spawn("worker", "--nthreads", "1", "--memory-limit", "0", "--no-nanny") for _ in range(2)]
    try:
        address = json_load_robust(note[1], timeout=60)["address"]
        with Client(address, timeout="60s", set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
        yield address, scheduler, workers
    finally:
        for process in (*workers, scheduler):
            process.kill()
            process.wait()


def test_cluster_in_another_folder_gives_the_same_table(data, tmp_path, undisturbed, cluster, monkeypatch):
    monkeypatch.chdir(data.parent)
    results = Path(os.path.relpath(tmp_path / "r"))
    engine.train_all(make_comparison_for(Path(data.name), results, epochs=EPOCHS, cluster=cluster[0]))
    same_table(data, tmp_path / "r", undisturbed)


@pytest.mark.parametrize("lost", ["workers", "scheduler"])
def test_lost_cluster_is_an_error_not_a_wait(data, tmp_path, cluster, monkeypatch, lost):
    address, scheduler, workers = cluster
    show, killed = engine.Progress.show, []

    def kill(progress):
        if not killed and list((tmp_path / "r").glob("runs/*/*/checkpoint.pt")):
            killed.append(time.monotonic())
            monkeypatch.setattr(engine, "PATIENCE_S", 2)  # a busy scheduler took longer before
            for process in workers if lost == "workers" else [scheduler]:
                process.kill()
        show(progress)

    monkeypatch.setattr(engine.Progress, "show", kill)
    with pytest.raises(RuntimeError, match=r"all Dask workers are gone|scheduler is gone") as caught:
        engine.train_all(make_comparison_for(data, tmp_path / "r", epochs=2000, cluster=address))
    assert killed, caught.value
    assert time.monotonic() - killed[0] < 60


def test_withdrawn_run_stops_on_a_cluster_too(data, tmp_path, cluster, monkeypatch):
    """The notebook is interrupted: its runs end within a step, and the workers are free again."""

    def interrupt(progress):
        if list((tmp_path / "r").glob("runs/*/*/checkpoint.pt")):
            raise KeyboardInterrupt

    monkeypatch.setattr(engine.Progress, "show", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.train_all(make_comparison_for(data, tmp_path / "r", epochs=2000, cluster=cluster[0]))
    with Client(cluster[0], timeout="20s", set_as_default=False) as client:
        ends = time.monotonic() + 10
        while client.run(lambda dask_worker: len(dask_worker.state.executing)) and time.monotonic() < ends:
            if not any(client.run(lambda dask_worker: len(dask_worker.state.executing)).values()):
                return
            time.sleep(0.2)
    pytest.fail("the workers go on training")


def test_scheduler_that_is_not_there_is_an_error(data, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "CONNECT_S", 3)
    began = time.monotonic()
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{deaf.getsockname()[1]}"
        with pytest.raises(RuntimeError, match=f"no Dask scheduler at {address} "):
            engine.train_all(make_comparison_for(data, tmp_path, cluster=address))
    assert time.monotonic() - began < 30


def options_of_processes(monkeypatch) -> tuple[list[dict], dict]:
    """Return the options that two workers on two GPUs, and their scheduler, would be started with."""
    asked = []

    def start(workers, scheduler, **options):
        asked.append(([worker["options"] for worker in workers.values()], scheduler["options"]))
        raise RuntimeError("seen")

    monkeypatch.setattr(engine, "SpecCluster", start)
    settings = read_settings({"profile": "quick", "processes": 2}, gpus=2)
    with pytest.raises(RuntimeError, match="seen"), engine.local_cluster(settings, 5):
        pass
    return asked[0]


@pytest.mark.parametrize(("visible", "own"), [(None, ["0", "1"]), ("2, GPU-5a", ["2", "GPU-5a"])])
def test_each_worker_has_one_of_the_gpus_that_this_process_may_use(monkeypatch, visible, own):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    workers, _ = options_of_processes(monkeypatch)
    assert [worker["env"]["CUDA_VISIBLE_DEVICES"] for worker in workers] == own


def test_processes_that_train_listen_to_this_machine_alone(monkeypatch):
    """A port of Dask's runs whatever code it is sent."""
    workers, scheduler = options_of_processes(monkeypatch)
    assert [each["host"] for each in (*workers, scheduler)] == ["127.0.0.1"] * 3
    assert scheduler["dashboard_address"] == "127.0.0.1:0"


def test_scheduler_that_goes_while_its_first_worker_is_awaited_is_explained():
    class Lost:
        def wait_for_workers(self, count, timeout):
            raise OSError("Timed out trying to connect")

    with pytest.raises(RuntimeError, match=r"the Dask scheduler is gone, or has had no worker for \d+ s"):
        engine.wait_for_workers(Lost())


def test_address_that_needs_certificates_is_an_error():
    with pytest.raises(RuntimeError, match="no Dask scheduler at tls://"), engine.client_of("tls://a:1"):
        pass


# ---------------------------------------- progress


def test_epochs_of_an_earlier_session_took_no_time_in_this_one(data, tmp_path, monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(engine.time, "monotonic", lambda: clock[0])
    comparison = make_comparison_for(data, tmp_path, epochs=25)
    progress = engine.Progress(comparison, finished=0)
    progress.note("a", 20.5)  # it goes on after its 20th epoch
    clock[0] += 60
    progress.note("a", 21.0)
    progress.show()
    total = 25 * len(comparison.runs)
    assert f"21 of {total} epochs, about {total - 21:.1f} minutes left" in capsys.readouterr().out


# ---------------------------------------- one notebook at a time


def test_second_notebook_is_told_of_the_first_until_that_is_gone(tmp_path):
    hold = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; import os, time; "
    hold += f"from step2.files import lock_results; lock = lock_results(Path({str(tmp_path / 'r')!r})); "
    first = subprocess.Popen(
        [sys.executable, "-c", hold + "print(os.getpid(), flush=True); time.sleep(60)"], stdout=-1
    )
    assert first.stdout is not None
    holder = psutil.Process(int(first.stdout.readline()))  # on Windows a child of python.exe
    with pytest.raises(
        RuntimeError, match=rf"another notebook uses .*process {holder.pid} on {socket.gethostname()}"
    ):
        lock_results(tmp_path / "r")
    holder.kill()
    first.wait()
    lock_results(tmp_path / "r").release()


def test_same_notebook_may_start_again(tmp_path):
    assert lock_results(tmp_path) is lock_results(tmp_path)


def test_no_time_is_said_before_anything_was_trained(data, tmp_path, monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(engine.time, "monotonic", lambda: clock[0])
    progress = engine.Progress(make_comparison_for(data, tmp_path), finished=0)
    clock[0] += 61
    progress.show()
    assert capsys.readouterr().out == "0 of 8 epochs\n"


def test_worker_that_loaded_older_code_is_refused_though_it_was_sent_the_new(data, tmp_path, monkeypatch):
    """Dask puts the new zip in front, and the modules that a worker has loaded stay."""
    comparison = replace(make_comparison_for(data, tmp_path), code="of the new files")
    for module in (engine, runs):
        monkeypatch.setattr(module, "code_digest", lambda: comparison.code)
    with pytest.raises(ValueError, match="this worker has another version of step2/: restart the kernel"):
        engine.train_on_worker(comparison, comparison.runs[0], math.inf)


def test_two_notebooks_on_one_cluster_hear_their_own_news(data, tmp_path):
    one, other = (make_comparison_for(data, tmp_path / name) for name in ("a", "b"))
    assert engine.topic_of(one) != engine.topic_of(other)


@pytest.mark.parametrize("hidden", ["data", "results"])
def test_worker_that_sees_other_files_says_so(data, tmp_path, monkeypatch, hidden):
    comparison = make_comparison_for(data, tmp_path / "r")
    elsewhere = comparison.settings.model_copy(update={hidden: tmp_path / "another disk"})
    worker = SimpleNamespace(get_current_task=lambda: "")
    monkeypatch.setattr(engine, "get_worker", lambda: worker)
    with pytest.raises(ValueError, match=r"a worker doesn't see .*another disk.* at the same path on all"):
        engine.train_on_worker(replace(comparison, settings=elsewhere), comparison.runs[0], math.inf)
    assert not (tmp_path / "another disk").exists()


@pytest.mark.parametrize("ends", [math.inf, 4e9])  # the year 2096
def test_results_that_vanish_are_not_taken_for_the_end_of_the_time(data, tmp_path, monkeypatch, ends):
    comparison = make_comparison_for(data, tmp_path / "r")
    done = {"accuracy": 0.5, "seconds": 1.0}
    monkeypatch.setattr(engine, "complete_run", lambda *given: done)  # and nothing is where it should be
    with pytest.raises(RuntimeError, match=r"4 runs were trained, but .*moved or emptied"):
        engine.train_all(comparison, ends)


@pytest.mark.skipif(os.name == "nt", reason="a locked file can't be removed there")
def test_results_folder_that_was_removed_is_locked_again_by_the_same_notebook(tmp_path):
    lock = lock_results(tmp_path / "r")
    shutil.rmtree(tmp_path / "r")
    assert lock_results(tmp_path / "r") is lock
    try:
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; "
        code += f"from step2.files import lock_results; lock_results(Path({str(tmp_path / 'r')!r}))"
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "another notebook uses" in second.stderr
    finally:
        lock.release(force=True)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_kernel_interrupted_while_workers_start_keeps_none():
    manager, client = start_new_kernel(cwd=str(ROOT))
    try:
        code = (
            "import time; from step2.settings import read_settings; from step2.engine import local_cluster\n"
        )
        code += "with local_cluster(read_settings({'profile': 'quick', 'processes': 2}), 2): time.sleep(60)"
        client.execute(code)
        ends = time.monotonic() + 60
        while not workers_of(manager.provisioner.pid):
            assert time.monotonic() < ends, "no worker was started"
            time.sleep(0.02)
        manager.interrupt_kernel()
        reply = {"msg_type": ""}
        while reply["msg_type"] != "execute_reply":
            reply = client.get_shell_msg(timeout=60)
        assert reply["content"]["ename"] == "KeyboardInterrupt"
        _, left = psutil.wait_procs(workers_of(manager.provisioner.pid), timeout=10)
        assert not left
    finally:
        manager.shutdown_kernel(now=True)
        client.stop_channels()


def test_address_of_a_web_server_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as server:
        answer = b"HTTP/1.1 400 Bad Request\r\n\r\n"
        Thread(target=lambda: server.accept()[0].sendall(answer), daemon=True).start()
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(RuntimeError, match="no Dask scheduler at"), engine.client_of(address):
            pass


def test_cluster_whose_workers_would_train_several_runs_at_once_is_refused(monkeypatch):
    workers = {"a": {"nthreads": 1}, "b": {"nthreads": 4}}
    monkeypatch.setattr(engine, "Client", lambda *given, **how: nullcontext())
    monkeypatch.setattr(engine, "wait_for_workers", lambda client: workers)
    with pytest.raises(ValueError, match=r"4 threads .*--nthreads 1"), engine.client_of("tcp://a:1"):
        pass


def test_workers_in_other_folders_get_whole_paths(data, tmp_path, monkeypatch):
    monkeypatch.chdir(data.parent)
    weights = InitialWeights("mine.pt", "file", "mine.pt", "", "")
    comparison = make_comparison_for(Path(data.name), Path(os.path.relpath(tmp_path / "r")))
    sent = engine.with_whole_paths(replace(comparison, weights=weights))
    assert sent.settings.data == data and sent.settings.results.resolve() == (tmp_path / "r").resolve()
    assert Path(sent.weights.path) == data.parent / "mine.pt"
