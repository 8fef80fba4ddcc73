"""What environment variables and files say, where it makes no sense: one line tells, no more."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from irpe_ds.ops import __main__ as report
from irpe_ds.ops.build import library, prebuilt, toolchain
from irpe_ds.ops.build.builder import IRPEBuilder
from irpe_ds.ops.build.toolchain import Unavailable

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("chosen", "means"),
    [
        ("8.0;9.0+PTX", "8.0;9.0+PTX"),
        ("8.6 8.9", "8.6;8.9"),
        ("10.0a;", "10.0a"),
        *((nothing, toolchain.ARCHITECTURES) for nothing in ("", " ; ")),
    ],
)
def test_architectures(chosen: str, means: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", chosen)
    assert toolchain.architectures() == means
    assert len(toolchain.gencode()) == len(means.split(";")) + means.count("+PTX")


@pytest.mark.parametrize(
    "nonsense", ["nonsense", "Ampere", "8.0,9.0", "8", "\u0668.\u0660", "8.0;-rf", "x" * 999]
)
def test_other_architectures_leave_the_cpu_s_operators(
    nonsense: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", nonsense)
    builder = IRPEBuilder()
    expected = "TORCH_CUDA_ARCH_LIST: expected compute capabilities such as 8.0;9.0+PTX, got '"
    assert builder.without_cuda.startswith(expected)
    assert len(builder.without_cuda) < 150
    assert not any(source.endswith(".cu") for source in builder.sources())
    assert f"[NO] {expected}" in "\n".join(report.installation())
    assert str(report.missing_build_tool("cuda")).startswith(expected)
    assert report.missing_build_tool("cpu") is None


@pytest.mark.parametrize(
    "change",
    [
        lambda info: "",
        lambda info: "[]",
        lambda info: "[" * 50_000,
        lambda info: " " * 200_000,
        lambda info: json.dumps(info)[:-1],
        lambda info: json.dumps(info | {"torch": 2}),
        lambda info: json.dumps(info | {"architectures": None}),
        lambda info: json.dumps(info | {"more": "than that"}),
        lambda info: json.dumps({key: info[key] for key in info if key != "cuda"}),
        lambda info: json.dumps(info | {"sources": float("nan")}),
    ],
)
def test_what_a_prebuilt_module_was_built_for(
    change: Callable[[dict[str, str | None]], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = prebuilt.needs() | {"architectures": "8.0", "without_cuda": ""}
    monkeypatch.setattr(prebuilt, "INFO", tmp_path / "irpe_op.json")
    prebuilt.INFO.write_text(json.dumps(info))
    assert prebuilt.built_for() == info
    prebuilt.INFO.write_text(change(info))
    monkeypatch.setattr(prebuilt, "find_spec", lambda name: object())
    with pytest.raises(
        Unavailable, match=r"^cannot read .*irpe_op.json \(.*\): reinstall irpe-ds$"
    ):
        prebuilt.load()
    prebuilt.INFO.unlink()
    with pytest.raises(Unavailable, match=r"irpe_op.json \(.*No such file"):
        prebuilt.load()


@pytest.mark.parametrize(
    "variables",
    [
        {"TORCH_EXTENSIONS_DIR": "/dev/null/x"},
        {"TORCH_EXTENSIONS_DIR": "~nobody-of-this-name/x"},
        {"TORCH_EXTENSIONS_DIR": "/\udcff", "CXX": "\udcff", "TORCH_CUDA_ARCH_LIST": "\udcff"},
        {"CXX": "c++ '"},
        {"CXX": str(ROOT)},
        {"PATH": ""},
        {"CUDA_HOME": "/dev/null"},
        {"HOME": "/no/such/home", "XDG_CACHE_HOME": ""},
    ],
)
def test_the_report_says_what_is_missing(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(library, "is_loaded", lambda: False)
    monkeypatch.setattr(sys, "argv", ["irpe_ds.ops"])
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    report.main()
    assert f"{torch.__version__}, CUDA" in capsys.readouterr().out


def test_the_report_in_an_unusual_python() -> None:
    environment = os.environ | {
        **{"HOME": "/no/such/home", "LC_ALL": "C", "PYTHONWARNINGS": "error"},
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-O", "-m", "irpe_ds.ops"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "\nready ..." in done.stdout
    assert "Traceback" not in done.stderr
