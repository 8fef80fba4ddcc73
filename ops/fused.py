"""Attention with relative position in fused CUDA kernels: no (L, L) tensor leaves the chip.

`csrc/fused` holds the kernels, and says how they work. NVRTC, which comes with PyTorch, compiles
them for one model's shapes on their first call. Saved for the backward pass: the inputs, the
output, and the log-sum-exp of the scores, (B, H, L) float32.
"""

import torch
from torch import Tensor

from irpe_ds.errors import ConfigError
from irpe_ds.ops import fused_kernels, fused_op
from irpe_ds.ops.build import nvrtc
from irpe_ds.ops.fused_plan import Shape, no_plan_reason
from irpe_ds.ops.inputs import DispatchKey, Inputs
from irpe_ds.rpe.buckets import BUCKET_METHODS

DTYPES = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 128


def unsupported_reason(key: DispatchKey) -> str | None:
    """Why the kernels cannot run such a call on any GPU; None when they can."""
    if key.dtype not in DTYPES:
        return f"dtype must be float16 or bfloat16, got {key.dtype}".replace("torch.", "")
    if key.head_dim % 8 or not 8 <= key.head_dim <= MAX_HEAD_DIM:
        return f"head_dim must be a multiple of 8 up to {MAX_HEAD_DIM}, got {key.head_dim}"
    if any(term.method not in BUCKET_METHODS for term in key.terms):
        return "it supports the methods of iRPE, not BEiT's own biases"
    scored = {term.is_bias for term in key.terms if term.target != "v"}
    if len(scored) > 1:
        return "terms on queries and keys must all be contextual or all biases"
    try:
        for keys in (False, True):
            kernel_shape(key, keys=keys)
    except ValueError as error:
        return str(error)
    return None


def unavailable_reason(key: DispatchKey) -> str | None:
    """Why they cannot run it here; None when they can."""
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    reason = nvrtc.unavailable_reason()
    if reason is not None:
        return reason
    device = fused_kernels.device_of(torch.cuda.current_device())
    if int(device.architecture.removeprefix("sm_")) < 80:
        return f"it needs a GPU of compute capability 8.0 or later, got {device.architecture}"
    for name, needed in fused_kernels.NEEDED.items():
        shape = kernel_shape(key, keys=name == "backward_keys")
        reason = no_plan_reason(shape, device.shared_bytes, needed) if shape else None
        if reason is not None:
            return reason
    return None


def attention(x: Inputs) -> Tensor:
    """Attention as `reference.attention` defines it, once differentiable.

    Sums are accumulated in float32; lookups and bucket sums are rounded to the dtype of q.
    """
    if x.scale <= 0:
        raise ConfigError("scale", "a positive number for impl='fused'", x.scale)
    terms = [
        (*term, target) for target, of in enumerate((x.rpe_q, x.rpe_k, x.rpe_v)) for term in of
    ]
    maps = [buckets for _, buckets, _ in terms]
    tables = [table.mT if table.dim() == 3 and target < 2 else table for table, _, target in terms]
    grid = [*maps[0].grid, maps[0].skip] if maps else [x.q.shape[2], 1, 0]
    seed = torch.randint(2**63 - 1, (1,), device=x.q.device) if x.dropout_p else None
    out, *_ = torch.ops.irpe_ds.fused_forward(
        x.q,
        x.k,
        x.v,
        tables,
        [target for _, _, target in terms],
        [each.method for each in maps],
        [each.ratio for each in maps],
        [table.dim() == 2 for table in tables],
        grid,
        x.key_padding_mask,
        seed,
        x.scale,
        x.dropout_p,
        torch.is_grad_enabled(),
    )
    return out


def kernel_shape(key: DispatchKey, *, keys: bool) -> Shape | None:
    """What the kernels are compiled for; None without terms, where it depends on the length."""
    if not key.terms:
        return None
    grid = (*key.terms[0].grid, key.terms[0].skip)
    return fused_op.shape(
        grid, key.terms, key.dtype, key.head_dim, keys=keys, has_dropout=key.has_dropout
    )
