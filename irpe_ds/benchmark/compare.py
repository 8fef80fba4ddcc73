"""Compares the results of two scaling experiments: which cells have become slower."""

from collections.abc import Iterator, Mapping
from typing import Any

from irpe_ds.benchmark.rows import CellRow, check_columns, first_difference


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Lines of text: the speed of each cell as a multiple of that before, slowest first.

    A cell is slower or faster if all its repetitions are slower or faster than all before.

    Args:
        before: the content of a results.json.
        after: of another, of which cells with the same axes are compared.
    """
    found = first_difference(before["settings"], after["settings"])
    if found is not None:
        key, old, new = found
        yield f"settings differ: {key}: {old} -> {new}"
    old_rows, new_rows = ({row["key"]: row for row in x["rows"]} for x in (before, after))
    shared = [(old_rows[key], row) for key, row in new_rows.items() if key in old_rows]
    measured = [pair for pair in shared if not any("error" in row for row in pair)]
    speeds = [f"{which}images_per_s" for which in ("", "slowest_", "fastest_")]
    check_columns((row for pair in measured for row in pair), speeds, "results")
    for old, new in sorted(measured, key=_ratio):
        change = f"{old['images_per_s']:,.1f} -> {new['images_per_s']:,.1f} img/s"
        yield f"{_ratio((old, new)):.3f} x  {_verdict(old, new):6}  {change}  {_name(new)}"
    for old, new in shared:
        if "error" in new and "error" not in old:
            yield f"fails   {_name(new)}: {new['error']}"
        elif "error" in old:
            yield f"failed before   {_name(new)}"
    for rows, others, where in ((old_rows, new_rows, "before"), (new_rows, old_rows, "after")):
        for key, row in rows.items():
            if key not in others:
                yield f"only {where}   {_name(row)}"


def _ratio(pair: tuple[CellRow, CellRow]) -> float:
    return float(pair[1]["images_per_s"] / pair[0]["images_per_s"])


def _verdict(old: CellRow, new: CellRow) -> str:
    if new["fastest_images_per_s"] < old["slowest_images_per_s"]:
        return "slower"
    return "faster" if new["slowest_images_per_s"] > old["fastest_images_per_s"] else ""


def _name(row: CellRow) -> str:
    return ", ".join(f"{key.split('.')[-1]} {value}" for key, value in row["axes"].items())
