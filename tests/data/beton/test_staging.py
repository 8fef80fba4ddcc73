"""Copies on a node's own disk: whole or not there, made once, the same data set."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from irpe_ds.data.beton import staging
from irpe_ds.data.beton.manifest import MANIFEST, beside, read_manifest, shard_path
from irpe_ds.data.beton.options import StorageOptions
from irpe_ds.data.beton.shards import convert_shards
from irpe_ds.data.beton.sources import open_source
from irpe_ds.data.beton.staging import staged
from irpe_ds.data.beton.verify import verify
from irpe_ds.errors import DataError


@pytest.fixture
def shards(tmp_path: Path, folder: Path) -> Path:
    out = tmp_path / "slow" / "set.beton"
    out.parent.mkdir()
    convert_shards(open_source([folder]), out, StorageOptions(), 4, workers=1)
    return out


def test_a_file_is_copied_once(beton: Path, tmp_path: Path) -> None:
    copy = staged(beton, tmp_path / "disk", "data.train")
    assert copy.read_bytes() == beton.read_bytes()
    assert verify(copy, workers=1).manifest == read_manifest(beton)
    before = copy.stat()
    assert staged(beton, tmp_path / "disk", "data.train") == copy
    assert (copy.stat().st_ino, copy.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_another_data_set_of_the_same_name_has_another_place(
    beton: Path, mixed: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other" / beton.name
    other.parent.mkdir()
    convert_shards(open_source([mixed]), other, StorageOptions(), 2, workers=1)
    copies = [staged(path, tmp_path / "disk", "data.train") for path in (beton, other)]
    assert copies[0].parent != copies[1].parent
    assert verify(copies[1], workers=1).manifest == read_manifest(other)


def test_what_was_interrupted_goes_on(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the shards that are missing; half of one is not taken for it, nor for used space."""
    usage = shutil.disk_usage(tmp_path)

    def disk_usage(folder: Path) -> object:
        return usage._replace(free=0 if [*folder.glob("*.partial")] else usage.free)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    copy = staged(shards, tmp_path / "disk", "data.train")
    kept, half = shard_path(copy, 0, 4), shard_path(copy, 2, 4)
    beside(half, ".partial").write_bytes(half.read_bytes()[:1000])
    half.unlink()
    beside(copy, MANIFEST).unlink()
    before = kept.stat().st_ino
    assert staged(shards, tmp_path / "disk", "data.train") == copy
    assert verify(copy, workers=1).num_samples == 37
    assert kept.stat().st_ino == before
    assert not list(copy.parent.glob("*.partial"))


def test_processes_wait_for_the_one_that_copies(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied, original = list[Path](), staging._copy

    def copy(file: Path, *others: object) -> None:
        copied.append(file)
        original(file, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(staging, "_copy", copy)
    with ThreadPoolExecutor(4) as pool:  # locks are between open files, not processes
        futures = [pool.submit(staged, shards, tmp_path / "disk", "data.val") for _ in range(4)]
    assert len({future.result() for future in futures}) == 1
    assert sorted(copied) == [shard_path(shards, n, 4) for n in range(4)]


def test_through_a_symbolic_link(beton: Path, tmp_path: Path) -> None:
    link = tmp_path / "linked.beton"
    link.symlink_to(beton)
    copy = staged(link, tmp_path / "disk", "data.train")
    assert not copy.is_symlink()
    assert verify(copy, workers=1).manifest == read_manifest(beton)


def test_damage_is_not_copied(own_beton: Path, tmp_path: Path) -> None:
    data = bytearray(own_beton.read_bytes())
    data[len(data) // 2] ^= 1
    own_beton.write_bytes(data)
    with pytest.raises(
        DataError, match=r"own\.beton: expected the SHA-256 of its manifest, .* got"
    ):
        staged(own_beton, tmp_path / "disk", "data.train")
    assert not list((tmp_path / "disk").rglob("*.beton*"))


def test_without_a_manifest(own_beton: Path, folder: Path, tmp_path: Path) -> None:
    beside(own_beton, MANIFEST).unlink()
    for path in (own_beton, folder):
        with pytest.raises(
            DataError, match=r"data\.val: expected a \.beton file with its manifest"
        ):
            staged(path, tmp_path / "disk", "data.val")


def test_too_little_space(beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        DataError, match=r"data\.stage: expected a disk with 0\.0 GB free, got .*disk"
    ):
        staged(beton, tmp_path / "disk", "data.train")


def test_a_folder_that_cannot_be_written(beton: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data\.stage: cannot copy .*small\.beton to .*Not a dir"):
        staged(beton, tmp_path / "file" / "disk", "data.train")
