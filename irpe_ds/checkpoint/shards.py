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
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pydantic
import torch
from torch import Tensor

from irpe_ds.checkpoint.manifest import Shape
from irpe_ds.config_types import Natural
from irpe_ds.errors import CheckpointError
from irpe_ds.files import open_regular
from irpe_ds.schema import parse_json

HEADER_LIMIT = 16 << 20
"""Largest header that is read, in bytes; that of 10,000 tensors has about 1 MiB."""
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
        header[key] = header_entry(names[values.dtype], [values.numel()], begin, end)
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for piece in _pieces(header, shards):
            digest.update(piece)
            while piece:
                piece = piece[file.write(piece) :]
            size = file.tell()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def header_entry(dtype: str, shape: Sequence[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def _pieces(header: Mapping[str, Any], shards: Mapping[str, Shard]) -> Iterator[memoryview]:
    yield memoryview(encode_header(header))
    for _, values in shards.values():
        data = values.contiguous().view(torch.uint8).numpy().data
        for begin in range(0, len(data), PIECE):
            yield data[begin : begin + PIECE]


def encode_header(header: Mapping[str, Any]) -> bytes:
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
    shape: Sequence[int] | None
    """As in the file; None of a shard."""

    def within(self, start: int, count: int) -> tuple[int, int]:
        """First element and end of what it has of a range; nothing if the end is not later."""
        return max(start, self.start), min(start + count, self.start + self.length)


class Content(NamedTuple):
    """What reading a whole file tells of it."""

    sha256: str
    damage: CheckpointError | None
    """A header that does not fit, or a parameter that is not finite."""


class ShardFiles:
    """Reads ranges of the tensors in some files; headers are read when a range needs them.

    Args:
        paths: the files. Those of shards are in the order of the ranks that wrote them.
        shapes: by key, the shape of every tensor.
        nearest: the file to look into first, as a fraction of the number of files.
        prefixes: what precedes the keys of some files, by file name.
        parameters: keys of tensors that must be in fp32.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        shapes: Mapping[str, Sequence[int]],
        nearest: float = 0,
        prefixes: Mapping[str, str] | None = None,
        parameters: Collection[str] = (),
    ) -> None:
        self._paths, self._prefixes, self._parameters = paths, prefixes or {}, parameters
        self._ranges: dict[Path, dict[str, _Range]] = {}
        self.shapes = shapes
        """Shape of every tensor, by key."""
        first = int(nearest * len(paths))
        self._order = [paths[n] for n in sorted(range(len(paths)), key=lambda n: abs(n - first))]

    def __contains__(self, key: str) -> bool:
        return key in self.shapes

    def read(self, key: str, start: int = 0, count: int | None = None) -> Tensor:
        """The elements [start, start + count) of a flattened tensor, by default all; (count,).

        Raises:
            CheckpointError: the files do not hold all of them, or hold some twice.
        """
        if count is None:
            count = math.prod(self.shapes[key]) - start
        parts: list[_Range] = []
        held = 0
        for path in self._order:
            part = self._ranges_of(path).get(key)
            if part is not None:
                begin, end = part.within(start, count)
                parts.append(part)
                held += max(0, end - begin)
            if parts and held >= count:
                break
        self._check_cover(key, parts, start, count)  # before memory is allocated
        result = torch.empty(count, dtype=parts[0].dtype if parts else torch.float32)
        for part in parts:
            begin, end = part.within(start, count)
            if begin < end:
                _read_into(result[begin - start : end - start], part, begin - part.start)
        return result

    def whole(self, key: str) -> Tensor:
        """A tensor in its shape."""
        return self.read(key).view(tuple(self.shapes[key]))

    def check_layout(self, keys: Iterable[str]) -> None:
        """Raise CheckpointError unless the files have every element of these tensors once."""
        parts: defaultdict[str, list[_Range]] = defaultdict(list)
        for path in self._paths:
            for key, part in self._ranges_of(path).items():
                parts[key].append(part)
        for key in keys:
            self._check_cover(key, parts[key], 0, math.prod(self.shapes[key]))

    def inspect(self, path: Path) -> Content:
        """Read one of the files once, to its end.

        Raises:
            OSError: it cannot be read.
        """
        ranges: Mapping[str, _Range] = {}
        damage = None
        try:
            ranges = self._ranges_of(path)
        except CheckpointError as error:
            damage = error
        digest = hashlib.sha256()
        with open_regular(path) as file:
            for key, found in ranges.items():
                digest.update(file.read(found.offset - file.tell()))
                size = PIECE // found.dtype.itemsize
                piece = torch.empty(min(size, found.length), dtype=found.dtype)
                for done in range(0, found.length, size):
                    values = piece[: found.length - done]
                    data = values.view(torch.uint8).numpy().data
                    digest.update(data[: file.readinto(data)])
                    is_checked = key in self._parameters and damage is None
                    if is_checked and not all(map(torch.isfinite, values.aminmax())):
                        wrong = float(values[~values.isfinite()][0])
                        damage = CheckpointError(f"{path}: {key}", "finite values", wrong)
            while rest := file.read(PIECE):
                digest.update(rest)
        return Content(digest.hexdigest(), damage)

    def _check_cover(self, key: str, parts: Sequence[_Range], start: int, count: int) -> None:
        """Raise CheckpointError unless parts have all of a range, nothing twice, in one dtype."""
        reached, missing = start, count
        for part in sorted(parts, key=lambda part: part.start):
            begin, end = part.within(start, count)
            if part.dtype != parts[0].dtype:
                raise CheckpointError(f"{part.path}: {key}", str(parts[0].dtype), part.dtype)
            if begin < end and begin < reached:
                where = f"{part.path}: {key}"
                raise CheckpointError(f"{where}: elements from {begin} on are in other files too")
            if begin < end:
                reached, missing = end, missing - (end - begin)
        if missing:
            folder = self._paths[0].parent if self._paths else "no files"
            where = f"{folder}: {key} is not complete"
            raise CheckpointError(f"{where}: {missing} elements are missing")

    def _ranges_of(self, path: Path) -> dict[str, _Range]:
        if path not in self._ranges:
            prefix = self._prefixes.get(path.name, "")
            ranges = {prefix + name: found for name, found in _read_header(path).items()}
            for key, part in ranges.items():
                self._check_range(key, part)
            self._ranges[path] = ranges
        return self._ranges[path]

    def _check_range(self, key: str, part: _Range) -> None:
        where = f"{part.path}: {key}"
        if key not in self.shapes:
            raise CheckpointError(where, "no such tensor", f"one of {part.length} elements")
        if part.shape is not None and [*part.shape] != [*self.shapes[key]]:
            raise CheckpointError(where, f"shape {[*self.shapes[key]]}", [*part.shape])
        if part.start + part.length > math.prod(self.shapes[key]):
            expected = f"elements of shape {[*self.shapes[key]]}"
            got = f"{part.start} to {part.start + part.length}"
            raise CheckpointError(where, expected, got)
        if key in self._parameters and part.dtype != torch.float32:
            raise CheckpointError(where, str(torch.float32), part.dtype)


def whole_shapes(paths: Sequence[Path], prefixes: Mapping[str, str]) -> dict[str, Sequence[int]]:
    """Shapes of the tensors in files of whole tensors, by key; as in `ShardFiles`.

    Raises:
        CheckpointError: a header cannot be read, or two files have the same tensor.
    """
    shapes: dict[str, Sequence[int]] = {}
    for path in paths:
        for name, found in _read_header(path).items():
            key = prefixes.get(path.name, "") + name
            if key in shapes:
                raise CheckpointError(f"{path}: {key}", "a tensor of this file alone", "a second")
            if found.shape is None:
                raise CheckpointError(f"{path}: {key}", "a whole tensor", "a part")
            shapes[key] = found.shape
    return shapes


@dataclass(frozen=True)
class _Entry:
    """A tensor in a header."""

    dtype: str
    shape: Shape
    data_offsets: tuple[Natural, Natural]


@dataclass(frozen=True)
class _Place:
    """Where a shard starts, in the metadata of a header."""

    saved_offsets: tuple[Natural]


class _Header(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, _Entry]

    metadata: dict[str, str] = pydantic.Field(default={}, alias="__metadata__")


def _read_header(path: Path) -> dict[str, _Range]:
    """Where the tensors of a file lie, by name.

    Raises:
        CheckpointError: the file is not a .safetensors file, or its header does not fit it.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > min(HEADER_LIMIT, size - 8):
                raise CheckpointError(path, "a .safetensors file", f"a header of {length} bytes")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    header = parse_json(text, _Header, path, CheckpointError)
    entries: dict[str, _Entry] = header.model_extra or {}
    starts = {name: _Place((0,)) for name in entries}
    if is_sharded := STARTS in header.metadata:
        starts = parse_json(header.metadata[STARTS], dict[str, _Place], path, CheckpointError)
        if starts.keys() != entries.keys():
            raise CheckpointError(f"{path}: {STARTS}", "the start of every tensor", [*starts])
    ranges, first = {}, 8 + length
    end = first
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        where, dtype, count = f"{path}: {name}", DTYPES.get(entry.dtype), math.prod(entry.shape)
        if dtype is None:
            raise CheckpointError(f"{where}: dtype", f"one of {', '.join(DTYPES)}", entry.dtype)
        offset, end = end, end + count * dtype.itemsize
        if entry.data_offsets != (offset - first, end - first):
            expected = f"bytes {offset - first} to {end - first}"
            raise CheckpointError(f"{where}: data_offsets", expected, [*entry.data_offsets])
        if is_sharded and len(entry.shape) != 1:
            raise CheckpointError(f"{where}: shape", "one dimension", entry.shape)
        start = starts[name].saved_offsets[0]
        shape = None if is_sharded else entry.shape
        ranges[name] = _Range(path, offset, start, count, dtype, shape)
    if end != size:
        differs = "shorter" if end > size else "longer"
        raise CheckpointError(f"{path}: {differs} than its header says")
    return ranges


def _read_into(target: Tensor, part: _Range, skipped: int) -> None:
    data = target.view(torch.uint8).numpy().data
    try:
        with part.path.open("rb", buffering=0) as file:
            file.seek(part.offset + skipped * part.dtype.itemsize)
            while data:
                read = file.readinto(data)
                if not read:
                    raise CheckpointError(f"{part.path}: shorter than its header says")
                data = data[read:]
    except OSError as error:
        raise CheckpointError(f"{part.path}: {error.strerror}") from None
