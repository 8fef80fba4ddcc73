"""The ZeRO settings of a JSON that memory and communication depend on."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pydantic

from irpe_ds.errors import ConfigError
from irpe_ds.training.deepspeed_config import (
    COMMUNICATION_BYTES,
    gradient_dtype,
    parse_zero,
    read_ds_config,
)


@dataclass(frozen=True, kw_only=True)
class Zero:
    """Keys of `zero_optimization` with the defaults of DeepSpeed 0.19.8; sizes are in elements.

    The defaults are for a machine without DeepSpeed; tests/planner/test_zero.py compares them.
    """

    stage: int
    communication_bytes: int | None = None
    """Bytes per gradient element when sent. None: of fp32, the default of irpe_ds."""
    sums_in_fp32: bool = True
    """Whether 16-bit gradients of several micro-steps are summed in fp32."""
    reduce_bucket_size: int = 500_000_000
    stage3_prefetch_bucket_size: int = 50_000_000
    """Elements gathered ahead."""
    stage3_param_persistence_threshold: int = 100_000
    """Smaller parameters stay whole on every rank."""
    stage3_max_live_parameters: int = 1_000_000_000
    """No more elements are gathered ahead while so many are there."""
    stage3_max_reuse_distance: int = 1_000_000_000
    """A parameter that is used again within so many elements is not released."""
    overlap_comm: bool = False
    """Whether gradients are reduced during the backward pass; on by default in stage 3."""
    contiguous_gradients: bool = True
    """Whether gradients are copied into a bucket that is allocated as one tensor."""
    offload_optimizer: bool = False
    offload_param: bool = False
    zero_quantized_weights: bool = False
    """qwZ of ZeRO++: parameters are gathered as 8-bit integers."""
    zero_quantized_gradients: bool = False
    """qgZ of ZeRO++: gradients are sent as 4-bit integers, in a node and then between nodes."""
    zero_hpz_partition_size: int = 1
    """hpZ of ZeRO++: ranks that share a second copy of the parameters; 1 turns it off."""

    @property
    def name(self) -> str:
        """`stage 3 + offload`, as in tables."""
        parts = {
            f"stage {self.stage}": True,
            "offload": self.offload_optimizer or self.offload_param,
            "qwZ": self.zero_quantized_weights,
            "hpZ": self.zero_hpz_partition_size > 1,
            "qgZ": self.zero_quantized_gradients,
        }
        return " + ".join(name for name, on in parts.items() if on)


OPTIONS = {field.name for field in fields(Zero)} - {"stage", "communication_bytes", "sums_in_fp32"}


def read_zero(path: Path) -> Zero:
    """The settings in a file of `ds_configs/`.

    Raises:
        ConfigError: the file cannot be read, or DeepSpeed rejects a key or a value.
    """
    ds_config = read_ds_config(path)
    communication = ds_config.get("communication_data_type")
    zero = zero_of(ds_config["zero_optimization"], communication, str(path))
    return replace(zero, sums_in_fp32=gradient_dtype(ds_config, path) == "fp32")


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
        values = section
    zero = Zero(stage=int(section["stage"]), overlap_comm=section["stage"] == 3)
    given = {
        key: _value(getattr(zero, key), value, f"{where}: zero_optimization.{key}")
        for key, value in values.items()
        if key in OPTIONS and (value is not None or key != "overlap_comm")
    }
    zero = replace(zero, communication_bytes=COMMUNICATION_BYTES.get(communication or ""), **given)
    if zero.zero_hpz_partition_size < 1:
        key = f"{where}: zero_optimization.zero_hpz_partition_size"
        raise ConfigError(key, "at least 1", zero.zero_hpz_partition_size)
    return zero


def _value(default: int, value: Any, where: str) -> Any:
    """A value of the default's type, from what DeepSpeed takes for it."""
    if type(default) is bool and isinstance(value, dict | None):  # a section offload_
        return value is not None and value.get("device") == "cpu"
    try:
        found: int = pydantic.TypeAdapter(type(default)).validate_python(value)
    except pydantic.ValidationError as error:
        raise ConfigError(where, error.errors()[0]["msg"], repr(value)) from None
    if found < 0:
        raise ConfigError(where, "a number from 0", found)
    return found
