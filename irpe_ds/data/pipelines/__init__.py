"""Two ways from stored images to batches of pixels: FFCV's decoder, and timm's transforms."""
