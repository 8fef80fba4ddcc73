"""Pictures of any mode of Pillow -> 8 bits of red, green and blue."""

import numpy as np
from PIL import Image, TiffImagePlugin

_PHOTOMETRIC, _BLACK = TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 1  # what 0 is


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened image in 8 bits of red, green and blue.

    Of 16 bits of grey these are the upper 8, as Pillow takes them of 16 bits of colour; of grey it
    (12.3) takes every value above 255 for white.

    Raises:
        ValueError: its values are numbers of which none is known to be white.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
        bits, zero = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,)), tags.get(_PHOTOMETRIC, _BLACK)
        if bits == (16,) and zero == _BLACK:
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode[0] in "IF":
        raise ValueError(f"numbers without a known white (Pillow's mode {image.mode}), not 8 bits")
    return image.convert("RGB")
