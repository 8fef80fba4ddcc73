"""The manifest: what a .beton file holds and how it came about, in FILE.beton.json."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from irpe_ds.errors import ConfigError

FORMAT = 1
_CHUNK_BYTES = 1 << 22


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents and origin of one .beton file."""

    format: int = FORMAT
    """Version of this record."""
    source: str
    """Folder that the images came from, as it was given."""
    options: dict[str, Any]
    """The options of the conversion."""
    num_samples: int
    """Images in the file."""
    reencoded: int
    """Images that are not the bytes of their source."""
    left_out: int
    """Files in the class folders that are no images by their name."""
    classes: tuple[str, ...]
    """Class names; a label is an index into them."""
    class_counts: tuple[int, ...]
    """Images of each class."""
    size: int
    """Bytes of the file."""
    sha256: str
    """Hash of the file."""
    ffcv: str
    """Version of FFCV that converted."""
    command: str
    """Command that converted."""

    def write(self, path: Path) -> None:
        """Write the record to `path`, all of it or nothing."""
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        os.replace(partial, path)


def manifest_path(beton: Path) -> Path:
    """Where the manifest of this .beton file lies."""
    return beton.with_name(beton.name + ".json")


def read_manifest(beton: Path) -> Manifest | None:
    """The manifest of this .beton file, or None where it has none.

    Raises:
        ConfigError: there is one, but it cannot be read.
    """
    path = manifest_path(beton)
    try:
        values = json.loads(path.read_text())
        if values["format"] != FORMAT:
            raise ConfigError(path, f"a manifest of format {FORMAT}", values["format"])
        lists = {name: tuple(values[name]) for name in ("classes", "class_counts")}
        return Manifest(**values | lists)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(path, "a readable file", error.strerror) from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        expected = "the manifest that data_prep/convert.py wrote"
        raise ConfigError(path, expected, "something else") from None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
