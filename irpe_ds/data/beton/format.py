"""The parts of FFCV that we use: its file format and its native decoder.

FFCV's Loader reads our files, but we do not use it (1.0.2): it reuses the memory of its batches,
hangs its consumer when its thread fails, cannot seed augmentation, keeps batch * five buffers of
the tallest height times the widest width, and builds 600 MB of tables in every rank for a data
set of ImageNet's size (1.28 million images). data/pipelines/ffcv.py replaces it.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

import numba.typed
import torch


@contextmanager
def _light_import() -> Iterator[None]:
    """Import FFCV without two side effects.

    - FFCV 1.0.2 fills a module-level numba.typed.Dict (fields.rgb_image.IMAGE_MODES), which
      numba 0.68 compiles for 7 CPU-seconds in every process. Nothing compiled reads it, so a plain
      dict serves. Can go when IMAGE_MODES is one: when importing ffcv costs what torch does.
    - It sets torch's threads to 1. Can go when test_import_leaves_torchs_threads_alone passes
      without it.
    """
    threads, typed_dict = torch.get_num_threads(), numba.typed.Dict
    numba.typed.Dict = dict
    try:
        yield
    finally:
        numba.typed.Dict = typed_dict
        torch.set_num_threads(threads)


with _light_import():
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES
    from ffcv.libffcv import imdecode, lib, resize_crop
    from ffcv.reader import Reader
    from ffcv.types import (
        ALLOC_TABLE_TYPE,
        CURRENT_VERSION,
        TYPE_ID_HANDLER,
        FieldDescType,
        HeaderType,
        get_metadata_type,
    )

VERSION = metadata.version("ffcv")  # ffcv.__version__ of 1.0.2 says 0.0.3rc1
JPG: int = IMAGE_MODES["jpg"]
RAW: int = IMAGE_MODES["raw"]

error_message = lib.tjGetErrorStr
"""Why the last `imdecode` of this thread did not return 0, as a C string: TurboJPEG's words."""
error_message.argtypes, error_message.restype = [], ctypes.c_void_p

MAX_PIXELS = 89_478_485
"""Of one image, 268 MB decoded: where Pillow begins to warn of decompression bombs."""

FIELDS = {"image": RGBImageField, "label": IntField}
"""The fields of our files, in order; FFCV's users give them these names too."""
ENTRY_TYPE = get_metadata_type([kind() for kind in FIELDS.values()])
"""The metadata of one sample in the file: f0 of the image, f1 the label."""
HEAD_BYTES = HeaderType.itemsize + len(FIELDS) * FieldDescType.itemsize
"""Where the metadata entries begin."""

__all__ = [
    "ALLOC_TABLE_TYPE",
    "CURRENT_VERSION",
    "ENTRY_TYPE",
    "FIELDS",
    "HEAD_BYTES",
    "JPG",
    "MAX_PIXELS",
    "RAW",
    "TYPE_ID_HANDLER",
    "VERSION",
    "FieldDescType",
    "HeaderType",
    "RGBImageField",
    "Reader",
    "error_message",
    "imdecode",
    "resize_crop",
]
