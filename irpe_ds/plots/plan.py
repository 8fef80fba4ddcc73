"""A plan as one figure: throughput, efficiency, memory and the step, on 1 to 4096 GPUs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from irpe_ds.planner.assumptions import MEANINGS
from irpe_ds.planner.memory import Memory
from irpe_ds.planner.plan import SIZES, PlanRow
from irpe_ds.planner.report import Report
from irpe_ds.plots.style import FAINT, INK, PALE, frame, titled

COLOURS = ("#0072B2", "#D55E00")
SHARES = ("flop_share", "memory_share", "link_share")
PARTS = {
    "forward": "#56B4E9",
    "backward": "#0072B2",
    "optimizer": "#E69F00",
    "communication": "#D55E00",
}
"""Parts of an update and their colours."""

KINDS = {
    "weights": "#0072B2",
    "gradients": "#56B4E9",
    "optimizer": "#E69F00",
    "ema": "#F0E442",
    "activations": "#009E73",
    "buckets": "#CC79A7",
    "context": "#c9d1d9",
}
"""Kinds of memory and their colours."""

_LEGEND: dict[str, Any] = {
    "fontsize": 9,
    "labelcolor": INK,
    "framealpha": 1,
    "edgecolor": "none",
    "handlelength": 1.2,
    "handletextpad": 0.5,
    "columnspacing": 1.1,
    "borderaxespad": 0,
}
_TEXT: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8.5}


def draw_plan(report: Report) -> Any:
    """The figure of a plan."""
    scenario, row = report.scenario, report.row
    title = (
        f"{scenario.config.model.name}, {scenario.config.train.precision}, "
        f"{scenario.zero.name}, nodes of {row.cluster.per_node} {row.cluster.gpu.name}"
    )
    figure = titled(title, _note(report), (11.5, 8.2))
    grid = figure.subplots(2, 2)
    strong, weak = report.strong, report.weak
    names = {
        f"global batch {strong[0].global_batch:,}" if strong else "": strong,
        f"{weak[0].micro_batch} images per GPU" if weak else "": weak,
    }
    curves = {name: rows for name, rows in names.items() if rows}
    _speed(grid[0][0], curves)
    _efficiency(grid[0][1], curves)
    _step(grid[1][0], strong or weak, next(iter(curves)))
    _memory(grid[1][1], row, report.memory)
    return figure


def _note(report: Report) -> str:
    """What is counted, and which of the main assumptions are fitted."""
    shares = [
        f"{getattr(report.scenario.assumed, name):.2g} {MEANINGS[name]} "
        f"({report.origins[name].split()[0]})"
        for name in SHARES
    ]
    return (
        "Planned, not measured. Memory, FLOPs and bytes are counted; speed takes these "
        f"shares:\n{'; '.join(shares)}."
    )


def _speed(axes: Any, curves: Mapping[str, Sequence[PlanRow]]) -> None:
    frame(axes, "Throughput", "images per second")
    _over_gpus(axes)
    every = [row for rows in curves.values() for row in rows]
    one = max(row.images_per_s / row.efficiency / row.cluster.gpus for row in every)
    axes.plot(SIZES, [one * n for n in SIZES], color=PALE, linewidth=1, linestyle=":")
    place = (SIZES[-3], one * SIZES[-3])
    axes.annotate("passes alone", place, (-8, 2), ha="right", color=PALE, **_TEXT)
    _lines(axes, curves, lambda row: row.images_per_s)
    axes.set_yscale("log")
    axes.legend(loc="lower right", frameon=False, fontsize=9.5, labelcolor=INK)


def _efficiency(axes: Any, curves: Mapping[str, Sequence[PlanRow]]) -> None:
    frame(axes, "Efficiency", "% of forward and backward alone")
    _over_gpus(axes)
    _lines(axes, curves, lambda row: 100 * row.efficiency)
    axes.set_ylim(0, 105)


def _step(axes: Any, rows: Sequence[PlanRow], name: str) -> None:
    frame(axes, f"Parts of an update, {name}", "% of its time")
    _over_gpus(axes)
    shown = [rows[0]]  # bars of neighbours would overlap
    for row in rows:
        if row.cluster.gpus >= 2 * shown[-1].cluster.gpus:
            shown.append(row)
    below = [0.0] * len(shown)
    places = [row.cluster.gpus for row in shown]
    for part, colour in PARTS.items():
        shares = [100 * row.step.parts[part] / row.step.total for row in shown]
        wide = [0.5 * place for place in places]
        label = "communication, exposed" if part == "communication" else part
        axes.bar(places, shares, bottom=below, width=wide, color=colour, label=label)
        below = [a + b for a, b in zip(below, shares, strict=True)]
    for place, row in zip(places, shown, strict=True):
        text = f"{1e3 * row.step.total:.3g}"
        axes.annotate(text, (place, 100), (0, 3), ha="center", color=INK, **_TEXT)
    axes.annotate("ms", (places[-1], 100), (16, 3), color=INK, **_TEXT)
    axes.set_ylim(0, 122)
    axes.set_yticks(range(0, 101, 20))
    axes.legend(loc="upper left", ncols=4, **_LEGEND)


def _memory(axes: Any, row: PlanRow, memory: Mapping[str, Memory]) -> None:
    cluster = row.cluster
    title = f"Memory per GPU, {row.micro_batch} images on each of {cluster.gpus}"
    frame(axes, title, "")
    axes.set_xlabel(f"GiB of {cluster.gpu.memory_gib:g}", color=INK)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=FAINT, linewidth=0.8)
    names = list(memory)
    left = [0.0] * len(names)
    sizes = [found.gib() for found in memory.values()]
    for part, colour in KINDS.items():
        widths = [size[part] for size in sizes]
        axes.barh(names, widths, left=left, height=0.62, color=colour, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for name, end, size in zip(names, left, sizes, strict=True):
        text = f"{size['total']:.2f}"
        axes.annotate(text, (end, name), (5, 0), va="center", color=INK, **_TEXT)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(left))
    axes.set_ylim(top=-1.9)
    axes.legend(loc="upper left", ncols=4, **_LEGEND)


def _lines(
    axes: Any, curves: Mapping[str, Sequence[PlanRow]], value: Callable[[PlanRow], float]
) -> None:
    for colour, (name, rows) in zip(COLOURS, curves.items(), strict=False):
        x, y = [row.cluster.gpus for row in rows], [value(row) for row in rows]
        axes.plot(x, y, color=colour, linewidth=1.8, marker="o", markersize=4, label=name)


def _over_gpus(axes: Any) -> None:
    axes.set_xlabel("GPUs", color=INK)
    axes.set_xscale("log", base=2)
    axes.set_xlim(SIZES[0] / 1.6, SIZES[-1] * 1.6)
    axes.set_xticks(SIZES[::2], [f"{size:g}" for size in SIZES[::2]])
    axes.minorticks_off()
