"""A run trains in surroundings that are not the usual ones."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from irpe_ds import provenance
from tests.launch.outcomes import slow
from tests.launch.ranks import CONFIG

STRICT, PLAIN = "PYTHONWARNINGS=error", "LC_ALL=C"
NO_HOME, NO_PLACE = "HOME=/nowhere", "HOME=/proc/sys"
"""No folder, and one in which not even root can create files: no cache of any library is there."""


@pytest.mark.dist
@pytest.mark.parametrize(
    ("variables", "options"),
    [
        ([STRICT, PLAIN, "PYTHONUTF8=0", NO_PLACE], ["-O"]),
        slow([STRICT], []),
        slow([PLAIN, "PYTHONUTF8=0", "PYTHONCOERCECLOCALE=0"], []),
        slow(["TORCH_EXTENSIONS_DIR=/proc/sys", NO_HOME], []),
        slow([], ["-O"]),
    ],
)
def test_it_trains(
    variables: list[str], options: list[str], run: Any, common: list[str], output: Path
) -> None:
    name = f"surroundings-{len(variables)}-{len(options)}"
    command = ("env", *variables, sys.executable, *options, "launch/train.py", "--config", CONFIG)
    done = run(*command, *common, f"name={name}", "train.max_updates=1", "train.precision=fp32")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    found = json.loads((output / name / "environment.json").read_text())
    assert found["attention_op"]["why"].startswith("auto: ")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_another_users_checkout_has_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Git refuses to look into it (dubious ownership) without being told."""
    package = tmp_path / "checkout/irpe_ds"
    package.mkdir(parents=True)
    shutil.copy(provenance.__file__, package)
    git = ("git", "-C", package.parent, "-c", "user.name=x", "-c", "user.email=x@x")
    for command in (("init", "-q"), ("add", "."), ("commit", "-qm", "One")):
        subprocess.run([*git, *command], check=True)
    for path in (package.parent, *package.parent.rglob("*")):
        os.chown(path, 65534, 65534)
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    commit = provenance.commit()
    assert commit is not None
    assert len(commit) == 40
