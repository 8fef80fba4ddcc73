"""SASS, the machine code of NVIDIA GPUs: read, and followed as a warp would."""
