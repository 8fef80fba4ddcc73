"""The benchmark runs; what it measures is not tested."""

import json
import sys
from pathlib import Path

import pytest

from irpe_ds.errors import ConfigError
from irpe_ds.ops.bench import __main__ as bench
from irpe_ds.ops.bench.timing import compare


def test_writes_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    options = (
        "--device cpu --models deit_tiny_patch16_224 --batch 1 --lookups 1 2 --rounds 1"
        " --attention 1 2 3 --encodings QK QKV"
    )
    monkeypatch.setattr(sys, "argv", ["bench", *options.split(), "--out", str(out)])
    bench.main()
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert report["command"] == f"python -m irpe_ds.ops.bench {options} --out {out}"
    assert len(report["tables"]) == 2 + 2 * 3 + 1
    for title, rows in report["tables"].items():
        assert title in printed
        assert all(row["median"] > 0 for row in rows.values())
    (step,) = (rows for title, rows in report["tables"].items() if "deit_tiny" in title)
    qk, qkv = (
        rows
        for title, rows in report["tables"].items()
        if title.endswith("B H L = 1 2 10, float32, forward + backward")
    )
    assert qkv.keys() == {"SDPA, flash", "reference", "gather", "cpu", "floor"}
    assert qk.keys() == qkv.keys() | {"SDPA, tensor of biases"}
    names = {
        f"{on}, {impl}" for on in ("K", "QK", "QKV") for impl in ("reference", "gather", "cpu")
    }
    assert step.keys() == names | {"plain, fused", "plain, eager"}


def test_ratios_are_to_the_faster_baseline() -> None:
    def loop(count: int) -> None:
        for _ in range(count):
            pass

    cases = {name: (lambda n=n: loop(n)) for name, n in (("a", 10**4), ("b", 10**6), ("c", 10**6))}
    timings = compare(cases, ("a", "b"), rounds=3)
    assert timings["a"].ratio == 1
    assert timings["c"].ratio > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["attend"], r"^parts: expected some of gather, attention, step, got attend$"),
        (["--encodings", "K", "V"], r"^--encodings: expected some of K, QK, .*, got V$"),
        (["--rounds", "0"], r"^--rounds: expected at least 1, got 0$"),
        (["--models", "nope"], r"^--models: expected DeiTs of timm, got nope$"),
        (["--out", "/no/such/x.json"], r"^--out: expected a file in a folder that exists, got /no"),
        (["--upstream", "/nowhere"], r"^--upstream: expected a folder with rpe_index.cpp"),
    ],
)
def test_mistakes(options: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *options])
    with pytest.raises(ConfigError, match=message):
        bench.main()
