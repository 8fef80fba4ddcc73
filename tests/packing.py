"""Sets of images packed in every way that a source may be, and what is listed of them."""

import io
import json
import tarfile
import zipfile
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from irpe_ds.data.beton.journal import Journal
from irpe_ds.data.beton.options import SourceOptions
from irpe_ds.data.beton.sources import open_source

Tree = Mapping[str, bytes]
"""Contents of files by path; a path that ends with a slash is a folder."""


def in_folder(path: Path, tree: Tree) -> Path:
    for name, data in tree.items():
        file = path / name
        (file if name.endswith("/") else file.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            file.write_bytes(data)
    return path


def in_tar(path: Path, tree: Tree) -> Path:
    with tarfile.open(path.with_suffix(".tar"), "w") as archive:
        for name, data in tree.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path.with_suffix(".tar")


def in_zip(path: Path, tree: Tree) -> Path:
    with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
        for number, (name, data) in enumerate(tree.items()):
            how = zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED
            archive.writestr(name, data, how)
    return path.with_suffix(".zip")


def with_labels(tree: Tree, *, suffix: str = "json") -> dict[str, bytes]:
    """Samples of a shard; the images of a class do not follow each other."""
    found = {}
    for path in sorted(tree, key=lambda path: path[::-1]):
        label, name = path.split("/")
        record = {"caption": "a photo", "label": ("cat", "dog").index(label)}
        found[name] = tree[path]
        found[f"{name[:-3]}{suffix}"] = json.dumps(record).encode()
    return found


def parquet(path: Path, tree: Tree, **table: Any) -> Path:
    """As `datasets` writes it, in row groups of two."""
    features = {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    paths = sorted(tree, key=lambda path: path[::-1])
    columns = {
        "image": [{"bytes": tree[path], "path": path.split("/")[1]} for path in paths],
        "label": [("cat", "dog").index(path.split("/")[0]) for path in paths],
    }
    made = pyarrow.table(columns | table).replace_schema_metadata(metadata)
    pyarrow.parquet.write_table(made, path, row_group_size=2)
    return path


def class_tars(folder: Path, tree: Tree) -> Path:
    folder.mkdir(parents=True)
    for name in ("cat", "dog"):
        images = {path[4:]: data for path, data in tree.items() if path.startswith(name)}
        in_tar(folder / name, images)
    return folder


def listed(
    *paths: Path, **options: Any
) -> tuple[tuple[str, ...], list[tuple[int, str]], tuple[str, ...]]:
    """The classes of a source, label and name of each image, and notes; no image is read."""
    source = open_source(paths, SourceOptions(**options))
    with closing(Journal(None, {})) as journal:
        listing = journal.list_source(source)
        images = [(label, member.name) for label, member in journal.members()]
        assert [label for label, _ in images] == [
            label for label, count in enumerate(listing.counts) for _ in range(count)
        ]
        return listing.classes, images, listing.notes


def labels(*paths: Path, **options: Any) -> tuple[tuple[str, ...], list[int]]:
    classes, images, _ = listed(*paths, **options)
    return classes, [label for label, _ in images]


def text(path: Path, content: str) -> Path:
    path.write_text(content)
    return path
