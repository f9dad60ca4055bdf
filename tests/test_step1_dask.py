"""Step 1 on a Dask cluster: a real scheduler and two workers on the loopback interface."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import plain_head, save_ct

import Step1_Image_Preprocessing as step1

pytest.importorskip(
    "distributed", reason='the optional extra is not installed: pip install "dask[distributed]"'
)

pytestmark = pytest.mark.processes
WORKER = ["distributed.cli.dask_worker", "--nthreads", "1", "--no-dashboard", "--memory-limit", "0"]


@pytest.fixture
def cluster(request, tmp_path):
    """Yield a scheduler's address and the processes of its two workers (elsewhere: can't import Step 1)."""
    from distributed import Client

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
    yield address, workers
    for process in (*workers, scheduler):
        process.terminate()
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
    address, _ = cluster
    status, pngs = run(raw, "remote", "--dask", address)
    assert status == 1  # bad.dcm
    assert len(pngs) == 40 * 7 + 1
    assert (status, pngs) == run(raw, "local", "--jobs", "2")


@pytest.mark.parametrize("cluster", ["elsewhere"], indirect=True)
def test_the_script_as_users_start_it(cluster, raw):
    out = raw.parent / "out"
    command = [sys.executable, step1.__file__, "--raw-data", str(raw), "--output", str(out)]
    done = subprocess.run([*command, "--dask", cluster[0]], capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr  # bad.dcm
    assert len(list(out.rglob("*.png"))) == 40 * 7 + 1


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_worker_killed_midway_loses_nothing(cluster, raw, monkeypatch):
    address, workers = cluster
    record = step1.record

    def then_kill(ledger, source, fields):
        if len(workers) == 2:
            os.kill(workers.pop().pid, signal.SIGKILL)
        record(ledger, source, fields)

    monkeypatch.setattr(step1, "record", then_kill)
    status, pngs = run(raw, "remote", "--dask", address)
    assert len(workers) == 1
    monkeypatch.undo()
    assert (status, pngs) == run(raw, "local", "--jobs", "2")


def test_no_scheduler_is_a_usage_error(raw, capsys):
    started = time.monotonic()
    assert run(raw, "out", "--dask", "tcp://127.0.0.1:9")[0] == 2
    assert time.monotonic() - started < 30
    assert "no Dask scheduler" in capsys.readouterr().err


def test_absent_extra_names_the_package(raw, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert run(raw, "out", "--dask", "tcp://127.0.0.1:9")[0] == 2
    assert "dask[distributed]" in capsys.readouterr().err
