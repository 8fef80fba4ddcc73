"""The released op as a baseline: its compiled gather, and the algorithm around it.

Its sources are not part of this repository: --upstream names the folder
`iRPE/DeiT-with-iRPE/rpe_ops` of a checkout of github.com/microsoft/Cream.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import cpp_extension

from irpe_ds.errors import ConfigError
from irpe_ds.ops.inputs import DispatchKey, Inputs

Gather = Callable[[Tensor, Tensor], Tensor]


def load(folder: Path) -> Gather:
    """Compile the released gather, for CUDA too when there is a GPU (minutes, the first time).

    Raises:
        ConfigError: the folder has no rpe_index.cpp.
    """
    names = ["rpe_index.cpp"]
    if torch.cuda.is_available():
        names.append("rpe_index_cuda.cu")
    if not all((folder / name).exists() for name in names):
        raise ConfigError("--upstream", f"a folder with {' and '.join(names)}", folder)
    released: Any = cpp_extension.load(
        "rpe_index_cpp",
        [str(folder / name) for name in names],
        extra_cflags=["-O3", "-fopenmp", *(["-DWITH_CUDA"] if len(names) > 1 else [])],
        extra_ldflags=["-fopenmp"],
    )

    class Index(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, lookup: Tensor, ids: Tensor) -> Tensor:
            ctx.save_for_backward(ids)
            ctx.shape = lookup.shape
            run = released.forward_gpu if lookup.is_cuda else released.forward_cpu
            return run(lookup, ids)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            (ids,) = ctx.saved_tensors
            sums = grad.new_zeros(ctx.shape)
            run = released.backward_gpu if grad.is_cuda else released.backward_cpu
            run(sums, grad, ids)
            return sums, None

    return Index.apply


def attention(gather: Gather) -> Callable[[Inputs], Tensor]:
    """Contextual attention with shared tables as the released models compute it.

    Terms on values expand the table to every pair, (L, L, D). The released op does not support
    bfloat16 and is timed in float16 instead.
    """

    def run(x: Inputs) -> Tensor:
        dtype = torch.float16 if x.q.dtype == torch.bfloat16 else x.q.dtype
        q, k, v = (y.to(dtype) for y in (x.q * x.scale, x.k, x.v))
        scores = q @ k.mT
        for table, buckets in x.rpe_k:
            scores = scores + gather(q @ table.to(dtype), buckets.ids)
        for table, buckets in x.rpe_q:
            scores = scores + gather(k * x.scale @ table.to(dtype), buckets.ids).mT
        probs = scores.softmax(-1)
        out = probs @ v
        for table, buckets in x.rpe_v:
            batch, heads, length, dim = v.shape
            by_query = probs.permute(2, 0, 1, 3).reshape(length, batch * heads, length)
            term = by_query @ table.to(dtype)[0][buckets.ids]
            out = out + term.view(length, batch, heads, dim).permute(1, 2, 0, 3)
        return out.to(x.q.dtype)

    return run


def unsupported_reason(key: DispatchKey) -> str | None:
    """Why the released op cannot run such a call; None when it can."""
    if any(term.is_bias for term in key.terms):
        return "it supports contextual terms"
    return None
