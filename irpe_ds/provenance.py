"""What produced a number or a file: commit, source, versions."""

import contextlib
import hashlib
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("irpe-ds", "torch", "torchvision", "timm", "deepspeed", "ffcv", "numpy", "wandb")
QUIET: dict[str, Any] = {"capture_output": True, "text": True, "check": True}
SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh")


def commit() -> str | None:
    """Commit of the source that runs, with `-dirty` when files differ from it; None outside git."""
    here = Path(__file__)
    # The checkout may be another user's, whose code this process runs anyway.
    git = ["git", "-C", str(here.parent), "-c", f"safe.directory={here.parents[1]}"]
    try:
        # An installed copy may lie in a repository that is not ours, such as the user's own.
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], **QUIET)
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40"], **QUIET
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def package_versions(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def source_hash() -> str:
    """Hash of the source but its scripts, the same for a wheel and a working tree."""
    root = Path(__file__).parent
    found = {p for r in (root, root / "ops") for p in r.rglob("*.*") if p.suffix in SUFFIXES}
    paths = [path for path in found if root / "scripts" not in path.parents]
    hashes = sorted({hashlib.sha256(path.read_bytes()).digest() for path in paths})
    return hashlib.sha256(b"".join(hashes)).hexdigest()[:12]


def cpu_name() -> str:
    """Model of this machine's CPU, and the number of cores that this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return f"{names[0] if names else platform.processor()}, {cores} cores"


def benchmark_info(module: str, packages: Iterable[str]) -> dict[str, Any]:
    """What the numbers of `python -m module` depend on: command, commit, CPU and versions."""
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "commit": commit(),
        "device": cpu_name(),
        "versions": package_versions(packages),
    }
