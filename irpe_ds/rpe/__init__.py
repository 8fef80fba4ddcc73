"""Image relative position encoding: buckets and learned tables. Knows nothing of ViT."""
