"""Inputs of a plan that no count gives."""

from dataclasses import dataclass, field, fields
from typing import Any

IMAGENET_IMAGES = 1_281_167
IMAGENET_KB = 110.0
"""Training images of ImageNet-1K, and the mean size of its JPEG files in 1000 bytes."""


def _assumed(default: float, meaning: str) -> Any:
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Each is assumed until the user gives it or a calibration fits it."""

    flop_share: float = _assumed(0.7, "of the GPU's peak in matrix products")
    memory_share: float = _assumed(0.8, "of the GPU's memory bandwidth in other operators")
    link_share: float = _assumed(0.8, "of the links' rates in collectives")
    launch_us: float = _assumed(10.0, "microseconds of host time to launch an operator")
    loader_img_s: float = _assumed(704.0, "img/s that a core of the host decodes and crops")
    """Measured on a Xeon: data/bench/results/load-xeon_2cores-2026-11-24.json, one worker."""
    latency: float = _assumed(1.0, "times the latencies in the communication library's tables")
    hook_us: float = _assumed(100.0, "microseconds of host time per parameter and pass, ZeRO 3")
    context_gib: float = _assumed(1.5, "GiB for CUDA, NCCL and libraries")
    host_gb_s: float = _assumed(200.0, "GB/s of a host's memory, for offloaded optimizers")
    pcie_share: float = _assumed(0.8, "of PCIe's rate in offloading")
    fitted: tuple[str, ...] = ()
    """Names of those that a calibration has fitted."""


MEANINGS = {
    item.name: item.metadata["meaning"]
    for item in fields(Assumptions)
    if "meaning" in item.metadata
}
"""What the value of each assumption is a share or a number of."""
