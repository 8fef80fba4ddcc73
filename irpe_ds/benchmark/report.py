"""What a scaling experiment found: a CSV, figures, and one HTML file that has everything in it."""

import base64
import csv
import html
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from irpe_ds.benchmark.cell import PHASES
from irpe_ds.errors import ConfigError
from irpe_ds.files import replace_file
from irpe_ds.plots.style import FAINT, INK, PALE, frame, titled

Row = dict[str, Any]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444", "#999933")
MARKERS = "osD^vPX*"
WHERE = ("device", "torch", "deepspeed_version")
BASIC = ("model", "rpe", "precision", "impl", "accumulation", "network", *WHERE)
"""Columns that tell lines of one panel from those of another, beside the batch and other axes."""
PANELS_IN_A_ROW = 4


def write_report(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write results.csv, report.html and the figures that it shows; the files.

    Args:
        results: name, settings and rows, as results.json has them.

    Raises:
        ConfigError: there are no rows.
    """
    rows = [dict(row) for row in results["rows"]]
    if not rows:
        raise ConfigError(folder, "the results of a cell or more", "none")
    good = [row for row in rows if "error" not in row]
    _add_derived(good)
    table = folder / "results.csv"
    replace_file(table, to_csv(rows))
    figures = [_draw(folder, results["name"], good, figure) for figure in FIGURES] if good else []
    page = folder / "report.html"
    replace_file(page, _page(results, rows, figures))
    return [table, *figures, page]


def _add_derived(rows: Sequence[Row]) -> None:
    """Efficiency, of the same line on fewest ranks, and the share of communication."""
    names = varied(rows)
    first: dict[tuple[str, str], Row] = {}
    for row in sorted(rows, key=lambda row: (row["ranks"], row["nodes"])):
        line = first.setdefault((facet(row, names), row["deepspeed"]), row)
        speed, before = (r["images_per_s"] / r["ranks"] for r in (row, line))
        row["efficiency"] = speed / before
        row["communication_share"] = row["communication_ms"] / row["apart_ms"]


def to_csv(rows: Sequence[Row]) -> str:
    """All rows as a table; axes as JSON."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(row | {"axes": json.dumps(row["axes"])} for row in rows)
    return text.getvalue()


def facet(row: Row, varied: Sequence[str]) -> str:
    """Title of the panel that a row is drawn in."""
    weak = row["scaling"] == "weak"
    batch = f"{row['micro_batch']} images per rank" if weak else f"{row['global_batch']} in all"
    return ", ".join([batch, *(_spell(name, _value(row, name)) for name in varied)])


def varied(rows: Sequence[Row]) -> list[str]:
    """Columns and axes, beside nodes, ranks, batch and ZeRO, that rows differ in."""
    own = dict.fromkeys(key for row in rows for key in row["axes"])
    shown = {"nodes", "ranks_per_node", "micro_batch", "train.global_batch", "train.deepspeed"}
    shown |= {"train.precision", "train.accumulation", "model.name", "model.impl"}
    names = [*BASIC, *(key for key in own if key not in shown)]
    return [name for name in names if len({str(_value(row, name)) for row in rows}) > 1]


def _value(row: Row, name: str) -> Any:
    return row["axes"].get(name, row.get(name))


def _spell(name: str, value: Any) -> str:
    if name in ("model", "precision", "network", "device"):
        return str(value)
    return f"{name.split('.')[-1]} {value}"


class Figure:
    """One quantity over ranks."""

    def __init__(
        self, file: str, title: str, unit: str, value: Callable[[Row], float], note: str
    ) -> None:
        self.file, self.title, self.unit, self.value, self.note = file, title, unit, value, note


FIGURES = (
    Figure(
        "flops.png",
        "Throughput",
        "images per second",
        lambda row: row["images_per_s"],
        "Median repetition. Dotted: the fewest ranks of the fastest line, times the ranks.",
    ),
    Figure(
        "efficiency.png",
        "Efficiency",
        "% of a rank among the fewest",
        lambda row: 100 * row["efficiency"],
        "Images per second of a rank, against those of a rank of the same line's first point.",
    ),
    Figure(
        "communication.png",
        "Share of communication",
        "% of an update",
        lambda row: 100 * row["communication_share"],
        "Of an update in which every collective is waited for and hides behind nothing; waiting "
        "for slower ranks is in it.",
    ),
    Figure(
        "memory.png",
        "Memory",
        "GiB of the fullest rank",
        lambda row: row["memory_gib"],
        "Most in use at once: of tensors on a GPU, of the whole process on a CPU.",
    ),
)


def _draw(folder: Path, name: str, rows: Sequence[Row], figure: Figure) -> Path:
    panels: dict[str, list[Row]] = {}
    names = varied(rows)
    for row in rows:
        panels.setdefault(facet(row, names), []).append(row)
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
    for axes, (facet_name, found) in zip(grid.flat, panels.items(), strict=False):
        _panel(axes, facet_name, found, figure, colours, markers)
    grid[0, 0].set_ylim(0, 1.05 * grid[0, 0].get_ylim()[1])
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[:, 1:].flat:
        axes.set_ylabel("")
    _legend(drawn, colours, markers if len(nodes) > 1 else {})
    path = folder / figure.file
    drawn.savefig(path)
    return path


def _panel(
    axes: Any,
    name: str,
    rows: Sequence[Row],
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
    if figure.file == "flops.png":
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

    entries = {file: Line2D([], [], color=colour) for file, colour in colours.items()}
    for nodes, marker in markers.items():
        name = f"{nodes} node" + "s" * (nodes > 1)
        entries[name] = Line2D([], [], color=PALE, marker=marker, linestyle="none")
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


def _page(results: Mapping[str, Any], rows: Sequence[Row], figures: Sequence[Path]) -> str:
    good = [row for row in rows if "error" not in row]
    failed = [row for row in rows if "error" in row]
    images = "".join(
        f'<img alt="{path.stem}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}">'
        for path in figures
    )
    facts = {
        key: ", ".join(sorted({str(row[key]) for row in good}))
        for key in (*WHERE, "commit")
        if good
    }
    parts = [
        f"<h1>Scaling of {html.escape(results['name'])}</h1>",
        f"<p>{len(good)} runs, {len(failed)} failed. "
        + "; ".join(f"{key.split('_')[0]} {html.escape(value)}" for key, value in facts.items())
        + "</p>",
        images,
        _runs(good) if good else "",
        _failures(failed) if failed else "",
        "<details><summary>What all runs have in common</summary><pre>"
        + html.escape(json.dumps(results["settings"], indent=1))
        + "</pre></details>",
    ]
    return PAGE.format(title=html.escape(results["name"]), body="\n".join(parts))


PAGE = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{title}}</title><style>
body {{{{ font: 15px/1.5 system-ui, sans-serif; color: {INK}; margin: 2em auto; max-width: 1400px;
  padding: 0 1em }}}}
table {{{{ border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }}}}
th, td {{{{ padding: .25em .6em; text-align: right; border-bottom: 1px solid {FAINT} }}}}
td {{{{ white-space: nowrap }}}}
th {{{{ font-weight: 600; vertical-align: bottom }}}} .text {{{{ text-align: left }}}}
img {{{{ max-width: 100%; display: block; margin: 1.5em 0 }}}} .wide {{{{ overflow-x: auto }}}}
pre {{{{ font-size: 12px }}}} p.note {{{{ color: {PALE}; font-size: 13px }}}}
</style></head><body>
{{body}}
</body></html>
"""


def _runs(rows: Sequence[Row]) -> str:
    names = varied(rows)
    known = any("mfu" in row for row in rows)
    kinds = sorted({key for row in rows for key in row if key.endswith("_bytes")})
    head = ["nodes", "ranks", "ZeRO", "batch", *(name.split(".")[-1] for name in names)]
    head += ["img/s", "slowest to fastest", "ms an update", "efficiency %"]
    head += [f"{phase} %" for phase in PHASES]
    head += [f"{kind.removesuffix('_bytes').replace('_', '-')} MB" for kind in kinds]
    head += ["GiB", "TFLOP/s", *(["MFU %"] if known else [])]
    lines = []
    for row in rows:
        speed = f"{row['slowest_images_per_s']:,.0f} to {row['fastest_images_per_s']:,.0f}"
        cells = [row["nodes"], row["ranks"], row["deepspeed"], facet(row, ())]
        cells += [_value(row, name) for name in names]
        cells += [f"{row['images_per_s']:,.0f}", speed, f"{row['step_ms']:,.1f}"]
        cells += [f"{100 * row['efficiency']:.0f}"]
        cells += [f"{100 * row[f'{phase}_ms'] / row['apart_ms']:.1f}" for phase in PHASES]
        cells += [f"{row.get(kind, 0) / 1e6:,.3f}" for kind in kinds]
        cells += [f"{row['memory_gib']:.2f}", f"{row['tflops']:.3g}"]
        cells += [f"{100 * row['mfu']:.1f}" if "mfu" in row else "?"] if known else []
        lines.append(cells)
    note = (
        "Throughput, time, TFLOP/s and MFU are those of the median repetition, left alone. Shares "
        "and bytes are of updates that were taken apart: each collective is waited for, bytes are "
        "those of its whole vector, for a rank and an update."
    )
    return f'<h2>Runs</h2>{_table(head, lines)}<p class="note">{note}</p>'


def _failures(rows: Sequence[Row]) -> str:
    head = ["nodes", "ranks", "ZeRO", "axes", "error"]
    lines = [
        [row["nodes"], row["ranks"], row["deepspeed"], json.dumps(row["axes"]), row["error"]]
        for row in rows
    ]
    return f"<h2>Failed</h2>{_table(head, lines)}"


def _table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    def cell(kind: str, x: Any) -> str:
        text = html.escape(str(x))
        left = ' class="text"' if any(c.isalpha() for c in text) else ""
        return f"<{kind}{left}>{text}</{kind}>"

    top = "".join(cell("th", name) for name in head)
    body = "".join(f"<tr>{''.join(cell('td', x) for x in line)}</tr>" for line in lines)
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'
