"""Kernels compiled at run time, and kept."""

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


def test_what_does_not_compile_is_told(source: Path) -> None:
    with pytest.raises(RuntimeError, match=r'cannot compile k.cu(?s:.*)"OTHER" is undefined'):
        nvrtc.compile_kernel(source, {}, "compute_80")
    with pytest.raises(Unavailable, match="does not compile for sm_12"):
        nvrtc.compile_kernel(source, {"OTHER": 2}, "sm_12")
