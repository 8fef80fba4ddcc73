"""A report is made of a results.json alone, and its figures have the numbers."""

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from irpe_ds.benchmark.report import panel_title, varied, write_report
from irpe_ds.benchmark.rows import PHASES, CellRow, read_results_file
from irpe_ds.errors import ConfigError


def row(ranks: int, speed: float, zero: str = "zero1", **more: Any) -> CellRow:
    axes = {"ranks_per_node": ranks, "train.deepspeed": zero, "micro_batch": 32}
    axes |= more.pop("axes", {})
    return {
        "key": f"{ranks}-{zero}-{sorted(more.items())}-{axes}",
        "axes": axes,
        **{"scaling": "weak", "nodes": 1, "ranks_per_node": ranks, "ranks": ranks},
        **{"model": "vit", "rpe": "k", "precision": "bf16", "impl": "cpu", "accumulation": 1},
        **{"network": None, "deepspeed": zero, "micro_batch": 32, "global_batch": 32 * ranks},
        **{"images_per_s": speed, "slowest_images_per_s": speed, "fastest_images_per_s": speed},
        **{f"{phase}_ms": 10.0 for phase in PHASES},
        **{"apart_ms": 50.0, "step_ms": 40.0, "memory_gib": 1.5, "tflops": 0.02},
        **{"all_reduce_bytes": 2e6, "device": "CPU", "torch": "2", "commit": "abc"},
        **{"deepspeed_version": "0"},
        **more,
    }


def results(*rows: CellRow) -> dict[str, Any]:
    return {"name": "x<y", "settings": {"seed": 0}, "rows": list(rows)}


def test_files(tmp_path: Path) -> None:
    failed = {k: v for k, v in row(4, 0).items() if k not in ("impl", "device", "images_per_s")}
    failed["error"] = "rank 3 <died>"
    found = results(row(1, 100), row(2, 150), row(2, 190, "zero2"), row(1, 100, "zero2"), failed)
    (tmp_path / "results.json").write_text(json.dumps(found))
    written = write_report(read_results_file(tmp_path / "results.json"), tmp_path, [".svg"])
    names = ("flops", "efficiency", "communication", "memory")
    figures = [f"{name}{suffix}" for name in names for suffix in (".png", ".svg")]
    assert [path.name for path in written] == ["results.csv", *figures, "report.html"]
    assert all(path.stat().st_size > 100 for path in written)

    with (tmp_path / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["efficiency"] for line in lines] == ["1.0", "0.75", "0.95", "1.0", ""]
    assert [line["communication_share"] for line in lines] == ["0.2"] * 4 + [""]
    assert lines[4]["error"] == "rank 3 <died>"

    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing is loaded from elsewhere
    assert "x&lt;y" in page
    assert "rank 3 &lt;died&gt;" in page


def test_links_and_the_slowest_rank_are_in_it(tmp_path: Path) -> None:
    ranks = {"rank_ms": [8.0, 12.0, 8.0], "slowest_rank": 1, "slowest_host": "node<2>"}
    gpu = {"rank_mhz": [1900.0, 1210.0, 1900.0], "rank_celsius": [60.0, 91.0, 60.0]}
    found = results(row(3, 100, **ranks, **gpu), row(1, 30))
    link = {"collective": "all_reduce", "ranks": 2, "ms": 0.5, "fastest_ms": 0.4, "gb_s": 3.25}
    found["links"] = {
        "rows": [
            {**link, "where": where, "bytes": 2**20, "slowest": "ranks 0, 1 on a"}
            for where in ("intra", "inter")
        ]
    }
    written = write_report(found, tmp_path)
    assert "links.png" in [path.name for path in written]
    page = (tmp_path / "report.html").read_text()
    assert "1 on node&lt;2&gt;: 1.50 x, 1,210 MHz, 91 °C" in page
    assert page.count("data:image/png;base64,") == 5
    assert all(text in page for text in ("all-reduce", "inter", "3.25", "ranks 0, 1 on a"))
    write_report({**found, "links": {"error": "no <link>"}}, tmp_path)
    assert "no &lt;link&gt;" in (tmp_path / "report.html").read_text()


def test_efficiency_compares_the_same_thing_only(tmp_path: Path) -> None:
    half = row(2, 60, precision="fp32", axes={"train.precision": "fp32"})
    found = results(row(1, 100), half, row(2, 200))
    write_report(found, tmp_path)
    with (tmp_path / "results.csv").open() as file:
        assert [line["efficiency"] for line in csv.DictReader(file)] == ["1.0", "1.0", "1.0"]


def test_efficiency_is_of_the_line_that_is_drawn(tmp_path: Path) -> None:
    alone = row(1, 100)
    del alone["axes"]["train.deepspeed"]  # as the configuration has it, which is the same
    write_report(results(alone, row(2, 150)), tmp_path)
    with (tmp_path / "results.csv").open() as file:
        assert [line["efficiency"] for line in csv.DictReader(file)] == ["1.0", "0.75"]


def test_panels_are_told_apart_by_what_differs() -> None:
    rows = [row(1, 1), row(1, 1, precision="fp32"), row(1, 1, axes={"optim.lr": 3})]
    names = varied(rows)
    assert names == ["precision", "optim.lr"]
    assert panel_title(rows[1], names) == "32 images per rank, fp32, lr None"
    gpu = row(2, 1, device="H100", axes={"seed": 1})
    assert varied([row(1, 1, axes={"seed": 0}), gpu]) == ["device", "seed"]
    strong = row(2, 1, scaling="strong")
    assert panel_title(strong, []) == "64 in all"


def test_text_in_tables_and_figures_is_text(tmp_path: Path) -> None:
    """Neither a spreadsheet nor matplotlib nor a terminal takes it for more."""
    formula, mathtext = "=cmd|' /C calc'!A0", "$\\frac$"
    first = row(1, 100, zero=mathtext, impl=formula, **{"@more": "+1", "\x1b[2J": "-x"})
    first["axes"]["name"] = "$x^$"
    found = results(first, row(2, 200, zero=mathtext, device="$\\sqrt$")) | {
        "name": "$\\frac$ \x1b[2J"
    }
    write_report(found, tmp_path)
    with (tmp_path / "results.csv").open(newline="") as file:
        lines = list(csv.reader(file))
    cells = [cell for line in lines for cell in line]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]
    assert {f"'{formula}", "'@more", "'+1", "'-x"} <= {*cells}


WRONG = [
    ("rows", {}),
    ("rows.0", None),
    ("rows.0.key", 5),
    ("rows.0.axes", []),
    ("rows.0.ranks", "2"),
    ("rows.0.ranks", True),
    ("rows.0.ranks", 0),
    ("rows.0.ranks", 10**400),
    ("rows.0.images_per_s", 0),
    ("rows.0.images_per_s", -1.0),
    ("rows.0.images_per_s", 1e300),
    ("rows.0.images_per_s", math.nan),
    ("rows.0.apart_ms", 0),
    ("rows.0.forward_ms", [1.0]),
    ("rows.0.scaling", "strange"),
    ("rows.0.deepspeed", ["zero1"]),
    ("rows.0.all_reduce_bytes", "many"),
    ("rows.0.rank_ms", []),
    ("rows.0.rank_ms", [0.0]),
    ("rows.0.slowest_rank", 3),
    ("rows.0.slowest_rank", -1),
    ("rows.0.rank_mhz", [1.0, 2.0]),
    ("rows.1.key", "same"),
    ("settings", None),
    ("settings.deep", json.loads("[" * 400 + "]" * 400)),
    ("name", 5),
    ("name", "x" * 10_000),
    ("links", []),
    ("links", {"rows": [{"bytes": 0}]}),
    ("links", {"rows": [{"collective": "../x"}]}),
    ("links", {"error": 5}),
]


@pytest.mark.parametrize(("place", "value"), WRONG, ids=lambda x: str(x)[:30])
def test_results_that_are_not_as_written(place: str, value: Any, tmp_path: Path) -> None:
    whole = row(3, 100, rank_ms=[8.0, 9.0, 7.0], slowest_rank=1, slowest_host="a")
    found: Any = results(whole | {"key": "same"}, row(1, 50))
    *above, last = place.split(".")
    part = found
    for key in above:
        part = part[int(key) if key.isdigit() else key]
    part[int(last) if last.isdigit() else last] = value
    path = tmp_path / "results.json"
    path.write_text(json.dumps(found))
    with pytest.raises(ConfigError, match=r"results\.json: expected the results of") as error:
        read_results_file(path)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("column", ["deepspeed", "micro_batch", "optimizer_ms", "device"])
def test_a_column_that_is_missing_is_named(column: str, tmp_path: Path) -> None:
    lacking = row(1, 100)
    del lacking[column]
    with pytest.raises(ConfigError, match=f"expected the column {column} in every row"):
        write_report(results(lacking, row(2, 100)), tmp_path)


@pytest.mark.parametrize("path", [*Path("irpe_ds/benchmark/results").glob("cpu-*.json")])
def test_results_of_before_are_read(path: Path) -> None:
    assert read_results_file(path)["rows"]


def test_only_failures_are_reported_too(tmp_path: Path) -> None:
    failed = {k: v for k, v in row(1, 0).items() if k != "images_per_s"} | {"error": "none"}
    written = write_report(results(failed), tmp_path)
    assert [path.name for path in written] == ["results.csv", "report.html"]


def test_nothing_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one cell"):
        write_report(results(), tmp_path)
