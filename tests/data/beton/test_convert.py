"""ImageFolder -> .beton: what is stored, that anyone can read it, and what is refused."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from irpe_ds.config import DataConfig
from irpe_ds.data.beton import writer
from irpe_ds.data.beton.convert import convert
from irpe_ds.data.beton.forecast import forecast
from irpe_ds.data.beton.format import JPG, RAW, Reader
from irpe_ds.data.beton.manifest import (
    MANIFEST,
    SKIPPED,
    DatasetManifest,
    beside,
    file_sha256,
    read_manifest,
)
from irpe_ds.data.beton.options import StorageOptions
from irpe_ds.data.beton.reader import read_beton
from irpe_ds.data.beton.sources import open_source
from irpe_ds.data.beton.verify import verify
from irpe_ds.data.loaders import EvalLoader
from irpe_ds.errors import ConfigError, DataError

ROOT = Path(__file__).parents[3]


def convert_folder(folder: Path, out: Path, options: StorageOptions, **how: Any) -> DatasetManifest:
    return convert(open_source([folder]), out, options, **how)


def payload(path: Path, sample: int) -> np.ndarray:
    """The stored bytes of one sample."""
    return read_beton(path, "test").payload(sample)


def test_passthrough_stores_the_files_themselves(folder: Path, beton: Path) -> None:
    files = sorted(folder.rglob("*.jpg"))
    assert len(files) == len(read_beton(beton, "test").entries)
    for sample, file in enumerate(files):
        assert payload(beton, sample).tobytes() == file.read_bytes()


def test_passthrough_keeps_the_pixels_of_what_is_no_rgb_jpeg(mixed: Path) -> None:
    out = mixed.parent / "mixed.beton"
    manifest = convert_folder(mixed, out, StorageOptions(), workers=2)
    assert (manifest.num_samples, manifest.changed, manifest.left_out) == (4, 2, 1)
    verify(out, workers=2)
    assert read_beton(out, "test").entries["mode"].tolist() == [JPG, JPG, RAW, RAW]
    for sample, name in ((2, "c.png"), (3, "d.jpg")):
        expected = np.asarray(Image.open(mixed / "dog" / name).convert("RGB"))
        assert np.array_equal(payload(out, sample), expected.ravel())


def test_manifest_says_what_is_in_the_file(mixed: Path) -> None:
    out = mixed.parent / "mixed.beton"
    convert_folder(mixed, out, StorageOptions(), workers=2, command="python data_prep/convert.py")
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.classes == ("cat", "dog")
    assert manifest.class_counts == (2, 2)
    assert manifest.size == out.stat().st_size
    assert manifest.sha256 == file_sha256(out)
    assert manifest.options["mode"] == "passthrough"
    assert manifest.command == "python data_prep/convert.py"
    assert json.loads(Path(f"{out}.json").read_text())["format"] == 3


def test_ffcv_loader_reads_the_file_as_we_do(beton: Path) -> None:
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder
    from ffcv.loader import Loader
    from ffcv.transforms import ToTensor

    decoders = {
        "image": [CenterCropRGBImageDecoder((24, 24), ratio=1.0), ToTensor()],
        "label": [IntDecoder(), ToTensor()],
    }
    theirs = Loader(str(beton), batch_size=37, num_workers=1, pipelines=decoders)
    ((images_BHWC, labels),) = theirs
    data = DataConfig(train=beton, val=beton, val_crop=1.0)
    ours = EvalLoader(data, batch_size=37, img_size=(24, 24), rank=0, world_size=1)
    ((images_BCHW, our_labels, _),) = ours
    assert np.array_equal(images_BHWC.numpy(), images_BCHW.permute(0, 2, 3, 1).numpy())
    assert labels[:, 0].tolist() == our_labels.tolist() == list(range(37))


@pytest.mark.parametrize(
    ("options", "modes"),
    [
        (StorageOptions(mode="reencode"), [JPG, JPG, JPG, JPG]),
        (StorageOptions(mode="raw"), [RAW, RAW, RAW, RAW]),
        (StorageOptions(mode="proportion", proportion=0.0), [RAW, RAW, RAW, RAW]),
        (StorageOptions(mode="proportion", proportion=1.0), [JPG, JPG, JPG, JPG]),
    ],
)
def test_modes(mixed: Path, options: StorageOptions, modes: list[int]) -> None:
    out = mixed.parent / "mixed.beton"
    manifest = convert_folder(mixed, out, options, workers=2)
    assert manifest.changed == 4
    assert read_beton(out, "test").entries["mode"].tolist() == modes
    verify(out, workers=2)
    if modes[2] == RAW:
        expected = np.asarray(Image.open(mixed / "dog" / "c.png"))
        assert np.array_equal(payload(out, 2), expected.ravel())


@pytest.mark.parametrize(
    ("side", "heights", "widths"),
    [
        ({"longest_side": 60}, [30, 60, 30, 30], [40, 45, 40, 40]),
        ({"shortest_side": 20}, [20, 27, 20, 20], [27, 20, 27, 27]),
        ({"longest_side": 1}, [1, 1, 1, 1], [1, 1, 1, 1]),
    ],
)
@pytest.mark.parametrize("mode", ["reencode", "raw"])
def test_longer_sides_are_reduced(
    mixed: Path, side: dict[str, int], heights: list[int], widths: list[int], mode: Any
) -> None:
    out = mixed.parent / "mixed.beton"
    convert_folder(mixed, out, StorageOptions(mode=mode, **side), workers=1)
    entries = read_beton(out, "test").entries
    assert entries["height"].tolist() == heights
    assert entries["width"].tolist() == widths
    verify(out, workers=1)


def test_reduction_is_by_area(mixed: Path) -> None:
    out = mixed.parent / "mixed.beton"
    convert_folder(mixed, out, StorageOptions(mode="raw", shortest_side=10), workers=1)
    original = np.asarray(Image.open(mixed / "dog" / "c.png"), float)  # 30 x 40
    found = payload(out, 2).reshape(10, 13, 3)
    assert found[:, 0].mean() == pytest.approx(original[:, :3].mean(), abs=1)


def test_rotation_tags_are_left_alone(mixed: Path) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6  # to be shown rotated by 90 degrees
    with Image.open(mixed / "cat" / "a.jpg") as image:
        image.save(mixed / "cat" / "a.jpg", quality=90, exif=tags)
    out = mixed.parent / "mixed.beton"
    for mode in ("passthrough", "raw"):
        convert_folder(mixed, out, StorageOptions(mode=mode), workers=1, overwrite=True)
        assert tuple(read_beton(out, "test").entries[0][["height", "width"]]) == (30, 40)


def test_file_does_not_depend_on_the_number_of_workers(folder: Path, tmp_path: Path) -> None:
    options = StorageOptions(mode="proportion")
    made = [convert_folder(folder, tmp_path / f"{n}.beton", options, workers=n) for n in (1, 3)]
    assert made[0].sha256 == made[1].sha256
    modes = read_beton(tmp_path / "1.beton", "test").entries["mode"]
    assert set(modes.tolist()) == {JPG, RAW}


def test_pages_grow_with_the_images_and_nothing_crosses_one(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "FIRST_PAGE_BYTES", 4096)
    out = mixed.parent / "mixed.beton"
    convert_folder(mixed, out, StorageOptions(mode="raw"), workers=1)  # 3,600 to 32,400 bytes each
    reader = Reader(out)
    assert reader.page_size == 32768
    first, last = reader.alloc_table["ptr"], reader.alloc_table["ptr"] + reader.alloc_table["size"]
    assert (first // reader.page_size == (last - 1) // reader.page_size).all()
    verify(out, workers=1)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut short": lambda data: data[: len(data) // 2],
    "overwritten": lambda data: data[: len(data) // 2] + bytes(40) + data[len(data) // 2 + 40 :],
    "no image": lambda data: b"hello " * 100,
}


def damage(mixed: Path, kind: str) -> None:
    bad = mixed / "cat" / "deeper" / "b.JPEG"
    bad.write_bytes(DAMAGE[kind](bad.read_bytes()))


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("mode", ["passthrough", "raw"])
def test_damaged_image_is_named(mixed: Path, kind: str, mode: Any) -> None:
    damage(mixed, kind)
    out = mixed.parent / "out" / "mixed.beton"
    with pytest.raises(DataError, match=r"cat/deeper/b\.JPEG: expected an undamaged image"):
        convert_folder(mixed, out, StorageOptions(mode=mode), workers=2)
    assert not out.exists()
    assert not beside(out, MANIFEST).exists()


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_image_is_left_out_and_listed(mixed: Path, kind: str) -> None:
    damage(mixed, kind)
    out = mixed.parent / "mixed.beton"
    manifest = convert_folder(mixed, out, StorageOptions(), workers=2, on_bad="skip")
    assert (manifest.num_samples, manifest.skipped) == (3, 1)
    assert manifest.class_counts == (1, 2)
    name, reason = beside(out, SKIPPED).read_text().splitlines()[0].split("\t")
    assert name == "cat/deeper/b.JPEG"
    assert reason.startswith(("0 bytes", "not a JPEG, PNG")) or "cleanly" in reason
    verify(out, workers=1)


def test_header_check_leaves_damage_to_verify(mixed: Path) -> None:
    damage(mixed, "overwritten")
    out = mixed.parent / "mixed.beton"
    convert_folder(mixed, out, StorageOptions(check="header"), workers=1)
    with pytest.raises(DataError, match=r"sample 1 \(cat/deeper/b\.JPEG\): JPEG data that does"):
        verify(out, workers=1)


def test_forecast_is_near_what_comes(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.beton"
    for options in (StorageOptions(), StorageOptions(mode="raw"), StorageOptions(mode="reencode")):
        coming = forecast(open_source([folder]), out, options, workers=1)
        assert list(tmp_path.iterdir()) == []
        made = convert_folder(folder, out, options, workers=1)
        assert coming.size == pytest.approx(made.size, rel=0.05)
        assert (coming.images, coming.classes) == (37, 37)
        for path in tmp_path.iterdir():
            path.unlink()


def test_forecast_of_the_time_counts_the_images_tried(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("irpe_ds.data.beton.forecast.time.monotonic", lambda: next(clock))
    monkeypatch.setattr("irpe_ds.data.beton.forecast._TRIALS", 25)  # of 37 images every second: 19
    coming = forecast(open_source([folder]), tmp_path / "out.beton", StorageOptions(), workers=2)
    assert coming.seconds == pytest.approx(37 * 10 / 19 / 2)


def test_failure_keeps_the_file_that_was_to_be_replaced(mixed: Path) -> None:
    out = mixed.parent / "mixed.beton"
    before = convert_folder(mixed, out, StorageOptions(), workers=1)
    with pytest.raises(ConfigError, match=r"--out: expected a new file, or --overwrite"):
        convert_folder(mixed, out, StorageOptions(), workers=1)
    (mixed / "dog" / "c.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"c\.png"):
        convert_folder(mixed, out, StorageOptions(), workers=1, overwrite=True)
    verify(out, workers=1)
    (mixed / "dog" / "c.png").unlink()
    after = convert_folder(mixed, out, StorageOptions(), workers=1, overwrite=True)
    assert (before.num_samples, after.num_samples) == (4, 3)
    assert read_manifest(out) == after


def test_folders_without_images_are_refused(tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "out.beton"
    with pytest.raises(ConfigError, match=r"--source.*absent"):
        convert_folder(tmp_path / "absent", out, StorageOptions(), workers=1)
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "image.jpg").write_bytes((folder / "001" / "image.jpg").read_bytes())
    with pytest.raises(DataError, match=r"--source.*one folder per class, or --labels, got image"):
        convert_folder(tmp_path / "flat", out, StorageOptions(), workers=1)
    (tmp_path / "flat" / "cat").mkdir()
    with pytest.raises(DataError, match=r"--source.*images in every class folder.*cat"):
        convert_folder(tmp_path / "flat", out, StorageOptions(), workers=1)
    assert not list(tmp_path.glob("out.*"))


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"mode": "png"}, "--mode"),
        ({"longest_side": 100}, "--mode"),
        ({"mode": "raw", "longest_side": 9, "shortest_side": 9}, "--shortest-side"),
        ({"mode": "raw", "check": "header"}, "--check"),
        ({"check": "none"}, "--check"),
        ({"quality": 0}, "--quality"),
        ({"mode": "proportion", "proportion": 1.5}, "--proportion"),
        ({"mode": "raw", "longest_side": 0}, "--longest-side"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], where: str) -> None:
    with pytest.raises(ConfigError) as error:
        StorageOptions(**options)
    assert error.value.where == where


def test_script_reports_a_mistake_in_one_line(
    mixed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (mixed / "dog" / "c.png").write_bytes(b"")
    out = mixed.parent / "mixed.beton"
    command = ["convert.py", "--source", str(mixed), "--out", str(out), "--workers", "1"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / "data_prep" / "convert.py"), run_name="__main__")
    assert exit_.value.code == 2
    shown = capsys.readouterr()
    listed = "a folder: 4 images of 2 classes, 2 each; 1 other files left out\n"
    assert shown.out == f"{listed}  0: cat, 2 images\n  1: dog, 2 images\n"
    assert shown.err.startswith(f"error: {mixed / 'dog' / 'c.png'}: expected an undamaged image")
    assert shown.err.count("\n") == 1


def test_dry_run_tells_the_classes_and_writes_nothing(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "classes.txt").write_text("".join(f"{number:03d}\n" for number in range(38)))
    options = ["--classes", str(tmp_path / "classes.txt"), "--limit", "36", "--dry-run"]
    command = ["convert.py", "--source", str(folder), "--out", str(tmp_path / "x.beton")]
    monkeypatch.setattr(sys, "argv", [*command, *options])
    runpy.run_path(str(ROOT / "data_prep" / "convert.py"), run_name="__main__")
    *lines, forecast, while_listed = capsys.readouterr().out.splitlines()
    rows = [f"  {n}: {n:03d}, {n < 36:d} images" for n in (0, 1, 2, 3, 36, 37)]
    assert lines == [
        "a folder: 36 images of 36 classes, 1 each; 0 other files left out",
        "2 more classes have no images",
        *rows[:4],
        "  ...",
        *rows[4:],
    ]
    assert forecast.startswith("about 16.8 MB")
    assert while_listed.startswith("while images are listed, ")
    assert [path.name for path in tmp_path.iterdir()] == ["classes.txt"]


WITHOUT_HEAVY_IMPORTS = """
import runpy, sys
sys.modules.update(dict.fromkeys(("torch", "ffcv", "numba", "sklearn", "scipy")))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_without_heavy_imports(script: str, *options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_HEAVY_IMPORTS, script, *map(str, options)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize(
    "option",
    [
        *(("--quality", 0), ("--workers", 0), ("--source", "absent"), ("--out", "README.md")),
        ("--shards", 513),
    ],
)
def test_mistake_is_reported_before_heavy_imports(mixed: Path, option: tuple[str, object]) -> None:
    options = {"--source": mixed, "--out": mixed.parent / "mixed.beton"} | dict([option])
    done = run_without_heavy_imports("data_prep/convert.py", *sum(options.items(), ()))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {option[0]}: expected")


@pytest.mark.parametrize("script", sorted(ROOT.glob("data_prep/*.py")), ids=lambda p: p.stem)
def test_help_needs_no_heavy_imports(script: Path) -> None:
    if 'name__ == "__main__"' not in script.read_text():
        pytest.skip("a module, no script")
    done = run_without_heavy_imports(str(script), "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_image_that_is_no_file_is_named(mixed: Path, make: Callable[[Path], None]) -> None:
    make(mixed / "cat" / "b.jpg")
    out = mixed.parent / "mixed.beton"
    with pytest.raises(DataError, match=r"cat/b\.jpg: expected an undamaged .* not a regular file"):
        convert_folder(mixed, out, StorageOptions(), workers=1)
    manifest = convert_folder(mixed, out, StorageOptions(), workers=1, on_bad="skip")
    assert (manifest.num_samples, manifest.skipped, manifest.left_out) == (4, 1, 1)


def test_loose_files_are_counted_and_loose_images_refused(mixed: Path) -> None:
    (mixed / "readme").write_text("x")
    out = mixed.parent / "mixed.beton"
    assert convert_folder(mixed, out, StorageOptions(), workers=1).left_out == 2
    (mixed / "loose.jpg").write_bytes((mixed / "cat/a.jpg").read_bytes())
    with pytest.raises(DataError, match=r"every image in a class folder, got .*loose\.jpg"):
        convert_folder(mixed, out, StorageOptions(), workers=1, overwrite=True)


def test_links_in_a_circle_end(mixed: Path) -> None:
    for name in ("one", "two"):
        (mixed / "cat" / name).symlink_to(mixed / "cat")
    with pytest.raises(DataError, match=r"every folder once in a class, got .*cat/(one|two)"):
        convert_folder(mixed, mixed.parent / "mixed.beton", StorageOptions(), workers=1)


def test_image_file_too_large_to_read_is_named(mixed: Path) -> None:
    (mixed / "cat" / "b.jpg").touch()
    os.truncate(mixed / "cat" / "b.jpg", 1 << 40)  # a hole
    with pytest.raises(DataError, match=r"cat/b\.jpg: .* got 1099511627776 bytes, over 268435456"):
        convert_folder(mixed, mixed.parent / "mixed.beton", StorageOptions(), workers=1)
