"""Decodes a box of a JPEG: jpeg.cpp."""

import ctypes
from pathlib import Path
from typing import Any

from irpe_ds.data import libjpeg

SOURCE = Path(__file__).with_suffix(".cpp")
HEADERS = (SOURCE.with_name("area.h"), SOURCE.with_name("huffman.h"))

_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64
_JPEG = (_POINTER, ctypes.c_uint64, _NUMBER, _NUMBER, _POINTER, _NUMBER, _NUMBER)
_TARGET = (_POINTER, _NUMBER, _NUMBER, _NUMBER)
FUNCTIONS = {
    "decode_box": (*_JPEG, _POINTER, _NUMBER, _POINTER),
    "decode_reduced": (*_JPEG, *_TARGET),
    "reduce": (_POINTER, _NUMBER, _POINTER, *_TARGET),
}
"""The C functions and the types of their arguments."""


def load() -> list[Any]:
    """The FUNCTIONS, which numba calls without Python's lock.

    Raises:
        UserError: they cannot be compiled, or not be kept.
    """
    library = libjpeg.load(SOURCE, HEADERS, "the JPEG decoder")
    functions = [getattr(library, name) for name in FUNCTIONS]
    for function, types in zip(functions, FUNCTIONS.values(), strict=True):
        function.argtypes, function.restype = types, _NUMBER
    return functions
