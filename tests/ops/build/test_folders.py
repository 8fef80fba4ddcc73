"""Whose compiled code is loaded, from damaged files or not, and who waits for whom to build it."""

import contextlib
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from deepspeed.ops.op_builder.builder import OpBuilder
from torch.utils import cpp_extension

from irpe_ds.errors import ConfigError
from irpe_ds.ops import __main__ as report
from irpe_ds.ops.build import builder, folders, library
from irpe_ds.ops.build.extension import ExtensionBuilder
from irpe_ds.ops.build.toolchain import Unavailable

MODULE = """
#include <Python.h>
static struct PyModuleDef irpe = {PyModuleDef_HEAD_INIT, "irpe"};
PyMODINIT_FUNC PyInit_irpe() { return PyModule_Create(&irpe); }
"""
HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("has it", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small library in place of the operators'."""
    source = tmp_path_factory.mktemp("module") / "irpe.cpp"
    source.write_text(MODULE)
    include = f"-I{sysconfig.get_paths()['include']}"
    made = source.with_suffix(".so")
    subprocess.run(["c++", "-shared", "-fPIC", include, source, "-o", made], check=True)
    return made


@pytest.fixture
def root(module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty TORCH_EXTENSIONS_DIR; a build in it takes no time."""

    def build(self: ExtensionBuilder, verbose: bool = False) -> ModuleType:
        (self.folder / "irpe.so").write_bytes(module.read_bytes())
        (self.folder / "lock").touch()
        return sys

    library.load()  # the real ones, for what `load` registers
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "root"))
    monkeypatch.setattr(ExtensionBuilder, "_loaded", {})
    monkeypatch.setattr(ExtensionBuilder, "jit_load", build)
    return tmp_path / "root"


def load() -> ModuleType:
    """As a new process does."""
    ExtensionBuilder._loaded.clear()
    return ExtensionBuilder().load()


@contextlib.contextmanager
def holding(lock: Path) -> Iterator[int]:
    """Another process that has a file open, and its lock; its number."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDER, lock], **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"has it\n"
        yield process.pid
        process.kill()


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


class TestDamage:
    @pytest.mark.parametrize(
        "damage",
        [
            ("irpe.so", lambda data: data[: len(data) // 2]),
            ("irpe.so", lambda data: b""),
            ("irpe.so", flipped),
            ("finished", lambda data: data[:63]),
            ("finished", lambda data: b""),  # as it was written before
            ("finished", lambda data: data * 1000),
            ("finished", lambda data: b"\xff" * 64),
        ],
    )
    def test_it_is_built_again_once(
        self,
        damage: tuple[str, Callable[[bytes], bytes]],
        root: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(library, "is_loaded", lambda: False)
        load()
        file = ExtensionBuilder().folder / "irpe.so"
        building = f"Building the iRPE operators, once, in {file.parent}\n"
        assert capsys.readouterr().err == building
        assert report.ready_library() == str(file)
        damaged = file.with_name(damage[0])
        data = damage[1](damaged.read_bytes())
        damaged.unlink()  # this process has mapped it
        damaged.write_bytes(data)
        assert report.ready_library() is None
        load()
        said = capsys.readouterr().err
        assert said == f"{file} is damaged: it is built again\n{building}"
        assert load().__file__ == str(file)
        assert not capsys.readouterr().err

    def test_what_an_interrupted_build_left_is_not_used(self, root: Path) -> None:
        folder = ExtensionBuilder().folder
        folder.mkdir(parents=True)
        (folder / "rpe.o").write_text("half of it")
        load()
        assert {path.name for path in folder.iterdir()} == {
            *("building", "finished", "irpe.so", "lock")
        }


class TestOthers:
    def give_away(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        if os.getuid() == 0:
            os.chown(path, 54321, -1, follow_symlinks=False)
        else:
            monkeypatch.setattr(os, "getuid", lambda: 54321)

    @pytest.mark.parametrize("built", [True, False])
    @pytest.mark.parametrize("up", [0, 1, 2], ids=["folder", "above", "root"])
    def test_code_of_another_user_is_refused(
        self, up: int, built: bool, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = ExtensionBuilder().folder
        folder.mkdir(parents=True)
        if built:
            load()
        theirs = [folder, *folder.parents][up]
        self.give_away(theirs, monkeypatch)
        refused = r"^refused code that other users could replace: .* belongs to .*; "
        with pytest.raises(Unavailable, match=refused + "set TORCH_EXTENSIONS_DIR to a folder of"):
            load()
        assert "belongs to" in str(report.missing_build_tool("cpu"))
        if os.getuid() == 0:
            assert f"{theirs} belongs to 54321" in str(report.missing_build_tool("cpu"))

    @pytest.mark.parametrize(
        ("up", "mode", "refused"),
        [
            *((0, 0o777, True), (0, 0o1777, True), (0, 0o775, False), (1, 0o777, True)),
            *((2, 0o777, True), (2, 0o1777, False), (2, 0o2775, False)),
        ],
    )
    def test_a_folder_that_all_may_write_to(
        self, up: int, mode: int, refused: bool, root: Path
    ) -> None:
        load()
        folder = [ExtensionBuilder().folder, *ExtensionBuilder().folder.parents][up]
        folder.chmod(mode)
        context = pytest.raises(Unavailable, match=f"every user can write to {folder};")
        with context if refused else contextlib.nullcontext():
            load()
        folder.chmod(0o755)

    @pytest.mark.parametrize("name", ["irpe.so", "finished"])
    def test_a_file_that_all_may_write_to(self, name: str, root: Path) -> None:
        load()
        (ExtensionBuilder().folder / name).chmod(0o666)
        with pytest.raises(Unavailable, match=f"every user can write to .*{name};"):
            load()

    def test_no_umask_makes_one(self, root: Path) -> None:
        umask = os.umask(0)
        try:
            load()
            assert load().__file__
        finally:
            assert os.umask(umask) == 0

    @pytest.mark.parametrize("name", ["failed", "finished", "build.log", "irpe.so", "lock"])
    def test_a_link_is_not_followed(
        self, name: str, module: Path, root: Path, tmp_path: Path
    ) -> None:
        mine = tmp_path / "mine"
        mine.write_bytes(module.read_bytes())
        folder = ExtensionBuilder().folder
        folder.mkdir(parents=True)
        if name == "irpe.so":
            (folder / "finished").write_text(folders._sha256(mine))
        (folder / name).symlink_to(mine)
        load()
        assert mine.read_bytes() == module.read_bytes()
        assert not (folder / name).is_symlink()

    def test_a_link_in_place_of_the_lock(self, root: Path, tmp_path: Path) -> None:
        mine = tmp_path / "mine"
        mine.write_text("mine")
        folder = ExtensionBuilder().folder
        folder.mkdir(parents=True)
        (folder / "building").symlink_to(mine)
        with pytest.raises(Unavailable, match=r"^cannot build in .*a symbolic link in place of"):
            load()
        assert mine.read_text() == "mine"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Says who is waited for all the time, and gives up at once."""
    for name, seconds in (("POLL", 0.01), ("SAY", 0.02), ("GIVE_UP", 0.1)):
        monkeypatch.setattr(folders, f"{name}_SECONDS", seconds)


@pytest.mark.usefixtures("quick")
class TestWaiting:
    @pytest.mark.parametrize("name", ["building", "lock"])
    def test_it_is_said_who_builds(
        self, name: str, root: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = ExtensionBuilder().folder
        folder.mkdir(parents=True)
        with holding(folder / name) as process:
            with pytest.raises(Unavailable, match=f"^waited half an hour for process {process}"):
                load()
            first, *_ = capsys.readouterr().err.splitlines()
            command = f"{sys.executable} -c "
            assert first.startswith(f"waiting for process {process} ({command}")
            assert first.endswith(f") to build the operators in {folder}")
        assert load() is sys  # it was killed: nothing is left of its lock

    def test_someone_who_cannot_be_seen(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = ExtensionBuilder().folder
        folder.mkdir(parents=True)
        monkeypatch.setattr(folders, "processes_with", lambda path: [])
        expected = "^waited half an hour for a process, of another host or user, to build in"
        with holding(folder / "building"), pytest.raises(Unavailable, match=expected):
            load()

    @pytest.mark.parametrize("leaves_locks", [True, False], ids=["torch 2.8", "torch 2.14"])
    def test_deepspeeds_own_ops(
        self,
        leaves_locks: bool,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """They are built one at a time, and where nobody else can write."""
        folder, op = tmp_path / "cpu_adam", SimpleNamespace(name="cpu_adam")
        said = f"Building DeepSpeed's cpu_adam, once, in {folder}\n"

        def build(self: Any, verbose: bool = True) -> str:
            assert not (folder / "lock").exists()
            with pytest.raises(BlockingIOError):
                folders.lock_file(folder / "building")
            (folder / "cpu_adam.so").write_text("built")
            return "built"

        def fail(self: Any, verbose: bool = True) -> None:
            raise RuntimeError("ninja\nadam.cpp:1:2: fatal error: no cblas.h\n")

        def guard(build: Callable[..., Any]) -> Callable[..., Any]:
            monkeypatch.setattr(OpBuilder, "jit_load", build)
            builder.guard_deepspeed_builds.__wrapped__()
            return OpBuilder.jit_load

        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        monkeypatch.delattr(cpp_extension, "FileBaton", raising=False)
        if leaves_locks:
            monkeypatch.setattr(cpp_extension, "FileBaton", object, raising=False)
        with pytest.raises(ConfigError, match=r"^cannot build DeepSpeed's .*: fatal error: no cbl"):
            guard(fail)(op)
        assert capsys.readouterr().err == said
        (folder / "lock").touch()  # left by a killed process
        assert guard(build)(op) == "built"
        assert capsys.readouterr().err == said
        with holding(folder / "building"):  # what is built, ranks load side by side
            if leaves_locks:
                with pytest.raises(ConfigError, match="waited half an hour"):
                    guard(build)(op)
            else:
                assert guard(lambda *_: "loaded")(op) == "loaded"
        folder.chmod(0o777)
        expected = f"^cannot build DeepSpeed's cpu_adam: refused .*write to {folder};"
        with pytest.raises(ConfigError, match=expected):
            guard(build)(op)
