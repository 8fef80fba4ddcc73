"""The parts of FFCV that we use: its file format and its native decoder.

FFCV's Loader reads our files, but we do not use it. It reuses the memory of its batches, leaves
its consumer waiting for ever when its thread fails, cannot seed augmentation, keeps batch * five
buffers of the tallest height times the widest width, and builds 600 MB of tables in every rank
for a data set of ImageNet's size (1.28 million images). data/pipelines/batches.py replaces it.
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
ENTRY_TYPE = get_metadata_type([kind() for kind in FIELDS.values()])
"""What the format keeps of one sample: f0 of the image, f1 the label."""
HEAD_BYTES = HeaderType.itemsize + len(FIELDS) * FieldDescType.itemsize
"""Where the entries begin."""

__all__ = [
    "ALLOC_TABLE_TYPE",
    "CURRENT_VERSION",
    "ENTRY_TYPE",
    "FIELDS",
    "HEAD_BYTES",
    "JPG",
    "RAW",
    "TYPE_ID_HANDLER",
    "VERSION",
    "FieldDescType",
    "HeaderType",
    "RGBImageField",
    "Reader",
    "imdecode",
    "resize_crop",
]
