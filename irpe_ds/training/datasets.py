"""The data sets of a run: made readable, counted, and checked against the model."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from irpe_ds.config import RunConfig
from irpe_ds.data.beton.cached import converted
from irpe_ds.data.beton.manifest import SKIPPED, beside, read_manifest
from irpe_ds.data.beton.reader import DatasetInfo
from irpe_ds.data.beton.staging import staged
from irpe_ds.data.pipelines.pipeline import Part, dataset_info, val_images
from irpe_ds.errors import ConfigError, DataError
from irpe_ds.files import read_regular
from irpe_ds.models.loading import CLASSES
from irpe_ds.schema import parse_json

VAL_IMAGES = "val_images.json"
"""File of the run folder: without data.val, the images of data.train that are for validation."""

PARTS: tuple[Part, ...] = ("train", "val")
_LIMIT = 1 << 30  # bytes of such a file: ten million names of 100 characters


class Resolved(NamedTuple):
    """A configuration with what only the data tells."""

    config: RunConfig
    notes: list[str]
    """Messages about the data for the log."""


def resolve(config: RunConfig) -> Resolved:
    """Convert folders that `ffcv` is to read, and count the classes if num_classes is `auto`.

    One rank calls it, before any rank opens the data.

    Raises:
        UserError: a folder has no images in classes, or cannot be converted.
    """
    data, notes = config.data, list[str]()
    for part in PARTS:
        folder = getattr(data, part)
        if folder is None or not folder.is_dir():
            continue
        if data.pipeline == "ffcv":
            cores = len(os.sched_getaffinity(0))
            beton = converted(folder, f"data.{part}", workers=data.workers or cores)
            data = data.model_copy(update={part: beton})
            notes += _notes(f"data.{part}", folder, beton)
    config = with_class_count(config.model_copy(update={"data": data}), "train")
    if data.val is None:
        train, val = (dataset_info(data, part).num_samples for part in PARTS)
        notes.append(f"data.val: {val} of the {train + val} images; {VAL_IMAGES} lists them")
    return Resolved(config, notes)


def stage(config: RunConfig) -> RunConfig:
    """The configuration with the copies of its data in data.stage, made on the way if need be.

    Every rank calls it: those of a node wait for the one that copies.

    Raises:
        DataError: the data cannot be copied.
    """
    data, folder = config.data, config.data.stage
    if folder is None:
        return config
    for part in PARTS:
        if (path := getattr(data, part)) is not None:
            data = data.model_copy(update={part: staged(path, folder, f"data.{part}")})
    return config.model_copy(update={"data": data})


def _notes(where: str, folder: Path, beton: Path) -> Iterator[str]:
    """What is to be said of a folder that was converted."""
    manifest = read_manifest(beton)
    assert manifest is not None  # of what was not converted by us
    images = f"{manifest.num_samples} images of {len(manifest.classes)} classes"
    others = f", and {manifest.left_out} other files left out" if manifest.left_out else ""
    yield f"{where}: {images} in {folder}{others}; read from {beton}"
    if manifest.skipped:
        total = manifest.num_samples + manifest.skipped
        bad = f"{manifest.skipped} of {total} images in {folder} cannot be read"
        yield f"caution: {bad}: {beside(beton, SKIPPED)} lists them"


def unconverted(config: RunConfig) -> RunConfig:
    """The same without writing: folders are read as they are, as by pipeline `timm`."""
    data, parts = config.data, (config.data.train, config.data.val)
    if any(path is not None and path.is_dir() for path in parts):
        data = data.model_copy(update={"pipeline": "timm"})
    return with_class_count(config.model_copy(update={"data": data}), "train")


def with_class_count(config: RunConfig, part: Part) -> RunConfig:
    """The configuration with the number of classes of its data where it says `auto`."""
    if config.model.num_classes != "auto":
        return config
    info = dataset_info(config.data, part)
    count = info.num_classes
    if count is None:
        assert info.largest_label is not None  # what is not a .beton file has named classes
        count = info.largest_label[0] + 1
    model = config.model.model_copy(update={"num_classes": count})
    return config.model_copy(update={"model": model})


def names_of(config: RunConfig, info: DatasetInfo) -> dict[str, list[str]]:
    """What a run folder keeps of the names in its data, by file."""
    found = {} if info.classes is None else {CLASSES: list(info.classes)}
    if config.data.val is None:
        found[VAL_IMAGES] = val_images(config.data)
    return found


def check_names(config: RunConfig, info: DatasetInfo, folder: Path) -> None:
    """Compare the names in the data with those that a run folder keeps, if it does.

    Raises:
        DataError: the data has changed since the run began.
    """
    for file, present in names_of(config, info).items():
        path = folder / file
        try:
            kept = parse_json(read_regular(path, _LIMIT), list[str], path, DataError)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise DataError(path, "a readable file", error.strerror) from None
        if kept != present:
            what = "classes" if file == CLASSES else "validation images"
            expected = f"the data to have the {what} that the run began with"
            raise DataError(path, expected, _difference(kept, present))


def check_data(config: RunConfig) -> dict[str, DatasetInfo]:
    """What data.train and data.val hold, after checking that both are complete and fit the model.

    Raises:
        UserError: one does not; the message names the configuration key.
    """
    train, val = dataset_info(config.data, "train"), dataset_info(config.data, "val")
    if train.classes and val.classes and train.classes != val.classes:
        got = _difference(train.classes, val.classes)
        raise ConfigError("data.val", f"the classes of {train.path}", got)
    _check_classes(config, "train", train)
    _check_classes(config, "val", val)
    return {"train": train, "val": val}


def _difference(expected: Sequence[str], got: Sequence[str]) -> str:
    missing, more = set(expected) - set(got), set(got) - set(expected)
    words = [f"{w} {_few(names)}" for w, names in (("without", missing), ("with", more)) if names]
    return f"others: {', '.join(words)}" if words else "another order"


def _few(names: set[str]) -> str:
    shown = [repr(name) for name in sorted(names)[:3]]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def open_checked(config: RunConfig, part: Part) -> DatasetInfo:
    """What data.train or data.val holds, after checking that it is complete and fits the model."""
    info = dataset_info(config.data, part)
    _check_classes(config, part, info)
    return info


def _check_classes(config: RunConfig, part: Part, info: DatasetInfo) -> None:
    path, num_classes = config.data.path(part), config.model.class_count
    if info.num_classes not in (None, num_classes):
        expected = f"{info.num_classes}, the classes of {path}"
        raise ConfigError("model.num_classes", expected, num_classes)
    if info.num_classes is None and info.largest_label is not None:  # no manifest
        largest, sample = info.largest_label
        if largest >= num_classes:
            expected = f"more than {largest}, the label of sample {sample} of {path}"
            raise ConfigError("model.num_classes", expected, num_classes)
