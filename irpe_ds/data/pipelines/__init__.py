"""From sample indices to batches: `ffcv` for speed, `timm` as the reference."""
