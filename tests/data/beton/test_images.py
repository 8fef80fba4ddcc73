"""Image files of foreign origin: which formats are read, and how large they may be."""

import io
import struct
import subprocess
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from irpe_ds.data.beton.format import JPG, RAW
from irpe_ds.data.beton.images import store_image
from irpe_ds.data.beton.options import StorageOptions

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 30 40\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize("name", ["EPS", "GIF", "TGA", "ICO"])
def test_no_other_parsers_of_pillow_are_tried(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO(EPS)
    if name != "EPS":
        Image.new("RGB", (32, 32)).save(file, name)
    monkeypatch.setattr(subprocess, "Popen", None)  # for Ghostscript
    with pytest.raises(ValueError, match="not a JPEG, PNG, BMP, PPM, TIFF or WebP image"):
        store_image(file.getvalue(), 0, StorageOptions())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP"])
def test_formats_of_images(kind: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (32, 24)).save(file, kind)
    image = store_image(file.getvalue(), 0, StorageOptions())
    assert (image.mode, image.width, image.height) == (JPG if kind == "JPEG" else RAW, 32, 24)


@pytest.mark.parametrize(("width", "height"), [(9460, 9460), (20_000, 20_000), (70_000, 10)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_image_too_large_is_refused_before_it_is_decoded(width: int, height: int) -> None:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = b""
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        chunks += struct.pack(">I", len(data)) + kind + data + checksum
    with pytest.raises(ValueError, match=r"pixels"):
        store_image(b"\x89PNG\r\n\x1a\n" + chunks, 0, StorageOptions())


RAMP = np.linspace(0, 65535, 4 * 64).astype(np.uint16).reshape(4, 64)


def encoded(kind: str, pixels: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        encoded("PNG", RAMP),
        encoded("TIFF", RAMP),
        encoded("TIFF", RAMP, compression="tiff_lzw"),
        b"P5 64 4 65535\n" + RAMP.astype(">u2").tobytes(),
        b"P6 64 4 65535\n" + np.repeat(RAMP[..., None], 3, -1).astype(">u2").tobytes(),
        cv2.imencode(".png", np.repeat(RAMP[..., None], 3, -1))[1].tobytes(),
    ],
    ids=["PNG", "TIFF", "LZW", "PGM", "PPM", "RGB"],
)
def test_16_bits_are_scaled(data: bytes) -> None:
    image = store_image(data, 0, StorageOptions())
    pixels = np.frombuffer(image.payload, np.uint8).reshape(4, 64, 3).astype(int)
    assert np.abs(pixels - np.round(RAMP / 257)[..., None]).max() <= 1


@pytest.mark.parametrize(
    ("data", "mode"),
    [
        (encoded("TIFF", (RAMP / 65535).astype(np.float32)), "F"),
        (encoded("TIFF", RAMP.astype(np.int32)), "I"),
        (encoded("TIFF", RAMP, tiffinfo={262: 0}), "I;16"),  # 0 is white
        (b"Pf 64 4 -1.0\n" + (RAMP / 65535).astype("<f4").tobytes(), "F"),
    ],
    ids=["float", "int32", "white is 0", "PFM"],
)
def test_numbers_without_a_white_are_refused(data: bytes, mode: str) -> None:
    with pytest.raises(ValueError, match=rf"without a known white \(Pillow's mode {mode}\)"):
        store_image(data, 0, StorageOptions())


@pytest.mark.parametrize("frame", [b"\xff\xc3", b"\xff\xc5"], ids=["lossless", "hierarchical"])
def test_header_check_refuses_what_the_decoder_cannot_read(frame: bytes) -> None:
    data = encoded("JPEG", np.uint8(RAMP >> 8)).replace(b"\xff\xc0", frame)
    with pytest.raises(ValueError, match="does not decode cleanly"):
        store_image(data, 0, StorageOptions(check="header"))


def test_side_that_no_jpeg_has() -> None:
    data = encoded("PNG", np.zeros((2, 65501), np.uint8))
    assert store_image(data, 0, StorageOptions()).width == 65501
    with pytest.raises(ValueError, match="65501 x 2 pixels: a JPEG has up to 65500 on a side"):
        store_image(data, 0, StorageOptions(mode="reencode"))
