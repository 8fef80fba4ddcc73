"""A small ImageFolder, and the .beton file made of it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from irpe_ds.data.beton.convert import convert
from irpe_ds.data.beton.manifest import HASHES, MANIFEST, beside
from irpe_ds.data.beton.options import StorageOptions
from irpe_ds.data.beton.sources import open_source

NUM_CLASSES = 37  # one image each in `folder`: there a label identifies an image

Pixels = Callable[[int, int, int], np.ndarray]


@pytest.fixture(scope="session")
def pixels() -> Pixels:
    """Make an image from its number: a gradient with noise, (height, width, 3) uint8."""

    def pixels(number: int, height: int, width: int) -> np.ndarray:
        rng = np.random.default_rng(number)
        gradient = np.add.outer(np.linspace(0, 90, height), np.linspace(0, 90, width))
        noise = rng.integers(0, 60, (height, width, 3))
        return (gradient[..., None] + noise + rng.integers(0, 15, 3)).astype(np.uint8)

    return pixels


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, pixels: Pixels) -> Path:
    """37 classes of one JPEG each, of many sizes; every fifth is grey."""
    root = tmp_path_factory.mktemp("folder")
    for number in range(NUM_CLASSES):
        image = Image.fromarray(pixels(number, 20 + number, 56 - number))
        path = root / f"{number:03d}" / "image.jpg"
        path.parent.mkdir()
        (image.convert("L") if number % 5 == 0 else image).save(path, quality=90)
    return root


@pytest.fixture(scope="session")
def beton(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """`folder`, converted; not to be changed."""
    path = tmp_path_factory.mktemp("beton") / "small.beton"
    convert(open_source([folder]), path, StorageOptions(), workers=2)
    return path


@pytest.fixture
def mixed(tmp_path: Path, pixels: Pixels) -> Path:
    """Two classes; a small JPEG, a large one, a PNG and a CMYK JPEG; and a text file."""
    root = tmp_path / "mixed"
    for name in ("cat", "dog"):
        (root / name / "deeper").mkdir(parents=True)
    Image.fromarray(pixels(0, 30, 40)).save(root / "cat" / "a.jpg", quality=90)
    Image.fromarray(pixels(7, 120, 90)).save(root / "cat" / "deeper" / "b.JPEG", quality=90)
    Image.fromarray(pixels(2, 30, 40)).save(root / "dog" / "c.png")
    Image.fromarray(pixels(3, 30, 40)).convert("CMYK").save(root / "dog" / "d.jpg", quality=95)
    (root / "dog" / "notes.txt").write_text("not an image")
    return root


@pytest.fixture
def own_beton(tmp_path: Path, beton: Path) -> Path:
    """A copy of `beton` and its manifest, to be damaged."""
    own = tmp_path / "own.beton"
    for suffix in ("", MANIFEST, HASHES):
        beside(own, suffix).write_bytes(beside(beton, suffix).read_bytes())
    return own
