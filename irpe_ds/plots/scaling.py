"""Figures of a scaling experiment: throughput, efficiency, communication and memory over ranks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irpe_ds.errors import ConfigError
from irpe_ds.plots.style import INK, PALE, frame, plain, titled, write_figure

CellRow = Mapping[str, Any]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444", "#999933")
"""By ZeRO config."""
MARKERS = "osD^vPX*"
"""By number of nodes."""
PANELS_IN_A_ROW, PANELS = 4, 200
"""Panels of a figure: in a row, and at most. A larger one is more than matplotlib can draw."""


@dataclass(frozen=True)
class Figure:
    """One quantity over ranks."""

    file: str
    """Without suffix."""
    title: str
    unit: str
    value: Callable[[CellRow], float]
    note: str
    linear: bool = False
    """Whether a dotted line shows linear scaling."""


FIGURES = (
    Figure(
        "flops",
        "Throughput",
        "images per second",
        lambda row: row["images_per_s"],
        "Median repetition. Dotted: linear scaling from the fewest ranks of the fastest line.",
        linear=True,
    ),
    Figure(
        "efficiency",
        "Efficiency",
        "% of the fewest ranks",
        lambda row: 100 * row["efficiency"],
        "Images per second and rank, relative to the first point of the same line.",
    ),
    Figure(
        "communication",
        "Share of communication",
        "% of an update",
        lambda row: 100 * row["communication_share"],
        "Of a profiled update, in which collectives are synchronous and overlap nothing; includes "
        "waiting for slower ranks.",
    ),
    Figure(
        "memory",
        "Memory",
        "GiB, largest rank",
        lambda row: row["memory_gib"],
        "Peak of tensors on a GPU, of the whole process on a CPU.",
    ),
)


def draw_figures(
    folder: Path, name: str, panels: Mapping[str, Sequence[CellRow]], suffixes: Sequence[str]
) -> list[Path]:
    """Write FIGURES into a folder; the files.

    Args:
        name: the experiment's.
        panels: rows by the title of the panel that they are drawn in.
        suffixes: of the files of each figure, such as .png and .pdf.

    Raises:
        ConfigError: there are too many panels.
    """
    if len(panels) > PANELS:
        raise ConfigError(folder, f"runs that differ in at most {PANELS} ways", len(panels))
    files = []
    for figure in FIGURES:
        files += _write(_draw(name, panels, figure), folder / figure.file, suffixes)
    return files


def _write(drawn: Any, path: Path, suffixes: Sequence[str]) -> list[Path]:
    files = [path.with_suffix(suffix) for suffix in suffixes]
    for file in files:
        write_figure(drawn, file)
    return files


LINKS = "links"


def draw_links(
    folder: Path, name: str, rows: Sequence[Mapping[str, Any]], suffixes: Sequence[str]
) -> list[Path]:
    """Write LINKS, bandwidth by message size (`irpe_ds.benchmark.links`); the files."""
    places = list(dict.fromkeys(row["where"] for row in rows))
    note = (
        "Of each rank's link: 2 (n - 1) / n of the vector for all-reduce, (n - 1) / n for "
        "all-gather, over the median\ntime of the slowest group."
    )
    drawn = titled(f"Links: {name}", note, (max(6.2, 4.2 * len(places)), 4.5), above=0.3)
    grid = drawn.subplots(1, len(places), squeeze=False)
    kinds = list(dict.fromkeys(row["collective"] for row in rows))
    colours = dict(zip(kinds, COLOURS, strict=False))
    for axes, place in zip(grid.flat, places, strict=True):
        found = [row for row in rows if row["where"] == place]
        frame(axes, f"{place}, {found[0]['ranks']} ranks", "GB/s", size=10)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("MiB", color=INK)
        sizes = sorted({row["bytes"] / 2**20 for row in found})
        axes.set_xticks(sizes, [f"{size:.3g}" for size in sizes])
        axes.minorticks_off()
        for kind, colour in colours.items():
            line = [row for row in found if row["collective"] == kind]
            sizes_mib = [row["bytes"] / 2**20 for row in line]
            axes.plot(sizes_mib, [row["gb_s"] for row in line], "o-", color=colour, linewidth=1.6)
        axes.set_ylim(0)
    _legend(drawn, {kind.replace("_", "-"): colour for kind, colour in colours.items()}, {})
    return _write(drawn, folder / LINKS, suffixes)


def _draw(name: str, panels: Mapping[str, Sequence[CellRow]], figure: Figure) -> Any:
    rows = [row for found in panels.values() for row in found]
    columns = min(len(panels), PANELS_IN_A_ROW)
    lines = -(-len(panels) // columns)
    device = " and ".join(sorted({str(row["device"]) for row in rows}))
    title = f"{figure.title}: {name}, on {device}"
    size = (max(6.2, 4.2 * columns), 1.2 + 3.3 * lines)
    drawn = titled(title, figure.note, size, above=0.3)
    grid = drawn.subplots(lines, columns, squeeze=False, sharey=True)
    files = sorted({row["deepspeed"] for row in rows})
    nodes = sorted({row["nodes"] for row in rows})
    colours = dict(zip(files, COLOURS * len(files), strict=False))
    markers = dict(zip(nodes, MARKERS * len(nodes), strict=False))
    for axes, (panel, found) in zip(grid.flat, panels.items(), strict=False):
        _panel(axes, panel, found, figure, colours, markers)
    grid[0, 0].set_ylim(0, 1.05 * grid[0, 0].get_ylim()[1])
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[:, 1:].flat:
        axes.set_ylabel("")
    _legend(drawn, colours, markers if len(nodes) > 1 else {})
    return drawn


def _panel(
    axes: Any,
    name: str,
    rows: Sequence[CellRow],
    figure: Figure,
    colours: Mapping[str, str],
    markers: Mapping[int, str],
) -> None:
    frame(axes, name, figure.unit, size=10)
    places = sorted({row["ranks"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [str(place) for place in places])
    axes.set_xlim(places[0] / 1.3, places[-1] * 1.3)
    axes.minorticks_off()
    axes.set_xlabel("ranks", color=INK)
    if figure.linear:
        best = max(row["images_per_s"] / row["ranks"] for row in rows if row["ranks"] == places[0])
        axes.plot(places, [best * n for n in places], color=PALE, linewidth=1, linestyle=":")
    for file, colour in colours.items():
        line = sorted(
            (row for row in rows if row["deepspeed"] == file),
            key=lambda row: (row["ranks"], row["nodes"]),
        )
        x, y = [row["ranks"] for row in line], [figure.value(row) for row in line]
        axes.plot(x, y, color=colour, linewidth=1.6)
        for row, place, value in zip(line, x, y, strict=True):
            axes.plot(place, value, markers[row["nodes"]], color=colour, markeredgecolor="white")


def _legend(drawn: Any, colours: Mapping[str, str], markers: Mapping[int, str]) -> None:
    from matplotlib.lines import Line2D

    entries = {plain(file): Line2D([], [], color=colour) for file, colour in colours.items()}
    for nodes, marker in markers.items():
        label = f"{nodes} node" + "s" * (nodes > 1)
        entries[label] = Line2D([], [], color=PALE, marker=marker, linestyle="none")
    drawn.legend(
        entries.values(),
        entries.keys(),
        loc="upper left",
        bbox_to_anchor=(0.004, 1 - 0.38 / drawn.get_figheight()),
        ncols=len(entries),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=1.2,
    )
