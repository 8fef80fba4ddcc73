"""ImageFolder -> .beton: what is stored, that anyone can read it, and what is refused."""

import io
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from irpe_ds.data import writer
from irpe_ds.data.convert import convert
from irpe_ds.data.dataset import read_beton
from irpe_ds.data.ffcv_api import JPG, RAW, Reader
from irpe_ds.data.images import StorageOptions
from irpe_ds.data.loaders import EvalLoader
from irpe_ds.data.manifest import file_sha256, read_manifest
from irpe_ds.data.verify import verify
from irpe_ds.errors import ConfigError

ROOT = Path(__file__).parents[2]


def payload(path: Path, sample: int) -> np.ndarray:
    """The stored bytes of one sample."""
    beton = read_beton(path, "test")
    entry = beton.entries[sample]
    return beton.bytes[entry["start"] : entry["start"] + entry["bytes"]]


@pytest.fixture
def mixed(tmp_path: Path, pixels: Callable[..., np.ndarray]) -> Path:
    """Two classes; a small JPEG, a large one, a PNG and a CMYK JPEG; and a text file."""
    root = tmp_path / "mixed"
    for name in ("cat", "dog"):
        (root / name / "deeper").mkdir(parents=True)
    Image.fromarray(pixels(0, 30, 40)).save(root / "cat" / "a.jpg", quality=90)
    Image.fromarray(pixels(1, 120, 90)).save(root / "cat" / "deeper" / "b.JPEG", quality=90)
    Image.fromarray(pixels(2, 30, 40)).save(root / "dog" / "c.png")
    Image.fromarray(pixels(3, 30, 40)).convert("CMYK").save(root / "dog" / "d.jpg", quality=95)
    (root / "dog" / "notes.txt").write_text("not an image")
    return root


def test_passthrough_stores_the_files_themselves(folder: Path, beton: Path) -> None:
    files = sorted(folder.rglob("*.jpg"))
    assert len(files) == len(read_beton(beton, "test").entries)
    for sample, file in enumerate(files):
        assert payload(beton, sample).tobytes() == file.read_bytes()


def test_passthrough_reencodes_what_no_decoder_of_ours_reads(mixed: Path) -> None:
    out = mixed.parent / "mixed.beton"
    manifest = convert(mixed, out, StorageOptions(quality=95), workers=2)
    assert (manifest.num_samples, manifest.reencoded, manifest.left_out) == (4, 2, 1)
    verify(out, workers=2)
    for sample, name in ((2, "c.png"), (3, "d.jpg")):
        stored = payload(out, sample).tobytes()
        assert stored.startswith(b"\xff\xd8")
        expected = np.asarray(Image.open(mixed / "dog" / name).convert("RGB"), np.float32)
        found = np.asarray(Image.open(io.BytesIO(stored)), np.float32)
        assert np.abs(found - expected).mean() < 12


def test_manifest_says_what_is_in_the_file(mixed: Path) -> None:
    out = mixed.parent / "mixed.beton"
    convert(mixed, out, StorageOptions(), workers=2, command="python data_prep/convert.py")
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.classes == ("cat", "dog")
    assert manifest.class_counts == (2, 2)
    assert manifest.size == out.stat().st_size
    assert manifest.sha256 == file_sha256(out)
    assert manifest.options["mode"] == "passthrough"
    assert manifest.command == "python data_prep/convert.py"
    assert json.loads(Path(f"{out}.json").read_text())["format"] == 1


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
    ours = EvalLoader(beton, batch_size=37, img_size=24, crop=1.0, rank=0, world_size=1)
    ((images_BCHW, our_labels, _),) = ours
    assert np.array_equal(images_BHWC.numpy(), images_BCHW.permute(0, 2, 3, 1).numpy())
    assert labels[:, 0].tolist() == our_labels.tolist() == list(range(37))


@pytest.mark.parametrize(
    ("options", "modes"),
    [
        (StorageOptions(mode="jpg"), [JPG, JPG, JPG, JPG]),
        (StorageOptions(mode="raw"), [RAW, RAW, RAW, RAW]),
        (StorageOptions(mode="smart", smart_threshold=5000), [RAW, JPG, RAW, RAW]),
        (StorageOptions(mode="proportion", proportion=0.0), [RAW, RAW, RAW, RAW]),
        (StorageOptions(mode="proportion", proportion=1.0), [JPG, JPG, JPG, JPG]),
    ],
)
def test_modes(mixed: Path, options: StorageOptions, modes: list[int]) -> None:
    out = mixed.parent / "mixed.beton"
    manifest = convert(mixed, out, options, workers=2)
    assert manifest.reencoded == 4
    assert read_beton(out, "test").entries["mode"].tolist() == modes
    verify(out, workers=2)
    if modes[2] == RAW:
        expected = np.asarray(Image.open(mixed / "dog" / "c.png"))
        assert np.array_equal(payload(out, 2), expected.ravel())


def test_max_resolution_limits_the_longest_side(mixed: Path) -> None:
    out = mixed.parent / "mixed.beton"
    convert(mixed, out, StorageOptions(mode="jpg", max_resolution=60), workers=1)
    entries = read_beton(out, "test").entries
    assert entries["height"].tolist() == [30, 60, 30, 30]
    assert entries["width"].tolist() == [40, 45, 40, 40]


def test_file_does_not_depend_on_the_number_of_workers(folder: Path, tmp_path: Path) -> None:
    options = StorageOptions(mode="proportion")
    made = [convert(folder, tmp_path / f"{n}.beton", options, workers=n) for n in (1, 3)]
    assert made[0].sha256 == made[1].sha256
    modes = read_beton(tmp_path / "1.beton", "test").entries["mode"]
    assert set(modes.tolist()) == {JPG, RAW}


def test_pages_grow_with_the_images_and_nothing_crosses_one(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "FIRST_PAGE_BYTES", 4096)
    out = mixed.parent / "mixed.beton"
    convert(mixed, out, StorageOptions(mode="raw"), workers=1)  # 3,600 to 32,400 bytes each
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


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("mode", ["passthrough", "raw"])
def test_damaged_image_is_named_and_leaves_nothing(mixed: Path, kind: str, mode: str) -> None:
    bad = mixed / "cat" / "deeper" / "b.JPEG"
    bad.write_bytes(DAMAGE[kind](bad.read_bytes()))
    out = mixed.parent / "out" / "mixed.beton"
    with pytest.raises(ConfigError, match=r"b\.JPEG: expected an undamaged image"):
        convert(mixed, out, StorageOptions(mode=mode), workers=2)
    assert list(out.parent.iterdir()) == []


def test_failure_keeps_the_file_that_was_to_be_replaced(mixed: Path) -> None:
    out = mixed.parent / "mixed.beton"
    before = convert(mixed, out, StorageOptions(), workers=1)
    with pytest.raises(ConfigError, match=r"--out: expected a new file, or --overwrite"):
        convert(mixed, out, StorageOptions(), workers=1)
    (mixed / "dog" / "c.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"c\.png"):
        convert(mixed, out, StorageOptions(), workers=1, overwrite=True)
    verify(out, workers=1)
    (mixed / "dog" / "c.png").unlink()
    after = convert(mixed, out, StorageOptions(), workers=1, overwrite=True)
    assert (before.num_samples, after.num_samples) == (4, 3)
    assert read_manifest(out) == after


def test_folders_without_images_are_refused(tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "out.beton"
    with pytest.raises(ConfigError, match=r"--source.*absent"):
        convert(tmp_path / "absent", out, StorageOptions(), workers=1)
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "image.jpg").write_bytes((folder / "001" / "image.jpg").read_bytes())
    with pytest.raises(ConfigError, match=r"--source.*one folder per class, got none"):
        convert(tmp_path / "flat", out, StorageOptions(), workers=1)
    (tmp_path / "flat" / "cat").mkdir()
    with pytest.raises(ConfigError, match=r"--source.*images in every class folder.*cat"):
        convert(tmp_path / "flat", out, StorageOptions(), workers=1)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"mode": "png"}, "--mode"),
        ({"max_resolution": 100}, "--mode"),
        ({"mode": "smart"}, "--smart-threshold"),
        ({"mode": "jpg", "smart_threshold": 1}, "--smart-threshold"),
        ({"quality": 0}, "--quality"),
        ({"mode": "proportion", "proportion": 1.5}, "--proportion"),
        ({"mode": "raw", "max_resolution": 0}, "--max-resolution"),
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
    assert shown.out == ""
    assert shown.err.startswith(f"error: {mixed / 'dog' / 'c.png'}: expected an undamaged image")
    assert shown.err.count("\n") == 1
