"""ImageFolder -> .beton with its manifest."""

import os
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from irpe_ds.data.ffcv_api import VERSION
from irpe_ds.data.images import StorageOptions, StoredImage, read_image
from irpe_ds.data.manifest import Manifest, file_sha256, manifest_path
from irpe_ds.data.parallel import map_in_order
from irpe_ds.data.writer import BetonWriter
from irpe_ds.errors import ConfigError

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
)  # torchvision's ImageFolder


@dataclass(frozen=True)
class ImageFolder:
    """The image files of a folder that has one folder per class."""

    classes: tuple[str, ...]
    """Class names, sorted; a label is an index into them."""
    paths: tuple[Path, ...]
    """Image files, by class and then by path."""
    labels: tuple[int, ...]
    """Label of each file."""
    others: int
    """Files in the class folders that are no images by their name."""


def convert(
    source: Path,
    out: Path,
    options: StorageOptions,
    *,
    workers: int,
    overwrite: bool = False,
    command: str = "",
) -> Manifest:
    """Convert an ImageFolder; `out` and its manifest appear whole at the end, or not at all.

    The file depends on the source and the options alone, not on the number of workers.

    Args:
        workers: reading and encoding threads.
        command: what to record as the command that converted.

    Raises:
        ConfigError: the source has no class folders, no images or a damaged one, or `out` exists.
    """
    if out.exists() and not overwrite:
        raise ConfigError("--out", "a new file, or --overwrite", f"{out}, which exists")
    folder = find_images(source)
    unfinished = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        reencoded = _write(unfinished, folder, options, workers)
        manifest = Manifest(
            source=os.fspath(source),
            options=asdict(options),
            num_samples=len(folder.paths),
            reencoded=reencoded,
            left_out=folder.others,
            classes=folder.classes,
            class_counts=tuple(np.bincount(folder.labels).tolist()),
            size=unfinished.stat().st_size,
            sha256=file_sha256(unfinished),
            ffcv=VERSION,
            command=command,
        )
        manifest_path(out).unlink(missing_ok=True)  # never beside a file that it does not describe
        os.replace(unfinished, out)
        manifest.write(manifest_path(out))
    except OSError as error:
        raise ConfigError("--out", "a file that can be written", f"{out}: {error}") from None
    finally:
        unfinished.unlink(missing_ok=True)
    return manifest


def find_images(source: Path) -> ImageFolder:
    """List the images of an ImageFolder; links are followed, hidden folders are no classes.

    Raises:
        ConfigError: there is no such folder, or it has no class folders, or one without images.
    """
    if not source.is_dir():
        raise ConfigError("--source", "a folder with one folder per class", source)
    classes = sorted(f.name for f in source.iterdir() if f.is_dir() and f.name[0] != ".")
    if not classes:
        raise ConfigError("--source", "a folder with one folder per class", f"none in {source}")
    paths: list[Path] = []
    labels: list[int] = []
    others = 0
    for label, name in enumerate(classes):
        files = [
            Path(folder, file)
            for folder, _, names in os.walk(source / name, onerror=_unreadable, followlinks=True)
            for file in names
        ]
        images = sorted(file for file in files if file.suffix.lower() in EXTENSIONS)
        if not images:
            raise ConfigError("--source", "images in every class folder", source / name)
        paths += images
        labels += [label] * len(images)
        others += len(files) - len(images)
    return ImageFolder(tuple(classes), tuple(paths), tuple(labels), others)


def _unreadable(error: OSError) -> None:
    raise ConfigError("--source", "folders that can be read", error)


def _write(path: Path, folder: ImageFolder, options: StorageOptions, workers: int) -> int:
    """Write the .beton file and bring it to the disk; return how many images were re-encoded."""
    reencoded = 0
    numbered = enumerate(folder.paths)
    with (
        closing(map_in_order(partial(_read, options), numbered, workers=workers)) as images,
        tqdm(total=len(folder.paths), unit="img", disable=None) as progress,
        BetonWriter(path, len(folder.paths)) as writer,
    ):
        for image, label in zip(images, folder.labels, strict=True):
            writer.append(image, label)
            reencoded += not image.original
            progress.update()
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return reencoded


def _read(options: StorageOptions, numbered: tuple[int, Path]) -> StoredImage:
    number, path = numbered
    return read_image(path, number, options)


def summary(manifest: Manifest, out: Path, since: float) -> str:
    """One line for the user; `since` is time.monotonic() at the start."""
    seconds = time.monotonic() - since
    return (
        f"{out}: {manifest.num_samples} images of {len(manifest.classes)} classes, "
        f"{manifest.reencoded} re-encoded, {manifest.left_out} other files left out, "
        f"{manifest.size / 1e6:.1f} MB, "
        f"{manifest.num_samples / seconds:.0f} img/s"
    )
