"""irpe_ds/ops is a link inside its own tree: a clone never runs the operators of another one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("copied", ["clone", "link followed"])
def test_another_tree_imports_its_own_operators(tmp_path: Path, copied: str) -> None:
    """With this tree importable too, as it is for a clone that uses this one's environment."""
    shutil.copytree(ROOT / "irpe_ds", tmp_path / "irpe_ds", symlinks=copied == "clone")
    if copied == "clone":
        shutil.copytree(ROOT / "ops", tmp_path / "ops")
    code = "import irpe_ds, irpe_ds.ops; print(irpe_ds.__file__, irpe_ds.ops.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=900,
    )
    package, operators = (Path(file).resolve() for file in done.stdout.split())
    assert package == tmp_path.resolve() / "irpe_ds/__init__.py"
    ops = tmp_path.resolve() / ("ops" if copied == "clone" else "irpe_ds/ops")
    assert operators == ops / "__init__.py"
