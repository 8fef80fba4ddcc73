"""Image files of foreign origin: which formats are read, and how large they may be."""

import io
import struct
import subprocess
import zlib

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
