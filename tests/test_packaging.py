"""The wheel: what is in it, and that it works where nothing else of the repository is."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from irpe_ds.provenance import source_hash

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
GATHER = """
import torch
from irpe_ds.ops import irpe_gather
from irpe_ds.ops.build import library

ids = torch.tensor([[2, 0], [1, 1]])
lookup = torch.tensor([[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]])
assert irpe_gather(lookup, ids).tolist() == [[[[3.0, 1.0], [5.0, 5.0]]]]
print(library.load().origin)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", folder, ROOT], check=True)
    (path,) = folder.glob("*.whl")
    return path


def test_it_holds_every_module_and_kernel_and_nothing_else(wheel: Path) -> None:
    suffixes = {".py", ".cpp", ".cu", ".cuh", ".h", ".typed", ".yaml", ".json", ".sbatch"}
    links = (ROOT / "irpe_ds/ops", *(ROOT / "irpe_ds/scripts").iterdir())
    tree = {
        str(path.relative_to(ROOT))
        for folder in (ROOT / "irpe_ds", *links)  # rglob follows no link
        for path in folder.rglob("*")
        if path.suffix in suffixes and "results" not in path.parts
    }
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name for name in found if Path(name).suffix in suffixes} == tree
    assert not [name for name in found if "test" in name.lower()]


def test_an_environment_of_torch_and_timm(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")  # one of three, to compile for less long
    monkeypatch.delenv("PYTHONPATH", raising=False)
    ours, folders = str(Path(sys.executable).parent), os.environ["PATH"].split(os.pathsep)
    monkeypatch.setenv("PATH", os.pathsep.join(x for x in folders if x != ours))  # its own ninja
    python = tmp_path / "venv/bin/python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    pip = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt"]
    subprocess.run([*pip, f"irpe-ds @ {wheel.as_uri()}"], check=True)

    def call(*command: str) -> "subprocess.CompletedProcess[str]":
        program, *words = command
        path = python.with_name(program)
        return subprocess.run([path, *words], cwd=tmp_path, capture_output=True, text=True)

    assert "PyTorch alone builds the operators" in call("irpe-ds", "ops").stdout
    assert call("python", "-c", GATHER).stdout.splitlines()[-1].startswith(f"{tmp_path}/extensions")
    code = "from irpe_ds.provenance import source_hash; print(source_hash())"
    assert call("python", "-c", code).stdout.strip() == source_hash()
    assert "| `deit_small_patch16_224_ctx_product_50_shared_k` |" in call("irpe-ds", "zoo").stdout
    train = call("irpe-ds", "train", "--config", "launch/configs/quickstart.yaml")
    assert train.stderr == "error: psutil is not installed: pip install 'irpe-ds[train]'\n"


def test_a_build_on_installation_refuses_architectures_that_make_no_sense() -> None:
    environment = {**os.environ, "DS_BUILD_IRPE": "1", "TORCH_CUDA_ARCH_LIST": "nonsense"}
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: TORCH_CUDA_ARCH_LIST: expected")
