"""JPEGs coded anew from their coefficients: the same pixels, and only what a crop needs is read."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from irpe_ds.data.beton.convert import convert
from irpe_ds.data.beton.format import JPG
from irpe_ds.data.beton.images import store_image
from irpe_ds.data.beton.options import StorageOptions
from irpe_ds.data.beton.reader import read_beton
from irpe_ds.data.beton.sources import open_source
from irpe_ds.data.beton.transcode import transcode
from irpe_ds.data.beton.verify import verify
from irpe_ds.errors import ConfigError
from tests.data.pipelines.test_jpeg import Pixels, decode, decode_by_ffcv, encode, photograph

SIZE = (240, 333)
RESTART = b"\xff\xd0"


def transcoded(data: Pixels) -> Pixels:
    made = transcode(data.tobytes())
    assert made is not None
    return np.frombuffer(made, np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("kind", ["baseline", "optimize", "progressive"])
def test_same_pixels(kind: str, subsampling: int, mode: str) -> None:
    image = photograph(*SIZE[::-1], mode)
    data = encode(image, subsampling=subsampling, **{kind: True} if kind != "baseline" else {})
    made = transcoded(data)
    assert RESTART in made.tobytes()
    pixels = decode_by_ffcv(data, *SIZE)
    assert np.array_equal(decode_by_ffcv(made, *SIZE), pixels)
    random = np.random.default_rng(0)
    for divisor in (1, 2, 4, 8):
        for _ in range(8):
            rows, columns = random.integers(1, np.array(SIZE) + 1).tolist()
            top, left = random.integers(0, (SIZE[0] - rows + 1, SIZE[1] - columns + 1)).tolist()
            box = (top, left, rows, columns)
            expected, got = decode(data, SIZE, box, divisor), decode(made, SIZE, box, divisor)
            assert expected is not None
            assert got is not None
            assert np.array_equal(got, expected)


def test_what_a_crop_does_not_need_is_not_read() -> None:
    """Between two markers beside the crop, bytes may be missing."""
    made = transcoded(encode(photograph(*SIZE[::-1])))
    box = (120, 160, 60, 40)
    expected = decode(made, SIZE, box)
    begin = made.tobytes().index(RESTART) + 2  # what is right of the first eight units
    damaged = np.delete(made, slice(begin, begin + 100))
    got = decode(damaged, SIZE, box)
    assert decode(damaged, SIZE, box, to_end=True) is None  # libjpeg-turbo
    assert expected is not None
    assert got is not None
    assert np.array_equal(got, expected)
    assert decode(damaged, SIZE, (0, 160, 60, 40)) is None


def test_a_missing_part_beside_a_crop_is_damage() -> None:
    """Or the markers would lead to other rows."""
    made = transcoded(encode(photograph(*SIZE[::-1])))
    begin, end = (made.tobytes().index(bytes((0xFF, marker))) for marker in (0xD0, 0xD1))
    assert decode(np.concatenate([made[:begin], made[end:]]), SIZE, (120, 160, 60, 40)) is None


def test_a_progressive_jpeg_without_its_last_scans_is_kept() -> None:
    """Decoders smooth it, which nobody does with a JPEG of one scan."""
    data = encode(photograph(*SIZE[::-1]), progressive=True).tobytes()
    scans = [place for place in range(len(data)) if data.startswith(b"\xff\xda", place)]
    unfinished = data[: scans[2]] + b"\xff\xd9"
    image = store_image(unfinished, 0, StorageOptions(mode="transcode"))
    assert (image.payload, image.mode, image.original) == (unfinished, JPG, True)


@pytest.mark.parametrize("cut", [0, 2, 300, 2000])
def test_damage_is_never_coded_as_sound(cut: int) -> None:
    data = encode(photograph(*SIZE[::-1])).tobytes()
    assert transcode(data[:cut]) is None
    with pytest.raises(ValueError, match=r"JPEG|bytes|image|Truncated"):
        store_image(data[:cut], 0, StorageOptions(mode="transcode"))


def test_metadata_is_left_out_and_grows_no_image() -> None:
    image = photograph(*SIZE[::-1])
    data = encode(image, exif=b"Exif\0\0" + 5000 * b"x", optimize=True)
    made = transcoded(data)
    assert b"Exif" not in made.tobytes()
    assert made.size < data.size - 4000


@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_a_missing_compiler_is_no_bad_image(tmp_path: Path, on_bad: str) -> None:
    folder = tmp_path / "train"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        photograph(64, 48).save(folder / name / "0.jpg")
    command = [sys.executable, "data_prep/convert.py", "--source", folder, "--mode", "transcode"]
    done = subprocess.run(
        [*command, "--out", tmp_path / "x.beton", "--on-bad", on_bad],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"CXX": "no-compiler", "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "error: cannot build the JPEG transcoder: no C++ compiler 'no-compiler'" in done.stderr
    assert not (tmp_path / "x.beton").exists()


def test_conversion(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    for name in ("a/0.jpg", "b/1.jpg", "b/2.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        photograph(64, 48).save(folder / name)
    out = tmp_path / "train.beton"
    source = open_source([folder])
    manifest = convert(source, out, StorageOptions(mode="transcode"), workers=1)
    assert (manifest.options["mode"], manifest.changed) == ("transcode", 3)
    assert verify(out, workers=1).num_samples == 3
    for sample, file in enumerate(sorted(folder.glob("*/*.jpg"))):
        data = np.fromfile(file, np.uint8)
        expected = decode_by_ffcv(data, 48, 64)
        assert np.array_equal(
            decode_by_ffcv(read_beton(out, "data").payload(sample), 48, 64), expected
        )
    with pytest.raises(ConfigError, match=r"another mode with --longest-side, got transcode"):
        StorageOptions(mode="transcode", longest_side=32)
