"""The operators of an ahead-of-time build, DS_BUILD_IRPE=1."""

import importlib
import json
import threading
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from irpe_ds.files import read_regular
from irpe_ds.ops.build import toolchain
from irpe_ds.ops.build.toolchain import Unavailable

MODULE = "irpe_ds.ops.irpe_op"
INFO = Path(__file__).parents[1] / "irpe_op.json"
"""Beside the module: what it was built for."""

LOCK = threading.RLock()
"""Held while operators are looked for, built and loaded; other threads wait."""


def load() -> ModuleType | None:
    """The module, if there is one.

    Raises:
        Unavailable: it was built for another PyTorch or CUDA than is installed.
    """
    if find_spec(MODULE) is None:
        return None
    built, here = built_for(), needs()
    if any(built[name] != here[name] for name in here):
        wanted, found = (", ".join(f"{name} {of[name]}" for name in here) for of in (built, here))
        raise Unavailable(f"prebuilt for {wanted}, but found {found}: reinstall irpe-ds")
    try:
        return importlib.import_module(MODULE)
    except ImportError as error:
        raise Unavailable(f"cannot load the prebuilt operators: {error}") from error


def needs() -> dict[str, str | None]:
    """What a prebuilt module depends on and may change after its installation."""
    return {"torch": torch.__version__, "cuda": torch.version.cuda, "sources": toolchain.sources()}


def built_for() -> dict[str, Any]:
    """`needs` at the time of the build, `architectures`, and why it is `without_cuda`.

    Raises:
        Unavailable: the file is missing, or is not as `setup.py` writes it.
    """
    try:
        info: dict[str, Any] = json.loads(read_regular(INFO, 100_000))
        wrong = {
            key
            for key, x in info.items()
            if not isinstance(x, str | None if key == "cuda" else str)
        }
        if wrong or info.keys() != {*needs(), "architectures", "without_cuda"}:
            raise ValueError("other keys or values than setup.py writes")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise Unavailable(f"cannot read {INFO} ({error}): reinstall irpe-ds") from error
    return info
