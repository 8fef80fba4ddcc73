"""What `train.precision` means for tensors."""

from contextlib import AbstractContextManager, nullcontext

import torch

MODEL = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "autocast": torch.float32,
}
"""Type of the parameters that the model computes with, and of what it is fed."""

PRODUCTS = MODEL | {"autocast": torch.bfloat16}
"""Type in which matrix products, and the attention op, take their inputs."""


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """What a forward pass outside of DeepSpeed's engine runs in."""
    if precision == "autocast":
        return torch.autocast(device.type, PRODUCTS[precision])
    return nullcontext()
