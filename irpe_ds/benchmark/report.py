"""Reports a scaling experiment: a CSV, figures, and one HTML file that has them all."""

import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from irpe_ds.benchmark.rows import INSTRUMENTED_STEP_MS, PHASES, CellRow, check_columns
from irpe_ds.errors import ConfigError
from irpe_ds.files import replace_file
from irpe_ds.plots.page import page, picture, table
from irpe_ds.plots.scaling import draw_figures, draw_links

WHERE = ("device", "torch", "deepspeed_version")
BASIC = ("model", "rpe", "precision", "impl", "accumulation", "network", *WHERE)
"""Columns that may distinguish panels, beside the batch and other axes."""
FACTS = ("nodes", "ranks", "deepspeed")
SPEEDS = ("images_per_s", "slowest_images_per_s", "fastest_images_per_s")
MEASURED = (*SPEEDS, "step_ms", INSTRUMENTED_STEP_MS, *(f"{phase}_ms" for phase in PHASES))
NEEDED = (*MEASURED, "memory_gib", "tflops", "scaling", "micro_batch", "global_batch", *WHERE)
"""Columns of runs that did not fail, beside FACTS."""
LINK = ("collective", "where", "ranks", "bytes", "ms", "fastest_ms", "gb_s", "slowest")
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What text begins with that a spreadsheet would take for a formula."""


def write_report(
    results: Mapping[str, Any], folder: Path, suffixes: Sequence[str] = ()
) -> list[Path]:
    """Write results.csv, report.html and its figures; returns the files.

    Args:
        results: the content of a results.json.
        suffixes: further files of each figure, such as .pdf.

    Raises:
        ConfigError: there are no rows, or one lacks a column.
    """
    rows = [dict(row) for row in results["rows"]]
    if not rows:
        raise ConfigError(folder, "the results of at least one cell", "none")
    good = [row for row in rows if "error" not in row]
    check_columns(rows, FACTS, folder)
    check_columns(good, NEEDED, folder)
    _add_derived(good)
    cells = folder / "results.csv"
    replace_file(cells, to_csv(rows))
    name, suffixes = results["name"], (".png", *suffixes)
    figures = draw_figures(folder, name, _panels(good), suffixes) if good else []
    links = (results.get("links") or {}).get("rows")
    if links:
        check_columns(links, LINK, f"{folder}: links")
        figures += draw_links(folder, name, links, suffixes)
    report = folder / "report.html"
    replace_file(report, _page(results, rows, figures))
    return [cells, *figures, report]


def _panels(rows: Sequence[CellRow]) -> dict[str, list[CellRow]]:
    panels: dict[str, list[CellRow]] = {}
    names = varied(rows)
    for row in rows:
        panels.setdefault(panel_title(row, names), []).append(row)
    return panels


def _add_derived(rows: Sequence[CellRow]) -> None:
    """Add efficiency, relative to the same line on the fewest ranks, and communication's share."""
    names = varied(rows)
    first: dict[tuple[str, str], CellRow] = {}
    for row in sorted(rows, key=lambda row: (row["ranks"], row["nodes"])):
        fewest = first.setdefault((panel_title(row, names), row["deepspeed"]), row)
        speed, reference = (r["images_per_s"] / r["ranks"] for r in (row, fewest))
        row["efficiency"] = speed / reference
        if "rank_ms" in row:
            row["slowest_over_median"] = max(row["rank_ms"]) / median(row["rank_ms"])
        row["communication_share"] = row["communication_ms"] / row[INSTRUMENTED_STEP_MS]


def to_csv(rows: Sequence[CellRow]) -> str:
    """All rows as CSV, with axes as JSON; no text is one that a spreadsheet would run."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(map(_as_text, columns))
    for row in rows:
        cells = row | {"axes": json.dumps(row["axes"])}
        writer.writerow(_as_text(cells.get(column)) for column in columns)
    return text.getvalue()


def _as_text(cell: Any) -> Any:
    """A cell; an apostrophe before what would be a formula makes it text."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell


def panel_title(row: CellRow, varied: Sequence[str]) -> str:
    """Title of the panel that a row is drawn in."""
    weak = row["scaling"] == "weak"
    batch = f"{row['micro_batch']} images per rank" if weak else f"{row['global_batch']} in all"
    return ", ".join([batch, *(_spell(name, _value(row, name)) for name in varied)])


def varied(rows: Sequence[CellRow]) -> list[str]:
    """Columns and axes in which rows differ, apart from nodes, ranks, batch and ZeRO."""
    own = dict.fromkeys(key for row in rows for key in row["axes"])
    shown = {"nodes", "ranks_per_node", "micro_batch", "train.global_batch", "train.deepspeed"}
    shown |= {"train.precision", "train.accumulation", "model.name", "model.impl"}
    names = [*BASIC, *(key for key in own if key not in shown)]
    return [name for name in names if len({str(_value(row, name)) for row in rows}) > 1]


def _value(row: CellRow, name: str) -> Any:
    return row["axes"].get(name, row.get(name))


def _spell(name: str, value: Any) -> str:
    if name in ("model", "precision", "network", "device"):
        return str(value)
    return f"{name.split('.')[-1]} {value}"


def _page(results: Mapping[str, Any], rows: Sequence[CellRow], figures: Sequence[Path]) -> str:
    good = [row for row in rows if "error" not in row]
    failed = [row for row in rows if "error" in row]
    images = "".join(picture(path) for path in figures if path.suffix == ".png")
    facts = {
        key: ", ".join(sorted({str(row.get(key)) for row in good}))
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
        _links(results.get("links") or {}),
        "<details><summary>Configuration shared by all runs</summary><pre>"
        + html.escape(json.dumps(results["settings"], indent=1))
        + "</pre></details>",
    ]
    return page(results["name"], parts)


def _runs(rows: Sequence[CellRow]) -> str:
    names = varied(rows)
    known = any("mfu" in row for row in rows)
    kinds = sorted({key for row in rows for key in row if key.endswith("_bytes")})
    head = ["nodes", "ranks", "ZeRO", "batch", *(name.split(".")[-1] for name in names)]
    head += ["img/s", "slowest to fastest", "ms per update", "efficiency %"]
    head += [f"{phase} %" for phase in PHASES]
    head += [f"{kind.removesuffix('_bytes').replace('_', '-')} MB" for kind in kinds]
    head += ["slowest rank", "GiB", "TFLOP/s", *(["MFU %"] if known else [])]
    lines = []
    for row in rows:
        speed = f"{row['slowest_images_per_s']:,.0f} to {row['fastest_images_per_s']:,.0f}"
        cells = [row["nodes"], row["ranks"], row["deepspeed"], panel_title(row, ())]
        cells += [_value(row, name) for name in names]
        cells += [f"{row['images_per_s']:,.0f}", speed, f"{row['step_ms']:,.1f}"]
        cells += [f"{100 * row['efficiency']:.0f}"]
        cells += [f"{100 * row[f'{phase}_ms'] / row[INSTRUMENTED_STEP_MS]:.1f}" for phase in PHASES]
        cells += [f"{row.get(kind, 0) / 1e6:,.3f}" for kind in kinds]
        cells += [_slowest(row), f"{row['memory_gib']:.2f}", f"{row['tflops']:.3g}"]
        cells += [f"{100 * row['mfu']:.1f}" if "mfu" in row else "?"] if known else []
        lines.append(cells)
    note = (
        "Throughput, time, TFLOP/s and MFU are those of the median repetition. Shares and bytes "
        "are of profiled updates, in which collectives are synchronous; bytes are those of a "
        "collective's whole vector, per rank and update. The slowest rank is the one on which an "
        "update without communication takes longest, beside the median rank."
    )
    return f'<h2>Runs</h2>{table(head, lines)}<p class="note">{note}</p>'


def _slowest(row: CellRow) -> str:
    """Which rank is slowest, by how much, and how its GPU does."""
    if not {"rank_ms", "slowest_rank", "slowest_host"} <= row.keys():
        return "?"
    rank = row["slowest_rank"]
    units = {"mhz": "MHz", "watt": "W", "celsius": "°C"}
    known = {unit: row[f"rank_{key}"][rank] for key, unit in units.items() if f"rank_{key}" in row}
    gpu = "".join(f", {value:,.0f} {unit}" for unit, value in known.items())
    return f"{rank} on {row['slowest_host']}: {row['slowest_over_median']:.2f} x{gpu}"


def _links(links: Mapping[str, Any]) -> str:
    """The self-test of links: bandwidths and the slowest group's hosts, or why it failed."""
    if "error" in links:
        return f"<h2>Links</h2><p>{html.escape(links['error'])}</p>"
    if not links.get("rows"):
        return ""
    head = ["collective", "where", "ranks", "MiB", "ms", "fastest ms", "GB/s", "slowest"]
    lines = []
    for row in links["rows"]:
        cells = [row["collective"].replace("_", "-"), row["where"], row["ranks"]]
        cells += [f"{row['bytes'] / 2**20:g}", f"{row['ms']:.3g}", f"{row['fastest_ms']:.3g}"]
        lines.append([*cells, f"{row['gb_s']:.3g}", row["slowest"]])
    return f"<h2>Links</h2>{table(head, lines)}"


def _failures(rows: Sequence[CellRow]) -> str:
    head = ["nodes", "ranks", "ZeRO", "axes", "error"]
    lines = [
        [row["nodes"], row["ranks"], row["deepspeed"], json.dumps(row["axes"]), row["error"]]
        for row in rows
    ]
    return f"<h2>Failed</h2>{table(head, lines)}"
