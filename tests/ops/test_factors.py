"""The factors of bucket maps, which the fused kernels read."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from irpe_ds.ops.factors import MapSpec, factor, has_runs
from irpe_ds.rpe.config import METHODS, RPEConfig
from irpe_ds.rpe.tables import build_maps

CPU = torch.device("cpu")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("grid", "num_prefix", "ratio"), [((5, 9), 2, 1.9), ((1, 1), 1, 1.9), ((14, 14), 0, 20)]
)
def test_they_are_the_map(
    method: str, grid: tuple[int, int], num_prefix: int, ratio: float
) -> None:
    maps = build_maps(RPEConfig(method=method, ratio=ratio), *grid, num_prefix)
    specs = [MapSpec(each.method, *grid, num_prefix, ratio) for each in maps]
    negated = [spec._replace(negated=True) for spec in specs]
    height, width = grid
    y, x = torch.arange(height * width) // width, torch.arange(height * width) % width
    for transposed in (False, True):
        buckets, row_class, column_class = factor((*specs, *negated), CPU, transposed=transposed)
        rows = row_class.long()[y[:, None] - y + height - 1]
        columns = column_class.long()[x[:, None] - x + width - 1]
        of_pairs = buckets[:, columns, rows] if transposed else buckets[:, rows, columns]
        for each, found, minus in zip(maps, of_pairs, of_pairs[len(maps) :], strict=False):
            ids = each.ids[num_prefix:, num_prefix:].long()
            assert torch.equal(found, ids)
            assert torch.equal(minus, ids.T)
            assert num_prefix == 0 or bool((buckets[0, :, -1] == maps[0].num_buckets - 1).all())


def test_one_grid() -> None:
    spec = MapSpec("product", 2, 3, 1, 1.9)
    with pytest.raises(ValueError, match="expected maps of one grid"):
        factor((spec, spec._replace(width=4)), CPU)


def test_made_while_pytorch_traces() -> None:
    """They are made once: real tensors that can be saved for a backward pass, whatever is first."""
    spec = MapSpec("product", 2, 3, 1, 1.9)
    factor.cache_clear()
    with FakeTensorMode(), torch.inference_mode():
        first = factor((spec,), CPU)
    assert all(type(each) is torch.Tensor and not each.is_inference() for each in first)
    assert factor((spec,), CPU) is first


@pytest.mark.parametrize(
    ("method", "runs"), [("product", True), ("cross_rows", True), ("euclidean", False)]
)
def test_runs_of_row_classes(method: str, runs: bool) -> None:
    factors = factor((MapSpec(method, 14, 14, 1, 1.9),), CPU)
    assert has_runs(factors) == runs
