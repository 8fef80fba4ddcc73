"""Lossless transcoding of a JPEG, so that a loader finds a crop of it: transcode.cpp."""

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np

from irpe_ds.data import libjpeg


def transcode(data: bytes) -> bytes | None:
    """A JPEG with the same coefficients, and so the same pixels: one scan with restart markers.

    Metadata is left out. None if there is no such JPEG, as of a damaged one, or it would be half as
    large again.

    Raises:
        UserError: the transcoder cannot be compiled.
    """
    coded = np.frombuffer(data, np.uint8)
    made = np.empty(coded.size * 3 // 2 + 4096, np.uint8)
    size = _function()(coded.ctypes.data, coded.size, made.ctypes.data, made.size)
    return made[:size].tobytes() or None


@functools.cache
def _function() -> Any:
    source = Path(__file__).with_suffix(".cpp")
    function = libjpeg.load(source, (), "the JPEG transcoder").transcode
    pointer, size = ctypes.c_void_p, ctypes.c_uint64
    function.argtypes, function.restype = (pointer, size, pointer, size), size
    return function
