"""Conversions that were stopped and resumed: what is done is kept, and only that."""

import errno
import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from irpe_ds.data.beton.convert import convert
from irpe_ds.data.beton.images import store_image
from irpe_ds.data.beton.journal import Journal
from irpe_ds.data.beton.manifest import HASHES, DatasetManifest, beside
from irpe_ds.data.beton.options import StorageOptions
from irpe_ds.data.beton.reader import read_beton
from irpe_ds.data.beton.sources import open_source
from irpe_ds.data.beton.verify import verify
from irpe_ds.data.beton.writer import BetonWriter
from irpe_ds.errors import ConfigError, DataError


def convert_folder(folder: Path, out: Path, options: StorageOptions, **how: Any) -> DatasetManifest:
    return convert(open_source([folder]), out, options, **how)


def test_corrected_conversion_resumes(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (mixed / "cat" / "deeper" / "b.JPEG").write_bytes(b"")
    out = mixed.parent / "mixed.beton"
    with pytest.raises(DataError, match="0 bytes"):
        convert_folder(mixed, out, StorageOptions(), workers=1)
    with pytest.raises(ConfigError, match=r"unfinished.*expected mode passthrough, got raw"):
        convert_folder(mixed, out, StorageOptions(mode="raw"), workers=1)
    (mixed / "cat" / "deeper" / "b.JPEG").unlink()
    read = []
    monkeypatch.setattr(
        "irpe_ds.data.beton.convert.store_image",
        lambda data, *args: read.append(data) or store_image(data, *args),
    )
    convert_folder(mixed, out, StorageOptions(), workers=1)
    assert len(read) == 2  # not the first image of the three
    verify(out, workers=1)
    other = mixed.parent / "other.beton"
    convert_folder(mixed, other, StorageOptions(), workers=1)
    assert other.read_bytes() == out.read_bytes()


def test_skipped_image_is_an_error_without_skip(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (mixed / "cat" / "deeper" / "b.JPEG").write_bytes(b"")
    out = mixed.parent / "mixed.beton"

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("irpe_ds.data.beton.convert.publish", killed)
        with pytest.raises(KeyboardInterrupt):
            convert_folder(mixed, out, StorageOptions(), workers=1, on_bad="skip")
    with pytest.raises(DataError, match="0 bytes"):
        convert_folder(mixed, out, StorageOptions(), workers=1)
    assert convert_folder(mixed, out, StorageOptions(), workers=1, on_bad="skip").skipped == 1
    verify(out, workers=1)


def test_changed_source_is_read_again(mixed: Path, pixels: Callable[..., np.ndarray]) -> None:
    (mixed / "dog" / "d.jpg").write_bytes(b"")
    out = mixed.parent / "mixed.beton"
    with pytest.raises(DataError, match=r"d\.jpg"):
        convert_folder(mixed, out, StorageOptions(), workers=1)
    for name in ("cat/a.jpg", "dog/d.jpg"):
        Image.fromarray(pixels(9, 30, 40)).save(mixed / name, quality=80)
    manifest = convert_folder(mixed, out, StorageOptions(), workers=1)
    assert read_beton(out, "test").payload(0).tobytes() == (mixed / "cat" / "a.jpg").read_bytes()
    assert manifest.duplicates == 1
    verify(out, workers=1)


def test_nothing_is_committed_as_done_before_it_is_on_the_disk(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed, on_disk, commits = [0], [0], []

    def append(self: BetonWriter, payload: bytes) -> int:
        start = self_append(self, payload)
        placed[0] = start + len(payload)
        return start

    def sync(self: BetonWriter) -> None:
        reached = placed[0]
        time.sleep(0.005)
        self_sync(self)
        on_disk[0] = reached

    def commit(self: Journal) -> None:
        commits.append(self.written()[0])
        assert self.written()[2] <= on_disk[0]
        self_commit(self)

    self_append, self_sync, self_commit = BetonWriter.append, BetonWriter.sync, Journal.commit
    monkeypatch.setattr(BetonWriter, "append", append)
    monkeypatch.setattr(BetonWriter, "sync", sync)
    monkeypatch.setattr(Journal, "commit", commit)
    monkeypatch.setattr("irpe_ds.data.beton.convert._COMMIT_SECONDS", 0.0)
    convert_folder(folder, tmp_path / "out.beton", StorageOptions(), workers=1)
    assert commits[-1] == 37
    assert len(set(commits)) > 2


def test_what_a_failing_disk_lost_is_not_committed_as_done(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = mixed.parent / "mixed.beton"
    outcomes = [OSError(errno.EIO, "Input/output error"), None]  # the second fsync succeeds

    def sync(self: BetonWriter) -> None:
        outcome = outcomes.pop(0)
        if outcome:
            raise outcome

    with monkeypatch.context() as patch:
        patch.setattr(BetonWriter, "sync", sync)
        with pytest.raises(DataError, match=r"--out: .*Input/output error"):
            convert_folder(mixed, out, StorageOptions(), workers=1)
    assert not out.exists()
    with sqlite3.connect(beside(out, ".partial.db")) as journal:
        assert journal.execute("SELECT count(*) FROM done").fetchone() == (0,)
    convert_folder(mixed, out, StorageOptions(), workers=1)
    verify(out, workers=1)


def test_one_conversion_at_a_time(mixed: Path) -> None:
    out = mixed.parent / "mixed.beton"
    expected = pytest.raises(DataError, match=r"\.partial\.db is locked: another conversion")
    with closing(Journal(beside(out, ".partial.db"), {})), expected:
        convert_folder(mixed, out, StorageOptions(), workers=1)


def test_killed_before_the_first_image_it_does_not_take_the_old_file_for_its_own(
    mixed: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = mixed.parent / "mixed.beton"
    convert_folder(mixed, out, StorageOptions(), workers=1)

    def killed(*_: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("irpe_ds.data.beton.convert.BetonWriter", killed)
        with pytest.raises(KeyboardInterrupt):
            convert_folder(folder, out, StorageOptions(), workers=1, overwrite=True)
    with pytest.raises(ConfigError, match=r"--out: expected a new file, or --overwrite"):
        convert_folder(folder, out, StorageOptions(), workers=1)
    assert convert_folder(folder, out, StorageOptions(), workers=1, overwrite=True).num_samples > 9
    verify(out, workers=1)


def test_killed_between_renames_it_resumes(
    mixed: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every rename, on top of an older file."""
    out = mixed.parent / "out" / "mixed.beton"
    expected = convert_folder(folder, out, StorageOptions(), workers=1)
    for renames in range(5):
        convert_folder(mixed, out, StorageOptions(), workers=1, overwrite=True)
        renamed = []

        def replace(old: Path, new: Path, limit: int = renames, renamed: list = renamed) -> None:
            if old.suffix == ".partial" and not old.name.startswith("."):  # files.atomic_write's
                if len(renamed) == limit:
                    raise KeyboardInterrupt
                renamed.append(old)
            old.rename(new)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            with pytest.raises(KeyboardInterrupt):
                convert_folder(folder, out, StorageOptions(), workers=1, overwrite=True)
        with monkeypatch.context() as patch:
            patch.setattr("irpe_ds.data.beton.convert.store_image", None)  # nothing is read again
            made = convert_folder(folder, out, StorageOptions(), workers=1, overwrite=not renamed)
        assert made == expected
        verify(out, workers=1)
        assert len(list(out.parent.iterdir())) == 3


@pytest.fixture
def stopped(folder: Path, tmp_path: Path) -> Path:
    """The output of a conversion that stopped at the last of 37 images, with its journal."""
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    (source / "036/image.jpg").write_bytes(b"")
    out = tmp_path / "out.beton"
    with pytest.raises(DataError, match="0 bytes"):
        convert_folder(source, out, StorageOptions(), workers=1)
    shutil.copyfile(folder / "036/image.jpg", source / "036/image.jpg")
    return out


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("UPDATE done SET start = start + 1 WHERE position = 7", "damage in image 7"),
        ("UPDATE done SET height = 'x' WHERE position = 7", "damage in image 7"),
        ("UPDATE done SET sha256 = x'00' WHERE position = 7", "damage in image 7"),
        ("UPDATE done SET position = -1 WHERE position = 7", "damage in image 0"),
        ("DELETE FROM done WHERE position = 7", "damage in image 7"),
        ("UPDATE settings SET value = '[[['", "damaged settings"),
        ("UPDATE settings SET value = x'ff'", "damaged settings"),
        ("DROP TABLE done", "tables of another version or another program"),
        ("CREATE TABLE mine (name TEXT)", "tables of another version or another program"),
        ("ALTER TABLE done DROP COLUMN digest", "tables of another version or another program"),
    ],
)
def test_changed_journal_is_refused_and_kept(stopped: Path, change: str, expected: str) -> None:
    path = beside(stopped, ".partial.db")
    with closing(sqlite3.connect(path)) as journal:
        journal.execute(change)
        journal.commit()
    before = path.read_bytes(), beside(stopped, ".partial").read_bytes()
    with pytest.raises(DataError, match=r"\.partial\.db: expected the journal .*, got " + expected):
        convert_folder(stopped.parent / "source", stopped, StorageOptions(), workers=1)
    assert (path.read_bytes(), beside(stopped, ".partial").read_bytes()) == before


@pytest.mark.thorough
def test_flipped_bytes_of_the_journal_change_no_file(stopped: Path, beton: Path) -> None:
    rng = np.random.default_rng(0)
    path, unfinished = beside(stopped, ".partial.db"), beside(stopped, ".partial")
    journal, images = path.read_bytes(), unfinished.read_bytes()
    for _ in range(20):
        damaged = bytearray(journal)
        damaged[rng.integers(len(journal))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        unfinished.write_bytes(images)
        try:
            convert_folder(stopped.parent / "source", stopped, StorageOptions(), workers=1)
        except (DataError, ConfigError):
            continue
        assert stopped.read_bytes() == beton.read_bytes()
        assert beside(stopped, HASHES).read_bytes() == beside(beton, HASHES).read_bytes()
        stopped.unlink()


def test_journal_that_is_no_file(mixed: Path) -> None:
    out = mixed.parent / "mixed.beton"
    os.mkfifo(beside(out, ".partial.db"))
    with pytest.raises(DataError, match=r"\.partial\.db: .* not a regular file"):
        convert_folder(mixed, out, StorageOptions(), workers=1)


def test_images_that_the_journal_lost_are_noticed(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = Journal.counts
    monkeypatch.setattr(Journal, "counts", lambda self: counts(self) | {"num_samples": 3})
    expected = r"got 3 images in the file and 0 skipped, of 4 listed"
    with pytest.raises(DataError, match=expected):
        convert_folder(mixed, mixed.parent / "mixed.beton", StorageOptions(), workers=1)
