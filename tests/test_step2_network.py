"""The network, its learning rate and its initial weights: of a file, ImageNet's, or none and why."""

import hashlib
import socket
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from efficientnet_pytorch import EfficientNet
from step2_helpers import SIZE, make_settings

from step2.network import (
    batch_norm_momentum,
    build_network,
    download_imagenet,
    learning_rate,
    load_initial,
    load_tensors,
    mounted_files,
    settle_weights,
)
from step2.pictures import normalise
from step2.settings import read_settings

# ---------------------------------------- learning rate


def test_rates_of_the_full_profile_are_the_five_of_the_predecessor():
    recipe = read_settings({"profile": "full"})
    rates = [learning_rate(epoch * 10, 250, recipe) for epoch in range(25)]
    assert rates == [6e-5] * 5 + [3e-5] * 5 + [1e-5] * 5 + [8e-6] * 5 + [1e-6] * 5
    assert learning_rate(249, 250, recipe) == 1e-6


def test_one_cycle_rises_to_its_peak_and_falls_to_nothing():
    recipe = read_settings({"profile": "quick"})
    rates = np.array([learning_rate(step, 400, recipe) for step in range(400)])
    peak = recipe.rates[0]
    assert rates.argmax() in (99, 100) and rates.max() == pytest.approx(peak, rel=1e-3)
    assert (np.diff(rates[:100]) > 0).all() and (np.diff(rates[100:]) < 0).all()
    assert rates[0] < 0.05 * peak and 0 < rates[-1] < 1e-4 * peak


# ---------------------------------------- network


def test_colours_are_normalised_each_by_its_own_mean_and_spread():
    result = normalise(torch.tensor([[[[255]], [[0]], [[51]]]], dtype=torch.uint8))
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225]
    assert result.flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_grey_is_repeated_and_normalised_as_imagenet_weights_expect():
    result = normalise(torch.tensor([[[[0, 255]]]], dtype=torch.uint8))
    expected = torch.tensor([[-0.485 / 0.229, 0.515 / 0.229], [-0.456 / 0.224, 0.544 / 0.224]])
    assert result.shape == (1, 3, 1, 2)
    assert torch.allclose(result[0, :2, 0], expected)
    assert torch.allclose(result[0, 2, 0], torch.tensor([-0.406 / 0.225, 0.594 / 0.225]))


@pytest.mark.parametrize("size", [33, 64, 97])
def test_padding_is_that_of_the_image_size(size):
    torch.manual_seed(0)
    network = build_network(make_settings(model_name="efficientnet-b0", image_size=size), 0.1, 6).eval()
    dynamic = EfficientNet.from_name("efficientnet-b0", num_classes=6, image_size=None).eval()
    default = EfficientNet.from_name("efficientnet-b0", num_classes=6).eval()  # built for 224
    for other in (dynamic, default):
        other.load_state_dict(network.state_dict())
    picture = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        right, ours, wrong = (n.extract_features(picture) for n in (dynamic, network, default))
    assert torch.allclose(ours, right, atol=1e-5)
    if size == 33:
        assert ours.shape != wrong.shape or not torch.allclose(ours, wrong, atol=1e-5)


@pytest.mark.parametrize("size", [33, 64, 80, 97])
def test_padding_within_convolutions_changes_no_score(size):
    ours = build_network(make_settings(image_size=size, model_name="efficientnet-b0"), 0.1, 6).eval()
    library = EfficientNet.from_name("efficientnet-b0", image_size=size, num_classes=6).eval()
    library.load_state_dict(ours.state_dict())
    pictures = torch.rand(2, 3, size, size)
    left = [layer for layer in ours.modules() if isinstance(layer, torch.nn.ZeroPad2d)]
    assert (
        len(left) < len([layer for layer in library.modules() if isinstance(layer, torch.nn.ZeroPad2d)]) / 2
    )
    assert torch.allclose(ours(pictures), library(pictures), rtol=1e-4, atol=1e-5)


def test_short_runs_get_a_larger_batch_norm_momentum():
    assert batch_norm_momentum(1999) == 0.1 and batch_norm_momentum(2000) == 0.01
    assert build_network(make_settings(), 0.1, 6)._bn0.momentum == pytest.approx(0.1)


def test_narrow_network_has_a_quarter_of_b0s_channels_and_seven_of_its_blocks():
    network = build_network(make_settings(), 0.1, 6)
    ends = network._conv_stem.out_channels, network._conv_head.out_channels
    assert ends == (32 / 4, 1280 / 4) and len(network._blocks) == 7
    assert network._dropout.p == 0.1 and network._global_params.drop_connect_rate == 0


def test_swish_is_that_of_pytorch():
    assert isinstance(build_network(make_settings(), 0.1, 6)._swish, torch.nn.SiLU)


# ---------------------------------------- initial weights


@pytest.fixture
def results(tmp_path):
    """Return an empty results folder."""
    (tmp_path / "results").mkdir()
    return tmp_path / "results"


@pytest.fixture
def given(tmp_path):
    """Return a B0 for a thousand classes, whose weights lie in tmp_path/b0.pt."""
    torch.manual_seed(1)
    network = EfficientNet.from_name("efficientnet-b0", num_classes=1000, image_size=SIZE)
    torch.save(network.state_dict(), tmp_path / "b0.pt")
    return network


def settle(results: Path, weights: str | Path, **others):
    """Return the initial weights that B0 gets for this request."""
    wanted = {"model_name": "efficientnet-b0", "weights": str(weights), "results": results}
    return settle_weights(make_settings(**wanted | others))


def test_weights_of_a_file_are_used_and_its_classifier_replaced(given, results, tmp_path):
    weights = settle(results, tmp_path / "b0.pt")
    network = build_network(make_settings(model_name="efficientnet-b0"), 0.1, 6)
    load_initial(network, weights)
    assert torch.equal(network._conv_stem.weight, given._conv_stem.weight)
    assert network._fc.out_features == 6


def test_weights_of_a_file_are_noted_with_its_hash(given, results, tmp_path):
    weights = settle(results, tmp_path / "b0.pt")
    assert weights.digest == hashlib.sha256((tmp_path / "b0.pt").read_bytes()).hexdigest()
    assert (weights.used, weights.in_words()) == ("file", "initial weights of a file")


def test_weights_for_another_network_are_refused(given, results, tmp_path):
    sentence = r"b0\.pt is for another network, \d+ tensors differ .*: set model_name"
    with pytest.raises(ValueError, match=sentence):
        settle(results, tmp_path / "b0.pt", model_name="efficientnet-b1")


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (lambda path: torch.save([1, 2], path), r"wrong\.pt holds a list, no state dict: set weights to a"),
        (
            lambda path: path.write_bytes(b"PK half a file"),
            r"wrong\.pt is missing, damaged or .*set weights to",
        ),
        (lambda path: path.touch(), r"wrong\.pt is missing, damaged or .*: set weights to a file"),
        (lambda path: torch.save({"model": {}}, path), r"wrong\.pt is for another network"),
        (lambda path: torch.save({1: torch.zeros(1)}, path), r"wrong\.pt is for another network"),
        (lambda path: torch.save({"_fc.weight": 3}, path), r"wrong\.pt is for another network"),
    ],
    ids=["list", "half", "empty", "nested", "numbered", "number"],
)
def test_file_that_holds_no_weights_is_refused(results, tmp_path, write, sentence):
    write(tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match=sentence) as caught:
        settle(results, tmp_path / "wrong.pt")
    assert not list(results.iterdir()) and (tmp_path / "wrong.pt").is_file()
    assert "delete" not in str(caught.value)  # it is the user's own


def test_weights_with_code_in_them_are_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"model": Evil()}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="holds more than weights"):
        load_tensors(tmp_path / "weights.pt", "set another")
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def no_network(monkeypatch):
    """Let every download fail."""

    def fail(name: str) -> Path:
        raise OSError("no route to host")

    monkeypatch.setattr("step2.network.download_imagenet", fail)


def test_failed_download_falls_back_to_none_if_that_is_allowed(results, no_network):
    weights = settle(results, "auto")
    assert weights.used == "none" and "no route to host" in weights.note
    assert weights.in_words() == "random initial weights"


def test_failed_download_is_refused_where_imagenet_is_asked_for(results, no_network):
    with pytest.raises(
        ValueError, match=r"weights = 'imagenet': .*no route to host.*; set weights to a file"
    ):
        settle(results, "imagenet")


def test_what_was_settled_once_stays(results, no_network, monkeypatch):
    first = settle(results, "auto")
    monkeypatch.setattr("step2.network.download_imagenet", lambda name: pytest.fail("it was settled"))
    assert settle(results, "auto") == first


def test_another_request_is_settled_anew(results, no_network):
    assert settle(results, "none").note == "random initial weights"
    assert "no route to host" in settle(results, "auto").note


def test_downloaded_weights_are_used_and_found_again_elsewhere(given, results, tmp_path, monkeypatch):
    monkeypatch.setattr("step2.network.download_imagenet", lambda name: tmp_path / "b0.pt")
    first = settle(results, "auto")
    assert (first.used, first.path) == ("imagenet", str(tmp_path / "b0.pt"))
    monkeypatch.setattr("step2.network.download_imagenet", lambda name: tmp_path / "elsewhere.pt")
    again = settle(results, "auto")
    assert (again.path, again.digest) == (str(tmp_path / "elsewhere.pt"), first.digest)


def test_damaged_note_of_what_was_settled_is_made_again(results, no_network):
    first = settle(results, "auto")
    (note,) = results.iterdir()
    note.write_text("{")
    assert settle(results, "auto") == first


def test_damaged_download_is_fetched_again(tmp_path, monkeypatch):
    whole, fetched = b"weights", []
    name = f"b0-{hashlib.sha256(whole).hexdigest()[:8]}.pth"

    def fetch(url, path, **_):
        fetched.append(url)
        Path(path).write_bytes(whole)

    monkeypatch.setattr("step2.network.url_map", {"efficientnet-b0": f"https://nowhere.invalid/{name}"})
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    path = download_imagenet("efficientnet-b0")
    assert (
        download_imagenet("efficientnet-b0") == path == tmp_path / "checkpoints" / name and len(fetched) == 1
    )
    path.write_bytes(b"weight")
    assert download_imagenet("efficientnet-b0").read_bytes() == whole and len(fetched) == 2


@pytest.mark.parametrize("error", [None, OSError("no route to host")])
def test_download_waits_20_s_for_an_answer_and_other_sockets_as_long_as_before(tmp_path, monkeypatch, error):
    patience = []

    def fetch(url, path, **_):
        patience.append(socket.getdefaulttimeout())
        if error:
            raise error

    monkeypatch.setattr("step2.network.url_map", {"b0": "https://nowhere.invalid/b0-00000000.pth"})
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    with pytest.raises(OSError, match="no route") if error else nullcontext():
        download_imagenet("b0")
    assert patience == [20] and socket.getdefaulttimeout() is None


def test_mounted_data_sets_are_searched_four_folders_deep(tmp_path, monkeypatch):
    monkeypatch.setattr("step2.network.MOUNTED", tmp_path)
    for folder in ("1/2/3/4", "1/2/3/4/5"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "b0.pth").touch()
    assert list(mounted_files("b0.pth")) == [tmp_path / "1/2/3/4/b0.pth"]


def test_narrow_network_has_no_imagenet_weights(results):
    assert "there are none" in settle(results, "auto", model_name="efficientnet-narrow").note
