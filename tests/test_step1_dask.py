"""Step 1 on a Dask cluster: a real scheduler and two workers on the loopback interface."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import plain_head, save_ct
from distributed import Client

import Step1_Image_Preprocessing as step1

pytestmark = pytest.mark.processes
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
WORKER = ["distributed.cli.dask_worker", "--nthreads", "1", "--no-nanny", "--no-dashboard"]


@pytest.fixture
def cluster(request, tmp_path):
    """Yield a scheduler's address, its process, and its two workers' (elsewhere: can't import Step 1)."""
    folder = tmp_path if getattr(request, "param", "") == "elsewhere" else None

    def spawn(*arguments):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen([sys.executable, "-m", *arguments], cwd=folder, **quiet)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    port = address.rsplit(":", 1)[1]
    scheduler = spawn(
        "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard"
    )
    workers = [spawn(*WORKER, address) for _ in range(2)]
    with Client(address, timeout="60s") as client:
        client.wait_for_workers(2, timeout=60)
    yield address, scheduler, workers
    for process in (*workers, scheduler):
        process.kill()
    for process in (*workers, scheduler):
        process.wait(20)


@pytest.fixture
def raw(tmp_path):
    for number in range(40):
        path = tmp_path / "raw" / "TrainingData" / "healthy" / f"{number:02}.dcm"
        save_ct(path, plain_head(128, 20 + number), WindowCenter=40, WindowWidth=80)
    (tmp_path / "raw" / "TrainingData" / "healthy" / "bad.dcm").write_bytes(b"no DICOM")
    return tmp_path / "raw"


def run(raw, output, *options):
    """Run Step 1; return its exit status and all PNGs."""
    out = raw.parent / output
    status = step1.main(["--raw-data", str(raw), "--output", str(out), *options])
    return status, {p.relative_to(out): p.read_bytes() for p in out.rglob("*.png")}


def test_same_bytes_as_locally(cluster, raw):
    address, *_ = cluster
    status, pngs = run(raw, "remote", "--dask", address)
    assert status == 1  # bad.dcm
    assert len(pngs) == 40 * 7 + 1
    assert (status, pngs) == run(raw, "local", "--jobs", "2")


@pytest.mark.parametrize("cluster", ["elsewhere"], indirect=True)
def test_the_script_as_users_start_it(cluster, raw):
    """Its folders are relative to where it is started, which is not where the workers are."""
    out, here = raw.parent / "out", raw / "TrainingData"
    command = [
        sys.executable,
        step1.__file__,
        "--raw-data",
        "..",
        "--output",
        "../../out",
        "--dask",
        cluster[0],
    ]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr  # bad.dcm
    assert len(list(out.rglob("*.png"))) == 40 * 7 + 1


def at_the_first_result(monkeypatch, act):
    """Call act once, when Step 1 records its first result, and never again."""
    record, actions = step1.record, [act]

    def act_then_record(ledger, source, fields):
        if actions:
            actions.pop()()
        record(ledger, source, fields)

    monkeypatch.setattr(step1, "record", act_then_record)


def send(sent, *processes):
    for process in processes:
        process.send_signal(sent)


@posix
def test_worker_killed_midway_loses_nothing(cluster, raw, monkeypatch):
    address, _, workers = cluster
    at_the_first_result(monkeypatch, lambda: send(signal.SIGKILL, workers[0]))
    status, pngs = run(raw, "remote", "--dask", address)
    assert workers[0].wait(20) == -signal.SIGKILL
    assert (status, pngs) == run(raw, "local", "--jobs", "2")


@posix
@pytest.mark.parametrize(
    ("lost", "sent", "said"),
    [
        ("workers", signal.SIGKILL, "had no worker, or gave no answer, for 3 s: start what is missing"),
        ("scheduler", signal.SIGSTOP, "had no worker, or gave no answer, for 3 s: start what is missing"),
        ("scheduler", signal.SIGKILL, "is gone: start it and its workers again"),
    ],
    ids=["workers killed", "scheduler hangs", "scheduler killed"],
)
def test_a_lost_cluster_ends_the_run(cluster, raw, monkeypatch, capsys, lost, sent, said):
    address, scheduler, workers = cluster
    monkeypatch.setattr(step1, "DASK_PATIENCE_S", 3)
    at_the_first_result(monkeypatch, lambda: send(sent, *(workers if lost == "workers" else [scheduler])))
    started = time.monotonic()
    assert run(raw, "remote", "--dask", address)[0] == 1
    assert time.monotonic() - started < 30
    errors = capsys.readouterr().err
    assert f"error: stopped, the Dask scheduler {address} {said}; what was done stays" in errors
    assert "Traceback" not in errors
    monkeypatch.undo()
    _, pngs = run(raw, "remote", "--jobs", "2")  # goes on
    assert len(pngs) == 40 * 7 + 1


def test_no_scheduler_is_a_usage_error(raw, capsys):
    started = time.monotonic()
    assert run(raw, "out", "--dask", "tcp://127.0.0.1:9")[0] == 2
    assert time.monotonic() - started < 30
    assert "no Dask scheduler" in capsys.readouterr().err
