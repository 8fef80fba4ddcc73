"""Files of weights, .safetensors and .pth: read without trusting them."""

import mmap
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from timm.models import clean_state_dict
from torch import Tensor, nn

from irpe_ds.checkpoint.whole import SHA256, check_whole
from irpe_ds.errors import ConfigError
from irpe_ds.files import open_regular
from irpe_ds.models.positions import KEY, Positions

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
STATES = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Where a .pth may have the state dict, first to last as timm looks for it."""


def read_weights(path: Path) -> tuple[dict[str, Any], Positions | None]:
    """The state dict in a file, and what the file says of positions, if anything.

    Raises:
        UserError, Exception: an unreadable file; safetensors and torch raise any type.
    """
    with open_regular(path) as file:
        is_archive = file.read(4) == b"PK\x03\x04"
    if path.suffix == ".safetensors":
        state, stated = _read_safetensors(path)
    else:
        _check_pickle(path, is_archive)
        state, stated = _read_pth(path)
    return state, None if stated is None else Positions.parse(str(stated), path)


def _read_safetensors(path: Path) -> tuple[dict[str, Any], str | None]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if {SHA256, KEY} & metadata.keys():  # else another program's, without a hash
        check_whole(path, metadata.get(SHA256, ""))
    return state, metadata.get(KEY)


def _check_pickle(path: Path, is_archive: bool) -> None:
    """Raise ValueError for what torch.load accepts, and should not.

    torch 2.14 ignores the checksums of an archive, and inflates records; its weights_only calls
    bytearray(n). No longer needed when test_what_torch_accepts in tests/models says so.
    """
    with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data.find(b"\nbytearray\n") >= 0:
            raise ValueError("a bytearray in it, which no weights are")
        if not is_archive:
            return
        size = len(data)
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
        if not stored or sum(record.file_size for record in records) > size:
            raise ValueError("compressed records, which torch.save does not write")
        if damaged := archive.testzip():
            raise ValueError(f"record {damaged} differs from its checksum")


def _read_pth(path: Path) -> tuple[dict[str, Any], str | None]:
    with torch.serialization.safe_globals([Namespace]):  # of the released files
        content = torch.load(path, map_location="cpu", weights_only=True)
    state, stated = content, None
    if isinstance(content, Mapping):
        stated = content.get(KEY)
        state = next((content[key] for key in STATES if content.get(key) is not None), content)
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise ValueError("no state dict in it")
    return clean_state_dict(dict(state)), stated


def check_tensors(
    state: Mapping[str, Any], expected: Mapping[str, Tensor], where: str, path: object
) -> None:
    """Check the tensors of a state dict that are not the expected ones themselves.

    Raises:
        ConfigError: not dense, of another type of number, NaN or infinite; names the tensor.
    """
    for key, value in state.items():
        if value is expected[key]:
            continue
        wanted = expected[key].dtype
        types = FLOATS if wanted.is_floating_point else (wanted,)
        got = _name(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        if getattr(value, "dtype", None) not in types:
            kind = "floating-point" if wanted.is_floating_point else _name(wanted)
            raise ConfigError(where, f"{kind} values of {key}", f"{path} with {got}")
        is_dense = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided
        if not is_dense or value.is_meta:
            raise ConfigError(where, f"a dense tensor {key}", f"{path} with another")
        if wanted.is_floating_point and value.numel() and not _all_finite(value):
            raise ConfigError(where, f"finite values of {key}", f"{path} with NaN or inf")


def _all_finite(value: Tensor) -> bool:
    """Without a second tensor of its size."""
    return all(bool(bound.isfinite()) for bound in torch.aminmax(value.detach()))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
