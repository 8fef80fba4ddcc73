"""What a run folder keeps besides metrics: enough to run it again and to trust its numbers."""

import contextlib
import json
import os
import platform
import shlex
import subprocess
import sys
import warnings
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from irpe_ds.config import RunConfig
from irpe_ds.errors import ConfigError
from irpe_ds.models.attention import RPEAttention
from irpe_ds.ops.dispatch import Choice, FallbackWarning, select
from irpe_ds.training.distributed import Ranks
from irpe_ds.training.meeting import INTERFACE
from irpe_ds.training.precision import PRODUCTS

CONFIG = "config.yaml"
QUIET: dict[str, Any] = {"capture_output": True, "text": True, "check": True}
PACKAGES = ("irpe-ds", "torch", "torchvision", "timm", "deepspeed", "ffcv", "numpy", "wandb")


def attention_op(config: RunConfig, model: nn.Module, device_type: str) -> Choice:
    """The implementation of the attention op that will run, built if need be, and why.

    Raises:
        ConfigError: `model.impl` names one that does not run here.
    """
    layer = next((m for m in model.modules() if isinstance(m, RPEAttention)), None)
    if layer is None:
        return Choice("timm's own", "the model has no relative position")
    warnings.simplefilter("ignore", FallbackWarning)  # the run's log says it, once
    try:
        return select(config.model.impl, layer.case(device_type, PRODUCTS[config.train.precision]))
    except ConfigError as error:
        raise ConfigError(f"model.{error.where}", error.expected, error.got) from None


def write_record(config: RunConfig, settings: dict[str, Any], ranks: Ranks, op: Choice) -> str:
    """Write config.yaml (resolved), deepspeed.json and environment.json into the run folder.

    Returns:
        One line for the log: what runs where.
    """
    found = describe_environment(ranks, op)
    (config.folder / CONFIG).write_text(config.dump())
    (config.folder / "deepspeed.json").write_text(json.dumps(settings, indent=2) + "\n")
    (config.folder / "environment.json").write_text(json.dumps(found, indent=2) + "\n")
    nodes = len(found["hosts"])
    network = f", {nodes} nodes over {found['interface']}" if nodes > 1 else ""
    return (
        f"{config.folder}: {config.model.name} in {config.train.precision}, "
        f"{found['ranks']} ranks on {found['device']}{network}, attention op {op.name} ({op.why})"
    )


def describe_environment(ranks: Ranks, op: Choice) -> dict[str, Any]:
    """Command, commit, versions, hardware, and which implementation of the op runs and why."""
    on_gpu = ranks.device.type == "cuda"
    return {
        "command": shlex.join(arg for arg in sys.argv if not arg.startswith("--local_rank")),
        "commit": commit(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "device": torch.cuda.get_device_name(ranks.device) if on_gpu else "CPU",
        "cuda": torch.version.cuda if on_gpu else None,
        "ranks": ranks.world_size,
        "hosts": dict(Counter(ranks.names)),
        "interface": os.environ.get(INTERFACE),
        "attention_op": op._asdict(),
    }


def commit() -> str | None:
    """Commit of the source that runs, with `-dirty` when files differ from it; None outside git."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        # An installed copy may lie in a repository that is not ours, such as the user's own.
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], **QUIET)
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40"], **QUIET
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def package_versions() -> dict[str, str]:
    """Versions of what a run stands on, as far as it is installed."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
