"""The bytes of one image file -> what a .beton file stores of it."""

import hashlib
import io
from dataclasses import dataclass
from typing import Literal, get_args

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from irpe_ds.data.beton.format import JPG, RAW, imdecode
from irpe_ds.errors import DataError

Mode = Literal["passthrough", "reencode", "raw", "proportion"]
Check = Literal["decode", "header"]

LARGEST_SIDE = 65535  # pixels; the format keeps 16 bits

DAMAGE = (OSError, SyntaxError, ValueError, OverflowError, Image.DecompressionBombError, cv2.error)
"""What Pillow and OpenCV raise for damaged images."""
_EIGHTH = 8  # checks decode to an eighth: all of the entropy decoding, little of the rest


@dataclass(frozen=True, kw_only=True)
class StorageOptions:
    """How images are stored; the defaults keep every RGB or grey JPEG as it is."""

    mode: Mode = "passthrough"
    """`passthrough`: a JPEG's own bytes, and the pixels of what is no RGB or grey JPEG.
    `reencode`: JPEG, compressed anew. `raw`: pixels. `proportion`: JPEG for a random share of
    the images, else pixels."""
    longest_side: int | None = None
    """Pixels; images whose longer side is longer are reduced, by area. None: as they are."""
    shortest_side: int | None = None
    """Pixels; images whose shorter side is longer are reduced, by area. None: as they are."""
    quality: int = 90
    """Quality of the JPEGs that are made here."""
    proportion: float = 0.5
    """Share of JPEGs in `proportion`."""
    check: Check = "decode"
    """`decode`: every image is decoded. `header`: a JPEG kept as it is, only as far as its size."""

    def __post_init__(self) -> None:
        for name, choices in (("mode", get_args(Mode)), ("check", get_args(Check))):
            if getattr(self, name) not in choices:
                raise DataError(f"--{name}", "one of " + ", ".join(choices), getattr(self, name))
        sides = {"--longest-side": self.longest_side, "--shortest-side": self.shortest_side}
        given = {name: side for name, side in sides.items() if side is not None}
        for name, side in given.items():
            if side < 1:
                raise DataError(name, "at least 1 pixel", side)
            if self.mode == "passthrough":
                expected = f"a mode that stores images anew when there is a {name}"
                raise DataError("--mode", expected, self.mode)
        if len(given) == 2:
            raise DataError("--shortest-side", "no --longest-side beside it", self.longest_side)
        if not 1 <= self.quality <= 100:
            raise DataError("--quality", "1 to 100", self.quality)
        if not 0 <= self.proportion <= 1:
            raise DataError("--proportion", "a share between 0 and 1", self.proportion)
        if self.check == "header" and self.mode != "passthrough":
            raise DataError("--check", f"decode in mode {self.mode}", self.check)


@dataclass(frozen=True)
class StoredImage:
    """One image as FFCV's RGB field holds it."""

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

    Rotation tags (EXIF) are left alone, as torchvision's ImageFolder leaves them. CMYK becomes RGB
    as Pillow converts it.

    Args:
        position: its index in the data set, which decides a mode drawn at random.

    Raises:
        ValueError: they are no image, or a damaged one; the message says what is wrong.
    """
    if not data:
        raise ValueError("0 bytes")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if max(image.size) > LARGEST_SIDE:
                raise ValueError(f"{image.width} x {image.height} pixels, over {LARGEST_SIDE}")
            if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
                if options.check == "decode":
                    check_jpeg(data)  # Pillow lets damage pass that turbojpeg reports
                if options.mode == "passthrough":
                    return StoredImage(data, JPG, image.height, image.width, True)
            pixels = _reduced(np.asarray(image.convert("RGB")), options)
    except UnidentifiedImageError:
        raise ValueError("no image that Pillow knows") from None
    except DAMAGE as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
    as_jpeg = options.mode == "reencode"
    if options.mode == "proportion":
        as_jpeg = np.random.default_rng(position).random() < options.proportion
    height, width = pixels.shape[:2]
    if not as_jpeg:
        return StoredImage(pixels.tobytes(), RAW, height, width, False)
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    _, jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, options.quality])
    return StoredImage(jpeg.tobytes(), JPG, height, width, False)


def check_jpeg(data: bytes | NDArray[np.uint8]) -> tuple[int, int]:
    """Decode a JPEG with the decoder that training uses; its height and width.

    Raises:
        ValueError: it does not decode, or only with a warning: a part of the image is garbage.
    """
    array = np.frombuffer(data, np.uint8)
    try:
        with Image.open(io.BytesIO(array.data)) as image:
            width, height = image.size
    except (*DAMAGE, UnidentifiedImageError):
        raise ValueError("no JPEG header") from None
    pixels = np.empty((-(-height // _EIGHTH), -(-width // _EIGHTH), 3), np.uint8)
    size = height, width
    if imdecode(array, pixels, *size, *size, 0, 0, 1, _EIGHTH, False, False) != 0:
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
