"""A box of a JPEG has the pixels of the whole, FFCV's; a decoder that cannot be built says why."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFile

from irpe_ds.data.beton import jpeg as jpegs
from irpe_ds.data.beton.format import JPG, RAW, imdecode
from irpe_ds.data.beton.images import store_image
from irpe_ds.data.beton.options import StorageOptions
from irpe_ds.data.beton.reader import ENTRY
from irpe_ds.data.crops import CROP
from irpe_ds.data.pipelines import decoding, jpeg
from irpe_ds.data.pipelines.decoding import MARGIN
from irpe_ds.errors import UserError

ImageFile.MAXBLOCK = 1 << 20  # Pillow cannot write a small progressive JPEG in less
DECODE = jpeg.load()[0]
Pixels = NDArray[np.uint8]


def photograph(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Waves of all frequencies, in colours that change from pixel to pixel."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin((x * (3 + n) + y * (5 - n)) ** 1.3 / 40) for n in range(3)]
    return Image.fromarray(np.uint8(127 + 120 * np.stack(waves, -1))).convert(mode)


def encode(image: Image.Image, quality: int = 85, **options: object) -> Pixels:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, **options)
    return np.frombuffer(file.getvalue(), np.uint8)


def decode(
    data: Pixels,
    size: tuple[int, int],
    box: tuple[int, ...],
    divisor: int = 1,
    to_end: bool = False,
) -> Pixels | None:
    """The box's pixels, by the way the loaders take them; None if the data are damaged."""
    (height, width), (top, left, rows, columns) = size, box
    pixels = np.empty((rows // divisor + MARGIN) * (columns // divisor + 2 * MARGIN) * 3, np.uint8)
    placed, wanted = np.empty(4, np.int64), np.array(box, np.int64)
    image = (data.ctypes.data, data.size, height, width)
    to = (pixels.ctypes.data, pixels.size, placed.ctypes.data)
    if DECODE(*image, wanted.ctypes.data, divisor, to_end, *to):
        return None
    whole = pixels[: placed[2] * placed[3] * 3].reshape(placed[2], placed[3], 3)
    first = top // divisor - placed[0], left // divisor - placed[1]
    ends = -(-(top + rows) // divisor) - placed[0], -(-(left + columns) // divisor) - placed[1]
    return whole[first[0] : ends[0], first[1] : ends[1]]


def decode_by_ffcv(data: Pixels, height: int, width: int) -> Pixels:
    image = np.empty((height, width, 3), np.uint8)
    assert imdecode(data, image, height, width, height, width, 0, 0, 1, 1, False, False) == 0
    return image


SIZES = [(375, 500), (217, 333), (9, 17), (64, 64), (33, 501)]


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
@pytest.mark.parametrize(("mode", "progressive"), [("RGB", False), ("RGB", True), ("L", False)])
def test_a_box_is_part_of_the_whole(subsampling: str, mode: str, progressive: bool) -> None:
    random = np.random.default_rng(0)
    for height, width in SIZES:
        image = photograph(width, height, mode)
        options = {} if mode == "L" else {"subsampling": subsampling}
        data = encode(image, progressive=progressive, **options)
        for divisor in (1, 2, 4, 8):
            whole = decode(data, (height, width), (0, 0, height, width), divisor)
            assert whole is not None
            if divisor == 1:
                assert np.array_equal(whole, decode_by_ffcv(data, height, width))
            for n in range(10):
                rows, columns = random.integers(1, (height + 1, width + 1))
                top, left = random.integers(0, (height - rows + 1, width - columns + 1))
                box = (int(top), int(left), int(rows), int(columns))
                got = decode(data, (height, width), box, divisor, to_end=n % 2 == 0)
                ends = -(-(top + rows) // divisor), -(-(left + columns) // divisor)
                expected = whole[top // divisor : ends[0], left // divisor : ends[1]]
                assert got is not None
                assert np.array_equal(got, expected), (box, divisor)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:300],
        lambda data: np.concatenate([data[:400], np.zeros(60, np.uint8), data[460:]]),
        lambda data: data[:0],
        lambda data: np.zeros(2000, np.uint8),
    ],
)
def test_damage(damage: Callable[[Pixels], Pixels]) -> None:
    data = damage(encode(photograph(200, 100)))
    assert decode(data, (100, 200), (0, 0, 100, 200), to_end=True) is None


def _after_start(data: bytes, segment: bytes) -> bytes:
    return data[:2] + segment + data[2:]


def _without_jfif(data: bytes) -> bytes:
    return data[:2] + data[20:]


ADOBE = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0"  # the transform follows
HARMLESS: dict[str, Callable[[bytes], bytes]] = {
    "bytes before the end": lambda data: data[:-2] + b"left over, by whom?" + data[-2:],
    "JFIF 0.00": lambda data: data.replace(b"JFIF\0\1\1", b"JFIF\0\0\0"),
    "unknown marker": lambda data: _after_start(data, b"\xff\xe7\0\x06abcd"),
    "unknown transform": lambda data: _after_start(_without_jfif(data), ADOBE + b"\7"),
    "bytes after the end": lambda data: data + b"more",
    "two of them": lambda data: HARMLESS["JFIF 0.00"](HARMLESS["bytes before the end"](data)),
}


def decode_whole(data: Pixels, size: tuple[int, int]) -> Pixels | None:
    """Where `decode_box` cannot be built; at a target of the same size no pixel changes."""
    entry, target = np.zeros(1, ENTRY), np.empty((*size, 3), np.uint8)
    entry["height"], entry["width"] = size
    box = np.array((0, 0, *size), np.int64)
    return target if decoding._decode_whole(data, entry[0], box, target, 0, False, False) else None


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", HARMLESS)
def test_warnings_that_change_no_pixel(kind: str, mode: str) -> None:
    clean = encode(photograph(90, 60, mode))
    strange = np.frombuffer(HARMLESS[kind](clean.tobytes()), np.uint8)
    assert not np.array_equal(strange, clean)
    opened = [np.asarray(Image.open(io.BytesIO(data.tobytes()))) for data in (clean, strange)]
    assert np.array_equal(*opened)
    expected = decode_by_ffcv(clean, 60, 90)
    for found in (
        decode(strange, (60, 90), (0, 0, 60, 90)),
        decode_whole(strange, (60, 90)),
    ):
        assert found is not None
        assert np.array_equal(found, expected)
    for check in ("decode", "header"):
        stored = store_image(strange.tobytes(), 0, StorageOptions(check=check))
        assert stored.original


def test_harmless_warning_does_not_hide_damage() -> None:
    half = HARMLESS["JFIF 0.00"](encode(photograph(90, 60)).tobytes()[:2000])
    data = np.frombuffer(half, np.uint8)
    assert decode(data, (60, 90), (0, 0, 60, 90), to_end=True) is None
    assert decode_whole(data, (60, 90)) is None
    with pytest.raises(ValueError, match="does not decode cleanly"):
        store_image(data.tobytes(), 0, StorageOptions())


def test_bytes_left_over_by_damage_are_told_from_those_added() -> None:
    random, refused, accepted = np.random.default_rng(0), 0, 0
    for n in range(60):
        data = encode(photograph(90 + n, 60))
        scan = data.tobytes().index(b"\xff\xda") + 14
        damaged, place = data.copy(), random.integers(scan, data.size - 50)
        damaged[place : place + 40] = 0
        size, image = (60, 90 + n), np.empty((60, 90 + n, 3), np.uint8)
        if jpegs.decode(damaged, image, *size, 1) == jpegs.LEFTOVER:
            refused += not jpegs.ends_as_encoders_end(damaged, *size)
        added = data[:-2].tobytes() + random.bytes(20).replace(b"\xff", b"") + b"\xff\xd9"
        accepted += jpegs.ends_as_encoders_end(np.frombuffer(added, np.uint8), *size)
    assert accepted >= 58
    assert refused >= 6, refused


def test_damage_below_the_box() -> None:
    data = encode(photograph(200, 100))[:-2000]
    assert decode(data, (100, 200), (0, 0, 16, 200)) is not None
    assert decode(data, (100, 200), (0, 0, 16, 200), to_end=True) is None


def test_another_size_than_the_table_says() -> None:
    data = encode(photograph(200, 100))
    assert decode(data, (100, 201), (0, 0, 100, 201)) is None
    assert decode(data, (99, 200), (0, 0, 99, 200)) is None


def test_whole_images_give_the_same_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it cannot be built, FFCV's decoder and OpenCV's INTER_AREA take its place."""
    random = np.random.default_rng(0)
    photographs = [photograph(width, height) for height, width in SIZES]
    jpegs = [encode(image) for image in photographs]
    payloads = jpegs + [np.asarray(image).ravel() for image in photographs]
    entries = np.zeros(2 * len(SIZES), ENTRY)
    entries["bytes"] = [len(payload) for payload in payloads]
    entries["start"] = np.cumsum(entries["bytes"]) - entries["bytes"]
    entries["height"], entries["width"] = np.transpose(SIZES * 2)
    entries["mode"] = [JPG] * len(SIZES) + [RAW] * len(SIZES)
    crops = np.zeros(20 * len(entries), CROP)
    crops["sample"] = np.arange(len(crops)) % len(entries)
    for crop in crops:
        height, width = SIZES[crop["sample"] % len(SIZES)]
        rows, columns = random.integers(1, (height + 1, width + 1))
        if random.random() < 0.2:  # the kind of OpenCV's INTER_AREA that is left to it
            rows, columns = 8 * max(1, rows // 8), 12 * max(1, columns // 12)
        crop["height"], crop["width"] = min(rows, height), min(columns, width)
        crop["top"] = random.integers(height - crop["height"] + 1)
        crop["left"] = random.integers(width - crop["width"] + 1)
        crop["flip"], crop["shift_down"], crop["shift_right"] = random.integers(
            (0, -4, -4), (2, 5, 5)
        )
    images = np.zeros((2, len(crops), 8, 12, 3), np.uint8)
    file = np.concatenate(payloads)
    assert decoding.decode_crops(file, entries, crops, images[0], False, True).all()
    monkeypatch.setattr(decoding, "_decode_jpeg", decoding._decode_whole)
    monkeypatch.setattr(decoding, "_resize_pixels", decoding._resize_by_opencv)
    assert decoding.decode_crops.py_func(file, entries, crops, images[1], False, True).all()
    assert np.array_equal(images[0], images[1])
    assert images.std() > 20


def test_flips_and_shifts() -> None:
    """The shifted window of a box is flipped, not the box alone."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, 20, 30, 3), np.uint8)
    entries, crops = np.zeros(1, ENTRY), np.zeros(4, CROP)
    entries["bytes"], entries["height"], entries["width"] = pixels.size, 20, 30
    entries["mode"] = RAW
    crops["height"], crops["width"], crops["flip"] = 20, 30, (0, 1, 0, 1)
    crops["shift_down"], crops["shift_right"] = 2, (3, 3, -3, -3)
    images = np.zeros((4, 7, 13, 3), np.uint8)
    assert decoding.decode_crops(pixels.ravel(), entries, crops, images, False, False).all()
    assert np.array_equal(images[::2, :, ::-1], images[1::2])
    assert not np.array_equal(images[0], images[2])


@pytest.mark.parametrize("size", [(112, 113), (225, 230), (449, 450)])
def test_a_scaled_box_begins_and_ends_within_pixels(size: tuple[int, int]) -> None:
    """At 1/8, 1/4 and 1/2 of the size."""
    y, x = np.mgrid[:920, :930]
    waves = [127 + 100 * np.sin((x + way * y) / 40) for way in (-1, 0, 1)]
    data = encode(Image.fromarray(np.uint8(np.stack(waves, -1))))
    entries, crops = np.zeros(1, ENTRY), np.zeros(2, CROP)
    entries["bytes"], entries["height"], entries["width"], entries["mode"] = (
        len(data),
        920,
        930,
        JPG,
    )
    crops["top"], crops["left"] = (5, 7), (7, 5)
    crops["height"], crops["width"], crops["flip"] = (901, 910), 921, (0, 1)
    images = np.zeros((2, 2, *size, 3), np.uint8)
    for is_scaled in (False, True):
        target = images[int(is_scaled)]
        assert decoding.decode_crops(data, entries, crops, target, is_scaled, False).all()
    apart = np.abs(images[0].astype(int) - images[1])
    assert 0 < apart.max() <= 5  # 8, 15 and 32 where a box is taken to whole pixels


def test_what_is_missing_to_build_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "no-compiler")
    with pytest.raises(UserError, match=r"cannot build the JPEG decoder: no C\+\+ compiler 'no-co"):
        jpeg.load()
    monkeypatch.delenv("CXX")
    source = tmp_path / "jpeg.cpp"
    source.write_text("#include <no_such_header.h>\n")
    monkeypatch.setattr(jpeg, "SOURCE", source)
    with pytest.raises(UserError, match=r"decoder: .*no_such_header\.h.*; install libjpeg-turbo"):
        jpeg.load()
