"""Ranges of tensors in files: written by some ranks, read by any other number."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor

from irpe_ds.checkpoint import shards
from irpe_ds.checkpoint.reader import SavedWeights, find_damage, open_files, read_manifest
from irpe_ds.checkpoint.shards import Shard, ShardFiles, write_shards
from irpe_ds.checkpoint.whole import write_whole
from irpe_ds.errors import CheckpointError

SHAPES = {"a": (5, 7), "b": (3,), "count": (), "mask": (4,), "half": (6,)}
TYPES = {"count": torch.int64, "mask": torch.bool, "half": torch.bfloat16}


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        name: (8 * torch.rand(shape)).to(TYPES.get(name, torch.float32))
        for name, shape in SHAPES.items()
    }


def write(folder: Path, tensors: dict[str, Tensor], ends: dict[str, Sequence[int]]) -> list[Path]:
    """Write a file for every range of elements; `ends` has where they end, by name."""
    paths = []
    for rank in range(max(map(len, ends.values()))):
        found = {}
        for name, tensor in tensors.items():
            own = ends.get(name, (tensor.numel(),))
            if rank < len(own):
                start = own[rank - 1] if rank else 0
                found[name] = Shard(start, tensor.flatten()[start : own[rank]])
        paths.append(folder / f"rank-{rank}.safetensors")
        written = write_shards(paths[-1], found)
        data = paths[-1].read_bytes()
        assert written == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return paths


ENDS = {"a": (10, 33, 35), "b": (0, 0, 3)}


@pytest.mark.parametrize("nearest", [0, 0.5, 0.99])
def test_any_range_comes_back(nearest: float, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    files = ShardFiles(write(tmp_path, tensors, ENDS), SHAPES, nearest)
    for name, tensor in tensors.items():
        flat = tensor.flatten()
        assert torch.equal(files.whole(name), tensor)
        for start in range(flat.numel()):
            for end in range(start, flat.numel() + 1):
                got = files.read(name, start, end - start)
                assert got.dtype == tensor.dtype
                assert torch.equal(got, flat[start:end])


def test_only_the_files_that_are_needed_are_read(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write(tmp_path, tensors, {"a": (10, 20, 35)})
    opened: set[Path] = set()
    read_header = shards._read_header
    monkeypatch.setattr(shards, "_read_header", lambda path: opened.add(path) or read_header(path))
    for rank, (start, end) in enumerate(((0, 10), (10, 20), (20, 35))):
        opened.clear()
        files = ShardFiles(paths, SHAPES, nearest=rank / 3)
        assert torch.equal(files.read("a", start, end - start), tensors["a"].flatten()[start:end])
        assert opened == {paths[rank]}


def test_pieces_are_written_whole(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "PIECE", 16)
    files = ShardFiles(write(tmp_path, tensors, ENDS), SHAPES)
    assert all(torch.equal(files.whole(name), tensor) for name, tensor in tensors.items())


def test_pytorch_reads_them(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """Ranges of tensors of one dimension are what torch.distributed.checkpoint writes."""
    flat = {name: tensor.flatten() for name, tensor in tensors.items()}
    write(tmp_path, flat, {"a": (10, 33, 35)})
    found = {name: torch.zeros_like(tensor) for name, tensor in flat.items()}
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in flat.items())


def test_one_file_of_whole_tensors(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    files = ShardFiles(write(tmp_path, tensors, ENDS), SHAPES)
    write_whole(tmp_path / "whole", files, {f"model.{name}": name for name in tensors})
    found = load_file(tmp_path / "whole")
    assert found.keys() == {f"model.{name}" for name in tensors}
    for name, tensor in tensors.items():
        assert found[f"model.{name}"].dtype == tensor.dtype
        assert torch.equal(found[f"model.{name}"], tensor)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("damage", "message"), [(Path.unlink, "No such file"), (cut, "shorter than its header says")]
)
def test_what_is_missing_is_said(
    damage: Any, message: str, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    paths = write(tmp_path, {"a": tensors["a"]}, {"a": (10, 20, 35)})
    damage(paths[2])
    with pytest.raises(CheckpointError, match=message):
        ShardFiles(paths, SHAPES).whole("a")
    with pytest.raises(CheckpointError, match="a is not complete: 15 elements are missing"):
        ShardFiles(paths[:2], SHAPES).whole("a")


class TestFormat2:
    """Whole tensors by kind, as before shards."""

    PATH = Path(__file__).with_name("format2") / "update-00000005"

    def test_it_is_read(self) -> None:
        assert read_manifest(self.PATH).scores == {"top1": 50.0}
        files = open_files(self.PATH)
        for factor, kind in enumerate(("weights", "exp_avg", "exp_avg_sq", "ema"), 1):
            expected = factor * torch.arange(6.0)
            assert torch.equal(files.whole(f"{kind}.weight"), expected.reshape(3, 2))
            assert torch.equal(files.read(f"{kind}.weight", 1, 4), expected[1:5])

    @pytest.mark.parametrize("kind", ["weights", "optimizer", "ema"])
    def test_what_is_missing_is_said(self, kind: str, tmp_path: Path) -> None:
        assert find_damage(self.PATH) is None
        path = shutil.copytree(self.PATH, tmp_path / self.PATH.name)
        save_file({"other": torch.ones(1)}, path / f"{kind}.safetensors")
        with pytest.raises(CheckpointError, match=r"(weights|exp_avg|ema)(\.\w+)?: expected"):
            open_files(path)
        assert f"{kind}.safetensors has " in str(find_damage(path))

    @pytest.mark.parametrize("ema", [False, True])
    def test_its_weights(self, ema: bool) -> None:
        found = dict(SavedWeights(self.PATH, ema=ema))
        assert found.keys() == {"weight", "bias", "offsets"}
        assert torch.equal(found["bias"], torch.arange(3.0) * (4 if ema else 1))
        assert torch.equal(found["offsets"], torch.arange(4))
