"""Who trains the runs: this process, a Dask cluster on this machine, or one that is there already.

Dask (dask.distributed) hands each run to a worker process, and to another one if that dies. Runs are the same
wherever they are trained, byte for byte, as long as the processor is.
"""

import logging
import math
import os
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import dask
from distributed import Client, Future, Nanny, Scheduler, SpecCluster, get_worker
from distributed.scheduler import KilledWorker
from tqdm.auto import tqdm

from Step1_Image_Preprocessing import interrupts_blocked
from step2.network import weights_note
from step2.runs import LOADED, Comparison, Run, code_digest, complete_run, is_complete, remove_damaged
from step2.sessions import part_in_words, whole_part
from step2.settings import Settings, is_watched
from step2.training import OutOfTime
from step2.variants import require

PATIENCE_S = 40  # without any worker, or without the scheduler, before giving up
CONNECT_S = 20  # for a scheduler to answer
LINE_EVERY_S = 60  # of progress, where nobody watches
FOR_MEMORY = "most often for want of memory: lower processes, batch_size or image_size, and run again"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# of glibc: Dask's own settings give memory back at once, which doubles the time of a step on a CPU
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": 1 << 30, "MALLOC_MMAP_THRESHOLD_": 1 << 30}
ROOT = Path(__file__).resolve().parents[1]


def train_all(comparison: Comparison, ends: float = math.inf) -> Comparison:
    """Train every run that isn't complete, and print how it goes; what a kill left behind is used.

    ends: when training has to be over, in seconds since 1970. Returns the comparison of the folds that are
    whole by then. RuntimeError, with what to do, where there is none, or workers die or can't be reached.
    """
    comparison = replace(comparison, only=None)  # where this is run again, it is a part by now
    for line in remove_damaged(comparison):
        print(line)
    waiting = [run for run in comparison.runs if not is_complete(comparison, run)]
    print(f"{len(comparison.runs)} runs, {len(waiting)} of them to train", flush=True)
    ended = train_waiting(comparison, waiting, ends) if waiting else 0
    missing = [run for run in waiting if not is_complete(comparison, run)]
    gone = ended - (len(waiting) - len(missing))
    if gone > 0:
        lost = f"{gone} runs were trained, but {comparison.settings.results} lacks their files"
        raise RuntimeError(f"{lost}: was it moved or emptied? Put it back, and run the notebook again")
    whole = whole_part(comparison, missing)
    if part := part_in_words(whole):
        print(f"max_hours is over: what follows is about {part} alone; run the notebook again for the rest")
    return whole


def train_waiting(comparison: Comparison, waiting: list[Run], ends: float) -> int:
    """Train these runs as far as the time goes, here or on Dask's workers; return how many were finished."""
    settings, before = comparison.settings, len(comparison.runs) - len(waiting)
    with closing(Progress(comparison, before)) as progress:
        if settings.processes == 1 and not settings.cluster:
            train_here(comparison, waiting, progress, ends)
            return progress.finished - before
        cluster = client_of(settings.cluster) if settings.cluster else local_cluster(settings, len(waiting))
        with cluster as client:
            train_on(client, comparison, waiting, progress, ends)
        return progress.finished - before


def train_here(comparison: Comparison, waiting: list[Run], progress: "Progress", ends: float) -> None:
    """Train in this process, one run after the other; none is begun after one that ran out of time."""
    cv2.setNumThreads(0)
    with suppress(OutOfTime):
        for run in waiting:
            progress.finish(run, complete_run(comparison, run, partial(progress.tell, str(run)), ends))


# ---------------------------------------- Dask


def train_on_worker(comparison: Comparison, run: Run, ends: float) -> dict[str, Any]:
    """Train a run in a Dask worker, and tell the notebook how far it is twice a second."""
    same = comparison.code == LOADED
    require(same, "this worker has another version of step2/: restart the kernel, and a cluster's workers")
    settings = comparison.settings
    needed = settings.data / "manifest.csv", weights_note(settings)
    unseen = " nor ".join(str(path) for path in needed if not path.is_file())
    require(not unseen, f"a worker doesn't see {unseen}: show that folder at the same path on all machines")
    cv2.setNumThreads(0)
    worker, told = get_worker(), 0.0
    key = worker.get_current_task()

    def tell(epochs: float) -> None:
        nonlocal told
        task = worker.state.tasks.get(key)
        if task is None or task.state != "executing":
            raise RuntimeError(f"{run} was withdrawn: the notebook was interrupted, or is gone")
        if time.monotonic() - told > 0.5:
            told = time.monotonic()
            worker.log_event(topic_of(comparison), {"run": str(run), "epochs": epochs})

    return complete_run(comparison, run, tell, ends)


def topic_of(comparison: Comparison) -> str:
    """Return what the news of a comparison is called: a cluster may train for several notebooks."""
    return f"step2-progress {comparison.settings.results}"


@contextmanager
def local_cluster(settings: Settings, runs: int) -> Iterator[Client]:
    """Start workers on this machine, one thread and one GPU each, that listen to this machine alone."""
    options = {
        "distributed.worker.daemon": False,  # daemons could not start processes, as torch.compile may
        "distributed.comm.timeouts.connect": "10s",
        "distributed.nanny.pre-spawn-environ": KEEP_MEMORY,
        "distributed.worker.profile.enabled": False,
        "distributed.admin.system-monitor.gil.enabled": False,
    }
    workers, visible = {}, os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "").split(",")
    for number in range(min(settings.processes, runs)):
        env = dict.fromkeys(THREADS, str(settings.threads))
        if settings.gpus:  # of those that this process may use
            env |= {"CUDA_VISIBLE_DEVICES": visible[number] if visible[0] else str(number)}
        how = {"nthreads": 1, "host": "127.0.0.1", "memory_limit": 0, "dashboard": False}
        workers[number] = {"cls": Nanny, "options": {**how, "env": env, "silence_logs": logging.CRITICAL}}
    shown = find_spec("bokeh") is not None
    listen = {"host": "127.0.0.1", "dashboard": shown, "dashboard_address": "127.0.0.1:0"}
    with (
        dask.config.set(options),
        tempfile.TemporaryDirectory(prefix="step2-", ignore_cleanup_errors=True) as folder,
        dask.config.set({"temporary-directory": folder}),
        interrupt_free(SpecCluster, workers, scheduler={"cls": Scheduler, "options": listen}) as cluster,
        Client(cluster) as client,
    ):
        if shown:
            print(f"Dask's dashboard: {client.dashboard_link}", flush=True)
        yield client


def interrupt_free(start: Callable, *args: Any, **options: Any) -> Any:
    """Return start(...), whose threads and processes leave an interrupt to the notebook, which ends them."""
    try:
        with interrupts_blocked(), ThreadPoolExecutor(1) as thread:
            starting = thread.submit(start, *args, **options, silence_logs=logging.ERROR)
            return starting.result()
    except KeyboardInterrupt:  # which other threads of a kernel don't block; by now all has started
        starting.result().close()
        raise
    except RuntimeError as err:
        raise RuntimeError(f"the processes that train could not be started ({err}), {FOR_MEMORY}") from err


@contextmanager
def client_of(address: str) -> Iterator[Client]:
    """Connect to a scheduler that is there, and send its workers this code."""
    try:
        client = Client(address, timeout=CONNECT_S, set_as_default=False)
    # TypeError: tls:// without certificates; MemoryError: "HTTP/1.1" of a web server, taken for a length
    except (OSError, TypeError, ValueError, MemoryError) as err:
        advice = "start dask scheduler and its workers, or leave the parameter cluster out"
        raise RuntimeError(f"no Dask scheduler at {address} ({err}): {advice}") from err
    with client, tempfile.TemporaryDirectory() as folder:
        workers = wait_for_workers(client)
        threads = max((worker["nthreads"] for worker in workers.values()), default=1)
        one = "dask worker ADDRESS --nthreads 1 --nworkers N"
        require(threads == 1, f"a worker with {threads} threads would train as many runs at once: {one}")
        client.upload_file(str(zip_code(Path(folder))))
        print(f"{len(workers)} Dask workers, dashboard: {client.dashboard_link}", flush=True)
        yield client


def zip_code(folder: Path) -> Path:
    """Write this project's modules to a zip that Python can import from, and return its path."""
    path = folder / f"step2-{code_digest()[:10]}.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for module in [ROOT / "Step1_Image_Preprocessing.py", *sorted((ROOT / "step2").glob("*.py"))]:
            archive.write(module, module.relative_to(ROOT))
    return path


def wait_for_workers(client: Client) -> dict[str, Any]:
    """Return the workers as soon as there is one; RuntimeError if none comes."""
    try:
        client.wait_for_workers(1, timeout=PATIENCE_S)
    except OSError as err:  # none came in time, or the scheduler is gone
        text = f"the Dask scheduler is gone, or has had no worker for {PATIENCE_S} s: start some, run again"
        raise RuntimeError(text) from err
    return client.scheduler_info(n_workers=-1)["workers"]


def train_on(
    client: Client, comparison: Comparison, waiting: list[Run], progress: "Progress", ends: float
) -> None:
    """Have all runs trained by Dask's workers; the first error ends the rest.

    The first one that runs out of time ends those that have not begun; the others train while they can.
    """
    order, sent = {"pure": False, "retries": 0}, with_whole_paths(comparison)
    topic = topic_of(sent)
    client.subscribe_topic(topic, lambda event: progress.note(event[1]["run"], event[1]["epochs"]))
    futures = {client.submit(train_on_worker, sent, run, ends, **order): run for run in waiting}
    seen = time.monotonic()
    try:
        while futures:
            for future in [future for future in futures if future.done()]:
                run = futures.pop(future)
                try:
                    progress.finish(run, result_of(future, run))
                except OutOfTime:
                    begun = {f for f, run in futures.items() if f.done() or str(run) in progress.at_work}
                    client.cancel([f for f in futures if f not in begun], force=True)
                    futures = {f: run for f, run in futures.items() if f in begun}
            if client.status == "running" and client.scheduler_info(n_workers=-1)["workers"]:
                seen = time.monotonic()
            if time.monotonic() - seen > PATIENCE_S:
                lost = "all Dask workers are gone" if client.status == "running" else "the scheduler is gone"
                again = "start them again, and run again: at most two epochs of each run are lost"
                advice = again if comparison.settings.cluster else FOR_MEMORY
                raise RuntimeError(f"{lost}, for over {PATIENCE_S} s: {advice}")
            progress.show()
            time.sleep(0.5)  # more often would take a tenth of a core from the training
    finally:
        client.unsubscribe_topic(topic)
        if futures and client.status == "running":
            client.cancel(list(futures), force=True)


def with_whole_paths(comparison: Comparison) -> Comparison:
    """Return the comparison for workers that run in other folders."""
    settings, weights = comparison.settings, comparison.weights
    folders = {"data": settings.data.absolute(), "results": settings.results.absolute()}
    path = str(Path(weights.path).absolute()) if weights.path else ""
    whole = settings.model_copy(update=folders)
    return replace(comparison, settings=whole, weights=replace(weights, path=path))


def result_of(future: Future, run: Run) -> dict[str, Any]:
    """Return what a run noted; RuntimeError, with what to do, where its workers were killed."""
    if future.status == "cancelled":
        advice = "start it if it was yours, and run again: at most two epochs of each run are lost"
        raise RuntimeError(f"the Dask scheduler is gone: {advice}")
    try:
        return future.result()
    except KilledWorker as err:
        killed = f"its worker process died {err.allowed_failures + 1} times"
        raise RuntimeError(f"{run}: {killed}, {FOR_MEMORY}") from err


# ---------------------------------------- progress


class Progress:
    """How far the whole comparison is, in epochs: a bar where somebody watches, else a line now and then."""

    def __init__(self, comparison: Comparison, finished: int):
        self.epochs, self.began = comparison.settings.epochs, time.monotonic()
        self.at_work: dict[str, float] = {}
        self.runs, self.finished = len(comparison.runs), finished
        self.done_before, self.drawn = self.epochs * finished, time.monotonic()
        self.watched = is_watched()
        total = self.epochs * self.runs
        self.bar = tqdm(total=total, initial=self.done_before, unit="epoch", disable=not self.watched)

    def note(self, run: str, epochs: float) -> None:
        """Keep how many epochs of a run are done; those of an earlier session took no time in this one."""
        if run not in self.at_work:
            self.done_before += max(math.ceil(epochs) - 1, 0)
        self.at_work[run] = epochs

    def tell(self, run: str, epochs: float) -> None:
        """Keep it, and show it from time to time."""
        self.note(run, epochs)
        self.show()

    def finish(self, run: Run, done: dict[str, Any]) -> None:
        """Count a finished run and say so in a line."""
        self.at_work.pop(str(run), None)
        self.finished += 1
        line = f"{run}  held-out accuracy {done['accuracy']:.3f}, {done['seconds']:.0f} s"
        tqdm.write(f"{line}  ({self.finished} of {self.runs})")

    def show(self) -> None:
        """Draw the bar, or print a line if the last one is old."""
        now, epochs = time.monotonic(), self.epochs * self.finished + sum(list(self.at_work.values()))
        if now - self.drawn < (0.5 if self.watched else LINE_EVERY_S):
            return
        self.drawn = now
        if self.watched:
            self.bar.n = round(epochs, 1)
            self.bar.refresh()
            return
        total, here = self.epochs * self.runs, epochs - self.done_before
        line = f"{epochs:.0f} of {total} epochs"
        if here > 0:
            line += f", about {(total - epochs) * (now - self.began) / here / 60:.1f} minutes left"
        print(line, flush=True)

    def close(self) -> None:
        """Leave the bar as it ended."""
        self.bar.n = self.epochs * self.finished
        self.bar.close()
