"""A self-test of links: bandwidth of collectives by message size, within nodes and between them."""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from irpe_ds.cli import run
from irpe_ds.cluster.process_group import (
    Ranks,
    destroy_process_group,
    init_process_group,
    set_environment,
)
from irpe_ds.cluster.rendezvous import name_ranks
from irpe_ds.files import replace_file
from irpe_ds.runlog import writing

LinkRow = dict[str, Any]
"""One collective on one size; see `measure`."""
REPEATS = 5
WARMUP = 2
TRAFFIC = {"all_reduce": 2.0, "all_gather": 1.0}
"""Of a ring: how often the share (n - 1) / n of the whole vector goes over each rank's link."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--join_seconds", type=float, required=True)
    parser.add_argument("--mib", type=float, nargs="+", required=True)
    parser.add_argument("--local_rank", type=int)
    args = parser.parse_args()
    set_environment()
    ranks = init_process_group(args.join_seconds)
    rows = measure(ranks, args.mib)
    if ranks.is_main:
        with writing(args.out):
            replace_file(args.out, json.dumps(rows))
    destroy_process_group()


def measure(ranks: Ranks, sizes: list[float]) -> list[LinkRow]:
    """Rows of all collectives, sizes and places.

    `where` is `intra` (the ranks of each node), `inter` (the first rank of each node, then the
    second and so on: all of a node at once) or `all`. `ms` is the median repetition of the slowest
    group, named in `slowest`; `fastest_ms` that of the fastest. `bytes` are those of the whole
    vector, `gb_s` is the bandwidth of each rank's link, nccl-tests' bus bandwidth, in 1e9 bytes/s.

    Args:
        sizes: of the whole vector, in MiB.
    """
    rows = []
    for where, groups in places(ranks.hostnames).items():
        handles = [dist.new_group(group) for group in groups]
        own = next(n for n, group in enumerate(groups) if ranks.rank in group)
        for kind in TRAFFIC:
            for size in sizes:
                seconds = _seconds(kind, size, handles[own], len(groups[own]), ranks)
                every = ranks.all_gather(seconds)
                times = [max(every[rank] for rank in group) for group in groups]
                rows.append(_row(kind, where, groups, times, size, ranks.hostnames))
        for handle in handles:
            if handle is not dist.GroupMember.NON_GROUP_MEMBER:
                dist.destroy_process_group(handle)
    return rows


def places(hostnames: list[str]) -> dict[str, list[list[int]]]:
    """Groups of ranks that exchange something at once, by place; every rank is in one of each.

    Places without links, and `all` where it is the same as another, are left out. So is `inter`
    where nodes have different numbers of ranks.
    """
    nodes: defaultdict[str, list[int]] = defaultdict(list)
    for rank, host in enumerate(hostnames):
        nodes[host].append(rank)
    intra = list(nodes.values())
    per_node = {len(group) for group in intra}
    found = {}
    if 1 not in per_node:
        found["intra"] = intra
    if len(nodes) > 1 and len(per_node) == 1:
        found["inter"] = [list(group) for group in zip(*intra, strict=True)]
    if len(nodes) > 1 and per_node != {1}:
        found["all"] = [list(range(len(hostnames)))]
    return found


def _row(
    kind: str,
    where: str,
    groups: list[list[int]],
    times: list[float],
    size: float,
    hostnames: list[str],
) -> LinkRow:
    slowest = max(range(len(groups)), key=times.__getitem__)
    number, whole = len(groups[slowest]), int(size * 2**20)
    sent = TRAFFIC[kind] * whole * (number - 1) / number
    return {
        **{"collective": kind, "where": where, "ranks": number, "bytes": whole},
        **{"ms": 1000 * times[slowest], "fastest_ms": 1000 * min(times)},
        "gb_s": sent / times[slowest] / 1e9,
        "slowest": name_ranks(groups[slowest][:2], hostnames) + " ..." * (number > 2),
    }


def _seconds(kind: str, size: float, group: Any, number: int, ranks: Ranks) -> float:
    """Median time of a collective on this rank."""
    share = max(1, int(size * 2**20) // 4 // number)
    parts = torch.zeros(share * number, device=ranks.device)
    own = torch.zeros(share, device=ranks.device)
    collectives: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: dist.all_reduce(parts, group=group),
        "all_gather": lambda: dist.all_gather_into_tensor(parts, own, group=group),
    }
    times = []
    for _ in range(WARMUP + REPEATS):
        dist.all_reduce(torch.zeros(1, device=ranks.device), group=group)  # start together
        _synchronize(ranks.device)
        started = time.perf_counter()
        collectives[kind]()
        _synchronize(ranks.device)
        times.append(time.perf_counter() - started)
    return median(times[WARMUP:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    run(main)
