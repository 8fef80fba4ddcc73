"""Collectives: how many bytes each rank sends for one, and how long it takes."""

import math
from dataclasses import dataclass
from typing import Literal

from irpe_ds.planner.hardware import Cluster

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
Group = Literal["all", "node", "across"]
"""All ranks, those of a node, or one of each node."""


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Calls of one kind that every rank makes in an update."""

    kind: Kind
    payload: int
    """Bytes of the whole vector of all calls: the input of reductions, the output of gathers."""
    calls: int
    content: Literal["gradients", "parameters"]
    group: Group = "all"
    overlaps: Literal["forward", "backward"] | None = None
    """The pass that it runs beside. None: it is exposed as a whole."""
    exposed: float = 1.0
    """Share that is exposed even beside a pass: the first or the last bucket."""

    def ranks(self, cluster: Cluster, hpz_partition_size: int) -> int:
        """Ranks that take part."""
        node = min(cluster.per_node, cluster.gpus)
        if hpz_partition_size > 1:
            node = min(hpz_partition_size, cluster.gpus)
        return {"all": cluster.gpus, "node": node, "across": cluster.nodes}[self.group]

    def sent(self, ranks: int, backend: str = "nccl") -> float:
        """Bytes that a rank sends with the ring algorithm.

        Gloo has no reduce-scatter: PyTorch (2.12) all-reduces with it and keeps a part.
        """
        twice = self.kind == "all_reduce" or (self.kind == "reduce_scatter" and backend == "gloo")
        return (2 if twice else 1) * (ranks - 1) / ranks * self.payload


def collective_seconds(
    collective: Collective, cluster: Cluster, hpz_partition_size: int, link_share: float
) -> tuple[float, float]:
    """Latency and transfer time of all its calls, with the fastest protocol on a ring or a tree.

    The model is NCCL's own, which chooses a protocol and an algorithm by it (src/graph/tuning.cc).

    Args:
        link_share: share of the links' rates that is reached.
    """
    ranks = collective.ranks(cluster, hpz_partition_size)
    if ranks == 1 or not collective.calls:
        return 0.0, 0.0
    local = 1 if collective.group == "across" else min(ranks, cluster.per_node)
    nodes = ranks // local
    rate = cluster.intra
    if nodes > 1:
        # Ranks of a node that each talk to their counterparts share the node's network cards.
        between = cluster.inter / (cluster.per_node if collective.group == "across" else 1)
        rate = min(cluster.intra, between) if local > 1 else between
    sent = collective.sent(ranks, cluster.backend)
    transfer = sent / collective.calls / (rate * link_share)
    reduces = collective.kind == "all_reduce"
    passes, across = 2 if reduces else 1, nodes if nodes > 1 else 0
    choices = []
    for protocol in cluster.protocols:
        inside, outside = protocol.ring
        hops = max(0, ranks - 1 - across) * inside + min(across, ranks - 1) * outside
        choices.append((protocol.ring_base + passes * hops, transfer / protocol.rate))
        if reduces:
            inside, outside = protocol.tree
            hops = (local - 1) * inside + math.log2(nodes) * outside
            choices.append((protocol.tree_base + passes * hops, transfer / protocol.rate))
    latency_us, seconds = min(choices, key=lambda choice: 1e-6 * choice[0] + choice[1])
    return 1e-6 * latency_us * collective.calls, seconds * collective.calls
