"""Building the operators: what is found, what is missing and in which words, what lies ready."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from deepspeed.env_report import op_report
from deepspeed.ops.op_builder.builder import CUDAOpBuilder

from irpe_ds.ops import __main__ as report
from irpe_ds.ops.build import folders, library, prebuilt, toolchain
from irpe_ds.ops.build.builder import IRPEBuilder
from irpe_ds.ops.build.extension import ExtensionBuilder
from irpe_ds.ops.build.toolchain import Unavailable

ROOT = Path(__file__).parents[3]


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and no operators in this process as far as the builders know."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(ExtensionBuilder, "_loaded", {})
    return tmp_path


def test_it_is_a_deepspeed_op() -> None:
    builder = IRPEBuilder()
    assert isinstance(builder, CUDAOpBuilder)
    assert builder.is_compatible()
    assert library.load().origin
    assert builder.load().__file__ == library.load().origin
    assert all(Path(source).exists() for source in builder.sources())


def test_with_deepspeed_or_without_it_is_the_same_build(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = ExtensionBuilder()
    builder = library._with_deepspeed(alone)
    assert isinstance(builder, IRPEBuilder)
    assert builder.folder == alone.folder
    assert builder.cxx_args() == alone.cxx_args()
    monkeypatch.setitem(sys.modules, IRPEBuilder.__module__, None)  # DeepSpeed cannot be imported
    assert library._with_deepspeed(alone) is alone


def test_cuda_is_built_without_a_gpu() -> None:
    assert library.load().cuda is None
    assert torch._C._dispatch_has_kernel_for_dispatch_key("irpe_ds::bucket_sum", "CUDA")


def test_ds_report_knows_it(capsys: pytest.CaptureFixture[str]) -> None:
    op_report(verbose=False)
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("irpe "))
    assert "OKAY" in line


class TestWhatIsMissing:
    def reason(self) -> str:
        with pytest.raises(Unavailable) as caught:
            IRPEBuilder().load()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_no_compiler(self, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler")
        expected = "no C++ compiler 'no-such-compiler': install g++, or set CXX"
        assert self.reason() == expected

    def test_a_broken_compiler(self, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        broken = script(
            fresh / "c++",
            'case "$*" in *-version*|*-dump*) exec c++ "$@";; esac\n'
            'echo "x.cpp:3:5: fatal error: torch went missing" >&2; exit 1',
        )
        monkeypatch.setenv("CXX", str(broken))
        log = IRPEBuilder().folder / "build.log"
        expected = f"the build failed, see {log}: x.cpp:3:5: fatal error: torch went missing"
        assert self.reason() == expected
        assert "binding.cpp" in log.read_text()

    def test_who_waited_for_a_build_that_failed_does_not_try_again(
        self, fresh: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CXX", str(script(fresh / "c++", 'case "$*" in *-c*) exit 1;; esac')))
        folder = IRPEBuilder().folder
        folder.mkdir(parents=True)
        with ThreadPoolExecutor() as pool, (folder / "building").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = pool.submit(self.reason)
            time.sleep(1)
            (folder / "failed").write_text("torch went missing")
            fcntl.flock(lock, fcntl.LOCK_UN)
            assert found.result() == "torch went missing"
        time.sleep(0.1)
        assert "see" in self.reason()  # who comes later does

    def test_no_ninja(self, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(toolchain, "path_with_scripts", lambda: str(fresh))
        assert self.reason() == "ninja is not installed: pip install ninja"

    def test_a_cache_that_cannot_be_written(
        self, fresh: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/proc/no/such/folder")
        reason = self.reason()
        assert reason.startswith(f"cannot build in {IRPEBuilder().folder} (")
        assert reason.endswith("set TORCH_EXTENSIONS_DIR to a writable folder")


def test_a_lock_that_a_killed_build_left_is_no_obstacle(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "/bin/false"}
    code = "from irpe_ds.ops.build import builder, library; f = builder.IRPEBuilder().folder; "
    code += "f.mkdir(parents=True); (f / 'lock').touch(); print(library.load().cpu)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert "/bin/false" in done.stdout


def test_a_gpu_without_nvcc_still_builds_for_the_cpu(tmp_path: Path) -> None:
    """PyTorch alone builds; of two processes with several threads each, one builds."""
    code = """
import sys, threading, torch
sys.modules["deepspeed"] = None  # as if it were not installed
from irpe_ds.ops import irpe_gather
from irpe_ds.ops.build import library
from irpe_ds.ops.build import toolchain
torch.cuda.is_available = lambda: True
toolchain._homes = lambda major: iter(())
lookup, ids = torch.randn(1, 1, 2, 3, requires_grad=True), torch.zeros(2, 2).int()
call = lambda: irpe_gather(lookup, ids).sum().backward()
threads = [threading.Thread(target=call) for _ in range(3)]
[t.start() for t in threads], [t.join() for t in threads]
print(lookup.grad.sum().item(), library.load().cuda)
"""
    calls = tmp_path / "calls"
    counted = f'case "$*" in *" -c "*) echo "$*" >> {calls};; esac; exec c++ "$@"'
    cxx = str(script(tmp_path / "c++", counted))
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": "relative", "CXX": cxx}
    command = [sys.executable, "-c", code]

    def start() -> "subprocess.Popen[str]":
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=environment, cwd=tmp_path, text=True, **pipes)

    outputs = [process.communicate(timeout=900) for process in (start(), start())]
    for stdout, stderr in outputs:
        assert stdout.splitlines()[-1].startswith("12.0 nvcc not found"), stderr
    (finished,) = (tmp_path / "relative").rglob("finished")
    assert sum(stderr.count("Building the iRPE operators") for _, stderr in outputs) == 1
    compiled = [Path(word).name for word in calls.read_text().split() if word.endswith(".cpp")]
    assert sorted(compiled) == ["binding.cpp", "rpe.cpp"]
    command[2] = code.replace("torch.cuda.is_available =", "toolchain.cxx = None\n#")
    again = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert again.stdout.splitlines()[-1].startswith("12.0"), again.stderr
    assert "Building" not in again.stderr
    assert finished.exists()


def test_other_sources_or_options_are_another_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(toolchain.CSRC, tmp_path / "csrc")
    monkeypatch.setattr(toolchain, "CSRC", tmp_path / "csrc")
    toolkit = toolchain.cuda()
    folders = [toolchain.cache(toolkit), toolchain.cache(None)]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    folders.append(toolchain.cache(toolkit))
    with (tmp_path / "csrc" / "cuda" / "rpe.cu").open("a") as file:
        file.write("// more\n")
    folders.append(toolchain.cache(toolkit))
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize(
    ("capability", "compiled", "runs"),
    [
        ((9, 0), "8.0;9.0+PTX", True),
        ((8, 6), "8.0;9.0+PTX", True),
        ((12, 0), "8.0;9.0+PTX", True),
        ((7, 5), "8.0;9.0+PTX", False),
        ((8, 0), "9.0", False),
        ((8, 0), "8.6 9.0+PTX", False),
    ],
)
def test_which_gpus_the_kernels_are_for(
    capability: tuple[int, int], compiled: str, runs: bool
) -> None:
    assert toolchain.runs_on(capability, compiled) == runs


def test_a_finished_build_needs_no_compiler_and_must_load(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = IRPEBuilder().folder
    folder.mkdir(parents=True)
    (folder / "irpe.so").write_text("no library")
    folders.mark_complete(folder / "irpe.so")
    monkeypatch.setattr(toolchain, "ninja", None)
    with pytest.raises(Unavailable, match=r"^cannot load .*irpe\.so: .*file too short"):
        IRPEBuilder().load()


class TestCUDAToolkit:
    def only(self, monkeypatch: pytest.MonkeyPatch, *homes: Path) -> None:
        monkeypatch.setattr(toolchain, "_homes", lambda major: iter(homes))

    def test_of_the_nvidia_wheels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What `irpe-ds[cuda]` installs, and `make setup` with it."""
        (home,) = toolchain._wheels("13")
        self.only(monkeypatch, home)
        assert toolchain.cuda().home == home
        assert toolchain.cuda().version.startswith("13.")

    def test_another_version_of_cuda(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        old = script(tmp_path / "old/bin/nvcc", 'echo "tools, release 12.4, V12.4.131"')
        self.only(monkeypatch, tmp_path / "old")
        reason = f"{old} is CUDA 12.4, PyTorch is built for CUDA {torch.version.cuda}; install CUDA"
        with pytest.raises(Unavailable, match=f"^{reason}"):
            toolchain.cuda()
        builder = IRPEBuilder()
        assert builder.without_cuda.startswith(reason)
        assert not any(source.endswith(".cu") for source in builder.sources())
        assert "-DIRPE_WITH_CUDA" not in builder.cxx_args()

    def test_the_first_that_fits(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        script(tmp_path / "old/bin/nvcc", 'echo "tools, release 12.4, V12.4.131"')
        (home,) = toolchain._wheels("13")
        self.only(monkeypatch, tmp_path / "old", tmp_path / "none", home)
        assert toolchain.cuda().home == home

    @pytest.mark.parametrize(
        ("nvcc", "reason"),
        [
            ("exit 3", "cannot run .*bin/nvcc"),
            ('echo "release 13.0, V13.0.88"', "has no include/cuda_runtime_api.h"),
        ],
    )
    def test_half_a_toolkit(
        self, nvcc: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        script(tmp_path / "bin/nvcc", nvcc)
        self.only(monkeypatch, tmp_path)
        with pytest.raises(Unavailable, match=reason):
            toolchain.cuda()

    def test_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.only(monkeypatch)
        with pytest.raises(Unavailable, match=r"^nvcc not found; install CUDA .*irpe-ds\[cuda"):
            toolchain.cuda()
        monkeypatch.setattr(torch.version, "cuda", None)
        with pytest.raises(Unavailable, match=r"^this PyTorch is built without CUDA$"):
            toolchain.cuda()


class TestReport:
    def lines(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> dict[str, str]:
        monkeypatch.setattr(sys, "argv", ["irpe_ds.ops"])
        report.main()
        split = (line.partition(" ..") for line in capsys.readouterr().out.splitlines())
        return {name: rest.lstrip(". ") for name, dots, rest in split if dots}

    def test_ready(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        library.load()
        lines = self.lines(monkeypatch, capsys)
        for name in ("reference", "cpu (cpu)", "gather (cpu)", "gather (cuda)"):
            assert lines[name].startswith("[YES]")
            assert lines[name].endswith("[OKAY]")
        assert lines["architectures"] == toolchain.architectures()
        assert lines["ready"] == library.load().origin

    def test_what_is_ready_needs_no_compiler(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(library, "is_loaded", lambda: False)
        monkeypatch.setattr(report, "ready_library", lambda: "irpe_op.so")
        monkeypatch.setenv("CXX", "no-such-compiler")
        line = self.lines(monkeypatch, capsys)["cpu (cpu)"]
        assert line.startswith("[YES]")
        assert line.endswith("[OKAY]")

    def test_says_what_is_missing(
        self,
        fresh: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(library, "is_loaded", lambda: False)
        monkeypatch.setattr(toolchain, "_homes", lambda major: iter(()))
        lines = self.lines(monkeypatch, capsys)
        assert lines["cpu (cpu)"].startswith("[NO]")
        assert lines["cpu (cpu)"].endswith("[OKAY]")
        assert "[NO] nvcc not found" in lines["gather (cuda)"]
        assert lines["ready"].startswith("no: built on first use")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as DS_BUILD_IRPE=1 pip install puts it, in a folder of its own."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps"]
    environment = {**os.environ, "DS_BUILD_IRPE": "1"}
    subprocess.run([*pip, "--target", folder, ROOT], env=environment, check=True)
    return folder


@pytest.mark.slow
class TestAheadOfTime:
    @pytest.fixture
    def load(self, installed: Path, tmp_path: Path) -> Callable[[], str]:
        """Loads the operators where nothing could be compiled."""

        def run() -> str:
            environment = {
                **os.environ,
                "PYTHONPATH": str(installed),
                "CXX": "no-such-compiler",
                "TORCH_EXTENSIONS_DIR": str(tmp_path),
            }
            code = (
                "from irpe_ds.ops.build import library as l; print(l.load().cpu or l.load().origin)"
            )
            command = [sys.executable, "-c", code]
            done = subprocess.run(
                command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
            )
            return done.stdout.splitlines()[-1]

        return run

    def test_it_is_found_and_nothing_is_compiled(
        self, installed: Path, load: Callable[[], str]
    ) -> None:
        assert load().startswith(f"{installed}/irpe_ds/ops/irpe_op")

    def test_every_module_is_installed_and_no_test(self, installed: Path) -> None:
        package = installed / "irpe_ds"
        folders = {ROOT / "irpe_ds": package, ROOT / "ops": package / "ops"}
        for source, target in folders.items():
            modules = {file.relative_to(source) for file in source.rglob("*.py")}
            assert all((target / module).exists() for module in modules)
        assert (package / "ops" / "csrc" / "cuda" / "rpe.cu").exists()
        assert not [*installed.rglob("test_*.py")]

    def test_another_torch_is_refused(self, installed: Path, load: Callable[[], str]) -> None:
        file = installed / "irpe_ds" / "ops" / "irpe_op.json"
        built = json.loads(file.read_text())
        found = {"architectures": toolchain.architectures(), "without_cuda": ""}
        assert built == prebuilt.needs() | found
        file.write_text(json.dumps(built | {"torch": "2.6.0"}))
        try:
            refused = load()
            assert refused.startswith(f"prebuilt for torch 2.6.0, cuda {built['cuda']}, sources ")
            assert f", but found torch {torch.__version__}, cuda {built['cuda']}" in refused
            assert refused.endswith(": reinstall irpe-ds")
        finally:
            file.write_text(json.dumps(built))
