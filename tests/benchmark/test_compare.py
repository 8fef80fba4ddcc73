"""Cells of two experiments that are slower, faster, new, gone or broken."""

from typing import Any

from irpe_ds.benchmark.compare import compare


def results(*rows: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {"name": "x", "settings": settings, "rows": list(rows)}


def cell(key: str, *speeds: float) -> dict[str, Any]:
    slowest, speed, fastest = speeds
    return {
        **{"key": key, "axes": {"train.precision": key}, "images_per_s": speed},
        **{"slowest_images_per_s": slowest, "fastest_images_per_s": fastest},
    }


def failed(key: str) -> dict[str, Any]:
    return {"key": key, "axes": {"train.precision": key}, "error": "no memory"}


def test_slowest_first_and_only_what_is_beyond_the_repetitions() -> None:
    before = results(cell("a", 9, 10, 11), cell("b", 90, 100, 110), cell("c", 9, 10, 11))
    after = results(cell("a", 14, 15, 16), cell("b", 70, 80, 89), cell("c", 8, 9, 10))
    slower, within, faster = compare(before, after)
    assert slower == "0.800 x  slower  100.0 -> 80.0 img/s  precision b"
    assert within == "0.900 x          10.0 -> 9.0 img/s  precision c"
    assert faster == "1.500 x  faster  10.0 -> 15.0 img/s  precision a"


def test_what_cannot_be_compared_is_said() -> None:
    before = results(cell("a", 1, 1, 1), failed("b"), cell("gone", 1, 1, 1), seed=0)
    after = results(failed("a"), cell("b", 1, 1, 1), cell("new", 1, 1, 1), seed=1)
    assert [*compare(before, after)] == [
        "settings differ: seed: 0 -> 1",
        "fails   precision a: no memory",
        "failed before   precision b",
        "only before   precision gone",
        "only after   precision new",
    ]
