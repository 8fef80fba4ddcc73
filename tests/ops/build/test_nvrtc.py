"""Kernels compiled at run time, and kept."""

from collections.abc import Callable
from pathlib import Path

import pytest

from irpe_ds.ops.build import nvrtc
from irpe_ds.ops.build.toolchain import Unavailable

KERNEL = '#include "number.cuh"\nextern "C" __global__ void k(int* x) { *x = NUMBER + OTHER; }\n'


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IRPE_KERNEL_CACHE", str(tmp_path / "kept"))
    (tmp_path / "number.cuh").write_text("#define NUMBER 40\n")
    (tmp_path / "k.cu").write_text(KERNEL)
    return tmp_path / "k.cu"


def test_a_kernel_is_compiled_once(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = nvrtc.compile_kernel(source, {"OTHER": 2}, "compute_80")
    assert b".visible .entry k(" in first
    with monkeypatch.context() as patched:
        patched.setattr(nvrtc, "_compile", lambda *_: b"compiled again")
        assert nvrtc.compile_kernel(source, {"OTHER": 2}, "compute_80") == first
        assert nvrtc.compile_kernel(source, {"OTHER": 3}, "compute_80") == b"compiled again"
        assert nvrtc.compile_kernel(source, {"OTHER": 2}, "compute_90") == b"compiled again"
    (source.parent / "number.cuh").write_text("#define NUMBER 41\n")
    assert nvrtc.compile_kernel(source, {"OTHER": 2}, "compute_80") != first
    assert not [path for path in nvrtc.cache_folder().iterdir() if "partial" in path.name]


def test_a_folder_that_cannot_be_written_costs_only_time(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IRPE_KERNEL_CACHE", "/dev/null/kept")
    assert b".entry k(" in nvrtc.compile_kernel(source, {"OTHER": 2}, "compute_80")


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: kept[:-1],
        lambda kept: kept[:-1] + b"?",
        lambda kept: kept[32:],  # as they were kept before
        lambda kept: b"",
    ],
)
def test_a_damaged_kernel_is_compiled_again(
    damage: Callable[[bytes], bytes], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = nvrtc.compile_kernel(source, {"OTHER": 2}, "compute_80")
    (kept,) = nvrtc.cache_folder().iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))
    assert nvrtc.compile_kernel(source, {"OTHER": 2}, "compute_80") == first
    assert capsys.readouterr().err == f"{kept} is damaged: the kernel is compiled again\n"
    assert kept.read_bytes() == whole


@pytest.mark.parametrize("name", ["", "kept"], ids=["folder", "file"])
def test_a_kernel_that_others_may_have_written_is_not_used(
    name: str, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nvrtc, "_compile", lambda *_: b"compiled")
    nvrtc.compile_kernel(source, {}, "compute_80")
    (kept,) = nvrtc.cache_folder().iterdir()
    theirs = kept if name else kept.parent
    theirs.chmod(0o777)
    monkeypatch.setattr(nvrtc, "_compile", lambda *_: b"compiled again")
    for _ in range(2):
        assert nvrtc.compile_kernel(source, {}, "compute_80") == b"compiled again"
    hint = "so kernels are compiled anew: set IRPE_KERNEL_CACHE to another folder"
    assert capsys.readouterr().err == f"every user can write to {theirs}, {hint}\n"


def test_what_does_not_compile_is_told(source: Path) -> None:
    with pytest.raises(RuntimeError, match=r'cannot compile k.cu(?s:.*)"OTHER" is undefined'):
        nvrtc.compile_kernel(source, {}, "compute_80")
    with pytest.raises(Unavailable, match="does not compile for sm_12"):
        nvrtc.compile_kernel(source, {"OTHER": 2}, "sm_12")
