"""Checkpoints: sharded, written behind training, read by any number of ranks."""
