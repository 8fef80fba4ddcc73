"""A rank that runs something else is named."""

import pytest

from irpe_ds.cluster.consistency import SOURCE, compare
from irpe_ds.errors import ClusterError
from irpe_ds.provenance import source_hash


def test_equal_ranks_pass() -> None:
    compare([("a", {"torch": "2.12"}), ("b", {"torch": "2.12"})])


@pytest.mark.parametrize("odd", range(3))
def test_the_odd_one_is_named(odd: int) -> None:
    found = [(f"node{rank}", {"torch": "2.12", "data.train": "aa"}) for rank in range(3)]
    found[odd][1]["data.train"] = "bb"
    usual = 1 if odd == 0 else 0
    expected = rf"^node{odd}: expected data\.train aa, as node{usual} has, got bb$"
    with pytest.raises(ClusterError, match=expected):
        compare(found)


def test_what_only_one_has_is_told() -> None:
    with pytest.raises(ClusterError, match=r"^c: expected wandb none, as a has, got 0\.31$"):
        compare([("a", {}), ("b", {}), ("c", {"wandb": "0.31"})])


def test_the_source_is_hashed_with_the_operators() -> None:
    assert len(source_hash()) == 12


def test_of_the_source_the_commit_is_told_and_the_hash_compared() -> None:
    same = [("a", {SOURCE: "12ab (commit 9f)"}), ("b", {SOURCE: "12ab (commit unknown)"})]
    compare(same)
    with pytest.raises(ClusterError, match=r"^c: .* 12ab \(commit 9f\), as a has, got 34 \(commit"):
        compare([*same, ("c", {SOURCE: "34 (commit 9f-dirty)"})])
