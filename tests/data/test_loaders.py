"""Batches: the same whatever decodes them, complete, and no thread left behind."""

import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numba import config
from PIL import Image

from irpe_ds.config import AugmentConfig, DataConfig
from irpe_ds.data.augment.policies import Augment, Erase
from irpe_ds.data.beton.convert import convert
from irpe_ds.data.beton.manifest import MANIFEST, beside
from irpe_ds.data.beton.options import StorageOptions
from irpe_ds.data.beton.reader import read_beton
from irpe_ds.data.beton.sources import open_source
from irpe_ds.data.crops import simple_crops
from irpe_ds.data.loaders import EvalLoader, TrainLoader
from irpe_ds.data.pipelines import ffcv
from irpe_ds.errors import ConfigError, DataError

DEFAULT = AugmentConfig()
WHOLE = AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0)


ORDERS = pytest.mark.parametrize(
    "order",
    [{}, {"order": "blocks", "window": 32, "os_cache": False}],
    ids=["global", "blocks"],
)


def train_loader(
    path: Path,
    augment: AugmentConfig = DEFAULT,
    workers: int | None = 1,
    order: Mapping[str, Any] = {},
    **options: Any,
) -> TrainLoader:
    data = DataConfig(train=path, val=path, workers=workers, **order)
    defaults = {"batch_size": 4, "img_size": (24, 24), "seed": 0, "rank": 0, "world_size": 1}
    return TrainLoader(data, augment, **defaults | options)


def eval_loader(path: Path, rank: int = 0, world_size: int = 1) -> EvalLoader:
    data = DataConfig(train=path, val=path, val_crop=0.875)
    return EvalLoader(data, batch_size=8, img_size=(24, 24), rank=rank, world_size=world_size)


def everything(iterator: Iterator[tuple[Any, ...]]) -> tuple[torch.Tensor, ...]:
    """All images and labels of an iterator over batches."""
    batches = [batch[:2] for batch in iterator]
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def decoding_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "decode"]


def at_work() -> int:
    """Threads that are decoding for somebody."""
    return len(decoding_threads())


@pytest.fixture(autouse=True)
def _leaves_no_thread_at_work() -> Iterator[None]:
    before = at_work()  # a test that failed may hold one
    yield
    assert at_work() <= before


def test_batches_are_what_was_promised(beton: Path) -> None:
    loader = train_loader(beton, accumulation=2, img_size=(24, 40))
    found = list(loader.epoch(0))
    assert len(found) == len(loader) == 8  # 37 // (4 * 2) updates of two passes
    for images, labels, keys in found:
        assert (keys.dtype, keys.shape) == (np.uint64, (4,))
        assert (images.dtype, images.shape) == (torch.uint8, (4, 3, 24, 40))
        assert (labels.dtype, labels.shape) == (torch.int64, (4,))


needs_two_cores = pytest.mark.skipif(config.NUMBA_NUM_THREADS < 2, reason="needs two cores")


@needs_two_cores
@ORDERS
def test_epoch_is_bit_identical_for_any_number_of_threads(
    beton: Path, order: Mapping[str, Any]
) -> None:
    one, two = (train_loader(beton, workers=workers, order=order) for workers in (1, 2))
    images, labels = everything(one.epoch(3))
    assert len(labels.unique()) == 36  # of the 37 images, in batches of 4
    for other in (two, one, train_loader(beton, order=order)):
        other_images, other_labels = everything(other.epoch(3))
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)
    assert not torch.equal(labels, everything(one.epoch(4))[1])


def test_augmentation_changes_with_the_epoch(beton: Path) -> None:
    loader = train_loader(beton, batch_size=37)
    (images, labels, _), (others, other_labels, _) = (next(loader.epoch(e)) for e in (0, 1))
    same = (images[labels.argsort()] == others[other_labels.argsort()]).flatten(1).all(1)
    assert same.sum() <= 1


@ORDERS
@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_update_has_the_same_pixels_for_every_layout(
    beton: Path, world_size: int, accumulation: int, order: Mapping[str, Any]
) -> None:
    whole = train_loader(beton, batch_size=8, order=order).epoch(1)
    batch_size = 8 // (world_size * accumulation)
    ranks = [
        train_loader(
            beton,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            accumulation=accumulation,
            order=order,
        ).epoch(1)
        for rank in range(world_size)
    ]
    for images, labels, _ in whole:
        parts = [next(rank) for _ in range(accumulation) for rank in ranks]
        their_images, their_labels = everything(iter(parts))
        by_label, theirs = labels.argsort(), their_labels.argsort()
        assert torch.equal(labels[by_label], their_labels[theirs])
        assert torch.equal(images[by_label], their_images[theirs])
    for rank in ranks:
        assert next(rank, None) is None


@ORDERS
def test_rest_of_an_epoch_is_its_tail(beton: Path, order: Mapping[str, Any]) -> None:
    loader = train_loader(beton, order=order)
    images, labels = everything(loader.epoch(2))
    for first in range(len(loader)):
        rest_images, rest_labels = everything(loader.epoch(2, first_pass=first))
        assert torch.equal(images[4 * first :], rest_images)
        assert torch.equal(labels[4 * first :], rest_labels)
    assert list(loader.epoch(2, first_pass=len(loader))) == []


@ORDERS
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_rest_of_an_epoch_on_another_number_of_ranks(
    beton: Path, world_size: int, accumulation: int, order: Mapping[str, Any]
) -> None:
    """With all that is drawn per image: crops, repeats, augmentation, erasing."""
    config = AugmentConfig(auto="rand-m9-mstd0.5-inc1", erase=0.5, repeats=3)
    augment, erase = Augment(config, (0.5, 0.5, 0.5)), Erase(config.erase)

    def updates(first: int, **layout: int) -> list[dict[int, torch.Tensor]]:
        """Images by key of each update from the first on."""
        passes = layout["accumulation"]
        found: list[dict[int, torch.Tensor]] = [{} for _ in range(4 - first)]
        for rank in range(layout["world_size"]):
            loader = train_loader(beton, augment=config, rank=rank, order=order, **layout)
            for number, batch in enumerate(loader.epoch(5, first_pass=first * passes)):
                images = erase(augment(batch.images, batch.keys).float(), batch.keys)
                found[number // passes] |= dict(zip(batch.keys.tolist(), images, strict=True))
        return found

    whole = updates(0, batch_size=8, world_size=1, accumulation=1)
    batch_size = 8 // (world_size * accumulation)
    rest = updates(1, batch_size=batch_size, world_size=world_size, accumulation=accumulation)
    assert [len(images) for images in whole] == [8] * 4
    for expected, images in zip(whole[1:], rest, strict=True):
        assert expected.keys() == images.keys()
        assert all(torch.equal(expected[key], images[key]) for key in images)


def test_batches_may_be_kept(beton: Path) -> None:
    kept, copies = [], []
    for images, *_ in train_loader(beton).epoch(0):
        kept.append(images)
        copies.append(images.clone())
    assert torch.equal(torch.cat(kept), torch.cat(copies))
    assert len({images.data_ptr() for images in kept}) == len(kept)


@pytest.mark.parametrize("mode", ["reencode", "raw"])
def test_pixels_are_those_of_the_image(
    tmp_path: Path, pixels: Callable[..., np.ndarray], mode: Any
) -> None:
    originals = [pixels(number, 32, 32) for number in range(6)]
    for number, original in enumerate(originals):
        (tmp_path / "folder" / str(number)).mkdir(parents=True)
        Image.fromarray(original).save(tmp_path / "folder" / str(number) / "image.png")
    path = tmp_path / "square.beton"
    options = StorageOptions(mode=mode, quality=98)
    convert(open_source([tmp_path / "folder"]), path, options, workers=1)
    mirrored = WHOLE.model_copy(update={"hflip": 1.0})
    plain, flipped = (
        next(train_loader(path, a, batch_size=6, img_size=(32, 32)).epoch(0))
        for a in (WHOLE, mirrored)
    )
    assert torch.equal(plain[0].flip(3), flipped[0])
    luma = np.array([0.299, 0.587, 0.114])  # JPEG keeps colour at half the resolution
    for image, label, _ in zip(*plain, strict=True):
        error = image.permute(1, 2, 0).numpy().astype(float) - originals[label]
        if mode == "reencode":
            assert np.abs(error @ luma).mean() < 2
        else:
            assert not error.any()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_counts_every_image_once(beton: Path, world_size: int) -> None:
    counted, lengths = [], set()
    for rank in range(world_size):
        loader = eval_loader(beton, rank, world_size)
        for images, labels, valid in loader:
            assert images.shape == (8, 3, 24, 24)
            counted += labels[valid].tolist()
        lengths.add(len(loader))
    assert sorted(counted) == list(range(37))
    assert len(lengths) == 1


def test_a_simple_crop_is_a_window_of_the_padded_image(folder: Path, tmp_path: Path) -> None:
    """Of images whose shorter side is as long as the model's: 24 x 52 and 52 x 24 pixels."""
    augment, shifts = AugmentConfig(crop="simple"), []
    convert(open_source([folder]), tmp_path / "x.beton", StorageOptions(mode="raw"), workers=1)
    loader = train_loader(tmp_path / "x.beton", augment)
    for epoch in range(4):
        for images, labels, keys in loader.epoch(epoch):
            for image, label, key in zip(images, labels.tolist(), keys, strict=True):
                if label not in (4, 32):
                    continue
                whole = np.asarray(Image.open(folder / f"{label:03d}/image.jpg").convert("RGB"))
                sides = [np.array([side]) for side in whole.shape[:2]]
                (crop,) = simple_crops(
                    np.array([label]), *sides, np.array([key]), size=(24, 24), hflip=augment.hflip
                )
                padded = np.pad(whole, ((4, 4), (4, 4), (0, 0)), "reflect")
                top = 4 + crop["top"] + crop["shift_down"]
                left = 4 + crop["left"] + crop["shift_right"]
                window = padded[top : top + 24, left : left + 24]
                shown = image.permute(1, 2, 0).numpy()
                assert np.array_equal(shown[:, ::-1] if crop["flip"] else shown, window)
                shifts += [crop["shift_down"], crop["shift_right"]]
    assert min(shifts) < 0 < max(shifts)


def test_evaluation_is_the_same_each_time(beton: Path) -> None:
    loader = eval_loader(beton)
    assert all(map(torch.equal, everything(iter(loader)), everything(iter(loader))))


def test_leaving_early_frees_the_thread(beton: Path) -> None:
    loader = train_loader(beton, batch_size=1)
    for _ in loader.epoch(0):
        assert at_work() == 1
        break
    assert at_work() == 0

    def fail() -> None:
        for _ in loader.epoch(0):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert at_work() == 0
    epoch = loader.epoch(0)
    next(epoch)
    epoch.close()
    assert at_work() == 0


def test_200_epochs_with_early_exits_leave_nothing(beton: Path) -> None:
    def held() -> tuple[int, int, int]:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return (
            len(list(Path("/proc/self/task").iterdir())),
            len(list(Path("/proc/self/fd").iterdir())),
            pages * resource.getpagesize(),
        )

    loader = train_loader(beton)
    for epoch in range(220):
        if epoch == 20:
            threads, files, memory = held()
        for number, _ in enumerate(loader.epoch(epoch)):
            if number == epoch % 4:
                break
    for _ in range(1000):
        now = held()
        if now[0] <= threads:  # the system lists a joined thread a moment longer
            break
        time.sleep(0.01)
    assert now[0] <= threads
    assert now[1] == files
    assert now[2] - memory < 2 << 20


def test_exception_of_the_thread_reaches_the_consumer(
    beton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def decode_two_batches(*args: Any) -> np.ndarray:
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError("no room")
        return np.ones(4, bool)

    monkeypatch.setattr(ffcv, "decode_crops", decode_two_batches)
    epoch = train_loader(beton).epoch(0)
    assert len([next(epoch), next(epoch)]) == 2
    with pytest.raises(MemoryError, match="no room"):
        next(epoch)


@pytest.mark.parametrize("manifest", [True, False])
def test_damaged_image_stops_training_by_name(own_beton: Path, manifest: bool) -> None:
    if not manifest:  # then the decoder has to find it
        beside(own_beton, MANIFEST).unlink()
    entry = read_beton(own_beton, "test").entries[21]
    with own_beton.open("r+b") as file:
        file.seek(int(entry["start"] + entry["bytes"] // 2))
        file.write(bytes(30))
    with pytest.raises(DataError, match=r"own\.beton: expected undamaged .* sample 21$"):
        list(train_loader(own_beton, batch_size=37).epoch(0))


def test_a_file_that_is_truncated_while_it_is_read_is_named(own_beton: Path) -> None:
    """Of a mapped file it would be SIGBUS, and silence."""
    loader = train_loader(own_beton, batch_size=1)
    epoch = loader.epoch(0)
    next(epoch)
    size = int(np.median(read_beton(own_beton, "test").entries["start"]))
    os.truncate(own_beton, size)
    where = (
        rf"{socket.gethostname()}: expected to read sample \d+ of .*own\.beton, got it has {size}"
    )
    with pytest.raises(DataError, match=where):
        list(epoch)


def test_two_loaders_may_decode_at_once(beton: Path) -> None:
    loader = train_loader(beton, batch_size=1)
    first, second = loader.epoch(0), loader.epoch(1)
    alternating = [(next(first), next(second)) for _ in range(len(loader))]
    labels = [torch.cat([pair[i][1] for pair in alternating]) for i in (0, 1)]
    assert torch.equal(labels[0], everything(loader.epoch(0))[1])
    assert torch.equal(labels[1], everything(loader.epoch(1))[1])
    first.close()
    second.close()


def test_too_large_a_batch(beton: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.global_batch: expected at most 37.*got 40"):
        train_loader(beton, batch_size=5, world_size=4, accumulation=2)


def test_workers(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "NUMBA_NUM_THREADS", 12)
    with pytest.raises(ConfigError, match=r"data\.workers: expected at most 12.*got 13"):
        train_loader(beton, workers=13)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    assert train_loader(beton, workers=None).workers == 12
    monkeypatch.setenv("LOCAL_SIZE", "4")
    assert train_loader(beton, workers=None).workers == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "99")
    assert train_loader(beton, workers=None).workers == 1


def test_import_leaves_torchs_threads_alone() -> None:
    code = (
        "import torch; torch.set_num_threads(3); import irpe_ds.data.pipelines.ffcv;"
        "print(torch.get_num_threads())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.stdout == "3\n", done.stderr


def test_importing_ffcv_compiles_nothing() -> None:
    code = """
import numba.typed
before = numba.typed.Dict
import irpe_ds.data.beton.format
from ffcv.fields.rgb_image import IMAGE_MODES
assert type(IMAGE_MODES) is dict
assert numba.typed.Dict is before
assert before() is not None and before is not dict
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr


def test_decoding_leaves_torchs_threads_alone(beton: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        everything(train_loader(beton).epoch(0))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
