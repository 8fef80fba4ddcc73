"""The .beton beside a folder: made once, reused while it fits, never in another's place."""

import os
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from irpe_ds.data.beton.cached import converted
from irpe_ds.data.beton.convert import convert
from irpe_ds.data.beton.manifest import MANIFEST, SKIPPED, beside, read_manifest
from irpe_ds.data.beton.options import StorageOptions
from irpe_ds.data.beton.sources import open_source
from irpe_ds.errors import DataError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def out(mixed: Path) -> Path:
    """The .beton beside `mixed`, made by the first call."""
    found = converted(mixed, "data.train", workers=1)
    assert found == mixed.parent / "mixed.beton"
    assert _classes(found) == ("cat", "dog")
    return found


def _classes(path: Path) -> tuple[str, ...]:
    manifest = read_manifest(path)
    assert manifest is not None
    return manifest.classes


def _images(path: Path) -> int:
    manifest = read_manifest(path)
    assert manifest is not None
    return manifest.num_samples


def _is_made_again(folder: Path, out: Path) -> bool:
    before = out.stat().st_ino
    assert converted(folder, "data.train", workers=1) == out
    return out.stat().st_ino != before


def test_it_is_reused_as_long_as_it_fits(mixed: Path, out: Path) -> None:
    assert not _is_made_again(mixed, out)
    os.utime(mixed / "cat" / "a.jpg")  # as a copy of the folder has: the bytes are compared
    (mixed / "dog" / "more.txt").write_text("no image")
    assert not _is_made_again(mixed, out)


def _another_image(folder: Path) -> None:
    Image.new("RGB", (9, 9)).save(folder / "dog" / "e.jpg")


def _other_pixels(folder: Path) -> None:
    """With the name, and the time, of an older image: as `mv` leaves it."""
    stamp = (folder / "cat" / "a.jpg").stat().st_mtime_ns
    Image.new("RGB", (9, 9)).save(folder / "a.jpg", "JPEG")
    os.utime(folder / "a.jpg", ns=(stamp, stamp))
    os.replace(folder / "a.jpg", folder / "cat" / "a.jpg")


def _another_class(folder: Path) -> None:
    (folder / "cat").rename(folder / "eel")


@pytest.mark.parametrize("change", [_another_image, _other_pixels, _another_class])
def test_it_is_made_again_when_images_have_changed(
    change: Callable[[Path], None], mixed: Path, out: Path
) -> None:
    os.utime(beside(out, MANIFEST), (0, 0))  # whatever the resolution of the file system's clock
    change(mixed)
    assert _is_made_again(mixed, out)
    assert not _is_made_again(mixed, out)


def test_a_bad_image_is_left_out_and_listed_until_it_is_repaired(mixed: Path) -> None:
    bad = mixed / "cat" / "bad.jpg"
    bad.write_bytes(b"no image")
    out = converted(mixed, "data.train", workers=1)
    assert beside(out, SKIPPED).read_text().startswith("cat/bad.jpg\tnot a JPEG")
    assert _images(out) == 4
    os.utime(beside(out, MANIFEST), (2**31, 2**31))  # after the images, whatever the clock
    assert not _is_made_again(mixed, out)
    os.utime(beside(out, MANIFEST), (0, 0))
    Image.new("RGB", (9, 9)).save(bad)
    assert _is_made_again(mixed, out)
    assert _images(out) == 5


def test_a_file_with_other_options_is_used_but_not_replaced(mixed: Path) -> None:
    out = beside(mixed, ".beton")
    options = StorageOptions(mode="reencode", longest_side=32)
    convert(open_source([mixed]), out, options, workers=1)
    assert not _is_made_again(mixed, out)
    _another_image(mixed)
    with pytest.raises(DataError, match=r"move it away.*data_prep/convert\.py --source .*mixed"):
        converted(mixed, "data.train", workers=1)
    assert _images(out) == 4


def test_a_file_of_unknown_origin_is_not_replaced(mixed: Path) -> None:
    out = beside(mixed, ".beton")
    out.write_bytes(b"something")
    with pytest.raises(DataError, match=r"^data\.val: expected .*mixed\.beton to be of the images"):
        converted(mixed, "data.val", workers=1)
    assert out.read_bytes() == b"something"


def test_a_folder_that_cannot_be_written_to(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(DataError, match=r"cannot write .*Permission denied.*data\.pipeline=timm"):
        converted(mixed, "data.train", workers=1)


def test_a_folder_without_classes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^data\.train: expected images in .*, got no images"):
        converted(tmp_path, "data.train", workers=1)


def test_many_bad_images_stop_and_the_command_of_the_message_leaves_them_out(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(4):
        (mixed / "cat" / f"bad{n}.jpg").write_bytes(b"no image")
    out = mixed.parent / "mixed.beton"
    with pytest.raises(DataError, match=r"^data\.train: --max-bad: .* number 4, ") as error:
        converted(mixed, "data.train", workers=1)
    command = str(error.value).partition("to leave them out: python ")[2]
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
    assert converted(mixed, "data.train", workers=1) == out
    assert _images(out) == 4
