"""Every parameter of the notebook with its limits, and the profiles. Uses pydantic for the checks."""

import difflib
import math
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

from dask.system import CPU_COUNT
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationError

from step2.variants import entries, require


def as_tuple(value: Any) -> Any:
    """Return rates as a tuple: papermill gives a number, a list, or text such as "6e-5,3e-5"."""
    return tuple(float(part) if isinstance(part, str) else part for part in entries(value))


FolderPath = Annotated[Path, Strict(False)]  # text will do
Rates = Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(as_tuple)]

FULL_NEEDS = 23e9  # bytes of GPU memory, what a card sold as 24 GB has; a step of 8 slices takes 15.5e9
AFTERWARDS = " (and restart the kernel, which still knows the old name)"

_TABLE: dict[str, tuple[Any, Any, Any]] = {  # parameter -> its value in full, in medium and in quick
    "model_name": ("efficientnet-b7", "efficientnet-b2", "efficientnet-narrow"),
    "image_size": (600, 260, 80),  # B2 was made for 260
    "epochs": (25, 15, 120),
    "batch_size": (8, 32, 30),  # 30: two steps an epoch fit 60 slices faster and surer than eight of 8 do
    "folds": (5, 5, 3),
    "repeats": (1, 1, 1),
    "weights": ("auto", "auto", "none"),
    "schedule": ("steps", "one cycle", "one cycle"),
    "rates": ((6e-5, 3e-5, 1e-5, 8e-6, 1e-6), (1e-3,), (1.6e-2,)),  # each for a fifth of the epochs; a peak
    "weight_decay": (0.0, 0.01, 0.05),
    "label_smoothing": (0.0, 0.1, 0.1),
    "rotation": (20.0, 20.0, 10.0),
    "shift": (2.0, 4.0, 3.0),
    "zoom": (0.0, 0.05, 0.05),
    "flips": ("hv", "h", "h"),
}
PROFILES: dict[str, dict[str, Any]] = {
    name: {parameter: values[i] for parameter, values in _TABLE.items()}
    for i, name in enumerate(("full", "medium", "quick"))
}


class Recipe(BaseModel):
    """What decides a run's numbers, besides its pictures, its fold and its initial weights."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    model_name: str = Field(pattern=r"^efficientnet-(b[0-8]|narrow)$", description="-b0 to -b8, or -narrow")
    image_size: int = Field(ge=32, le=2048, description="pixels")
    epochs: int = Field(ge=1, le=10_000, description="passes over the training slices")
    batch_size: int = Field(ge=4, le=4096, description="batch norm needs some slices at a time")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="any such number will do")
    mixed_precision: Literal["auto", "bf16", "fp16", "no"] = "auto"
    schedule: Literal["steps", "one cycle"]
    rates: Rates = Field(min_length=1, description="of equal parts, or the cycle's peak")
    weight_decay: float = Field(ge=0, description="of AdamW; 0 makes it Adam")
    label_smoothing: float = Field(ge=0, lt=1)
    rotation: float = Field(ge=0, le=180, description="augmentation: up to so many degrees either way")
    shift: float = Field(ge=0, description="augmentation: up to so many pixels either way")
    zoom: float = Field(ge=0, lt=1, description="augmentation: up to this fraction either way")
    flips: Literal["", "h", "v", "hv"] = Field(description="augmentation: horizontal, vertical")


class Settings(Recipe):
    """All parameters of the notebook: the recipe of each run, what is compared, and who trains."""

    profile: Literal["full", "medium", "quick"]
    why: str = Field("", description="this profile")
    data: FolderPath = Path("data_preprocessing")
    raw_data: FolderPath = Path("raw_data")
    results: FolderPath = Path("results")
    dataset: str = "auto"
    variants: Any = Field(None, description="checked by choose_variants, which knows the folders")
    control_run: bool = True
    equivalence: float = Field(1.0, gt=0, le=50, description="points of accuracy too few to matter")
    folds: int = Field(ge=1, le=100, description="1 is a single hold-out split")
    repeats: int = Field(ge=1, le=100, description="of the whole cross-validation")
    weights: str = Field(description="imagenet, none, auto, or a file")
    processes: int = Field(ge=1, le=256, description="that train at the same time, at most one for each GPU")
    cluster: str | None = Field(None, pattern=r"^[a-z]+://.+:\d+$", description="tcp://scheduler:8786")
    workers: int = Field(ge=0, le=256, description="threads that load pictures, for each process that trains")
    max_hours: float | None = Field(None, gt=0, description="from the settings cell to the last epoch's end")
    threads: int = Field(1, ge=1, le=256, description="of each process on the CPU")
    gpus: int = Field(0, ge=0, description="of this machine")

    def recipe(self) -> dict[str, Any]:
        """Return what decides a run's numbers, by name."""
        return self.model_dump(include=set(Recipe.model_fields), mode="json")

    def changed(self) -> dict[str, Any]:
        """Return what was set otherwise than in the profile."""
        usual = PROFILES[self.profile]
        return {name: getattr(self, name) for name in usual if getattr(self, name) != usual[name]}


def read_settings(
    given: Mapping[str, Any], gpus: int = 0, gpu_memory: float = math.inf, before: Iterable[str] | None = None
) -> Settings:
    """Return all settings: what was given, else the profile's; ValueError with a sentence for each wrong one.

    given: parameters by name, None for the profile's; a notebook's whole namespace if `before` tells which
    of its names are older than the parameters. A name that is no parameter is refused: it may be misspelt.
    Where the cell is run again, later cells have made names of their own, and only parameters are taken.
    gpu_memory: of the smallest GPU, bytes.
    """
    parameters = set(Settings.model_fields)
    if before is not None:
        old = set(given if isinstance(given.get("settings"), Settings) else before)
        old |= {k for k, v in given.items() if callable(v) or isinstance(v, ModuleType)}  # imports, no values
        given = {k: v for k, v in given.items() if k in parameters or (k not in old and k[0] != "_")}
    given = {name: value for name, value in given.items() if value is not None}
    profile, why = choose_profile(given.get("profile", "auto"), gpus, gpu_memory)
    workers = min(CPU_COUNT // gpus, 16) if gpus else 0
    one_each = {"gpus": gpus, "processes": gpus or min(CPU_COUNT, 8), "workers": workers}
    try:
        settings = Settings(**(PROFILES[profile] | one_each | given | {"profile": profile, "why": why}))
    except ValidationError as err:
        raise ValueError("\n".join(_sentence(dict(wrong)) for wrong in err.errors())) from None
    too_many = f"processes = {settings.processes}, but there are {gpus} GPUs: set processes to {gpus}"
    require(settings.cluster or settings.processes <= (gpus or settings.processes), too_many)
    one_peak = settings.schedule == "steps" or len(settings.rates) == 1
    peaks = f"rates = {settings.rates}: one cycle has one peak, set one rate, or schedule to 'steps'"
    require(one_peak, peaks)
    known_weights = settings.weights in ("auto", "imagenet", "none") or Path(settings.weights).is_file()
    choice = "there is no such file: correct the path, or choose one of auto, imagenet, none"
    require(known_weights, f"weights = {settings.weights!r}: {choice}")
    return settings


def choose_profile(wanted: Any, gpus: int, gpu_memory: float) -> tuple[str, str]:
    """Return the profile and why: the wanted one, or of "auto" what this machine can train."""
    names = ("auto", *PROFILES)
    require(wanted in names, f"profile = {wanted!r}: choose one of {', '.join(names)}")
    if wanted != "auto":
        return wanted, "asked for"
    if not gpus:
        unseen = "there is an NVIDIA driver, but PyTorch sees no GPU: if there is one, install PyTorch for that driver"
        return "quick", unseen if shutil.which("nvidia-smi") else "there is no CUDA GPU"
    has = f"the GPU has {gpu_memory / 1e9:.0f} GB"
    if gpu_memory < FULL_NEEDS:
        return "medium", f"{has}, full is for 24 and more"
    return "full", has


def _sentence(wrong: dict[str, Any]) -> str:
    """Return what pydantic found wrong in a sentence that says what to do."""
    name = str(wrong["loc"][0])
    if wrong["type"] == "extra_forbidden":
        known = [parameter for parameter in Settings.model_fields if parameter not in ("why", "gpus")]
        near = difflib.get_close_matches(name, known, n=1)
        advice = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}"
        return f"{name} is no parameter of this notebook: {advice}{AFTERWARDS * is_watched()}"
    if wrong["type"] == "path_type":
        return f"{name} = {wrong['input']!r}: set the path of a folder, as text"
    note = Settings.model_fields[name].description
    should = wrong["msg"].removeprefix("Input ").removeprefix("String ")
    return f"{name} = {wrong['input']!r}: {should}{f' ({note})' if note else ''}"


def is_watched() -> bool:
    """Tell whether somebody watches the output: a Jupyter page or a terminal, not papermill or nbconvert."""
    from IPython.core.getipython import get_ipython

    kernel = getattr(get_ipython(), "kernel", None)
    if kernel is not None:
        return bool(getattr(kernel, "_allow_stdin", False))  # papermill and nbconvert never allow input
    return sys.stderr.isatty()
