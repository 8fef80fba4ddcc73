"""Where a conversion writes: through links, and what is said of a folder that fails."""

import errno
import os
from collections import namedtuple
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from irpe_ds.data.beton import listing, places
from irpe_ds.data.beton.cached import converted
from irpe_ds.data.beton.convert import convert
from irpe_ds.data.beton.journal import DoneImage, Journal
from irpe_ds.data.beton.manifest import DatasetManifest, read_manifest
from irpe_ds.data.beton.options import SourceOptions, StorageOptions
from irpe_ds.data.beton.sources import Source, open_source
from irpe_ds.data.beton.sources.source import SourceFile
from irpe_ds.data.beton.verify import verify
from irpe_ds.errors import DataError


def convert_folder(folder: Path, out: Path, **how: Any) -> DatasetManifest:
    return convert(open_source([folder]), out, StorageOptions(), workers=1, **how)


def test_link_is_written_to_where_it_points(mixed: Path, tmp_path: Path) -> None:
    far, link = tmp_path / "far" / "deep.beton", tmp_path / "link.beton"
    far.parent.mkdir()
    link.symlink_to("far/deep.beton")
    convert_folder(mixed, link)
    for _ in range(2):
        assert link.is_symlink()
        assert sorted(path.name for path in far.parent.iterdir()) == [
            f"deep.beton{suffix}" for suffix in ("", ".json", ".left_out", ".sha256")
        ]
        assert verify(link, workers=1).classes == ("cat", "dog")
        convert_folder(mixed, link, overwrite=True)
    assert not list(tmp_path.glob("link.beton?*"))


def test_link_beside_a_folder(mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "mixed.beton").symlink_to("far/deep.beton")
    made = converted(mixed, "data.train", workers=1)
    assert made == tmp_path / "far" / "deep.beton"
    before = made.stat().st_ino
    assert converted(mixed, "data.train", workers=1).stat().st_ino == before


def test_link_with_files_of_its_own_keeps_them(mixed: Path, tmp_path: Path) -> None:
    """As in stores that name files by their contents."""
    convert_folder(mixed, tmp_path / "made.beton")
    for suffix, blob in (("", "1f"), (".json", "2e"), (".sha256", "3d")):
        (tmp_path / f"made.beton{suffix}").rename(tmp_path / blob)
        (tmp_path / f"train.beton{suffix}").symlink_to(blob)
    assert read_manifest(tmp_path / "train.beton") is not None
    assert verify(tmp_path / "train.beton", workers=1).num_samples == 4


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_folder_that_cannot_be_written_is_named(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    opened = os.open

    def failing(path: Any, flags: int, *mode: int) -> int:
        if str(path).endswith(".partial.db"):
            raise OSError(number, os.strerror(number), os.fspath(path))
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", failing)
    out = tmp_path / "out" / "out.beton"
    expected = (
        rf"^--out: cannot write {out}: {os.strerror(number)}: {out}\.partial\.db; what is done"
    )
    with pytest.raises(DataError, match=expected):
        convert_folder(mixed, out)


def test_failing_disk_without_a_file_name(tmp_path: Path) -> None:
    error = places.cannot_write(tmp_path / "x.beton", OSError(errno.EIO, "Input/output error"))
    assert f"cannot write {tmp_path}/x.beton: Input/output error: {tmp_path}; what" in str(error)


class Names(Source):
    """Files of names as long as ImageNet's, which are not there."""

    kind = "names"

    def files(self) -> Iterator[SourceFile]:
        for n in range(3000):
            category = f"n{n % 50:08d}"
            path = f"{category}/{category}_{n:05d}.JPEG"
            yield SourceFile(path, f"/data/imagenet/train/{path}", 0, 110_000, 10**18 + n)


def test_room_for_the_journal_is_foreseen(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    with closing(Journal(path, {})) as state:
        state.list_source(Names([tmp_path], SourceOptions()))
        expected, temporary = state.needs()
        for n in range(3000):
            place = 1 << 33, 110_000, 1, 375, 500, 1
            state.add(DoneImage(n, *place, os.urandom(32), None))
        state.stage()
        state.commit()
    assert expected == pytest.approx(path.stat().st_size, rel=0.1)
    assert 150 < expected / 3000 < 300
    assert temporary > 3000 * 500


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("full", ["temporary", "out"])
def test_full_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str) -> None:
    folder = tmp_path / full
    (tmp_path / "temporary").mkdir()
    (tmp_path / "out").mkdir()
    monkeypatch.delenv("SQLITE_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    limited = (*listing._TABLES, "PRAGMA temp.max_page_count = 1")  # SQLite's own error
    monkeypatch.setattr(listing, "_TABLES", limited)
    monkeypatch.setattr(
        places.shutil, "disk_usage", lambda path: Usage(9, 0, 0 if path == folder else 9)
    )
    place = rf"{folder}, where SQLite sorts \(TMPDIR" if full == "temporary" else f"{folder}$"
    expected = f"^cannot list the images: No space left on device: {place}"
    for path in (tmp_path / "out" / "journal", None):
        with closing(Journal(path, {})) as state, pytest.raises(DataError, match=expected):
            state.list_source(Names([tmp_path], SourceOptions()))
        if full == "out":
            break
