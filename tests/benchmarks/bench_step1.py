"""Time Step 1: against the sum of its library calls, on two cores, and against other ways to PNGs.

    python tests/benchmarks/bench_step1.py                  # on the shipped phantoms
    python tests/benchmarks/bench_step1.py --dicoms DIR --slices 200 --rounds 5
    python tests/benchmarks/bench_step1.py --ways library seven program    # only ways with one of these words

Prints one table: milliseconds a slice, median, minimum and maximum of the rounds, slices a second at best, and
the ratios. All ways run in turn, round by round, so that a change of the machine's speed meets them alike; the
ratios are medians of those within a round. For a statement, nothing else may run on the machine.

What limits it. One slice in seven variants is one read and decode, two CLAHE, two bilateral filters and seven
PNGs; the rest (HU, windows, masks, files) may add 15 % at most. 60 % of the library calls is OpenCV's bilateral
filter, 0.2 microseconds a pixel of the head, and the pictures shall be its; in strips as wide as the head it
needs 15 % less for the same pixels. The predecessor's way, each stage reading the PNGs of the one before in one
process, takes about three times the program's time on two cores; the library calls alone, in strips and shared
by two cores without any loss, would be four times as fast as that way.

Measured on 2 cores of another AMD EPYC, 105 phantoms, 2026-11-26: library calls 118, in strips 98; seven variants in
one process 125; the program, its start counted, 145 on one process and 84 on two. The same day on a third one, 100
phantoms: 108, in strips 105; 138; 161 and 93. There, creating a file takes 1.4 ms, a tenth of a slice's time. On a
fourth, where it takes 0.2: 125, in strips 111; 139, ratio 1.10 (six rounds; 1.17 in seven beside another program).

Measured before on 2 cores of an AMD EPYC with nothing else running, 250 phantoms, most of them compressed, ms a
slice: library calls 85, in strips 72; seven variants in one process 81; the program on 1 and 2 processes 87 and
48, on 5,040 slices 43, at most 285 MB a process (257 MB with 1,050 slices); the predecessor's way 139. Variant 0
alone 12; the same kind of picture by pydicom and OpenCV 13, dicom2jpg 13, DCMTK 22, matplotlib 38.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pydicom

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import Step1_Image_Preprocessing as step1  # noqa: E402 - from the folder above

# ---------------------------------------- the limit: the library calls of all seven variants


def library_calls(in_strips: bool) -> Callable:
    """Return a way: one read and decode, two CLAHE, two bilateral filters, seven PNG encodes, a slice.

    The bilateral filter is of the head's box, or in strips as Step 1 has it.
    """

    def way(paths: list[Path], out: Path) -> None:
        equalise = cv2.createCLAHE(step1.CLAHE_CLIP, step1.CLAHE_TILES)
        for path, images in zip(paths, PREPARED, strict=True):
            pydicom.dcmread(path).pixel_array  # noqa: B018 - decodes
            for source, equalised, box in images["clahe"]:
                equalise.apply(source)
                if in_strips:
                    step1.bilateral(equalised)
                else:
                    cv2.bilateralFilter(equalised.image[box], 20, 50, 50)
            for image in images["written"]:
                cv2.imencode(".png", image)

    return way


PREPARED: list[dict] = []


def prepare(paths: list[Path]) -> None:
    """Make, outside the clock, the arrays that library_calls works on."""
    for path in paths:
        ds = step1.read_dicom(path)
        hu, _ = step1.hounsfield(step1.decode(ds), ds)
        after = step1.step_runner(step1.whole_slice(hu, step1.dicom2png(hu, ds)[0], step1.BRAIN_WINDOW))
        sources = [after(("roi",)), after(("roi", "noblank"))]
        filtered = []
        for source in sources:
            x, y, w, h = cv2.boundingRect(source.mask.astype(np.uint8))
            box = np.s_[max(y - 10, 0) : y + h + 10, max(x - 10, 0) : x + w + 10]
            filtered += [(source.image, step1.clahe(source), box)] if w else []
        PREPARED.append(
            {
                "clahe": filtered,
                "written": [after(steps).image for steps in step1.VARIANTS.values()],
            }
        )


# ---------------------------------------- ways to the PNGs


def one_process(variants: tuple[str, ...]) -> Callable:
    """Return a way: Step 1's own work on each file, in this process."""

    def way(paths: list[Path], out: Path) -> None:
        settings = step1.Settings(out, step1.BRAIN_WINDOW, b"k" * 32)
        for number, path in enumerate(paths):
            step1.process(step1.Task(path.name, path, f"{number}.png", variants), settings)

    return way


def whole_program(jobs: int) -> Callable:
    """Return a way: the script as users start it, with start-up, manifest and preview."""

    def way(paths: list[Path], out: Path) -> None:
        raw = out / "raw"
        (raw / "TestingData").mkdir(parents=True)
        for number, path in enumerate(paths):
            shutil.copy(path, raw / "TestingData" / f"{number}.dcm")
        command = [sys.executable, str(ROOT / "Step1_Image_Preprocessing.py"), "--raw-data", str(raw)]
        subprocess.run(
            [*command, "--output", str(out / "png"), "--jobs", str(jobs)], check=True, capture_output=True
        )

    return way


def stage_by_stage(paths: list[Path], out: Path) -> None:
    """The predecessor's way, written anew: each stage reads the PNGs of the one before, in one process.

    Window by the slice's min and max, ROI by the largest contour, white margin above grey 254.
    """

    def stage(name: str, source: str, change: Callable) -> None:
        (out / name).mkdir()
        for path in sorted((out / source).iterdir()):
            cv2.imwrite(str(out / name / path.name), change(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)))

    def roi(image: np.ndarray) -> np.ndarray:
        contours, _ = cv2.findContours((image > 0).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        mask = np.zeros_like(image)
        if contours:
            cv2.drawContours(mask, [max(contours, key=cv2.contourArea)], 0, 255, -1)
        return cv2.bitwise_and(image, mask)

    (out / "0").mkdir()
    for number, path in enumerate(paths):
        ds = pydicom.dcmread(path)
        hu = ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
        center, width = (int(np.atleast_1d(ds[k].value)[0]) for k in ("WindowCenter", "WindowWidth"))
        image = np.clip(hu, center - width // 2, center + width // 2)
        image = (image - image.min()) / max(image.max() - image.min(), 1) * 255
        cv2.imwrite(str(out / "0" / f"{number}.png"), image.astype(np.uint8))
    equalise = cv2.createCLAHE(5.0, (8, 8)).apply
    stage("1", "0", roi)
    stage("2", "1", equalise)
    stage("3", "2", lambda image: cv2.bilateralFilter(image, 20, 50, 50))
    stage("4", "1", lambda image: cv2.threshold(image, 254, 255, cv2.THRESH_TOZERO_INV)[1])
    stage("5", "4", equalise)
    stage("6", "5", lambda image: cv2.bilateralFilter(image, 20, 50, 50))


def pydicom_opencv(paths: list[Path], out: Path) -> None:
    """What many scripts do: pydicom, its VOI window, OpenCV."""
    for number, path in enumerate(paths):
        ds = pydicom.dcmread(path)
        shown = pydicom.pixels.apply_voi_lut(pydicom.pixels.apply_modality_lut(ds.pixel_array, ds), ds)
        shown = (shown - shown.min()) / max(shown.max() - shown.min(), 1) * 255
        cv2.imwrite(str(out / f"{number}.png"), shown.astype(np.uint8))


def pydicom_matplotlib(paths: list[Path], out: Path) -> None:
    """What tutorials do: pydicom and matplotlib.imsave."""
    import matplotlib.image

    for number, path in enumerate(paths):
        ds = pydicom.dcmread(path)
        matplotlib.image.imsave(out / f"{number}.png", ds.pixel_array, cmap="gray")


def dcmtk(paths: list[Path], out: Path) -> None:
    """DCMTK's converter, a process a file, with the header's first window."""
    program = shutil.which("dcm2img") or shutil.which("dcmj2pnm")
    assert program, "DCMTK is not installed"
    for number, path in enumerate(paths):
        subprocess.run(
            [program, "+on", "+Wi", "1", str(path), str(out / f"{number}.png")], capture_output=True
        )


def dicom2jpg(paths: list[Path], out: Path) -> None:
    """The package dicom2jpg, made for this."""
    import dicom2jpg as package  # type: ignore[import-not-found]

    for path in paths:
        package.dicom2png(str(path), target_root=str(out), multiprocessing=False)


# ---------------------------------------- measuring


def measure(ways: dict[str, Callable], paths: list[Path], rounds: int) -> dict[str, list[float]]:
    """Return milliseconds a slice of each way in each round; a warm-up round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            with tempfile.TemporaryDirectory(dir=ARGS.scratch) as folder:
                started = time.perf_counter()
                way(paths, Path(folder))
                if number:
                    times[name].append((time.perf_counter() - started) / len(paths) * 1e3)
    return times


def report(times: dict[str, list[float]]) -> None:
    """Print milliseconds a slice, then the ratios that the project promises."""
    print(f"{'ms a slice':44}{'median':>9}{'min':>9}{'max':>9}{'slices/s':>10}")
    for name, values in times.items():
        line = f"{name:44}{statistics.median(values):9.2f}{min(values):9.2f}{max(values):9.2f}"
        print(f"{line}{1e3 / min(values):10.1f}")
    for text, upper, lower in RATIOS:
        if upper in times and lower in times:
            ratio = statistics.median(u / v for u, v in zip(times[upper], times[lower], strict=True))
            print(f"{text:62}{ratio:6.2f}")


RATIOS = (
    (
        "seven variants / sum of library calls, one core (goal 1.15)",
        "seven variants, one process",
        "library calls",
    ),
    (
        "seven variants / the same with the filter in strips",
        "seven variants, one process",
        "library calls, bilateral in strips",
    ),
    ("whole program, 1 job / 2 jobs (goal 1.8)", "whole program, 1 job", "whole program, 2 jobs"),
    (
        "stage by stage / whole program on 2 cores",
        "stage by stage, one process",
        "whole program, 2 jobs",
    ),
    ("pydicom + OpenCV / variant 0 (goal 1)", "pydicom + OpenCV", "variant 0, one process"),
    ("pydicom + matplotlib / variant 0 (goal 1)", "pydicom + matplotlib", "variant 0, one process"),
    ("DCMTK / variant 0 (goal 1)", "DCMTK", "variant 0, one process"),
    ("dicom2jpg / variant 0 (goal 1)", "dicom2jpg", "variant 0, one process"),
)


def main() -> None:
    """Run all ways on the same files and print the table."""
    step1.plain_opencv()
    found = sorted(p for p in ARGS.dicoms.rglob("*") if p.suffix == ".dcm")
    paths = (found * (ARGS.slices // max(len(found), 1) + 1))[: ARGS.slices]
    prepare(paths)
    ways = {
        "library calls": library_calls(in_strips=False),
        "library calls, bilateral in strips": library_calls(in_strips=True),
        "seven variants, one process": one_process(tuple(step1.VARIANTS)),
        "whole program, 1 job": whole_program(1),
        "whole program, 2 jobs": whole_program(2),
        "stage by stage, one process": stage_by_stage,
        "variant 0, one process": one_process(("0_Dicom2PNG",)),
        "pydicom + OpenCV": pydicom_opencv,
        "pydicom + matplotlib": pydicom_matplotlib,
    }
    if shutil.which("dcm2img") or shutil.which("dcmj2pnm"):
        ways["DCMTK"] = dcmtk
    try:
        import dicom2jpg as _  # noqa: F401
    except ImportError:
        print("dicom2jpg is not installed: left out")
    else:
        ways["dicom2jpg"] = dicom2jpg
    if ARGS.ways:
        ways = {name: way for name, way in ways.items() if any(word in name for word in ARGS.ways)}
    print(
        f"{len(paths)} slices, {ARGS.rounds} rounds, OpenCV {cv2.__version__}, pydicom {pydicom.__version__}"
    )
    report(measure(ways, paths, ARGS.rounds))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dicoms", type=Path, default=ROOT / "raw_data", help="folder of slices (default: raw_data)"
    )
    parser.add_argument(
        "--slices", type=int, default=100, help="slices a round, repeated if too few (default: 100)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds after the warm-up (default: 5)")
    parser.add_argument(
        "--ways", nargs="+", metavar="WORD", help="only ways with one of these in their names"
    )
    parser.add_argument("--scratch", type=Path, help="folder for what is written (default: the system's)")
    ARGS = parser.parse_args()
    main()
