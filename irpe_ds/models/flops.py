"""FLOPs that a model needs, and the peak FLOP/s of GPUs."""

from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from irpe_ds.errors import ConfigError, UserError
from irpe_ds.models.attention import RPEAttention

if TYPE_CHECKING:
    from irpe_ds.config import ModelConfig

TRAINING = 3
"""FLOPs of a training step over those of its forward pass: each product has two in backward."""

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
"""Dense half precision with fp32 accumulation, from NVIDIA's data sheets; first match wins."""


def forward_flops(config: "ModelConfig") -> int:
    """Floating point operations of the matrix products of one image, counted without computing.

    Raises:
        ConfigError: the model does not run on images of this size.
    """
    from irpe_ds.models.create import meta_model  # needs pydantic, `params_and_macs` does not

    try:
        return _count(meta_model(config), *config.img_size)
    except UserError:
        raise
    except Exception as error:  # of any type: the models are timm's
        size = "x".join(map(str, config.img_size))
        got = str(error).partition("\n")[0]
        raise ConfigError("model", f"one that runs on images of {size} pixels", got) from None


def params_and_macs(name: str) -> tuple[int, int]:
    """Parameters of a timm model, and multiply-accumulates of its matrix products of one image."""
    with torch.device("meta"):
        model: Any = timm.create_model(name).eval()
    _, height, width = model.pretrained_cfg["input_size"]
    return sum(p.numel() for p in model.parameters()), _count(model, height, width) // 2


def _count(model: nn.Module, height: int, width: int) -> int:
    """FLOPs of a model on the meta device for one image of this size."""
    for module in model.modules():
        if isinstance(module, RPEAttention):
            # FlopCounterMode (torch 2.12) knows PyTorch's own operators alone and would count a
            # custom operator of ours as zero. Not needed once the operators register a formula
            # with torch.utils.flop_counter.register_flop_formula.
            module.impl = "reference"
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, height, width))
    return int(counter.get_total_flops())


def peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of a device in half precision; None for a CPU or an unlisted GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
