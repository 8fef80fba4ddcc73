"""What a run folder keeps besides metrics: enough to run it again and to trust its numbers."""

import json
import os
import platform
import shlex
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from irpe_ds.cluster.process_group import Ranks
from irpe_ds.cluster.rendezvous import INTERFACE
from irpe_ds.config import RunConfig
from irpe_ds.data.beton.reader import DatasetInfo
from irpe_ds.errors import ConfigError, UserError
from irpe_ds.models.attention import RPEAttention
from irpe_ds.ops.dispatch import FallbackWarning, ResolvedImpl, resolve_impl
from irpe_ds.provenance import commit, package_versions
from irpe_ds.training.precision import PRODUCTS

CONFIG = "config.yaml"


def attention_op(config: RunConfig, model: nn.Module, device_type: str) -> ResolvedImpl:
    """The implementation of the attention op that will run, built if need be, and why.

    Raises:
        ConfigError: `model.impl` names one that does not run here.
    """
    layer = next((m for m in model.modules() if isinstance(m, RPEAttention)), None)
    if layer is None:
        return ResolvedImpl("timm's own", "the model has no relative position")
    warnings.simplefilter("ignore", FallbackWarning)  # the run's log says it, once
    try:
        key = layer.dispatch_key(device_type, PRODUCTS[config.train.precision])
        return resolve_impl(config.model.impl, key)
    except UserError as error:
        raise ConfigError(f"model.{error.where}", error.expected, error.got) from None


def write_run_metadata(
    config: RunConfig, settings: dict[str, Any], ranks: Ranks, op: ResolvedImpl
) -> str:
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


def describe_environment(ranks: Ranks, op: ResolvedImpl) -> dict[str, Any]:
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
        "hosts": dict(Counter(ranks.hostnames)),
        "interface": os.environ.get(INTERFACE),
        "attention_op": op._asdict(),
    }


def inputs(data: Mapping[str, DatasetInfo], op: ResolvedImpl) -> dict[str, str]:
    """The data, and what computes."""
    found = {f"data.{part}": describe_data(info) for part, info in data.items()}
    return {**found, "the attention op": op.name}


def describe_data(info: DatasetInfo) -> str:
    """What tells a set of images from another: its hash, or its size where there is none."""
    manifest = info.manifest
    return f"{info.num_samples} images" if manifest is None else manifest.sha256[:12]
