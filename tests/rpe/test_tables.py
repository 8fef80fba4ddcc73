"""The learned tables: the keys and shapes of the released checkpoints, zero at the start."""

import pytest
import torch

from irpe_ds.rpe.config import RPEConfig
from irpe_ds.rpe.tables import build_maps, build_table

HEADS, HEAD_DIM, BUCKETS = 3, 8, 50


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("mode", "target", "shape"),
    [
        ("contextual", "q", (HEAD_DIM, BUCKETS)),
        ("contextual", "k", (HEAD_DIM, BUCKETS)),
        ("contextual", "v", (BUCKETS, HEAD_DIM)),
        ("bias", "k", (BUCKETS,)),
    ],
)
def test_shape(mode: str, target: str, shape: tuple[int, ...], shared: bool) -> None:
    rpe = RPEConfig(mode=mode, on=target, shared_heads=shared)
    table = build_table(rpe, target, build_maps(rpe, 4, 5, 1), HEADS, HEAD_DIM)
    ((name, parameter),) = table.named_parameters()
    assert name == ("lookup_table_bias" if mode == "bias" else "lookup_table_weight")
    assert parameter.shape == (1 if shared else HEADS, *shape)
    assert not parameter.any()
    assert list(table.state_dict()) == [name]


@pytest.mark.parametrize(
    ("mode", "name"), [("contextual", "lookup_table_weight"), ("bias", "lookup_table_bias")]
)
def test_cross_has_a_table_on_rows_and_one_on_columns(mode: str, name: str) -> None:
    rpe = RPEConfig(method="cross", mode=mode, ratio=20)
    table = build_table(rpe, "k", build_maps(rpe, 4, 5, 1), HEADS, HEAD_DIM)
    assert list(table.state_dict()) == [f"rp_rows.{name}", f"rp_cols.{name}"]
    (rows, row_map), (cols, col_map) = table.terms()
    assert (row_map.method, col_map.method) == ("cross_rows", "cross_cols")
    assert rows is getattr(table.rp_rows, name)
    assert cols is getattr(table.rp_cols, name)


def test_a_term_is_the_parameter_and_its_map() -> None:
    rpe = RPEConfig()
    (buckets,) = build_maps(rpe, 4, 5, 1)
    table = build_table(rpe, "k", (buckets,), HEADS, HEAD_DIM)
    ((weight, of_term),) = table.terms()
    assert weight is table.lookup_table_weight
    assert of_term is buckets


def test_tables_are_read_by_a_module_call() -> None:
    """ZeRO-3 gathers a parameter around the call of its module, so terms() must make one."""
    rpe = RPEConfig(method="cross")
    table = build_table(rpe, "k", build_maps(rpe, 4, 5, 1), HEADS, HEAD_DIM)
    called = []
    for module in (table.rp_rows, table.rp_cols):
        module.register_forward_hook(lambda module, *_: called.append(module))
    table.terms()
    assert called == [table.rp_rows, table.rp_cols]


def test_maps_know_grid_skip_and_ratio() -> None:
    (buckets,) = build_maps(RPEConfig(method="euclidean", ratio=20), 4, 5, 2)
    assert (buckets.method, buckets.grid, buckets.skip) == ("euclidean", (4, 5), 2)
    assert buckets.num_buckets == 2 * 40 + 1 + 1
    assert buckets.ids.shape == torch.Size([22, 22])
