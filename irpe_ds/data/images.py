"""One image file -> what a .beton file stores of it."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from irpe_ds.data.ffcv_api import JPG, RGBImageField, imdecode
from irpe_ds.errors import ConfigError

Mode = Literal["passthrough", "jpg", "raw", "smart", "proportion"]

Malloc = Callable[[int], tuple[int, NDArray[np.uint8]]]

_DAMAGE = (OSError, SyntaxError, ValueError, OverflowError, Image.DecompressionBombError, cv2.error)


@dataclass(frozen=True, kw_only=True)
class StorageOptions:
    """How images are stored; the defaults keep every RGB or grey JPEG as it is."""

    mode: Mode = "passthrough"
    """`passthrough`: a JPEG's own bytes; what is no RGB or grey JPEG becomes one.
    `jpg`: compressed anew. `raw`: pixels. `smart`: JPEG where the pixels take more bytes than
    smart_threshold, else raw. `proportion`: JPEG for a random share of the images, else raw."""
    max_resolution: int | None = None
    """Longest side, pixels; longer ones are reduced by area. None: as they are."""
    quality: int = 90
    """Quality of the JPEGs that are made here."""
    smart_threshold: int | None = None
    """Most bytes of pixels that `smart` keeps raw."""
    proportion: float = 0.5
    """Share of JPEGs in `proportion`."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ConfigError("--mode", "one of " + ", ".join(get_args(Mode)), self.mode)
        if self.mode == "passthrough" and self.max_resolution is not None:
            expected = "a mode that stores images anew when there is a --max-resolution"
            raise ConfigError("--mode", expected, self.mode)
        if (self.mode == "smart") != (self.smart_threshold is not None):
            expected = "a number of bytes for mode smart, and for no other"
            raise ConfigError("--smart-threshold", expected, self.smart_threshold)
        if self.max_resolution is not None and self.max_resolution < 1:
            raise ConfigError("--max-resolution", "at least 1 pixel", self.max_resolution)
        if not 1 <= self.quality <= 100:
            raise ConfigError("--quality", "1 to 100", self.quality)
        if not 0 <= self.proportion <= 1:
            raise ConfigError("--proportion", "a share between 0 and 1", self.proportion)


@dataclass(frozen=True)
class StoredImage:
    """One image as FFCV's RGB field holds it."""

    entry: NDArray[np.void]
    """FFCV's metadata, (1,): mode, height, width; its data_ptr is the writer's business."""
    payload: NDArray[np.uint8]
    """Pixels or JPEG bytes, (bytes,)."""
    original: bool
    """Whether the payload is the file's own bytes."""


@dataclass(frozen=True)
class Jpeg:
    """The bytes of a JPEG file and its size in pixels."""

    data: NDArray[np.uint8]
    height: int
    width: int


class OriginalJpegField(RGBImageField):
    """An RGB field that stores JPEG files as they are; any RGB decoder of FFCV reads them."""

    def encode(self, destination: NDArray[np.void], image: Jpeg, malloc: Malloc) -> None:
        destination["mode"] = JPG
        destination["height"], destination["width"] = image.height, image.width
        destination["data_ptr"], storage = malloc(image.data.size)
        storage[:] = image.data


def read_image(path: Path, number: int, options: StorageOptions) -> StoredImage:
    """Read and check one image file, and encode it as the options say.

    Rotation tags (EXIF) are left alone, as torchvision's ImageFolder does.

    Args:
        number: its index in the data set, which decides a mode drawn at random.

    Raises:
        ConfigError: the file is no image, or a damaged one.
    """
    try:
        data = np.fromfile(path, np.uint8)
        with Image.open(io.BytesIO(data.tobytes())) as image:
            if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
                jpeg = Jpeg(data, image.height, image.width)
                decode_jpeg(jpeg)  # Pillow lets damage pass that turbojpeg reports
                if options.mode == "passthrough":
                    return _stored(OriginalJpegField(), jpeg, original=True)
            pixels = np.asarray(image.convert("RGB"))
        return _stored(_field(number, options), pixels, original=False)
    except UnidentifiedImageError:
        raise ConfigError(path, "an undamaged image", "none that Pillow knows") from None
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(path, "an undamaged image", reason) from None


def decode_jpeg(jpeg: Jpeg) -> NDArray[np.uint8]:
    """Decode with the decoder that training uses, (height, width, 3).

    Raises:
        ValueError: it could not, or only with a warning: then a part of the image is garbage.
    """
    size = jpeg.height, jpeg.width
    pixels = np.empty((*size, 3), np.uint8)
    if imdecode(jpeg.data, pixels, *size, *size, 0, 0, 1, 1, False, False) != 0:
        raise ValueError("JPEG data that does not decode cleanly")
    return pixels


def _field(number: int, options: StorageOptions) -> RGBImageField:
    mode: str = options.mode
    if mode == "passthrough":
        mode = "jpg"
    elif mode == "proportion":  # here, since FFCV draws from a global generator
        mode = "jpg" if np.random.default_rng(number).random() < options.proportion else "raw"
    return RGBImageField(
        mode,
        max_resolution=options.max_resolution,
        smart_threshold=options.smart_threshold,
        jpeg_quality=options.quality,
    )


def _stored(
    field: RGBImageField, image: Jpeg | NDArray[np.uint8], *, original: bool
) -> StoredImage:
    """Let a field encode into memory of its own."""
    payloads: list[NDArray[np.uint8]] = []

    def malloc(size: int) -> tuple[int, NDArray[np.uint8]]:
        payloads.append(np.empty(size, np.uint8))
        return 0, payloads[-1]

    entry = np.zeros(1, field.metadata_type)
    field.encode(entry, image, malloc)
    return StoredImage(entry, payloads[0], original)
