"""The fused kernels as operators of PyTorch: schema, gradients, and mistakes in their arguments."""

from typing import Any

import pytest
import torch

from irpe_ds.ops.packed_ids import packed_ids
from irpe_ds.rpe.buckets import BucketMap

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
pytestmark = [pytest.mark.usefixtures("host"), pytest.mark.parametrize("device", DEVICES)]


def arguments(device: str) -> tuple[Any, ...]:
    """Of torch.ops.irpe_ds.attention_forward: contextual on k and v, a bias on q, dropout."""
    buckets = BucketMap.build("product", 3, 3, 1).to(device)
    q, k, v = (
        torch.randn(2, 3, 10, 32, device=device).bfloat16().requires_grad_() for _ in range(3)
    )
    shapes = [(1, 50), (3, 32, 50), (1, 50, 32)]
    tables = [torch.randn(s, device=device).bfloat16().requires_grad_() for s in shapes]
    mask, seed = torch.zeros(2, 10, dtype=torch.bool, device=device), torch.tensor([7])
    return q, k, v, tables, [packed_ids(buckets)] * 3, [0, 1, 2], mask, seed.to(device), 0.2, 0.1, 1


def test_what_pytorch_asks_of_an_operator(device: str) -> None:
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    forward = torch.ops.irpe_ds.attention_forward
    torch.library.opcheck(forward.default, arguments(device), test_utils=tests)
    out, lse = forward(*arguments(device))
    inputs = (torch.randn_like(out), out.detach(), lse, *arguments(device))
    backward = torch.ops.irpe_ds.attention_backward
    torch.library.opcheck(backward.default, inputs, test_utils=tests)
    tables = inputs[6]  # opcheck compares strides on CUDA alone
    grads = backward(*inputs)[3:]
    assert [grad.stride() for grad in grads] == [table.stride() for table in tables]


MISTAKES = {
    "q in float32": (0, lambda x: x.float(), "q: expected .* of float16 or bfloat16, got Float"),
    "k of another length": (1, lambda x: x[:, :, 1:], r"k, v: expected .*\[2, 3, 10, 32\]"),
    "a term without its table": (3, lambda x: x[1:], "expected one of each .* got 2, 3, 3"),
    "a table of two heads": (3, lambda x: [x[0], x[1][:2], x[2]], "tables: expected .*1 or 3"),
    "ids of another length": (
        4,
        lambda x: [x[0][:, :, :0], *x[1:]],
        "tiles: expected contiguous and aligned",
    ),
    "an unknown target": (5, lambda x: [0, 1, 3], "targets: expected 0, 1 or 2"),
    "three terms on one": (5, lambda x: [1, 1, 1], "targets: expected .* at most 2 times"),
    "a mask of numbers": (6, lambda x: x.float(), "hidden: expected contiguous bool"),
    "no seed": (7, lambda x: None, "seed: expected one int64"),
    "certain dropout": (9, lambda x: 1.0, "dropout_p: expected .* got 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(device: str, mistake: str) -> None:
    place, change, message = MISTAKES[mistake]
    with_mistake = list(arguments(device))
    with_mistake[place] = change(with_mistake[place])
    with pytest.raises((ValueError, RuntimeError), match=message):
        torch.ops.irpe_ds.attention_forward(*with_mistake)
