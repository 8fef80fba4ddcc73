"""Weights files of any content give their weights, or one line."""

import contextlib
import io
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from irpe_ds.checkpoint.shards import ShardFiles
from irpe_ds.checkpoint.whole import write_whole
from irpe_ds.config import ModelConfig
from irpe_ds.errors import ConfigError
from irpe_ds.models.build import build_model, load_weights

SUFFIXES = ("pth", "safetensors")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Two layers with BatchNorm, which has an integer buffer: num_batches_tracked."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    nn.init.normal_(model[0].weight)
    return model


def write(state: dict[str, Any], path: Path) -> Path:
    if path.suffix == ".pth":
        torch.save({"model": state}, path)
    else:
        save_file(state, path)
    return path


def refusal(model: nn.Module, path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_weights(model, path, "model.weights")
    message = str(caught.value)
    assert message.startswith("model.weights: ")
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", SUFFIXES)
class TestTensors:
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("name", ["0.weight", "1.bias", "1.running_var"])
    def test_not_finite(
        self, bad: float, name: str, suffix: str, model: nn.Module, tmp_path: Path
    ) -> None:
        state = {key: value.clone() for key, value in model.state_dict().items()}
        state[name].view(-1)[2] = bad
        message = refusal(model, write(state, tmp_path / f"x.{suffix}"))
        assert f"expected finite values of {name}, got" in message

    @pytest.mark.parametrize(
        "dtype", [torch.bool, torch.int64, torch.uint8, torch.float8_e4m3fn, torch.complex64]
    )
    @pytest.mark.parametrize("name", ["0.weight", "1.running_mean"])
    def test_other_numbers(
        self, dtype: torch.dtype, name: str, suffix: str, model: nn.Module, tmp_path: Path
    ) -> None:
        state = {**model.state_dict()}
        state[name] = state[name].detach().to(dtype)
        message = refusal(model, write(state, tmp_path / f"x.{suffix}"))
        assert f"expected floating-point values of {name}" in message
        assert message.endswith(f"with {str(dtype).removeprefix('torch.')}")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_precisions(
        self, dtype: torch.dtype, suffix: str, model: nn.Module, tmp_path: Path
    ) -> None:
        state = {
            k: v.to(dtype) if v.is_floating_point() else v for k, v in model.state_dict().items()
        }
        fresh = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        load_weights(fresh, write(state, tmp_path / f"x.{suffix}"), "model.weights")
        assert torch.equal(fresh[0].weight, model[0].weight.to(dtype).float())

    def test_a_counter_with_a_fraction(self, suffix: str, model: nn.Module, tmp_path: Path) -> None:
        state = {**model.state_dict(), "1.num_batches_tracked": torch.tensor(1.5)}
        message = refusal(model, write(state, tmp_path / f"x.{suffix}"))
        assert "expected int64 values of 1.num_batches_tracked, got" in message

    @pytest.mark.parametrize("name", ["0.weight", "1.num_batches_tracked"])
    def test_missing_or_of_another_shape(
        self, name: str, suffix: str, model: nn.Module, tmp_path: Path
    ) -> None:
        state = {**model.state_dict()}
        tensor = state.pop(name)
        path = write(state, tmp_path / f"x.{suffix}")
        assert f"with no tensor {name}" in refusal(model, path)
        state[name] = torch.zeros(2, 2, dtype=tensor.dtype)
        path = write(state, tmp_path / f"x.{suffix}")
        assert f"with {name} of shape (2, 2), not " in refusal(model, path)


def test_of_a_position_embedding_before_it_is_interpolated(tmp_path: Path) -> None:
    options = {"depth": 1, "embed_dim": 8, "num_heads": 2}
    config = ModelConfig(name="deit_tiny_patch16_224", img_size=64, options=options, num_classes=2)
    state = build_model(config).state_dict()
    state["pos_embed"][0, 3, 1] = float("nan")
    path = write(state, tmp_path / "x.pth")
    with pytest.raises(ConfigError, match="finite values of pos_embed"):
        build_model(config.model_copy(update={"img_size": (96, 64), "weights": path}))


@pytest.mark.parametrize("tensor", ["sparse", "meta", "a word"])
def test_no_dense_tensor(tensor: str, model: nn.Module, tmp_path: Path) -> None:
    weight = model[0].weight.detach()
    values = {"sparse": weight.to_sparse(), "meta": weight.to("meta"), "a word": "x"}
    state = {**model.state_dict(), "0.weight": values[tensor]}
    assert "0.weight" in refusal(model, write(state, tmp_path / "x.pth"))


HEADER = b'{"0.weight":{"dtype":"F32","shape":[4,3],"data_offsets":[0,48]}}'


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 1 << 62) + HEADER,
        struct.pack("<Q", len(HEADER)) + HEADER,
        struct.pack("<Q", len(HEADER)) + HEADER.replace(b"48", b"99") + bytes(48),
        struct.pack("<Q", len(HEADER)) + HEADER.replace(b"4,3", b"9,9") + bytes(48),
        struct.pack("<Q", 4000) + b"[" * 4000,
        struct.pack("<Q", 2) + b"{}",
        b"{}",
        b"",
    ],
    ids=["header too large", "no data", "beyond", "shape", "nested", "nothing", "short", "empty"],
)
def test_a_broken_safetensors(content: bytes, model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    refusal(model, path)


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize("what", ["fifo", "/dev/zero", "folder"])
def test_no_regular_file(name: str, what: str, model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / name
    if what == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path if what == "folder" else what)
    message = refusal(model, path)
    assert ("a checkpoint's folder" if what == "folder" else "not a regular file") in message


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"model": 3}, {"model": {3: 4}}, [], None])
def test_no_state_dict(content: Any, model: nn.Module, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pth")
    refusal(model, tmp_path / "x.pth")


class TestWhatWasWritten:
    """A change of any byte of a file that this program writes is found."""

    @pytest.fixture
    def exported(self, model: nn.Module, tmp_path: Path) -> Callable[[str], Path]:
        def export(suffix: str) -> Path:
            path = tmp_path / f"exported.{suffix}"
            if suffix == "pth":
                return write(model.state_dict(), path)
            state = model.state_dict()
            source = write(state, tmp_path / "source.safetensors")
            files = ShardFiles([source], {key: tensor.shape for key, tensor in state.items()})
            write_whole(path, files, {key: key for key in files.shapes}, {"said": "0" * 64})
            return path

        return export

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_bits(self, suffix: str, exported: Callable, model: nn.Module, tmp_path: Path) -> None:
        data = exported(suffix).read_bytes()
        path = tmp_path / f"damaged.{suffix}"
        for at in range(0, len(data), 7 if suffix == "safetensors" else 31):
            damaged = bytearray(data)
            damaged[at] ^= 1 << at % 8
            path.write_bytes(damaged)
            fresh = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
            with contextlib.suppress(ConfigError):
                load_weights(fresh, path, "model.weights")
                torch.testing.assert_close(fresh.state_dict(), model.state_dict(), rtol=0, atol=0)

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_a_weight(self, suffix: str, exported: Callable, model: nn.Module) -> None:
        path = exported(suffix)
        data, weight = path.read_bytes(), model[0].weight.detach().numpy().tobytes()
        path.write_bytes(data.replace(weight, weight[::-1]))
        message = refusal(model, path)
        assert "differs from" in message


class TestPickles:
    def test_what_torch_accepts(self, model: nn.Module, tmp_path: Path) -> None:
        """When one of these is refused by torch.load, `_check_pickle` can lose a part."""
        for make in (bomb, compressed, damaged):
            path = tmp_path / "x.pth"
            path.write_bytes(make(model.state_dict()))
            torch.load(path, weights_only=True)
            refusal(model, path)


def bomb(_: dict[str, Tensor]) -> bytes:
    """A pickle that calls bytearray(1000); it could be any number."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02c__builtin__\nbytearray\nM\xe8\x03\x85R.")
        archive.writestr("x/version", "3\n")
        archive.writestr("x/byteorder", "little")
    return file.getvalue()


def compressed(state: dict[str, Tensor]) -> bytes:
    saved, file = io.BytesIO(), io.BytesIO()
    torch.save(state, saved)
    with (
        zipfile.ZipFile(saved) as stored,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for record in stored.infolist():
            archive.writestr(record.filename, stored.read(record))
    return file.getvalue()


def damaged(state: dict[str, Tensor]) -> bytes:
    saved = io.BytesIO()
    torch.save(state, saved)
    weight = state["0.weight"].numpy().tobytes()
    return saved.getvalue().replace(weight, weight[::-1])
