"""Image relative position encoding: buckets and learned tables. Independent of ViT and of GPUs."""
