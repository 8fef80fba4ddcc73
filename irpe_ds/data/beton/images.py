"""The bytes of one image file -> the payload that a .beton file stores."""

import hashlib
import io
import struct
import zlib
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from irpe_ds.data.beton.format import JPG, MAX_PIXELS, RAW
from irpe_ds.data.beton.jpeg import DAMAGED, LEFTOVER, decode, ends_as_encoders_end, is_common
from irpe_ds.data.beton.options import StorageOptions
from irpe_ds.data.beton.transcode import transcode
from irpe_ds.data.rgb import to_rgb
from irpe_ds.errors import UserError

MAX_SIDE = 65535  # pixels; the format has 16 bits for each side
_JPEG_SIDE = 65500  # libjpeg's limit

FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP")
"""Pillow's names of the formats of images; its other parsers are not tried on foreign bytes: one of
them starts Ghostscript."""

DAMAGE = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError),
    *(MemoryError, struct.error, zlib.error, Image.DecompressionBombError, cv2.error),
)
"""What Pillow and OpenCV raise for damaged images."""
_EIGHTH = 8  # checks decode to 1/8 of the size: all entropy decoding, little of the rest


@dataclass(frozen=True)
class StoredImage:
    """One image as FFCV's RGB field stores it."""

    payload: bytes
    """JPEG, or pixels in rows of RGB."""
    mode: int
    """FFCV's image mode: JPG or RAW."""
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    original: bool
    """Whether the payload is the file's own bytes."""

    @property
    def sha256(self) -> bytes:
        """Hash of the payload."""
        return hashlib.sha256(self.payload).digest()


def store_image(data: bytes, position: int, options: StorageOptions) -> StoredImage:
    """Check the bytes of an image file, and encode them as the options say.

    EXIF orientation is ignored, as by torchvision's ImageFolder. Pillow converts CMYK to RGB.

    Args:
        position: its index in the data set, the seed of mode `proportion`.

    Raises:
        ValueError: not an image, or a damaged one; the message gives the reason.
        UserError: mode `transcode` without a compiler.
    """
    if not data:
        raise ValueError("0 bytes")
    try:
        with open_image(data) as image:
            if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
                if options.check == "decode" or not is_common(data):
                    check_jpeg(data)  # Pillow 12 accepts damage that libjpeg-turbo reports
                if options.mode in ("passthrough", "transcode"):
                    made = transcode(data) if options.mode == "transcode" else None
                    return StoredImage(made or data, JPG, image.height, image.width, made is None)
            pixels = _reduced(np.asarray(to_rgb(image)), options)
    except UserError:
        raise  # of the machine, not of this image
    except DAMAGE as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
    as_jpeg = options.mode == "reencode"
    if options.mode == "proportion":
        as_jpeg = np.random.default_rng(position).random() < options.proportion
    height, width = pixels.shape[:2]
    if not as_jpeg:
        return StoredImage(pixels.tobytes(), RAW, height, width, False)
    if max(height, width) > _JPEG_SIDE:
        raise ValueError(f"{width} x {height} pixels: a JPEG has up to {_JPEG_SIDE} on a side")
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    _, jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, options.quality])
    return StoredImage(jpeg.tobytes(), JPG, height, width, False)


def open_image(data: bytes | memoryview) -> Image.Image:
    """Open an image file with Pillow, which reads no pixels yet.

    Raises:
        ValueError: it is no image of FORMATS, or larger than any that may be stored.
        OSError, SyntaxError and others of DAMAGE: it is damaged.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError("not a JPEG, PNG, BMP, PPM, TIFF or WebP image") from None
    if max(image.size) > MAX_SIDE or image.width * image.height > MAX_PIXELS:
        limits = f"sides over {MAX_SIDE} or more than {MAX_PIXELS} pixels"
        raise ValueError(f"{image.width} x {image.height} pixels: {limits}")
    return image


def check_jpeg(data: bytes | NDArray[np.uint8]) -> tuple[int, int]:
    """Decode a JPEG with the decoder that training uses; return its height and width.

    Raises:
        ValueError: it does not decode, or with a warning that says that pixels are garbage.
    """
    array = np.frombuffer(data, np.uint8)
    try:
        with open_image(array.data) as image:
            width, height = image.size
    except DAMAGE as error:
        raise ValueError(f"no JPEG header: {error}") from None
    pixels = np.empty((-(-height // _EIGHTH), -(-width // _EIGHTH), 3), np.uint8)
    size = height, width
    found = decode(array, pixels, *size, _EIGHTH)
    if found == DAMAGED or (found == LEFTOVER and not ends_as_encoders_end(array, *size)):
        raise ValueError("JPEG data that does not decode cleanly")
    return size


def _reduced(pixels: NDArray[np.uint8], options: StorageOptions) -> NDArray[np.uint8]:
    """The image, (height, width, 3), with its longest or shortest side as the options say."""
    height, width = pixels.shape[:2]
    if options.longest_side is not None:
        factor = options.longest_side / max(height, width)
    elif options.shortest_side is not None:
        factor = options.shortest_side / min(height, width)
    else:
        return pixels
    if factor >= 1:
        return pixels
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
