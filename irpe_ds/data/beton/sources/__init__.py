"""Sources of images, read in place: a folder, archives, tables.

Each lists its files with their paths, and labels where it has them. What becomes of these is one
rule for all (`irpe_ds/data/beton/listing.py`), so the same images make the same .beton file
whatever they were packed in.
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path, PurePosixPath

from irpe_ds.data.beton.options import SourceOptions
from irpe_ds.data.beton.sources.files import Files
from irpe_ds.data.beton.sources.folder import Folder
from irpe_ds.data.beton.sources.parquet import Parquet
from irpe_ds.data.beton.sources.shards import CLS, WebDataset
from irpe_ds.data.beton.sources.source import (
    EXTENSIONS,
    IMAGE_BYTES,
    Member,
    Source,
    is_hidden,
    is_image,
)
from irpe_ds.data.beton.sources.tars import ClassTars, Tar, TarOfTars, clean, entries
from irpe_ds.data.beton.sources.zips import Zip
from irpe_ds.errors import ConfigError
from irpe_ds.files import open_regular

__all__ = ["IMAGE_BYTES", "Files", "Member", "Source", "is_image", "open_source"]

_LOOK = 8  # files at the beginning of an archive that tell its kind
_DEFAULT = SourceOptions()


def open_source(paths: Sequence[Path], options: SourceOptions = _DEFAULT) -> Source:
    """Find out the kind of a source from its contents.

    Args:
        paths: a folder; a .tar or .zip, or a folder in it (`a.zip/train`); a tar of class tars, or
            several; shards of a WebDataset; Parquet files; or a folder of such archives.

    Raises:
        ConfigError: a path does not exist, or they do not go together.
        DataError: an archive cannot be read.
    """
    expected = "a folder with one folder per class, or archives"
    if not paths:
        raise ConfigError("--source", expected, "nothing")
    (first, within), given = _split(paths[0]), tuple(paths)
    missing = [path for path in (first, *paths[1:]) if not path.exists()]
    if missing:
        raise ConfigError("--source", expected, f"{missing[0]}, which does not exist")
    folders = [path for path in paths if path.is_dir()]
    if folders and len(paths) > 1:
        raise ConfigError("--source", "one folder", f"{len(paths)} paths")
    archives = _archives(first) if folders else (first, *paths[1:])
    source = _of_archives(archives, options) if archives else Folder([first], options)
    source.paths, source.within = given, within
    return source


def _split(path: Path) -> tuple[Path, str]:
    """An archive, and the folder in it that a path such as a.zip/train names."""
    for parent in () if path.exists() else path.parents:
        if parent.is_file():
            return parent, path.relative_to(parent).as_posix() + "/"
    return path, ""


def _archives(folder: Path) -> tuple[Path, ...]:
    """The archives in a folder that holds no other folders and no images."""
    try:
        found = [path for path in sorted(folder.iterdir()) if not is_hidden(path.name)]
    except OSError:
        return ()  # whose error is that of a folder
    if any(path.is_dir() or is_image(path.name) for path in found):
        return ()
    for suffix in (".tar", ".parquet"):  # img2dataset writes a table for each shard
        if archives := tuple(path for path in found if path.suffix == suffix):
            return archives
    return ()


def _of_archives(paths: tuple[Path, ...], options: SourceOptions) -> Source:
    """The kind of some archives, from the first files in the first one."""
    if paths[0].suffix == ".parquet":
        return Parquet(paths, options)
    if _is_zip(paths[0]):
        if len(paths) > 1:
            raise ConfigError("--source", "one zip", f"{len(paths)} paths")
        return Zip(paths, options)
    names = (clean(entry.name) for entry in entries(paths[0]))
    files = (name for name in names if not name.endswith("/") and not is_hidden(name))
    first = list(islice(files, _LOOK))
    suffixes = {PurePosixPath(name).suffix.lower() for name in first}
    is_flat = not any("/" in name for name in first)
    if options.labels is None and (
        f".{CLS}" in suffixes or options.label_key or (".json" in suffixes and is_flat)
    ):
        return WebDataset(paths, options)
    if ".tar" in suffixes and not suffixes & EXTENSIONS and len(paths) == 1:
        return TarOfTars(paths, options)
    return (ClassTars if options.labels is None and len(paths) > 1 else Tar)(paths, options)


def _is_zip(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            return file.read(2) == b"PK"
    except OSError:
        return False  # whose error is that of a tar
