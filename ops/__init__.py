"""Attention with image relative position: the public op and its building block."""

from irpe_ds.ops.attention import irpe_attention
from irpe_ds.ops.dispatch import resolve_impl
from irpe_ds.ops.gather import bucket_sum, irpe_gather
from irpe_ds.ops.inputs import DispatchKey

__all__ = ["DispatchKey", "bucket_sum", "irpe_attention", "irpe_gather", "resolve_impl"]
