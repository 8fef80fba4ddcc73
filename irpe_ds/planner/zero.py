"""What a ZeRO JSON asks DeepSpeed for, with DeepSpeed's own defaults."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from irpe_ds.errors import ConfigError

COMMUNICATION_BYTES = {"fp16": 2, "bf16": 2, "bfp16": 2, "fp32": 4}
"""Values of DeepSpeed's communication_data_type."""


@dataclass(frozen=True, kw_only=True)
class Zero:
    """The settings of `zero_optimization` that memory and communication depend on."""

    stage: int
    reduce_bucket: int
    """Elements of a gradient bucket."""
    prefetch_bucket: int
    """Stage 3: elements that are gathered ahead."""
    persistence_threshold: int
    """Stage 3: smaller parameters stay whole on every rank."""
    max_reuse_distance: int
    """Stage 3: a parameter that is used again within so many elements is not let go."""
    overlap: bool
    """Whether gradients are reduced while the backward pass goes on."""
    contiguous: bool
    """Whether gradients are copied into a bucket that is allocated whole."""
    offload_optimizer: bool
    offload_param: bool
    quantized_weights: bool
    """qwZ of ZeRO++: parameters are gathered as 8-bit integers."""
    quantized_gradients: bool
    """qgZ of ZeRO++: gradients travel as 4-bit integers, in a node and then between nodes."""
    communication_bytes: int | None
    """Bytes of a number of a gradient on its way. None: as the model's precision has it."""
    partition: int
    """hpZ of ZeRO++: ranks that share a second copy of the parameters; 1: there is none."""

    @property
    def name(self) -> str:
        """`stage 3 + offload`, as tables call it."""
        parts = [f"stage {self.stage}"]
        parts += ["offload"] if self.offload_optimizer or self.offload_param else []
        extras = (
            ("qwZ", self.quantized_weights),
            ("hpZ", self.partition > 1),
            ("qgZ", self.quantized_gradients),
        )
        return " + ".join([*parts, *(name for name, on in extras if on)])


def read_zero(path: Path) -> Zero:
    """The settings of a file of `ds_configs/`.

    Raises:
        ConfigError: it cannot be read, or DeepSpeed does not know what it says.
    """
    try:
        settings = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(path, "a readable JSON file", error.strerror) from None
    except ValueError as error:
        raise ConfigError(path, "valid JSON", error) from None
    section = settings.get("zero_optimization") if isinstance(settings, dict) else None
    if not isinstance(section, dict) or section.get("stage") not in (0, 1, 2, 3):
        raise ConfigError(path, "zero_optimization.stage of 0, 1, 2 or 3", section)
    return zero_of(section, settings.get("communication_data_type"), str(path))


def zero_of(
    section: dict[str, Any], communication: str | None = None, where: str = "zero_optimization"
) -> Zero:
    """The settings of a section `zero_optimization`, and of `communication_data_type`.

    Raises:
        ConfigError: DeepSpeed does not know what they say.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        parsed = DeepSpeedZeroConfig(**section)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{where}: {key}", first["msg"], repr(first["input"])) from None
    if communication is not None and communication not in COMMUNICATION_BYTES:
        expected = f"one of {', '.join(COMMUNICATION_BYTES)}"
        raise ConfigError(f"{where}: communication_data_type", expected, repr(communication))
    return Zero(
        communication_bytes=COMMUNICATION_BYTES.get(communication or ""),
        stage=int(parsed.stage),
        reduce_bucket=int(parsed.reduce_bucket_size),
        prefetch_bucket=int(parsed.prefetch_bucket_size),
        persistence_threshold=int(parsed.param_persistence_threshold),
        max_reuse_distance=int(parsed.max_reuse_distance),
        overlap=bool(parsed.overlap_comm),
        contiguous=bool(parsed.contiguous_gradients),
        offload_optimizer=_on_host(parsed.offload_optimizer),
        offload_param=_on_host(parsed.offload_param),
        quantized_weights=bool(parsed.zero_quantized_weights),
        quantized_gradients=bool(parsed.zero_quantized_gradients),
        partition=int(parsed.zero_hpz_partition_size),
    )


def _on_host(offload: Any) -> bool:
    return offload is not None and str(getattr(offload.device, "value", offload.device)) == "cpu"
