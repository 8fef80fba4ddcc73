"""A file of whole tensors, with its own hash: weights for others to read."""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from irpe_ds.checkpoint.shards import (
    DTYPES,
    METADATA,
    PIECE,
    ShardFiles,
    encode_header,
    header_entry,
)
from irpe_ds.errors import CheckpointError
from irpe_ds.files import open_regular

SHA256, UNKNOWN = "sha256", 64 * "0"
"""In the metadata of the file: its hash, and what stands there while it is made."""


def write_whole(
    path: Path,
    files: ShardFiles,
    keys: Mapping[str, str],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write whole tensors to one .safetensors file, a tensor at a time.

    Its metadata has its SHA-256, see `check_whole`.

    Args:
        keys: name in the new file -> key in `files`.
        metadata: what the file says beside its tensors.
    """
    # The types are in the files: one element of each tensor tells its own.
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {METADATA: {SHA256: UNKNOWN, "format": "pt", **metadata}}
    end = 0
    for name, key in keys.items():
        shape = files.shapes[key]
        dtype = files.read(key, 0, min(1, math.prod(shape))).dtype
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = header_entry(names[dtype], shape, begin, end)
    encoded = encode_header(header)
    digest = hashlib.sha256(encoded)
    with path.open("wb") as file:
        file.write(encoded)
        for key in keys.values():
            data = files.read(key).view(torch.uint8).numpy().data
            digest.update(data)
            file.write(data)
        file.seek(encoded.index(UNKNOWN.encode()))
        file.write(digest.hexdigest().encode())


def check_whole(path: Path, sha256: str) -> None:
    """Check that a file is as `write_whole` wrote it: its SHA-256, zeros in place of its digits.

    Raises:
        CheckpointError: it is not.
    """
    with open_regular(path) as file:
        size = file.read(8)
        header = file.read(int.from_bytes(size, "little"))
        digest = hashlib.sha256(size + header.replace(sha256.encode(), UNKNOWN.encode(), 1))
        while piece := file.read(PIECE):
            digest.update(piece)
    if digest.hexdigest() != sha256:
        raise CheckpointError(f"{path} differs from what was written")
