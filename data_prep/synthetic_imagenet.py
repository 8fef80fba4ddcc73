"""Generates a synthetic ImageNet in the layouts that data_prep/synthetic.py lists."""

import gzip
import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat
from sklearn.datasets import load_sample_images

from irpe_ds.errors import ConfigError

QUALITY = 94  # of the JPEGs
NOISE = 11  # standard deviation of the noise, grey values
SHORT_SIDES = (333, 375, 375, 375, 400)  # pixels
PORTRAIT = 0.25  # share of the images
SHARD_IMAGES = 1000  # at most; fewer if there were less than MIN_SHARDS
MIN_SHARDS = 4
FIRST_INNER_ID = 1001  # of the devkit's synsets with children, which are not classes
DEVKIT = "ILSVRC2012_devkit_t12"
_VAL, _ORDER, _SHARDS, _IDS = range(1, 5)  # streams of random numbers; 0 is the images'


@dataclass(frozen=True)
class Planted:
    """One odd or bad training image."""

    synset: str
    """Its class."""
    name: str
    """File name."""
    kind: str
    """Odd: cmyk, grey, png, exif, progressive, unicode, space, duplicate; bad: empty, truncated,
    text, overwritten."""
    bad: bool = False
    """Whether it does not decode cleanly."""
    original: str | None = None
    """Of a duplicate: the path of the image with the same bytes."""

    @property
    def path(self) -> str:
        """`synset/name`, as in `Synthetic.train`."""
        return f"{self.synset}/{self.name}"


@dataclass(frozen=True)
class Synthetic:
    """The contents of the data set."""

    synsets: tuple[str, ...]
    """The classes, sorted; a label is an index into them."""
    train: tuple[str, ...]
    """`synset/name` of every training image, sorted, including the planted ones."""
    val: tuple[str, ...]
    """`synset/name` of every validation image, in the order of the names."""
    planted: tuple[Planted, ...]
    """The odd and the bad training images."""


class Photos:
    """Photos by number, the same for the same seed; `enlarge` times ImageNet's sides."""

    def __init__(self, seed: int, enlarge: int = 1) -> None:
        self._seed, self._enlarge = seed, enlarge
        self._photos = [Image.fromarray(photo) for photo in load_sample_images().images]
        noise = np.random.default_rng(seed).normal(0, NOISE, (640, 640, 3))
        self._noise = np.tile(np.rint(noise).astype(np.int16), (enlarge, enlarge, 1))

    def image(self, number: int) -> Image.Image:
        """A crop of one of the photos, at random flipped, brighter or darker, with noise."""
        rng = np.random.default_rng([self._seed, 0, number])
        photo = self._photos[rng.integers(len(self._photos))]
        sides = int(rng.integers(480, 501)), int(rng.choice(SHORT_SIDES))
        size = sides[0] * self._enlarge, sides[1] * self._enlarge
        width, height = size if rng.random() >= PORTRAIT else size[::-1]
        fit = min(photo.width / width, photo.height / height) * rng.uniform(0.7, 1)
        left = rng.uniform(0, photo.width - fit * width)
        top = rng.uniform(0, photo.height - fit * height)
        box = (left, top, left + fit * width, top + fit * height)
        crop = photo.resize((width, height), Image.Resampling.BILINEAR, box)
        if rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        brightness = np.arange(256) * rng.uniform(0.8, 1.2)
        crop = crop.point(brightness.clip(0, 255).astype(int).tolist() * 3)
        y, x = (rng.integers(0, 640 * self._enlarge - side) for side in (height, width))
        pixels = np.asarray(crop) + self._noise[y : y + height, x : x + width]
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    def jpeg(self, number: int) -> bytes:
        """The same as a JPEG file."""
        return encode(self.image(number))


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """An image file's bytes."""
    file = io.BytesIO()
    options = {"quality": QUALITY, **options} if kind == "JPEG" else options
    image.save(file, kind, **options)
    return file.getvalue()


def write(
    out: Path,
    *,
    images: int,
    classes: int,
    oddities: bool = False,
    bad: bool = False,
    seed: int,
    enlarge: int = 1,
) -> Synthetic:
    """Write all layouts to `out`, a new folder.

    Args:
        images: training images, not counting planted ones.
        oddities: plant images that are odd but undamaged.
        bad: plant files that are damaged or not images.
        enlarge: how many times ImageNet's sides the photos have.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError("--out", "a new folder", f"{out}, which exists")
    if not 2 <= classes <= images:
        raise ConfigError("--classes", f"2 to {images}, the number of images", classes)
    if enlarge < 1:
        raise ConfigError("--enlarge", "at least 1", enlarge)
    unfinished = out.with_name(out.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    synsets = synset_names(classes)
    photos = Photos(seed, enlarge)
    train = _write_train(unfinished / "folder/train", synsets, photos, images, seed)
    planted: list[Planted] = []
    if oddities:
        planted += _plant_odd(unfinished / "folder/train", synsets, photos, images, train)
    if bad:
        planted += _plant_bad(unfinished / "folder/train", synsets, photos, images + 100)
    train = sorted({*train, *(file.path for file in planted)})
    val = _write_val(unfinished, synsets, photos, max(images // 10, classes), seed)
    made = Synthetic(tuple(synsets), tuple(train), tuple(val), tuple(planted))
    _write_train_archives(unfinished, made, seed)
    _write_devkit(unfinished / f"{DEVKIT}.tar.gz", made, seed)
    unfinished.rename(out)
    return made


def synset_names(count: int) -> list[str]:
    """Names in ImageNet's form, sorted: n01440764, ...; the same for every data set."""
    steps = np.random.default_rng(0).integers(100, 13_000, count)
    steps[0] = 0
    return [f"n{number:08d}" for number in 1_440_764 + np.cumsum(steps)]


def _write_train(
    folder: Path, synsets: list[str], photos: Photos, images: int, seed: int
) -> list[str]:
    """Write the ordinary images; return their paths, unsorted."""
    rng = np.random.default_rng([seed, _ORDER])
    span = max(20_000, 4 * images)
    numbers = rng.choice(span, images, replace=False).tolist()  # not padded, not contiguous
    paths: list[str] = []
    for index, number in enumerate(numbers):
        synset = synsets[index % len(synsets)]
        paths.append(f"{synset}/{synset}_{number}.JPEG")
        _save(folder / paths[-1], photos.jpeg(index))
    return paths


def _plant_odd(
    folder: Path, synsets: list[str], photos: Photos, first: int, train: Sequence[str]
) -> list[Planted]:
    """Write one or two images of each odd kind."""
    rotated = Image.Exif()
    rotated[0x0112] = 6  # orientation: rotate by 90 degrees clockwise
    image = photos.image
    made = [
        ("cmyk", 9_000_000, encode(image(first).convert("CMYK"))),
        ("grey", 9_000_001, encode(image(first + 1).convert("L"))),
        ("grey", 9_000_002, encode(image(first + 2).convert("L"))),
        ("png", 9_000_003, encode(image(first + 3), "PNG")),
        ("exif", 9_000_004, encode(image(first + 4), exif=rotated)),
        ("progressive", 9_000_005, encode(image(first + 5), progressive=True)),
        ("unicode", "ünïcode_é", encode(image(first + 6))),
        ("space", "with a space", encode(image(first + 7))),
    ]
    planted: list[Planted] = []
    for index, (kind, name, data) in enumerate(made):
        synset = synsets[index % len(synsets)]
        planted.append(Planted(synset, f"{synset}_{name}.JPEG", kind))
        _save(folder / planted[-1].path, data)
    original = train[0]
    for index, synset in enumerate(synsets[:2]):  # the original's class, and another
        name = f"{synset}_{9_000_100 + index}.JPEG"
        planted.append(Planted(synset, name, "duplicate", original=original))
        _save(folder / planted[-1].path, (folder / original).read_bytes())
    return planted


def _plant_bad(folder: Path, synsets: list[str], photos: Photos, first: int) -> list[Planted]:
    """Write one file of each bad kind."""
    whole = photos.jpeg(first)
    overwritten = bytearray(photos.jpeg(first + 1))
    third = len(overwritten) // 3
    overwritten[third : 2 * third] = np.random.default_rng(0).bytes(third)
    made = {
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "text": b"<html><body>404 Not Found</body></html>\n",
        "overwritten": bytes(overwritten),
    }
    planted: list[Planted] = []
    for index, (kind, data) in enumerate(made.items()):
        synset = synsets[-1 - index % len(synsets)]
        planted.append(Planted(synset, f"{synset}_{9_000_200 + index}.JPEG", kind, bad=True))
        _save(folder / planted[-1].path, data)
    return planted


def _write_val(out: Path, synsets: list[str], photos: Photos, images: int, seed: int) -> list[str]:
    """Write the validation images as folder and as tar, and the list of their synsets."""
    labels = np.arange(images) % len(synsets)
    np.random.default_rng([seed, _VAL]).shuffle(labels)
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, images + 1)]
    with _tar(out / "ILSVRC2012_img_val.tar", tarfile.GNU_FORMAT) as tar:
        for index, (name, label) in enumerate(zip(names, labels, strict=True)):
            data = photos.jpeg(10_000_000 + index)  # photos that no training image has
            _save(out / "folder/val" / synsets[label] / name, data)
            _add(tar, name, data)
    lines = [f"{synsets[label]}\n" for label in labels]
    (out / "val_synsets.txt").write_text("".join(lines))
    return [f"{synsets[label]}/{name}" for label, name in zip(labels, names, strict=True)]


def _write_train_archives(out: Path, made: Synthetic, seed: int) -> None:
    """Write the training folder's files as tar, as tar of tars and as shards, each shuffled."""
    folder = out / "folder/train"
    with _tar(out / "train.tar", tarfile.PAX_FORMAT) as tar:
        for path in _shuffled(made.train, seed, _ORDER):
            _add(tar, path, (folder / path).read_bytes())
    with _tar(out / "ILSVRC2012_img_train.tar", tarfile.GNU_FORMAT) as tar:
        for label, synset in enumerate(made.synsets):
            names = [path for path in made.train if path.startswith(f"{synset}/")]
            paths = _shuffled(names, seed, _ORDER, label)
            _add_class_tar(tar, synset, (folder / path for path in paths))
    (out / "wds").mkdir()
    (out / "wds/classes.txt").write_text("".join(f"{synset}\n" for synset in made.synsets))
    paths = _shuffled(made.train, seed, _SHARDS)
    length = min(SHARD_IMAGES, -(-len(paths) // MIN_SHARDS))
    for shard, first in enumerate(range(0, len(paths), length)):
        with _tar(out / f"wds/train-{shard:06d}.tar", tarfile.PAX_FORMAT) as tar:
            for path in paths[first : first + length]:
                _add_sample(tar, folder / path, made.synsets)


def _add_class_tar(tar: tarfile.TarFile, synset: str, files: Iterable[Path]) -> None:
    """Add <synset>.tar, through a temporary file: its size is written first."""
    with tempfile.TemporaryFile() as content:
        with tarfile.open(fileobj=content, mode="w", format=tarfile.GNU_FORMAT) as inner:
            for file in files:
                _add(inner, file.name, file.read_bytes())
        member = tarfile.TarInfo(f"{synset}.tar")
        member.size = content.tell()
        content.seek(0)
        tar.addfile(member, content)


def _add_sample(tar: tarfile.TarFile, file: Path, synsets: Sequence[str]) -> None:
    """Add one image as a WebDataset sample: members that share the name without extension."""
    label = synsets.index(file.parent.name)
    record = {"filename": file.name, "label": label, "synset": file.parent.name}
    _add(tar, f"{file.stem}.jpg", file.read_bytes())
    _add(tar, f"{file.stem}.cls", str(label).encode())
    _add(tar, f"{file.stem}.json", json.dumps(record).encode())


def _write_devkit(path: Path, made: Synthetic, seed: int) -> None:
    """Write the IDs of the synsets, in another order than the synsets, and the labels."""
    shuffled = np.random.default_rng([seed, _IDS]).permutation(len(made.synsets)) + 1
    if (np.diff(shuffled) > 0).all():  # few classes: mistaking an ID for a label must fail
        shuffled = shuffled[::-1]
    ids = dict(zip(made.synsets, shuffled.tolist(), strict=True))
    truth = "".join(f"{ids[file.split('/')[0]]}\n" for file in made.val)
    file = io.BytesIO()
    savemat(file, {"synsets": _synset_table(made, ids)})
    meta = b"MATLAB 5.0 MAT-file, synthetic".ljust(116) + file.getvalue()[116:]  # with no date
    with (
        path.open("wb") as raw,
        gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar,
    ):
        _add(tar, f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt", truth.encode())
        _add(tar, f"{DEVKIT}/data/meta.mat", meta)
        _add(tar, f"{DEVKIT}/readme.txt", b"Synthetic.\n")


def _synset_table(made: Synthetic, ids: dict[str, int]) -> np.ndarray:
    """meta.mat's struct array `synsets`, (N, 1), by ID; two synsets with children come last."""
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children"]
    fields += ["wordnet_height", "num_train_images"]
    leaves = sorted((number, synset) for synset, number in ids.items())
    counts = {synset: 0 for synset in made.synsets}
    for path in made.train:
        counts[path.split("/")[0]] += 1
    rows: list[tuple[object, ...]] = []
    for number, synset in leaves:
        words = f"class {synset}, synthetic class"
        none = np.zeros((1, 0), np.uint16)
        rows.append((number, synset, words, "no gloss", 0, none, 0, counts[synset]))
    first = max(FIRST_INNER_ID, len(leaves) + 1)
    everything = np.array([[number for number, _ in leaves]], np.uint16)
    rows.append((first, "n00001740", "entity", "no gloss", len(leaves), everything, 1, 0))
    top = np.array([[first]], np.uint16)
    rows.append((first + 1, "n00001930", "physical entity", "no gloss", 1, top, 2, 0))
    table = np.empty((len(rows), 1), [(field, object) for field in fields])
    for index, row in enumerate(rows):
        table[index, 0] = tuple(np.uint32(x) if isinstance(x, int) else x for x in row)
    return table


def _shuffled(paths: Sequence[str], *stream: int) -> list[str]:
    return [paths[index] for index in np.random.default_rng(stream).permutation(len(paths))]


def _save(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@contextmanager
def _tar(path: Path, kind: int) -> Iterator[tarfile.TarFile]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        yield tar


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
