"""Files damaged at random: the loader says so, whatever it is that was hit."""

from pathlib import Path

import numpy as np
import pytest
import torch

from irpe_ds.config import AugmentConfig, DataConfig
from irpe_ds.data.beton.format import ALLOC_TABLE_TYPE, ENTRY_TYPE, HEAD_BYTES
from irpe_ds.data.beton.manifest import MANIFEST, beside
from irpe_ds.data.beton.reader import Beton, read_beton
from irpe_ds.data.loaders import TrainLoader
from irpe_ds.errors import DataError

KINDS = ("flipped bit", "zeros", "noise", "shifted", "tables", "cut short")


def spoil(path: Path, beton: Beton, kind: str, rng: np.random.Generator) -> None:
    """Damage a .beton file somewhere, but not in the gaps that hold nothing."""
    size, count = path.stat().st_size, len(beton.entries)
    if kind == "cut short":
        with path.open("r+b") as file:
            file.truncate(size - int(rng.integers(1, size)))
        return
    entry = beton.entries[rng.integers(count)]
    place, length = int(entry["start"]) + int(rng.integers(entry["bytes"] - 64)), 64
    if kind == "tables":
        allocations = size - count * ALLOC_TABLE_TYPE.itemsize
        tables = [*range(HEAD_BYTES + count * ENTRY_TYPE.itemsize), *range(allocations, size)]
        place = int(rng.choice(tables))
    if kind in ("tables", "flipped bit"):
        length = 1
    old = path.read_bytes()[place : place + length]
    new = {"zeros": bytes(64), "noise": rng.bytes(64), "shifted": old[1:] + old[:1]}.get(kind)
    if new is None or new == old:
        new = bytes([old[0] ^ 1 << rng.integers(8)]) + old[1:]
    with path.open("r+b") as file:
        file.seek(place)
        file.write(new)


def load(path: Path) -> dict[int, torch.Tensor]:
    """The images of an epoch by their labels, which are unique; 36 of the 37."""
    data = DataConfig(train=path, val=path, workers=1)
    loader = TrainLoader(
        data, AugmentConfig(), batch_size=9, img_size=(16, 16), seed=0, rank=0, world_size=1
    )
    found = {}
    for images, labels, _ in loader.epoch(0):
        found |= dict(zip(labels.tolist(), images, strict=True))
    return found


@pytest.mark.parametrize("number", range(100))
def test_damage_is_a_clear_error(own_beton: Path, number: int) -> None:
    rng = np.random.default_rng(number)
    kind = KINDS[number % len(KINDS)]
    beton = read_beton(own_beton, "test")
    unseen = set(range(37)) - set(load(own_beton))
    for sample in unseen:  # an epoch leaves one out: that one shall not be hit
        beton.entries[sample] = beton.entries[(sample + 1) % 37]
    spoil(own_beton, beton, kind, rng)
    with pytest.raises(DataError) as error:
        load(own_beton)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("number", range(100))
def test_without_manifest_damage_ends_nothing(own_beton: Path, number: int) -> None:
    """The decoder cannot know all of it, but it neither hangs nor crashes."""
    beside(own_beton, MANIFEST).unlink()
    beton = read_beton(own_beton, "test")
    spoil(own_beton, beton, KINDS[number % len(KINDS)], np.random.default_rng(number))
    try:
        found = load(own_beton)
    except DataError:
        return
    assert len(found) <= 36
