"""`make gpu-day` on a machine without a GPU: what it makes of results, and a trial of its parts."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from irpe_ds.errors import ConfigError
from irpe_ds.ops.bench import gpu_day
from irpe_ds.ops.bench.gpu_day import Verdict, medians, outcomes, verdicts

JUNIT = """<testsuites><testsuite name="pytest">
<testcase classname="tests.ops.test_fused" name="test_repeated_runs_give_the_same_bits[cuda]" />
<testcase classname="tests.ops.test_fused" name="test_scale[cuda]"><failure>x</failure></testcase>
<testcase classname="tests.ops.test_fused" name="test_x[cuda]"><error>x</error></testcase>
<testcase classname="tests.ops.test_flex" name="test_y"><skipped>x</skipped></testcase>
</testsuite></testsuites>"""


def report(**times: float) -> dict[str, Any]:
    """Times of attention with RPE on keys, in milliseconds."""
    rows = {name.replace("_", ", "): {"median": x} for name, x in times.items()}
    title = "attention, K, B H L = 256 6 197, bfloat16"
    empty = {"fused": {"median": 1e9}, **{name: {"median": 1.0} for name in rows}}
    return {"benchmark": {f"{title}, forward + backward": rows, f"{title}, backward": empty}}


def test_bars_of_time() -> None:
    found = list(verdicts(report(fused=0.94, SDPA_flash=1.0, SDPA_cuDNN=0.8, flex=1.88)))
    assert found[:6] == [
        Verdict("K: at most 0.95 x SDPA, flash", "0.940", True),
        Verdict("K: at most 1.1 x SDPA, cuDNN", "1.175", False),
        Verdict("QKV: at most 1.2 x SDPA, flash", "not measured", None),
        Verdict("K: at most 0.125 x upstream", "not measured", None),
        Verdict("QKV: at most 0.125 x upstream", "not measured", None),
        Verdict("K: at most 0.5 x flex", "0.500", True),
    ]


def test_bars_that_are_tests() -> None:
    parts = {
        "tests": outcomes(JUNIT),
        "sanitizer": {"memcheck": 0, "racecheck": 99},
        "errors": {"kernels": "RuntimeError: no"},
    }
    assert list(verdicts(parts))[6:] == [
        Verdict("the same bits on repeated runs", "passed", True),
        Verdict("1,000 steps of training like the reference", "not measured", None),
        Verdict("make test-gpu", "2 of 3 failed", False),
        Verdict("compute-sanitizer memcheck", "exit code 0", True),
        Verdict("compute-sanitizer racecheck", "exit code 99", False),
        Verdict("kernels", "RuntimeError: no", False),
    ]


def test_every_bar_can_be_measured() -> None:
    """What it names is there: tests by their names, and titles and rows of the benchmark."""
    sources = "".join(path.read_text() for path in Path(__file__).parent.glob("test_fused*.py"))
    assert all(f"def {name}(" in sources for name in gpu_day.TESTS.values())
    assert {bar.encoding for bar in gpu_day.BARS} <= gpu_day.cases.ENCODINGS.keys()


def test_times_of_the_kernels() -> None:
    def event(name: str, us: float) -> Any:
        return SimpleNamespace(name=name, time_range=SimpleNamespace(elapsed_us=lambda: us))

    times = [("attention_forward", 3), ("attention_forward", 1), ("attention_forward", 2)]
    events = [*times, ("attention_backward_keys", 7), ("gemm", 100)]
    found = medians(event(*each) for each in events)
    assert found == {"forward": 2, "backward_keys": 7}


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_day"])
    with pytest.raises(ConfigError, match=r"^--device: expected cpu, as PyTorch finds no GPU"):
        gpu_day.main()


@pytest.mark.slow
def test_a_trial_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "day.json"
    monkeypatch.setattr(sys, "argv", ["gpu_day", "--device", "cpu", "--out", str(out)])
    with pytest.raises(SystemExit) as end:
        gpu_day.main()
    assert end.value.code == 1
    written = json.loads(out.read_text())
    assert gpu_day.PARTS.keys() <= written.keys()
    assert "errors" not in written
    assert set(written["tests"].values()) == {"skipped"}
    assert any(title.startswith("attention, K, ") for title in written["benchmark"])
    assert "K: at most 0.95 x SDPA, flash: not measured" in capsys.readouterr().out
