"""Tensors in parts: every rank writes what it holds, and reads what it needs.

A shard is a range of a flattened tensor. A .safetensors file of shards has one dimension per tensor
and, in its metadata, where each range starts, as torch.distributed.checkpoint writes it: its
HuggingFaceStorageReader reads these files too. Its writer is not used, since it builds a file in
memory before it writes it, a second copy of the rank's state; nor is its own format, whose metadata
is a pickle.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from irpe_ds.errors import CheckpointError
from irpe_ds.files import open_regular

PIECE = 4 << 20
"""Bytes that are hashed and written, or copied, at a time."""
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The types of safetensors that models have."""
METADATA, STARTS = "__metadata__", "DCP_SHARDING_INFO"
SHA256, UNKNOWN = "sha256", 64 * "0"
"""In the metadata of a file of whole tensors: its hash, and what stands there while it is made."""


class Shard(NamedTuple):
    """The elements [start, start + len(values)) of a flattened tensor."""

    start: int
    values: Tensor
    """(elements,); of an engine's state a view: writing to it changes the state."""


def write_shards(path: Path, shards: Mapping[str, Shard]) -> dict[str, Any]:
    """Write shards on the CPU to a file, and wait until it is on disk.

    Returns:
        Its `bytes` and `sha256`.

    Raises:
        OSError: it cannot be written.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    starts = {key: {"saved_offsets": [shard.start]} for key, shard in shards.items()}
    header: dict[str, Any] = {METADATA: {"format": "pt", STARTS: json.dumps(starts)}}
    end = 0
    for key, (_, values) in shards.items():
        begin, end = end, end + values.nbytes
        header[key] = _entry(names[values.dtype], [values.numel()], begin, end)
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for piece in _pieces(header, shards):
            digest.update(piece)
            while piece:
                piece = piece[file.write(piece) :]
            size = file.tell()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _entry(dtype: str, shape: Sequence[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def _pieces(header: Mapping[str, Any], shards: Mapping[str, Shard]) -> Iterator[memoryview]:
    yield memoryview(_encode(header))
    for _, values in shards.values():
        data = values.contiguous().view(torch.uint8).numpy().data
        for begin in range(0, len(data), PIECE):
            yield data[begin : begin + PIECE]


def _encode(header: Mapping[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class _Range(NamedTuple):
    """Where a shard lies in a file."""

    path: Path
    offset: int
    """In bytes."""
    start: int
    length: int
    dtype: torch.dtype


class ShardFiles:
    """Reads ranges of the tensors in some files; headers are read when a range needs them.

    Args:
        paths: the files. Those of shards are in the order of the ranks that wrote them.
        shapes: by key, the shape of every tensor. None: as in the files, which hold whole tensors.
        nearest: the file to look into first, as a fraction of the number of files.
        prefixes: what precedes the keys of some files, by file name.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        shapes: Mapping[str, Sequence[int]] | None = None,
        nearest: float = 0,
        prefixes: Mapping[str, str] | None = None,
    ) -> None:
        self._paths, self._prefixes = paths, prefixes or {}
        self._ranges: dict[Path, dict[str, _Range]] = {}
        self._shapes: dict[str, Sequence[int]] = dict(shapes or {})
        first = int(nearest * len(paths))
        self._order = [paths[n] for n in sorted(range(len(paths)), key=lambda n: abs(n - first))]
        if shapes is None:
            for path in paths:
                self._ranges_of(path)

    @property
    def shapes(self) -> Mapping[str, Sequence[int]]:
        """Shape of every tensor, by key."""
        return self._shapes

    def __contains__(self, key: str) -> bool:
        return key in self._shapes

    def read(self, key: str, start: int = 0, count: int | None = None) -> Tensor:
        """The elements [start, start + count) of a flattened tensor, by default all; (count,).

        Raises:
            CheckpointError: the files do not hold all of them.
        """
        if count is None:
            count = math.prod(self._shapes[key]) - start
        result: Tensor | None = None
        missing = count
        for path in self._order:
            part = self._ranges_of(path).get(key)
            if part is None:
                continue
            if result is None:
                result = torch.empty(count, dtype=part.dtype)
            begin = max(start, part.start)
            end = min(start + count, part.start + part.length)
            if begin < end:
                _read_into(result[begin - start : end - start], part, begin - part.start)
                missing -= end - begin
            if not missing:
                break
        if missing:
            where = self._paths[0].parent if self._paths else key
            raise CheckpointError(f"{where}: {key} is not complete: {missing} elements are missing")
        return torch.empty(0) if result is None else result  # which no file has if it is empty

    def whole(self, key: str) -> Tensor:
        """A tensor in its shape."""
        return self.read(key).view(tuple(self._shapes[key]))

    def _ranges_of(self, path: Path) -> dict[str, _Range]:
        if path not in self._ranges:
            header, first = _read_header(path)
            starts = json.loads(header.pop(METADATA, {}).get(STARTS, "{}"))
            prefix, ranges = self._prefixes.get(path.name, ""), {}
            for name, entry in header.items():
                (begin, _), shape, key = entry["data_offsets"], entry["shape"], prefix + name
                start = starts[name]["saved_offsets"][0] if starts else 0
                if not starts:
                    self._shapes.setdefault(key, shape)
                dtype = DTYPES[entry["dtype"]]
                ranges[key] = _Range(path, first + begin, start, math.prod(shape), dtype)
            self._ranges[path] = ranges
        return self._ranges[path]


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """A file's header, and the offset of its data."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return json.loads(file.read(size)), 8 + size
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _read_into(target: Tensor, part: _Range, skipped: int) -> None:
    data = target.view(torch.uint8).numpy().data
    with part.path.open("rb", buffering=0) as file:
        file.seek(part.offset + skipped * part.dtype.itemsize)
        while data:
            read = file.readinto(data)
            if not read:
                raise CheckpointError(f"{part.path}: shorter than its header says")
            data = data[read:]


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
        header[name] = _entry(names[dtype], shape, begin, end)
    encoded = _encode(header)
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
