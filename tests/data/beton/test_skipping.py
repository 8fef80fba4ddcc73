"""--on-bad skip: bad images are left out, up to a share; a source that has gone stops."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from irpe_ds.data.beton import sources
from irpe_ds.data.beton.convert import convert
from irpe_ds.data.beton.journal import list_images
from irpe_ds.data.beton.manifest import HASHES, SKIPPED, DatasetManifest, beside
from irpe_ds.data.beton.options import StorageOptions
from irpe_ds.data.beton.sources import Files, Member, open_source
from irpe_ds.errors import ConfigError, DataError


def skip(folder: Path, out: Path, **how: Any) -> DatasetManifest:
    source = open_source([folder])
    return convert(source, out, StorageOptions(), workers=1, on_bad="skip", **how)


@pytest.fixture
def photos(mixed: Path) -> Path:
    """60 images in two classes, each the same small JPEG; one of class dog is bad."""
    for n in range(28):
        for name in ("cat", "dog"):
            shutil.copyfile(mixed / "cat" / "a.jpg", mixed / name / f"f{n:02d}.jpg")
    (mixed / "dog" / "f07.jpg").write_bytes(b"no image")
    return mixed


def go_away(folder: Path) -> None:
    folder.rename(folder.parent / "elsewhere")


def come_back(folder: Path) -> None:
    (folder.parent / "elsewhere").rename(folder)


@pytest.mark.parametrize("kind", ["folder", "an empty mount point", errno.EIO, errno.ESTALE])
def test_source_that_goes_away_stops_and_continues(
    photos: Path, monkeypatch: pytest.MonkeyPatch, kind: str | int
) -> None:
    expected, out = photos.parent / "expected.beton", photos.parent / "out.beton"
    assert skip(photos, expected).skipped == 1
    source, reads, read = open_source([photos]), [0], Files.read

    def unplugged(files: Files, member: Member) -> bytes:
        reads[0] += 1
        if reads[0] == 40:
            if isinstance(kind, int):
                monkeypatch.setattr(sources.files, "read_regular", failing)
            else:
                go_away(photos)
                if kind == "an empty mount point":
                    photos.mkdir()
        return read(files, member)

    def failing(path: str, _: int) -> bytes:
        raise OSError(kind, os.strerror(int(kind)), path)

    with monkeypatch.context() as patch:
        patch.setattr(Files, "read", unplugged)
        with pytest.raises(DataError, match=r"dog/.*\.jpg: expected the file as it was listed"):
            convert(source, out, StorageOptions(), workers=1, on_bad="skip")
    monkeypatch.undo()
    assert not out.exists()
    if not isinstance(kind, int):
        with pytest.raises((ConfigError, DataError), match="--source"):
            skip(photos, out)
        if kind == "an empty mount point":
            photos.rmdir()
        come_back(photos)
    again: list[str] = []
    monkeypatch.setattr(Files, "read", lambda f, m: again.append(m.name) or read(f, m))
    skip(photos, out)
    assert len(again) < 30  # 60 but for what was done
    for suffix in ("", HASHES, SKIPPED):
        assert beside(out, suffix).read_bytes() == beside(expected, suffix).read_bytes()


@pytest.mark.parametrize(
    ("happens", "got"),
    [
        (lambda file: file.unlink(), "No such file"),
        (lambda file: os.truncate(file, 9), "9 bytes instead of"),
        (lambda file: file.write_bytes(file.read_bytes() * 2), "more than .* bytes"),
    ],
)
def test_file_that_changes_after_it_was_listed_stops(
    photos: Path, happens: Callable[[Path], object], got: str
) -> None:
    source, _, images = list_images(photos, "--source")
    files = Files(source)
    member = next(member for _, member in images if member.name == "f03.jpg")
    happens(Path(member.file))
    with pytest.raises(DataError, match=rf"f03\.jpg: expected the file as .* got {got}"):
        files.read(member)


@pytest.mark.parametrize(
    ("happens", "got"),
    [(lambda file: os.truncate(file, 2048), "0 bytes instead of"), (Path.unlink, "No such file")],
)
def test_archive_that_changes_after_it_was_listed_stops(
    photos: Path, happens: Callable[[Path], object], got: str
) -> None:
    tar = Path(shutil.make_archive(str(photos), "tar", photos.parent, "mixed"))
    source, _, images = list_images(tar, "--source")
    member = next(member for _, member in images if member.name == "f03.jpg")
    happens(source.path)
    with pytest.raises(DataError, match=rf"tar: cat/f03\.jpg: expected the file as .* got {got}"):
        Files(source).read(member)


def spoil(folder: Path, count: int) -> None:
    for n in range(count):
        (folder / "cat" / f"f{n:02d}.jpg").write_bytes(b"no image")


@pytest.mark.parametrize(("count", "max_bad"), [(2, 0.01), (2, 0.0), (8, 0.15)])
def test_a_few_bad_images_are_skipped(photos: Path, count: int, max_bad: float) -> None:
    spoil(photos, count)
    assert skip(photos, photos.parent / "out.beton", max_bad=max_bad).skipped == count + 1


def test_too_many_bad_images_stop_and_a_larger_share_continues(photos: Path) -> None:
    out = photos.parent / "out.beton"
    spoil(photos, 5)
    expected = r"--max-bad: expected at most 0\.01 of 60 images to be bad, got .* number 4, .*f03"
    for _ in range(2):  # those that an earlier call skipped count too
        with pytest.raises(DataError, match=expected):
            skip(photos, out)
    assert skip(photos, out, max_bad=0.1).skipped == 6
    with pytest.raises(ConfigError, match="--max-bad: expected a share between 0 and 1, got 5"):
        skip(photos, out, max_bad=5, overwrite=True)


@pytest.mark.parametrize("name", ["cat", "dog"])
def test_class_that_becomes_empty_stops(mixed: Path, name: str) -> None:
    files = [path for path in (mixed / name).rglob("*") if path.suffix != ".txt" and path.is_file()]
    good = [path.read_bytes() for path in files]
    for path in files:
        path.write_bytes(b"no image")
    out = mixed.parent / "out.beton"
    for _ in range(2):  # whatever the journal has of an earlier call
        with pytest.raises(DataError, match=f"good image in every class, got only bad .* {name}:"):
            skip(mixed, out)
    files[0].write_bytes(good[0])
    assert skip(mixed, out).class_counts == ((1, 2) if name == "cat" else (2, 1))
