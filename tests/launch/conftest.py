"""The launch scripts as a user runs them, on a small data set."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.outcomes import BATCH, UPDATES

ROOT = Path(__file__).parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def run() -> Run:
    """Run a command line from the repository's root; its output is text."""

    def run(*command: object, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        bin_dir = Path(sys.executable).parent
        path = f"{bin_dir}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": path}
        return subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture(scope="session")
def digits(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.beton and val.beton of the digits."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    made = run(sys.executable, "data_prep/digits.py", "--out", folder)
    assert made.returncode == 0, made.stderr
    for part in ("train", "val"):
        convert = ("data_prep/convert.py", "--source", folder / part, "--out")
        made = run(sys.executable, *convert, folder / f"{part}.beton")
        assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="module")
def common(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of every run here; the output folder is the first."""
    return [
        f"output={tmp_path_factory.mktemp('survival')}",
        *(f"data.train={digits}/train.beton", f"data.val={digits}/val.beton"),
        *("train.epochs=3", f"train.global_batch={BATCH}", "train.log_every=1"),
        *("train.ema_decay=0.9", f"train.max_updates={UPDATES}", "data.workers=1"),
        *("model.options.depth=2", "model.options.embed_dim=32"),
        *("optim.warmup_epochs=1", "optim.lr=1e-3"),
    ]


@pytest.fixture
def output(common: list[str]) -> Path:
    return Path(common[0].removeprefix("output="))
