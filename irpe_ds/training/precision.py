"""The dtypes that `train.precision` stands for."""

from contextlib import AbstractContextManager, nullcontext

import torch

MODEL = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "autocast": torch.float32,
}
"""dtype of the parameters in forward and backward passes, and of the images."""

PRODUCTS = MODEL | {"autocast": torch.bfloat16}
"""dtype of the inputs of matrix products and of the attention op."""


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The autocast context for a forward pass outside DeepSpeed's engine."""
    if precision == "autocast":
        return torch.autocast(device.type, PRODUCTS[precision])
    return nullcontext()
