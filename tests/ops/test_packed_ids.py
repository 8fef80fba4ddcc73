"""Bucket ids for the fused kernels: their layout, and that they are packed once."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from irpe_ds.ops import irpe_attention, packed_ids
from irpe_ds.rpe.buckets import BucketMap
from irpe_ds.rpe.config import RPEConfig


@pytest.fixture(autouse=True)
def packings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The length of every map that was packed, twice each: as it is and transposed."""
    lengths: list[int] = []
    pack = packed_ids.pack_tiles
    monkeypatch.setattr(
        packed_ids, "pack_tiles", lambda ids: (lengths.append(len(ids)), pack(ids))[1]
    )
    packed_ids._pack_once.cache_clear()
    yield lengths
    packed_ids._pack_once.cache_clear()


@pytest.mark.parametrize("grid", [(1, 1), (5, 9), (14, 14)])
def test_a_lane_finds_the_ids_of_its_sums(grid: tuple[int, int]) -> None:
    buckets = BucketMap.build("euclidean", *grid, 1, ratio=20)
    packed = packed_ids.packed_ids(buckets)
    length = buckets.ids.shape[0]
    assert packed.shape == (2, -(-length // 16), -(-length // 32), 32, 16)
    for tiles, ids in zip(packed, (buckets.ids, buckets.ids.T), strict=True):
        for i in range(0, length, 3):
            for j in range(0, length, 5):
                (row, column), (r, c) = (i // 16, j // 32), (i % 16, j % 32)
                lane, number = r % 8 * 4 + c % 8 // 2, c // 8 * 4 + r // 8 * 2 + c % 2
                place = tiles[row, column, lane, number]
                assert buckets.used_ids[place.long()] == ids[i, j]


def test_maps_of_one_kind_are_packed_once(packings: list[int]) -> None:
    buckets = BucketMap.build("product", 2, 3, 1)
    first = packed_ids.packed_ids(buckets)
    assert packed_ids.packed_ids(buckets) is first
    assert packed_ids.packed_ids(copy.deepcopy(buckets)) is first
    assert packings == [7, 7]
    assert packed_ids.packed_ids(copy.deepcopy(buckets).to("meta")).is_meta
    for other in (("product", 3, 2, 1), ("cross_rows", 2, 3, 1), ("product", 2, 3, 1, 3.0)):
        assert packed_ids.packed_ids(BucketMap.build(*other)) is not first


@pytest.mark.parametrize("strict", [False, True])
def test_exported_first(strict: bool) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.buckets = BucketMap.build("product", 2, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + packed_ids.packed_ids(self.buckets).sum()

    x = torch.ones(2)
    program = torch.export.export(Model(), (x,), strict=strict)
    assert type(packed_ids.packed_ids(Model().buckets)) is torch.Tensor
    assert torch.equal(program.module()(x), Model()(x))


@pytest.fixture
def call(host: object, make_inputs: Callable) -> Callable[..., torch.Tensor]:
    inputs: dict[str, Any] = make_inputs(RPEConfig(on="qkv"), head_dim=32, dtype=torch.bfloat16)
    return partial(irpe_attention, **inputs, impl="fused")


def test_the_fused_call_packs_once(call: Callable, packings: list[int]) -> None:
    for _ in range(3):
        call().sum().backward()
    assert packings == [7, 7]


def test_training_after_inference(call: Callable) -> None:
    with torch.inference_mode():
        call()
    call().sum().backward()  # which saves the packed ids


def test_compiled_first(call: Callable, packings: list[int]) -> None:
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(), call())
        compiled().sum().backward()
    assert packings == [7, 7]
