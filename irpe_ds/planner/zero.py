"""The ZeRO settings of a JSON that memory and communication depend on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irpe_ds.errors import ConfigError
from irpe_ds.training.deepspeed_config import parse_zero, read_ds_config

COMMUNICATION_BYTES = {"fp16": 2, "bf16": 2, "bfp16": 2, "fp32": 4}
"""Values of DeepSpeed's communication_data_type."""

DEFAULTS: dict[str, Any] = {
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "overlap_comm": None,
    "contiguous_gradients": True,
    "offload_optimizer": None,
    "offload_param": None,
    "zero_quantized_weights": False,
    "zero_quantized_gradients": False,
    "zero_hpz_partition_size": 1,
}
"""Of DeepSpeedZeroConfig in 0.19.8, for a machine without DeepSpeed; a test compares them."""


@dataclass(frozen=True, kw_only=True)
class Zero:
    """Settings of `zero_optimization`, under DeepSpeed's names; sizes are in elements."""

    stage: int
    reduce_bucket_size: int
    prefetch_bucket_size: int
    """Stage 3: elements gathered ahead."""
    param_persistence_threshold: int
    """Stage 3: smaller parameters stay whole on every rank."""
    max_reuse_distance: int
    """Stage 3: a parameter that is used again within so many elements is not released."""
    overlap_comm: bool
    """Whether gradients are reduced during the backward pass."""
    contiguous_gradients: bool
    """Whether gradients are copied into a bucket that is allocated as one tensor."""
    offload_optimizer: bool
    offload_param: bool
    quantized_weights: bool
    """qwZ of ZeRO++: parameters are gathered as 8-bit integers."""
    quantized_gradients: bool
    """qgZ of ZeRO++: gradients are sent as 4-bit integers, in a node and then between nodes."""
    hpz_partition_size: int
    """hpZ of ZeRO++: ranks that share a second copy of the parameters; 1 turns it off."""
    communication_bytes: int | None
    """Bytes per gradient element when sent. None: as in the model's precision."""

    @property
    def name(self) -> str:
        """`stage 3 + offload`, as in tables."""
        parts = {
            f"stage {self.stage}": True,
            "offload": self.offload_optimizer or self.offload_param,
            "qwZ": self.quantized_weights,
            "hpZ": self.hpz_partition_size > 1,
            "qgZ": self.quantized_gradients,
        }
        return " + ".join(name for name, on in parts.items() if on)


def read_zero(path: Path) -> Zero:
    """The settings in a file of `ds_configs/`.

    Raises:
        ConfigError: the file cannot be read, or DeepSpeed rejects a key or a value.
    """
    ds_config = read_ds_config(path)
    communication = ds_config.get("communication_data_type")
    return zero_of(ds_config["zero_optimization"], communication, str(path))


def zero_of(
    section: dict[str, Any], communication: str | None = None, where: str = "ds_config"
) -> Zero:
    """The settings in a section `zero_optimization`, and in `communication_data_type`.

    Without DeepSpeed, unknown keys pass and its defaults are those of 0.19.8.

    Raises:
        ConfigError: DeepSpeed rejects a key or a value.
    """
    try:
        values = parse_zero(section, f"{where}: zero_optimization").model_dump(by_alias=True)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "deepspeed":
            raise
        values = DEFAULTS | section
    if communication is not None and communication not in COMMUNICATION_BYTES:
        expected = f"one of {', '.join(COMMUNICATION_BYTES)}"
        raise ConfigError(f"{where}: communication_data_type", expected, repr(communication))
    overlap = values["overlap_comm"]
    return Zero(
        stage=int(values["stage"]),
        reduce_bucket_size=int(values["reduce_bucket_size"]),
        prefetch_bucket_size=int(values["stage3_prefetch_bucket_size"]),
        param_persistence_threshold=int(values["stage3_param_persistence_threshold"]),
        max_reuse_distance=int(values["stage3_max_reuse_distance"]),
        # DeepSpeedZeroConfig.overlap_comm_valid: on by default in stage 3 alone.
        overlap_comm=values["stage"] == 3 if overlap is None else bool(overlap),
        contiguous_gradients=bool(values["contiguous_gradients"]),
        offload_optimizer=_on_host(values["offload_optimizer"]),
        offload_param=_on_host(values["offload_param"]),
        quantized_weights=bool(values["zero_quantized_weights"]),
        quantized_gradients=bool(values["zero_quantized_gradients"]),
        hpz_partition_size=int(values["zero_hpz_partition_size"]),
        communication_bytes=COMMUNICATION_BYTES.get(communication or ""),
    )


def _on_host(offload: dict[str, Any] | None) -> bool:
    return offload is not None and offload.get("device") == "cpu"
