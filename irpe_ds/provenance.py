"""What produced a number or a file: commit, source, versions."""

import contextlib
import hashlib
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("irpe-ds", "torch", "torchvision", "timm", "deepspeed", "ffcv", "numpy", "wandb")
QUIET: dict[str, Any] = {"capture_output": True, "text": True, "check": True}
SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh")


def commit() -> str | None:
    """Commit of the source that runs, with `-dirty` when files differ from it; None outside git."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        # An installed copy may lie in a repository that is not ours, such as the user's own.
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], **QUIET)
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40"], **QUIET
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def package_versions() -> dict[str, str]:
    """Versions of what a run stands on, as far as it is installed."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def source_hash() -> str:
    """Hash of the source, the same for a wheel and a working tree."""
    root = Path(__file__).parent
    paths = {p for r in (root, root / "ops") for p in r.rglob("*.*") if p.suffix in SUFFIXES}
    hashes = sorted({hashlib.sha256(path.read_bytes()).digest() for path in paths})
    return hashlib.sha256(b"".join(hashes)).hexdigest()[:12]
