"""Files of a checkpoint that are not what the manifest and their own headers say, hashes apart."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from irpe_ds.checkpoint.shards import METADATA, STARTS, Shard, ShardFiles, write_shards
from irpe_ds.data.beton.manifest import file_sha256
from irpe_ds.errors import CheckpointError

SHAPES = {"weights.a": [2, 3], "weights.b": [2], "weights.count": []}
PARAMETERS = ("weights.a", "weights.b")


def file_of(folder: Path, shards: dict[str, tuple[int, Tensor]], rank: int = 0) -> Path:
    path = folder / f"rank-{rank}.safetensors"
    write_shards(path, {name: Shard(*shard) for name, shard in shards.items()})
    return path


def read_all(paths: Sequence[Path]) -> None:
    """What find_damage and the loading of a checkpoint do."""
    files = ShardFiles(paths, SHAPES, parameters=PARAMETERS)
    files.check_layout(SHAPES)
    for path in paths:
        content = files.inspect(path)
        assert content.sha256 == file_sha256(path)
        if content.damage is not None:
            raise content.damage
    for key in SHAPES:
        files.whole(key)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    whole = {"weights.a": (0, torch.ones(6)), "weights.b": (0, torch.ones(2))}
    path = file_of(tmp_path, whole | {"weights.count": (0, torch.tensor([7]))})
    read_all([path])
    return path


def forge(path: Path, header: bytes | dict[str, Any]) -> None:
    """Replace a file's header."""
    data = path.read_bytes()
    data = data[8 + int.from_bytes(data[:8], "little") :]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def header_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    header: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header


@pytest.mark.parametrize(
    "start",
    [b"", b"\1", b"\xff" * 8, (2**63).to_bytes(8, "little"), (400).to_bytes(8, "little")],
)
def test_a_header_larger_than_the_file(start: bytes, path: Path) -> None:
    path.write_bytes(start + path.read_bytes()[8:] if len(start) == 8 else start)
    with pytest.raises(CheckpointError, match=r"rank-0\.safetensors: expected"):
        read_all([path])


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 50_000, b'{"a": {}, "a": {}}', b"1"]
)
def test_a_header_that_is_no_json(text: bytes, path: Path) -> None:
    forge(path, text)
    with pytest.raises(CheckpointError, match=r"rank-0\.safetensors: expected|safetensors: a"):
        read_all([path])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data_offsets", [-24, 0]),
        ("data_offsets", [0, 20]),
        ("data_offsets", [8, 32]),
        ("data_offsets", [24, 0]),
        ("data_offsets", [10**30, 10**30 + 24]),
        ("data_offsets", [0]),
        ("data_offsets", ["0", "24"]),
        ("data_offsets", None),
        ("shape", [5]),
        ("shape", [-6]),
        ("shape", [2, 3]),
        ("shape", 6),
        ("shape", [10**18]),
        ("dtype", "F16"),
        ("dtype", "I32"),
        ("dtype", "F8_E5M2"),
        ("dtype", 32),
        ("dtype", None),
    ],
)
def test_an_entry_that_does_not_fit(key: str, value: Any, path: Path) -> None:
    header = header_of(path)
    header["weights.a"][key] = value
    forge(path, header)
    with pytest.raises(CheckpointError, match=r"rank-0\.safetensors: weights\.\w"):
        read_all([path])


@pytest.mark.parametrize(
    "starts", ["", "[]", "{}", '{"weights.a": {}}', '{"weights.a": {"saved_offsets": [-1]}}']
)
def test_where_shards_start(starts: str, path: Path) -> None:
    header = header_of(path)
    header[METADATA][STARTS] = starts
    forge(path, header)
    with pytest.raises(CheckpointError, match=r"rank-0\.safetensors: "):
        read_all([path])


A, B, COUNT = torch.ones(6), torch.ones(2), torch.tensor([7])
NAN, INF = torch.tensor([1.0, math.nan]), torch.tensor([-math.inf, 1.0])


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([{"a": (0, A)}], r"weights\.b is not complete: 2 elements are missing"),
        ([{"a": (0, A[:5]), "b": (0, B)}], r"weights\.a is not complete: 1 elements"),
        ([{"a": (0, A[:2]), "b": (0, B)}, {"a": (3, A[:3])}], r"a is not complete: 1 elements"),
        ([{"a": (0, A), "b": (0, B)}, {"a": (2, A[:1])}], r"rank-1\S+ weights\.a: elements from 2"),
        ([{"a": (0, A[:4]), "b": (0, B)}, {"a": (3, A[:3])}], r"rank-1\S+ weights\.a: elements"),
        ([{"a": (0, A[:5]), "b": (0, B)}, {"a": (4, A[:1])}], r"rank-1\S+ weights\.a: elements"),
        ([{"a": (0, torch.ones(7)), "b": (0, B)}], r"weights\.a: expected .* \[2, 3\], got 0 to 7"),
        ([{"a": (2**60, A), "b": (0, B)}], r"rank-0\S+ weights\.a: expected elements of shape"),
        ([{"a": (0, A.half()), "b": (0, B)}], r"weights\.a: expected torch\.float32, got .*16"),
        ([{"a": (0, A.int()), "b": (0, B)}], r"weights\.a: expected torch\.float32, got .*int32"),
        ([{"a": (0, A), "b": (0, B), "c": (0, B)}], r"weights\.c: expected no such tensor"),
        ([{"a": (0, A), "b": (0, NAN)}], r"rank-0\S+ weights\.b: expected finite values, got nan"),
        ([{"a": (0, A), "b": (0, INF)}], r"rank-0\S+ weights\.b: expected finite values, got -inf"),
    ],
)
def test_tensors_that_are_not_what_was_saved(
    shards: list[dict[str, tuple[int, Tensor]]], message: str, tmp_path: Path
) -> None:
    shards[0] = shards[0] | {"count": (0, COUNT)}
    paths = [
        file_of(tmp_path, {f"weights.{name}": shard for name, shard in own.items()}, rank)
        for rank, own in enumerate(shards)
    ]
    with pytest.raises(CheckpointError, match=message):
        read_all(paths)


def test_whole_tensors_in_another_shape(tmp_path: Path) -> None:
    save_file({"weights.a": torch.ones(3, 2)}, tmp_path / "whole")
    with pytest.raises(CheckpointError, match=r"weights\.a: expected shape \[2, 3\], got \[3, 2\]"):
        ShardFiles([tmp_path / "whole"], SHAPES).whole("weights.a")


def test_no_memory_is_taken_for_what_the_files_do_not_have(path: Path) -> None:
    files = ShardFiles([path], SHAPES | {"weights.b": [10**9, 10**9]})
    with pytest.raises(CheckpointError, match=r"weights\.b is not complete: 9{15,}8 elements"):
        files.whole("weights.b")


def test_buffers_may_be_infinite(tmp_path: Path) -> None:
    path = file_of(tmp_path, {"weights.mask": (0, INF)})
    files = ShardFiles([path], {"weights.mask": [2]})
    assert files.inspect(path).damage is None
    assert torch.equal(files.whole("weights.mask"), INF)


def test_a_pipe_is_not_waited_for(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match=r"rank-0\.safetensors: not a regular file"):
        read_all([path])
