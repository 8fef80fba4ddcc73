"""How much arithmetic a model needs, and how much a GPU could do."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from irpe_ds.config import ModelConfig
from irpe_ds.models.attention import RPEAttention
from irpe_ds.models.build import build_model

TRAINING = 3
"""Passes of a training step in forward passes: the backward pass has two products for each one."""

PEAK_TFLOPS = {
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "V100": 125.0,
}
"""Dense products of half precision with fp32 sums, from NVIDIA's data sheets; first match wins."""


def forward_flops(config: ModelConfig) -> int:
    """Floating point operations of the matrix products of one image; nothing is computed.

    Counted from the model on the meta device with the reference implementation of the op, since
    the counter sees PyTorch's own operators alone.
    """
    plain = config.model_copy(update={"weights": None, "impl": "auto"})
    with torch.device("meta"):
        model = build_model(plain).eval()
        for module in model.modules():
            if isinstance(module, RPEAttention):
                module.impl = "reference"
        size = config.img_size
        height, width = (size, size) if isinstance(size, int) else size
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, height, width))
    return counter.get_total_flops()


def peak_flops(device: torch.device) -> float | None:
    """Operations per second that a GPU could do in half precision; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
