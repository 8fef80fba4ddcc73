"""FFCV's .beton format: images converted into it, verified and read."""
