"""Files that are whole on the disk, or not there."""

import os
from pathlib import Path


def fsync(path: Path) -> None:
    """Return when a file's contents, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, text: str) -> None:
    """Give the file this content at one stroke, even if the machine dies in between."""
    aside = path.with_name(f".{path.name}.new")
    with aside.open("w", newline="", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
