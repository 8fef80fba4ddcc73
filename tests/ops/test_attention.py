"""The public op: what it refuses, and in which words."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from irpe_ds.errors import ConfigError
from irpe_ds.ops import irpe_attention
from irpe_ds.rpe.buckets import BucketMap
from irpe_ds.rpe.config import RPEConfig

# The inputs below are (B, H, L, D) = (2, 3, 7, 4): a 2x3 grid and one class token, 50 buckets.
MAP = BucketMap.build("product", 2, 3, 1)


def term(*shape: int, buckets: BucketMap = MAP, **options: Any) -> tuple:
    return ((torch.zeros(shape, **options), buckets),)


MISTAKES = {
    "q has three dimensions": (
        {"q": torch.zeros(2, 7, 4)},
        "q",
        "a floating tensor (B, H, L, D)",
        "torch.float32 (2, 7, 4)",
    ),
    "q is an integer": (
        {"q": torch.zeros(2, 3, 7, 4, dtype=torch.int64)},
        "q",
        "a floating tensor (B, H, L, D)",
        "torch.int64 (2, 3, 7, 4)",
    ),
    "k is longer": (
        {"k": torch.zeros(2, 3, 8, 4)},
        "k",
        "torch.float32 (2, 3, 7, 4)",
        "torch.float32 (2, 3, 8, 4)",
    ),
    "v has another dtype": (
        {"v": torch.zeros(2, 3, 7, 4, dtype=torch.float64)},
        "v",
        "torch.float32",
        "torch.float64",
    ),
    "v is elsewhere": ({"v": torch.zeros(2, 3, 7, 4, device="meta")}, "v", "on cpu", "on meta"),
    "dropout_p is no probability": (
        {"dropout_p": 1.0},
        "dropout_p",
        "a probability in [0, 1)",
        "1.0",
    ),
    "dropout_p is negative": ({"dropout_p": -0.1}, "dropout_p", "a probability", "-0.1"),
    "mask is additive": (
        {"key_padding_mask": torch.zeros(2, 7)},
        "key_padding_mask",
        "torch.bool (2, 7)",
        "torch.float32 (2, 7)",
    ),
    "mask has another length": (
        {"key_padding_mask": torch.zeros(2, 6, dtype=torch.bool)},
        "key_padding_mask",
        "torch.bool (2, 7)",
        "torch.bool (2, 6)",
    ),
    "map of another grid": (
        {"rpe_k": term(1, 4, 50, buckets=BucketMap.build("product", 3, 3, 1))},
        "rpe_k[0]",
        "10 tokens (3x3 patches + 1 prefix)",
        "7 in q",
    ),
    "table of another head dimension": (
        {"rpe_k": term(1, 8, 50)},
        "rpe_k[0]",
        "(1 or 3, 4, 50) or (1 or 3, 50)",
        "(1, 8, 50)",
    ),
    "table without the bucket of the class token": (
        {"rpe_q": term(1, 4, 49)},
        "rpe_q[0]",
        "(1 or 3, 4, 50)",
        "(1, 4, 49)",
    ),
    "table of another number of heads": (
        {"rpe_q": term(2, 4, 50)},
        "rpe_q[0]",
        "(1 or 3, 4, 50)",
        "(2, 4, 50)",
    ),
    "table without heads": ({"rpe_k": term(50)}, "rpe_k[0]", "(1 or 3, 50)", "(50,)"),
    "values take the transposed table": (
        {"rpe_v": term(1, 4, 50)},
        "rpe_v[0]",
        "a table (1 or 3, 50, 4)",
        "(1, 4, 50)",
    ),
    "values take no bias": ({"rpe_v": term(1, 50)}, "rpe_v[0]", "(1 or 3, 50, 4)", "(1, 50)"),
    "the second term": (
        {"rpe_k": (*term(1, 50), *term(1, 51))},
        "rpe_k[1]",
        "(1 or 3, 50)",
        "(1, 51)",
    ),
    "table elsewhere": (
        {"rpe_k": term(1, 4, 50, device="meta")},
        "rpe_k[0]",
        "table and ids on cpu",
        "table on meta, ids on cpu",
    ),
    "unknown implementation": ({"impl": "Reference"}, "impl", "auto", "'Reference'"),
    "mask elsewhere": (
        {"key_padding_mask": torch.zeros(2, 7, dtype=torch.bool, device="meta")},
        "key_padding_mask",
        "cpu",
        "meta",
    ),
    "a term, not a tuple of terms": (
        {"rpe_k": term(1, 4, 50)[0]},
        "rpe_k[0]",
        "(table, BucketMap)",
        "Tensor",
    ),
    "ids, not a map": (
        {"rpe_k": ((torch.zeros(1, 4, 50), MAP.ids),)},
        "rpe_k[0]",
        "(table, BucketMap)",
        "(Tensor, Tensor)",
    ),
    "a table of one number": ({"rpe_k": term()}, "rpe_k[0]", "(1 or 3, 50)", "()"),
    "an integer table": (
        {"rpe_k": term(1, 4, 50, dtype=torch.int64)},
        "rpe_k[0]",
        "float",
        "torch.int64",
    ),
}


@pytest.mark.parametrize(
    ("mistake", "where", "expected", "got"),
    [pytest.param(*row, id=name) for name, row in MISTAKES.items()],
)
def test_mistakes(mistake: dict[str, Any], where: str, expected: str, got: str) -> None:
    inputs = {name: torch.zeros(2, 3, 7, 4) for name in "qkv"} | mistake
    with pytest.raises(ConfigError) as caught:
        irpe_attention(**inputs)
    error = caught.value
    assert error.where == where
    assert expected in error.expected
    assert got in str(error.got)
    assert str(error) == f"{where}: expected {error.expected}, got {error.got}"
    assert "\n" not in str(error)


def test_one_head_takes_one_table() -> None:
    q = torch.zeros(1, 1, 7, 4)
    with pytest.raises(
        ConfigError, match=r"^rpe_k\[0\]: expected a table \(1, 4, 50\) or \(1, 50\)"
    ):
        irpe_attention(q, q, q, rpe_k=term(2, 4, 50))


def test_the_default_scale(make_inputs: Callable) -> None:
    inputs = make_inputs(RPEConfig(on="qkv"), head_dim=16)
    torch.testing.assert_close(irpe_attention(**inputs), irpe_attention(**inputs, scale=0.25))
