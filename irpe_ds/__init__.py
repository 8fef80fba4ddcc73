"""iRPE-DS: vision transformers with image relative position encoding, trained at scale."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from irpe_ds import timm_hook

if TYPE_CHECKING:
    from irpe_ds.config import RunConfig, load_config
    from irpe_ds.errors import ConfigError
    from irpe_ds.models import RPEMultiheadAttention, equip
    from irpe_ds.models.loading import load
    from irpe_ds.ops import irpe_attention, irpe_gather
    from irpe_ds.ops.build.builder import IRPEBuilder
    from irpe_ds.rpe.buckets import BucketMap
    from irpe_ds.rpe.config import RPEConfig
    from irpe_ds.runlog import RunLog

__version__ = "0.1.0"
__all__ = [
    "BucketMap",
    "ConfigError",
    "IRPEBuilder",
    "RPEConfig",
    "RPEMultiheadAttention",
    "RunConfig",
    "RunLog",
    "equip",
    "irpe_attention",
    "irpe_gather",
    "load",
    "load_config",
]
_HOME = {
    "BucketMap": "rpe.buckets",
    "ConfigError": "errors",
    "IRPEBuilder": "ops.build.builder",
    "RPEConfig": "rpe.config",
    "RPEMultiheadAttention": "models",
    "RunConfig": "config",
    "RunLog": "runlog",
    "equip": "models",
    "irpe_attention": "ops",
    "irpe_gather": "ops",
    "load": "models.loading",
    "load_config": "config",
}


def __getattr__(name: str) -> Any:
    """Public names are imported on first use: reading a YAML takes no torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


timm_hook.install()
