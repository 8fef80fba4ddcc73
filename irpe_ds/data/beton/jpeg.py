"""JPEGs by FFCV's decoder, and which of libjpeg-turbo's warnings are damage.

TurboJPEG, on which FFCV builds, fails at any warning, with the first one as its message. Some of
them change no pixel, and every other decoder reads such files:

- a version of JFIF, or an Adobe transform, that no one has defined;
- bytes left over before the end of the image.

`decode` is called by Python and by numba's compiled code.
"""

import ctypes
from bisect import bisect_left

import numpy as np
from numba.extending import register_jitable
from numpy.typing import NDArray

from irpe_ds.data.beton.format import error_message, imdecode

SOUND, LEFTOVER, DAMAGED = 0, 1, 2
"""What `decode` returns; LEFTOVER: sound, but for bytes that no pixel needed."""

_VERSION = np.frombuffer(b"*JFIF revision*\0", np.uint8)
_TRANSFORM = np.frombuffer(b"*Adobe color transform*\0", np.uint8)
_EXTRANEOUS = np.frombuffer(b"*extraneous bytes before marker 0xd9*\0", np.uint8)
_FRAMES = (0xC0, 0xC1, 0xC2)
_APP0, _APP14, _SCAN = 0xE0, 0xEE, 0xDA
_END = b"\xff\xd9"

_fnmatch = ctypes.CDLL(None).fnmatch
_fnmatch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
_imdecode = register_jitable(imdecode)


@register_jitable
def decode(
    data: NDArray[np.uint8], image: NDArray[np.uint8], height: int, width: int, divisor: int
) -> int:
    """Fill `image` with the pixels of a JPEG, its sides divided by `divisor`; SOUND or another."""
    size = height, width, height, width
    if _imdecode(data, image, *size, 0, 0, 1, divisor, False, False) == 0:
        return SOUND
    if _says(_VERSION) or _says(_TRANSFORM):
        known = _with_known_numbers(data)
        if _imdecode(known, image, *size, 0, 0, 1, divisor, False, False) == 0:
            return SOUND
    return LEFTOVER if _says(_EXTRANEOUS) else DAMAGED


@register_jitable
def _says(pattern: NDArray[np.uint8]) -> bool:
    """Whether the last warning or error of this thread is this one."""
    return bool(_fnmatch(pattern.ctypes.data, error_message(), 0) == 0)


@register_jitable
def _next_marker(data: NDArray[np.uint8], place: int) -> int:
    """Where the marker after this one is, before the first scan; 0xFF may be written many times."""
    if data[place + 1] == 0xFF:
        return place + 1
    return place + 2 + 256 * int(data[place + 2]) + int(data[place + 3])


@register_jitable
def _with_known_numbers(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A copy with JFIF 1 and Adobe's transform 1, for which decoders take unknown ones."""
    known, place = data.copy(), 2
    while place + 16 < data.size and data[place] == 0xFF and data[place + 1] != _SCAN:
        if data[place + 1] == _APP0:
            known[place + 9] = 1
        elif data[place + 1] == _APP14 and data[place + 15] > 2:
            known[place + 15] = 1
        place = _next_marker(data, place)
    return known


def is_common(data: bytes) -> bool:
    """Whether a JPEG is baseline, extended or progressive with Huffman codes, as all but a few.

    Others, such as lossless ones, open in Pillow, and not every decoder was built with them.
    """
    array, place = np.frombuffer(data, np.uint8), 2
    while place + 4 <= array.size and array[place + 1] != _SCAN:
        if array[place + 1] in _FRAMES:
            return True
        place = _next_marker(array, place)
    return False


def ends_as_encoders_end(data: NDArray[np.uint8], height: int, width: int) -> bool:
    """Whether the coded pixels of a JPEG with LEFTOVER end where their encoder ended them.

    In a scan that was damaged, the decoder loses its way and may have all pixels before the end.
    Encoders fill the last byte with bits of 1. Three of four damaged scans end before another bit.
    """
    pixels = np.empty((2, height, width, 3), np.uint8)
    if decode(data, pixels[0], height, width, 1) != LEFTOVER:
        return False
    scan, coded = 2, data.tobytes()
    while scan + 4 <= data.size and data[scan + 1] != _SCAN:
        scan = _next_marker(data, scan)
    if coded.find(_END, scan) < 0:
        return False

    def same(coded: bytes) -> bool:
        array = np.frombuffer(coded + _END, np.uint8)
        found = decode(array, pixels[1], height, width, 1)
        return found != DAMAGED and np.array_equal(*pixels)

    ends = range(scan, coded.index(_END, scan) + 1)
    end = ends[bisect_left(ends, True, key=lambda end: same(coded[:end]))]
    stuffed = coded[end - 2 : end] == b"\xff\0"  # as a byte FF is written
    head, last = coded[: end - 1 - stuffed], coded[end - 1 - stuffed]
    unused = 0  # bits of the last byte
    while unused < 8 and same(head + bytes([last ^ 1 << unused]).replace(b"\xff", b"\xff\0")):
        unused += 1
    return last | (1 << unused) - 1 == last
