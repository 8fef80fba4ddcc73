"""Attention with image relative position: the public op and its building block."""

from irpe_ds.ops.attention import irpe_attention
from irpe_ds.ops.dispatch import select
from irpe_ds.ops.gather import bucket_sum, irpe_gather
from irpe_ds.ops.inputs import Case, kinds_of

__all__ = ["Case", "bucket_sum", "irpe_attention", "irpe_gather", "kinds_of", "select"]
