"""iRPE-DS: vision transformers with image relative position encoding, trained at scale."""

from typing import TYPE_CHECKING, Any

from irpe_ds.errors import ConfigError
from irpe_ds.models import equip
from irpe_ds.ops import irpe_attention, irpe_gather
from irpe_ds.rpe import BucketMap, RPEConfig

if TYPE_CHECKING:
    from irpe_ds.config import RunConfig, load_config
    from irpe_ds.ops.builder import IRPEBuilder
    from irpe_ds.runlog import RunLog

__version__ = "0.1.0"
__all__ = [
    "BucketMap",
    "ConfigError",
    "IRPEBuilder",
    "RPEConfig",
    "RunConfig",
    "RunLog",
    "equip",
    "irpe_attention",
    "irpe_gather",
    "load_config",
]
_LAZY = {
    "IRPEBuilder": "ops.builder",
    "RunConfig": "config",
    "RunLog": "runlog",
    "load_config": "config",
}


def __getattr__(name: str) -> Any:
    """What needs more than torch and timm is imported on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"irpe_ds.{_LAZY[name]}"), name)
