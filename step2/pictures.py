"""PNGs, augmentation and batches: what a network is fed with. A run's numbers depend on this file."""

import hashlib
import math
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import psutil
import torch

from step2.settings import Recipe, Settings
from step2.variants import require

PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as its weights expect
Key = tuple[int | None, int]  # epoch, None: not augmented; number of the slice
Batch = tuple[torch.Tensor, torch.Tensor]  # pictures, uint8 (n, 1 or 3, size, size); their numbers, int (n,)


def png_is_whole(content: bytes) -> bool:
    """Tell whether a PNG has all its chunks with their right check sums (PNG specification, 5.3)."""
    position, kind = 8, b""
    while content[:8] == b"\x89PNG\r\n\x1a\n" and position + 12 <= len(content):
        length = int.from_bytes(content[position : position + 4])
        kind, end = content[position + 4 : position + 8], position + 8 + length
        if zlib.crc32(content[position + 4 : end]) != int.from_bytes(content[end : end + 4]):
            return False
        position = end + 4
    return kind == b"IEND"


def read_content(path: Path) -> bytes:
    """Return a PNG's bytes; ValueError with the remedy where it is missing or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        content = b""
    wrong = "damaged: delete it, and" if content else "missing or empty:"
    require(png_is_whole(content), f"{path} is {wrong} run Step1_Image_Preprocessing.py to make it again")
    return content


def has_colour(content: bytes) -> bool:
    """Tell whether a PNG says that it has colours (PNG specification, 11.2.2)."""
    return bool(content[25] & 2)


def decode(content: bytes) -> np.ndarray | None:
    """Return a PNG's picture, uint8, grey (h, w) or RGB (h, w, 3); None where it is broken."""
    way = cv2.IMREAD_COLOR if has_colour(content) else cv2.IMREAD_GRAYSCALE
    picture = cv2.imdecode(np.frombuffer(content, np.uint8), way)
    return picture if picture is None or picture.ndim == 2 else cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def read_png(path: Path, size: int) -> np.ndarray:
    """Return a picture, uint8 grey (size, size) or RGB (size, size, 3).

    It is padded with black to a square before it is resized.
    """
    picture = decode(read_content(path))
    if picture is None:
        raise ValueError(f"{path} can't be decoded: delete it and run Step1_Image_Preprocessing.py")
    down, right = (max(picture.shape[:2]) - length for length in picture.shape[:2])
    edges = (down // 2, down - down // 2, right // 2, right - right // 2)
    picture = cv2.copyMakeBorder(picture, *edges, cv2.BORDER_CONSTANT, value=0)
    way = cv2.INTER_AREA if len(picture) > size else cv2.INTER_LINEAR
    return picture if len(picture) == size else cv2.resize(picture, (size, size), interpolation=way)


def pictures_digests(folder: Path, *parts: Sequence[str]) -> list[str]:
    """Return a hash of each part's names and bytes, so that a changed or renamed picture is noticed.

    ValueError, naming two pictures, where some are grey and some have colours.
    """

    def look(image: str) -> tuple[bytes, bool]:
        content = read_content(folder / image)
        return hashlib.sha256(image.encode() + b"\0" + content).digest(), has_colour(content)

    images = [image for part in parts for image in part]
    with ThreadPoolExecutor(8) as pool:
        seen = dict(zip(images, pool.map(look, images), strict=True))
    first = {colour: image for image, (_, colour) in reversed(seen.items())}
    again = "delete the folder, and run Step1_Image_Preprocessing.py to make it again"
    mixed = f"{folder} mixes grey pictures ({first.get(False)}) and colour ({first.get(True)}): {again}"
    require(len(first) < 2, mixed)
    return [hashlib.sha256(b"".join(seen[image][0] for image in part)).hexdigest() for part in parts]


def augment(picture: np.ndarray, rng: np.random.Generator, recipe: Recipe) -> np.ndarray:
    """Return a picture, uint8, grey or RGB: turned, shifted, zoomed and flipped by chance; gaps are black."""
    rows, columns = picture.shape[:2]
    angle = rng.uniform(-1, 1) * recipe.rotation
    zoom = 1 + rng.uniform(-1, 1) * recipe.zoom
    shift = rng.uniform(-1, 1, 2) * recipe.shift
    left_right, up_down = rng.random(2) < 0.5
    matrix = cv2.getRotationMatrix2D(((columns - 1) / 2, (rows - 1) / 2), angle, zoom)
    matrix[:, 2] = matrix[:, 2] + shift
    picture = cv2.warpAffine(picture, matrix, (columns, rows), flags=cv2.INTER_LINEAR, borderValue=0)
    if left_right and "h" in recipe.flips:
        picture = picture[:, ::-1]
    if up_down and "v" in recipe.flips:
        picture = picture[::-1]
    return np.ascontiguousarray(picture)


def to_channels(picture: np.ndarray) -> torch.Tensor:
    """Return a picture as uint8 (1, h, w) where it is grey, (3, h, w) where it is RGB."""
    return torch.from_numpy(picture.reshape(*picture.shape[:2], -1)).permute(2, 0, 1)


def to_picture(channels: torch.Tensor) -> np.ndarray:
    """Return what to_channels made of a picture as the picture again, for a figure."""
    return channels.permute(1, 2, 0).squeeze(2).numpy()


def normalise(pictures: torch.Tensor) -> torch.Tensor:
    """Return uint8 (n, 1 or 3, h, w) as float32 (n, 3, h, w): grey three times, on ImageNet's scale."""
    mean = torch.tensor(PIXEL_MEAN, device=pictures.device).view(1, 3, 1, 1)
    std = torch.tensor(PIXEL_STD, device=pictures.device).view(1, 3, 1, 1)
    return (pictures.float() / 255 - mean) / std


class Pictures:
    """The slices of one variant; the item (epoch, index) is a picture and its index.

    The picture is uint8 (1, size, size), in a colour variant (3, size, size), and augmented unless the epoch
    is None. Chance follows from (seed, epoch, index), so a slice is turned and shifted alike in every
    variant, whatever thread loads it.
    """

    def __init__(
        self, folder: Path, images: Sequence[str], recipe: Recipe, seed: int = 0, cached: bool = False
    ):
        self.paths, self.recipe, self.seed = [folder / image for image in images], recipe, seed
        size = recipe.image_size
        self.cache = np.stack([read_png(path, size) for path in self.paths]) if cached else None

    def __getitem__(self, key: Key) -> tuple[torch.Tensor, int]:
        epoch, index = key
        size = self.recipe.image_size
        picture = read_png(self.paths[index], size) if self.cache is None else self.cache[index]
        if epoch is not None:
            picture = augment(picture, np.random.default_rng([self.seed, epoch, index]), self.recipe)
        return to_channels(picture), index


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Return the number of batches; of 20 or more, an incomplete last one is dropped: one shape is faster."""
    return count // batch_size if count >= 20 * batch_size else math.ceil(count / batch_size)


def shuffled(positions: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[list[Key]]:
    """Return an epoch's batches of (epoch, index): shuffled by (seed, epoch), of even sizes."""
    order = np.random.default_rng([seed, epoch]).permutation(positions)
    count = steps_per_epoch(len(positions), batch_size)
    parts = np.array_split(order[: count * batch_size], count)
    return [[(epoch, int(index)) for index in part] for part in parts]


def in_order(positions: np.ndarray, batch_size: int) -> list[list[Key]]:
    """Return batches of (None, index): in order, not augmented."""
    items: list[Key] = [(None, int(index)) for index in positions]
    return [items[i : i + batch_size] for i in range(0, len(items), batch_size)]


def prepare(pictures: Pictures, batch: list[Key]) -> Batch:
    """Return a batch of pictures."""
    several, index = zip(*(pictures[key] for key in batch), strict=True)
    stacked = torch.stack(several)
    return stacked.pin_memory() if torch.cuda.is_available() else stacked, torch.tensor(index)


def load(pictures: Pictures, batches: list[list[Key]], threads: int = 0) -> Iterator[Batch]:
    """Yield each batch as prepare makes it, in order; threads, if any, work some batches ahead.

    Threads, not processes: OpenCV does the work without Python's lock, and they share the pictures in memory,
    start at once and are the same on Linux, macOS and Windows.
    """
    if not threads:
        yield from (prepare(pictures, batch) for batch in batches)
        return
    ahead: deque[Future] = deque()
    with ThreadPoolExecutor(threads, initializer=cv2.setNumThreads, initargs=(0,)) as pool:
        for batch in batches:
            ahead.append(pool.submit(prepare, pictures, batch))
            if len(ahead) > threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def fits_in_memory(settings: Settings, first: Path, count: int) -> bool:
    """Tell whether a variant's pictures are kept in memory: in each process 1 byte a pixel, 3 in colour.

    first: the path of one of them.
    """
    share = psutil.virtual_memory().available // (4 * settings.processes)
    return count * read_png(first, settings.image_size).size <= share
