"""The timm pipeline: timm's transforms in processes, as a function of each image's key."""

import errno
import io
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import ResizeKeepRatio
from torchvision.transforms import RandomCrop

from irpe_ds.config import AugmentConfig, DataConfig
from irpe_ds.data.beton.convert import convert
from irpe_ds.data.beton.options import StorageOptions
from irpe_ds.data.beton.sources import open_source
from irpe_ds.data.loaders import Batch, EvalLoader, TrainLoader
from irpe_ds.data.pipelines.pipeline import dataset_info
from irpe_ds.data.pipelines.timm import Transformed, seed_generators
from irpe_ds.errors import DataError, TrainingError

FULL = AugmentConfig(auto="rand-m9-mstd0.5-inc1", repeats=2)


def config(path: Path, workers: int = 1) -> DataConfig:
    return DataConfig(train=path, val=path, pipeline="timm", workers=workers)


def train_loader(
    path: Path, augment: AugmentConfig = FULL, workers: int = 1, **options: Any
) -> TrainLoader:
    defaults: dict[str, Any] = {
        "batch_size": 4,
        "img_size": (24, 24),
        "seed": 0,
        "rank": 0,
        "world_size": 1,
    }
    return TrainLoader(config(path, workers), augment, **defaults | options)


def flat(batches: Any) -> dict[str, np.ndarray]:
    images, labels, keys = zip(*batches, strict=True)
    return {
        "images": torch.cat(images).numpy(),
        "labels": torch.cat(labels).numpy(),
        "keys": np.concatenate(keys),
    }


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def tar(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tar") / "small.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(folder, "small")
    return path


def test_pixels_depend_on_neither_workers_nor_source(beton: Path, folder: Path, tar: Path) -> None:
    first = flat(train_loader(beton).epoch(3))
    assert first["images"].shape == (36, 3, 24, 24)
    assert first["images"].dtype == np.uint8
    for path, workers in ((beton, 2), (folder, 1), (tar, 2)):
        assert same(first, flat(train_loader(path, workers=workers).epoch(3)))
    assert not same(first, flat(train_loader(beton).epoch(4)))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_see_the_same_images(beton: Path, world_size: int) -> None:
    whole = flat(train_loader(beton, batch_size=8).epoch(1))
    order = np.argsort(whole["keys"])
    ranks = [
        flat(
            train_loader(beton, batch_size=8 // world_size, rank=r, world_size=world_size).epoch(1)
        )
        for r in range(world_size)
    ]
    parts = {name: np.concatenate([rank[name] for rank in ranks]) for name in whole}
    there = np.argsort(parts["keys"])
    for name in whole:
        assert np.array_equal(whole[name][order], parts[name][there])


def test_rest_of_an_epoch_is_its_tail(beton: Path) -> None:
    whole = flat(train_loader(beton).epoch(2))
    rest = flat(train_loader(beton, workers=2).epoch(2, first_pass=5))
    assert same({name: values[20:] for name, values in whole.items()}, rest)


@pytest.mark.parametrize("crop", ["random_resized", "simple"])
def test_image_is_what_timms_transform_makes_of_it(beton: Path, folder: Path, crop: str) -> None:
    transform = create_transform(
        (3, 24, 24),
        is_training=True,
        use_prefetcher=True,
        color_jitter=None,
        auto_augment=FULL.auto,
        interpolation="bicubic",
    )
    if crop == "simple":  # of DeiT's augment.py, where Resize rounds the longer side down
        transform.transforms[:1] = [
            ResizeKeepRatio(24, interpolation="bicubic"),
            RandomCrop(24, padding=4, padding_mode="reflect"),
        ]
    files = sorted(folder.rglob("*.jpg"))
    for images, labels, keys in train_loader(beton, FULL.model_copy(update={"crop": crop})).epoch(
        0
    ):
        for image, label, key in zip(images, labels.tolist(), keys.tolist(), strict=True):
            seed_generators(key)
            expected = transform(Image.open(files[label]).convert("RGB"))
            assert np.array_equal(image.numpy(), np.asarray(expected))


def test_repeats_differ(beton: Path) -> None:
    found = flat(train_loader(beton, batch_size=36).epoch(0))
    assert len(np.unique(found["keys"])) == 36
    labels, counts = np.unique(found["labels"], return_counts=True)
    assert counts.tolist() == [2] * 18
    for label in labels:
        one, other = found["images"][found["labels"] == label]
        assert not np.array_equal(one, other)


def test_generators_of_this_process_are_left_alone(beton: Path) -> None:
    def states() -> list[bytes]:
        python = repr(random.getstate()).encode()
        return [python, np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()]

    before = states()
    next(train_loader(beton).epoch(0))
    after = states()
    assert before[:2] == after[:2]


@pytest.mark.parametrize("size", [(24, 24), (24, 32)])
def test_evaluation_is_timms_bicubic(folder: Path, beton: Path, size: tuple[int, int]) -> None:
    transform = create_transform(
        (3, *size), interpolation="bicubic", crop_pct=0.875, use_prefetcher=True
    )
    files = sorted(folder.rglob("*.jpg"))
    for path in (folder, beton):
        loader = EvalLoader(config(path), batch_size=8, img_size=size, rank=0, world_size=1)
        counted = 0
        for images, labels, valid in loader:
            for image, label in zip(images[valid], labels[valid].tolist(), strict=True):
                expected = transform(Image.open(files[label]).convert("RGB"))
                assert np.array_equal(image.numpy(), np.asarray(expected))
                counted += 1
        assert counted == 37


def test_pixels_stored_raw(folder: Path, beton: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw.beton"
    convert(open_source([folder]), raw, StorageOptions(mode="raw"), workers=1)
    assert same(flat(train_loader(raw).epoch(0)), flat(train_loader(beton).epoch(0)))


def test_damage_is_named(own_beton: Path, folder: Path, tmp_path: Path) -> None:
    with own_beton.open("r+b") as file:
        file.seek((8 << 20) + 300)  # in the first image
        file.write(bytes(30))
    with pytest.raises(DataError, match=r"own\.beton: sample 0: expected an undamaged image"):
        list(train_loader(own_beton, batch_size=37, augment=AugmentConfig()).epoch(0))
    shutil.copytree(folder, tmp_path / "folder")
    (tmp_path / "folder/007/image.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"007/image\.jpg: expected an undamaged image"):
        list(train_loader(tmp_path / "folder", batch_size=37, augment=AugmentConfig()).epoch(0))


def test_leaving_early_ends_the_processes(beton: Path) -> None:
    before = set(multiprocessing.active_children())
    for _ in train_loader(beton, workers=2, batch_size=1).epoch(0):
        break
    assert set(multiprocessing.active_children()) == before


def test_what_a_folder_holds(folder: Path, tmp_path: Path) -> None:
    info = dataset_info(config(folder), "train")
    assert (info.num_samples, info.num_classes, info.manifest) == (37, 37, None)
    with pytest.raises(DataError, match=r"data\.train: expected a folder with one"):
        dataset_info(config(tmp_path / "absent"), "train")


def test_a_folder_is_for_this_pipeline(folder: Path) -> None:
    with pytest.raises(
        DataError, match=r"or data\.pipeline=timm, which reads folders, got .*folder"
    ):
        dataset_info(DataConfig(train=folder, val=folder), "train")


class Stderr(io.StringIO):
    """Lets stopped processes continue once a line about them is written."""

    def __init__(self, pids: list[int]) -> None:
        super().__init__()
        self.pids = pids

    def flush(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.thorough
def test_a_stopped_worker_is_named_and_may_continue(
    beton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = flat(train_loader(beton).epoch(0))
    monkeypatch.setattr("irpe_ds.data.pipelines.timm._PATIENCE_SECONDS", 1)
    monkeypatch.setenv("RANK", "3")
    before = set(multiprocessing.active_children())
    epoch = train_loader(beton).epoch(0)
    first = next(epoch)
    (worker,) = set(multiprocessing.active_children()) - before
    assert worker.pid is not None
    shown = Stderr([worker.pid])
    monkeypatch.setattr("sys.stderr", shown)
    os.kill(worker.pid, signal.SIGSTOP)
    assert same(expected, flat([first, *epoch]))
    line = f"[rank 3] no images from data workers for 1 s: pid {worker.pid} stopped"
    assert line in shown.getvalue()


@pytest.mark.thorough
def test_a_dead_worker_is_named_and_the_others_end(
    beton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("irpe_ds.data.pipelines.timm._PATIENCE_SECONDS", 1)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    before = set(multiprocessing.active_children())
    epoch = train_loader(beton, workers=2, batch_size=1).epoch(0)
    next(epoch)
    worker, stopped = set(multiprocessing.active_children()) - before
    assert worker.pid is not None
    assert stopped.pid is not None
    os.kill(stopped.pid, signal.SIGSTOP)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=rf"data\.workers: .*{worker.pid}"):
        list(epoch)
    assert set(multiprocessing.active_children()) == before


def test_a_worker_killed_with_a_lock_in_its_hands(
    beton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock of the event by which torch tells its workers to end."""

    def die(*_: object) -> None:
        frame = sys._getframe()
        while "done_event" not in frame.f_locals:
            assert frame.f_back is not None
            frame = frame.f_back
        frame.f_locals["done_event"]._cond.acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    monkeypatch.setattr(Transformed, "__getitem__", die)  # the workers are forked
    with pytest.raises(TrainingError, match=r"data\.workers: process \d+ died"):
        list(train_loader(beton, workers=2, batch_size=1).epoch(0))


def test_full_shared_memory_is_one_line(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)  # the workers are forked
    with pytest.raises(DataError, match=r"cannot put batches into /dev/shm: .*No space left"):
        list(train_loader(beton).epoch(0))


def test_shared_memory_too_full_to_start(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(DataError, match=r"cannot put batches into /dev/shm: No space left"):
        next(train_loader(beton).epoch(0))


def test_batch_type(beton: Path) -> None:
    batch = next(train_loader(beton).epoch(0))
    assert isinstance(batch, Batch)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
