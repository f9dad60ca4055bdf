"""EfficientNet, its initial weights and its learning rate. A run's numbers depend on this file.

The network is efficientnet_pytorch's, of Tan and Le, EfficientNet, 2019.
"""

import math
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from efficientnet_pytorch import EfficientNet
from efficientnet_pytorch.utils import url_map

from step2.files import read_json, sha256, write_json
from step2.settings import Recipe, Settings
from step2.variants import require

MOUNTED = Path("/kaggle/input")  # where Kaggle shows data sets; there may be no internet beside them
NARROW = {"width_coefficient": 0.25, "depth_coefficient": 0.1, "dropout_rate": 0.1, "drop_connect_rate": 0.0}


def build_network(recipe: Recipe, momentum: float, outputs: int) -> EfficientNet:
    """Return an EfficientNet with so many outputs, one a class, and random weights from torch's seed.

    It pads for the image size it is built for, so it is always told. Its swish is PyTorch's SiLU: the
    library's own saves memory but is much slower. momentum: of batch norm, the weight of the newest batch.
    """
    name, narrow = recipe.model_name, {}
    if name == "efficientnet-narrow":  # a quarter of B0's channels, 7 of its 16 blocks
        name, narrow = "efficientnet-b0", NARROW
    how = {"image_size": recipe.image_size, "num_classes": outputs, "batch_norm_momentum": 1 - momentum}
    network = EfficientNet.from_name(name, **how, **narrow)
    network.set_swish(memory_efficient=False)
    pad_in_convolutions(network)
    return network


def pad_in_convolutions(network: EfficientNet) -> None:
    """Leave padding to the convolutions themselves where it is the same on all sides: the same sums, without a
    padded copy of each layer's input, which a step would write, read and keep for the backward pass."""
    for layer in network.modules():
        pad = getattr(layer, "static_padding", None)
        if isinstance(pad, torch.nn.ZeroPad2d) and len(set(pad.padding)) == 1:
            layer.padding, layer.static_padding = (pad.padding[0],) * 2, torch.nn.Identity()


def batch_norm_momentum(steps: int) -> float:
    """Return 0.01, the library's, for long runs; 0.1 for those that end before that settles."""
    return 0.01 if steps >= 2000 else 0.1


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Return the rate of a step, 0 to steps - 1: in equal parts, or one cycle with its peak at a quarter.

    It depends on the step alone, so a run that goes on after a stop needs no memory of it.
    """
    rates = recipe.rates
    if recipe.schedule == "steps":
        return rates[step * len(rates) // steps]
    progress = (step + 0.5) / steps
    if progress < 0.25:
        return rates[0] * (0.04 + 0.96 * (1 - math.cos(math.pi * progress / 0.25)) / 2)
    return rates[0] * (1 + math.cos(math.pi * (progress - 0.25) / 0.75)) / 2


# ---------------------------------------- initial weights


@dataclass(frozen=True)
class InitialWeights:
    """Where training starts: used is imagenet, file or none; note says in words what happened."""

    requested: str
    used: str
    path: str
    digest: str
    note: str

    def in_words(self) -> str:
        """Return what to write in titles."""
        words = {"none": "random initial weights", "file": "initial weights of a file"}
        return words.get(self.used, "ImageNet's initial weights")


def weights_note(settings: Settings) -> Path:
    """Return the file that keeps which initial weights a results folder began with."""
    return settings.results / f"initial_weights_{settings.model_name}.json"


def settle_weights(settings: Settings) -> InitialWeights:
    """Return the initial weights for this results folder: as settled earlier, if the request is the same.

    They are the same for all variants, also where a comparison goes on after a stop, or on another machine.
    """
    path = weights_note(settings)
    fields = read_json(path) or {}
    if path.exists() and not fields:
        print(f"{path} is damaged: the initial weights are settled again")
    if settings.weights == "auto" and set(fields) == set(InitialWeights.__dataclass_fields__):
        earlier = InitialWeights(**fields)
        if earlier.requested == "auto" and earlier.used == "imagenet":
            with suppress(OSError, RuntimeError):  # finished runs need no file, a new one will name it
                earlier = replace(earlier, path=str(download_imagenet(settings.model_name)))
        if earlier.requested == "auto":
            return earlier
    weights = find_weights(settings)
    write_json(path, asdict(weights))
    return weights


def find_weights(settings: Settings) -> InitialWeights:
    """Settle the initial weights: a file, ImageNet's, or none, asked for or for want of a download."""
    requested, name = settings.weights, settings.model_name
    if requested not in ("auto", "imagenet", "none"):
        digest = sha256(Path(requested))
        given = InitialWeights(requested, "file", requested, digest, f"initial weights from {requested}")
        # a wrong file is refused now, not in the first run; its classifier may be for any number of classes
        load_initial(build_network(settings, 0.1, outputs=2), given)
        return given
    if requested == "none":
        return InitialWeights(requested, "none", "", "", "random initial weights")
    try:
        require(name in url_map, f"there are none for {name}")
        path = download_imagenet(name)
    except (OSError, RuntimeError, ValueError) as err:
        why = f"ImageNet's can't be had ({err})"
        require(requested == "auto", f"weights = 'imagenet': {why}; set weights to a file, or to 'none'")
        return InitialWeights(requested, "none", "", "", f"random initial weights: {why}")
    digest = sha256(path)
    return InitialWeights(requested, "imagenet", str(path), digest, f"ImageNet weights, {path.name}")


def download_imagenet(name: str) -> Path:
    """Return the file of the library's ImageNet weights, downloaded unless it is on this machine and whole.

    Looked for in torch's cache and, by the library's name for it, in the data sets that are mounted.
    """
    url = url_map[name]
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    checksum = path.stem.rsplit("-", 1)[1]  # the start of its SHA-256
    for there in (path, *mounted_files(path.name)):
        if there.is_file() and sha256(there).startswith(checksum):
            return there
    path.parent.mkdir(parents=True, exist_ok=True)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # seconds without an answer; a closed network may never give one
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=checksum, progress=False)  # whole or not
    finally:
        socket.setdefaulttimeout(patience)
    return path


def mounted_files(name: str) -> Iterator[Path]:
    """Yield the files of this name that a mounted data set holds, at most four folders deep."""
    for depth in range(5):  # deeper could be long: RSNA-2019 is 750,000 files
        yield from sorted(MOUNTED.glob("*/" * depth + name))


def load_tensors(path: Path, advice: str) -> dict:
    """Return what torch.save wrote, tensors and plain values only; ValueError that names any other file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:
        wrong = f"{path} is missing, damaged or holds more than weights ({type(err).__name__})"
        raise ValueError(f"{wrong}: {advice}") from err
    require(isinstance(content, dict), f"{path} holds a {type(content).__name__}, no state dict: {advice}")
    return content


def load_initial(network: EfficientNet, weights: InitialWeights) -> None:
    """Load the initial weights; a classifier for other classes than these stays random."""
    if weights.used == "none":
        return
    advice = "set weights to a file that torch.save(model.state_dict(), file) wrote, or to 'none'"
    state, own = load_tensors(Path(weights.path), advice), network.state_dict()
    for key in ("_fc.weight", "_fc.bias"):
        if getattr(state.get(key), "shape", None) != own[key].shape:
            state[key] = own[key]
    shapes, expected = ({k: getattr(v, "shape", None) for k, v in part.items()} for part in (state, own))
    wrong = sorted(str(k) for k in shapes.keys() | expected.keys() if shapes.get(k) != expected.get(k))
    other = f"{weights.path} is for another network, {len(wrong)} tensors differ ({''.join(wrong[:1])})"
    require(not wrong, f"{other}: set model_name to that network's, or weights to another file")
    network.load_state_dict(state)
