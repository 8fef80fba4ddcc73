"""Image relative position encoding: buckets and learned tables. Knows nothing of ViT."""

from irpe_ds.rpe.buckets import BucketMap, piecewise_index
from irpe_ds.rpe.config import RPEConfig
from irpe_ds.rpe.tables import CrossRPETable, RPETable, Term, build_maps, build_table

__all__ = [
    "BucketMap",
    "CrossRPETable",
    "RPEConfig",
    "RPETable",
    "Term",
    "build_maps",
    "build_table",
    "piecewise_index",
]
