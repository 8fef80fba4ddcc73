"""The parts of FFCV that we use: its file format and its native decoder.

FFCV's Loader reads our files, but we do not use it: it reuses buffers for batches, leaves its
consumer waiting for ever when its thread fails, keeps batch * five buffers of the tallest height
times the widest width (150 GB for ImageNet's original JPEGs in batches of 256) and half a
gigabyte of tables per rank, and cannot seed augmentation. See irpe_ds.data.batches.
"""

from importlib import metadata

import torch

_threads = torch.get_num_threads()
try:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES
    from ffcv.libffcv import imdecode, resize_crop
    from ffcv.reader import Reader
    from ffcv.types import (
        ALLOC_TABLE_TYPE,
        CURRENT_VERSION,
        TYPE_ID_HANDLER,
        FieldDescType,
        HeaderType,
        get_metadata_type,
    )
finally:
    torch.set_num_threads(_threads)  # importing FFCV sets it to 1

VERSION = metadata.version("ffcv")  # ffcv.__version__ is years behind
JPG: int = IMAGE_MODES["jpg"]
RAW: int = IMAGE_MODES["raw"]

FIELDS = {"image": RGBImageField, "label": IntField}
"""The fields of our files, in order; FFCV's users give them these names too."""

__all__ = [
    "ALLOC_TABLE_TYPE",
    "CURRENT_VERSION",
    "FIELDS",
    "JPG",
    "RAW",
    "TYPE_ID_HANDLER",
    "VERSION",
    "FieldDescType",
    "HeaderType",
    "RGBImageField",
    "Reader",
    "get_metadata_type",
    "imdecode",
    "resize_crop",
]
