"""WebDataset shards, img2dataset's among them: an image and its label share a key."""

import json
import os
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from irpe_ds.data.beton.sources.source import LABEL_BYTES, Source, SourceFile, is_hidden, is_image
from irpe_ds.data.beton.sources.tars import entries, in_tar
from irpe_ds.errors import DataError
from irpe_ds.files import open_regular

CLS = "cls"
LABEL = "label"
"""What holds labels unless --label-key names another: key.cls, or this field of key.json."""

_JSON_BYTES = 1 << 20


class WebDataset(Source):
    """Shards with key.jpg next to key.cls, or to key.json with a field for the label."""

    kind = "WebDataset shards"
    has_labels = True

    def files(self) -> Iterator[SourceFile]:
        for path in self.archives:
            stamp = path.stat().st_mtime_ns
            listed = (in_tar(entry, path, stamp) for entry in entries(path))
            seen = (file for file in listed if not is_hidden(file.path) and file.path[-1:] != "/")
            for key, group in groupby(seen, key=lambda file: _key(file.path)):
                yield self._sample(path, key, list(group))

    def _sample(self, path: Path, key: str, files: list[SourceFile]) -> SourceFile:
        """The image of a key, with its label."""
        images = [file for file in files if is_image(file.path)]
        if self.options.image_key is not None:
            images = [file for file in images if file.path == f"{key}.{self.options.image_key}"]
        got = ", ".join(file.path for file in files)
        if len(images) > 1:
            expected = f"one image per key in {path}, or --image-key, such as "
            raise DataError("--source", expected + images[0].path.removeprefix(f"{key}."), got)
        by_ending = {file.path.removeprefix(f"{key}."): file for file in files}
        label_key = self.options.label_key or (CLS if CLS in by_ending else LABEL)
        label = by_ending.get(label_key, by_ending.get("json"))
        if not images or label is None:
            raise DataError("--source", f"one image and one .cls per key in {path}", got)
        text = _text(path, label, _JSON_BYTES if label_key not in by_ending else LABEL_BYTES)
        if label_key not in by_ending:
            text = _field(text, label_key, f"{path}: {label.path}")
        return images[0]._replace(label=text)


def _key(name: str) -> str:
    """The key of a sample: the path up to the first dot of the file name."""
    folder, base = os.path.split(name)
    return os.path.join(folder, base.partition(".")[0])


def _text(path: Path, label: SourceFile, limit: int) -> str:
    """A label as it is written, without the spaces around it."""
    where = f"{path}: {label.path}"
    if label.size > limit:
        raise DataError(where, f"a label of up to {limit} bytes", label.size)
    with open_regular(path) as file:
        file.seek(label.offset)
        data = file.read(label.size)
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise DataError(where, "a label in UTF-8", data[:20]) from None


def _field(text: str, name: str, where: str) -> str:
    """A field of a JSON object as the text of a label."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(where, "a JSON object", error) from None
    value = found.get(name) if isinstance(found, dict) else None
    if not isinstance(value, str | int) or isinstance(value, bool):
        fields = ", ".join(found) if isinstance(found, dict) else "no object"
        raise DataError(where, f"a field {name} (--label-key names another)", fields)
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise DataError(where, "a label in UTF-8", ascii(value))
    return str(value).strip()
