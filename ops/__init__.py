"""Attention with image relative position, by one public op."""

from irpe_ds.ops.attention import irpe_attention, select

__all__ = ["irpe_attention", "select"]
