"""Which order of images suits a data set, a node's memory and its storage."""

from irpe_ds.planner.plan import PlanRow, Scenario

CACHE_SHARE = 0.7
"""Of a node's memory, what the page cache may hold of a data set: processes need the rest."""
ROUNDS = 16
"""Updates in a window: with fewer, an update has more images of one class; see `block_order`."""


def data_advice(
    scenario: Scenario,
    row: PlanRow,
    memory_gb: float | None = None,
    storage_gb_s: float | None = None,
) -> str:
    """Keys of the section `data`, and what to expect of the storage.

    Args:
        memory_gb: of a node, 1e9 bytes. None: not known.
        storage_gb_s: what the storage gives all nodes together. None: not known.
    """
    size = scenario.images * scenario.image_kb / 1e6
    window = max(16384, ROUNDS * row.global_batch)
    held = min(window, scenario.images) * scenario.image_kb / 1e6 / row.cluster.nodes
    keys = f"data.order=blocks data.os_cache=false data.window={window}"
    blocks = f"{keys}, which holds {held:.1f} GB in a node's memory"
    if memory_gb is None:
        least = size / CACHE_SHARE
        found = f"data.order=global if a node has {least:,.0f} GB of memory or more, else {blocks}"
    elif size <= CACHE_SHARE * memory_gb:
        found = f"data.order=global, as {memory_gb:g} GB of memory hold them"
    else:
        found = f"{blocks}, as {memory_gb:g} GB do not hold the data"
    if storage_gb_s is not None and storage_gb_s < row.storage_gb_s:
        speed = 1e6 * storage_gb_s / scenario.image_kb
        rates = f"{speed:,.0f} of the {row.images_per_s:,.0f} img/s"
        found += f"; while nothing is cached, the storage gives {rates}"
    return f"{size:,.0f} GB, {found}"
