"""The .beton beside a folder of images: made when it is needed, and again when they change."""

import hashlib
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from irpe_ds.cli import command
from irpe_ds.data.beton.convert import convert
from irpe_ds.data.beton.journal import list_images
from irpe_ds.data.beton.manifest import (
    MANIFEST,
    DatasetManifest,
    beside,
    is_there,
    read_hashes,
    read_manifest,
)
from irpe_ds.data.beton.options import StorageOptions
from irpe_ds.data.beton.places import target
from irpe_ds.data.beton.sources import Files, Member, open_source
from irpe_ds.errors import DataError, UserError


def converted(folder: Path, where: str, *, workers: int) -> Path:
    """The .beton beside a folder of class folders, photos/train.beton for photos/train.

    One that fits the folder is reused, whoever made it; one that this function made of images that
    have changed since is made again. Images that cannot be stored are left out and listed.

    Args:
        where: the configuration key that names the folder, for errors.

    Raises:
        DataError: the folder has no images in classes, the file beside it is of other images, or
            it cannot be written.
    """
    if folder.name in ("", ".."):
        folder = folder.resolve()
    out = target(beside(folder, ".beton"))
    source, classes, images = list_images(folder, where)
    if is_there(out):
        manifest = read_manifest(out)
        if manifest is not None and _fits(out, manifest, classes, images, Files(source)):
            return out
        if manifest is None or not _is_ours(manifest, folder):
            expected = f"{out} to be of the images in {folder}"
            other = f"another one; move it away, or convert anew: {_command(folder, out)}"
            raise DataError(where, expected, other)
    _check_writable(out, where)
    try:
        convert(
            open_source([folder.absolute()]),
            out,
            StorageOptions(),
            workers=workers,
            on_bad="skip",
            overwrite=out.exists(),
            command=shlex.join(["python", *sys.argv]),
        )
    except UserError as error:
        if error.where == "--max-bad":
            how = f"to leave them out: {_command(folder, out)} --on-bad skip --max-bad 1"
            raise DataError(f"{where}: {error}; {how}") from None
        raise DataError(f"{where}: {error}") from None
    return out


def _fits(
    out: Path,
    manifest: DatasetManifest,
    classes: tuple[str, ...],
    images: Sequence[tuple[int, Member]],
    files: Files,
) -> bool:
    """Whether a file holds these images, but for those that were skipped, as they are now."""
    if classes != manifest.classes or len(images) != manifest.num_samples + manifest.skipped:
        return False
    made = beside(out, MANIFEST).stat().st_mtime_ns
    stored = {line.name: line.sha256 for line in read_hashes(out, manifest)}
    missing = 0
    for _, member in images:
        sha256 = stored.get(f"{member.category}/{member.name}")
        missing += sha256 is None
        found = os.stat(member.file)
        # The second is the time of a rename too: a file that was moved here keeps the first.
        if max(found.st_mtime_ns, found.st_ctime_ns) > made and _sha256(files, member) != sha256:
            return False
    return missing == manifest.skipped


def _sha256(files: Files, member: Member) -> bytes:
    try:
        return hashlib.sha256(files.read(member)).digest()
    except (ValueError, DataError):
        return b""


def _is_ours(manifest: DatasetManifest, folder: Path) -> bool:
    """Whether `converted` would make such a file of this folder: nobody's choice is lost."""
    source = [os.fspath(folder.absolute())]
    options = asdict(StorageOptions())
    return not manifest.shards and manifest.source == source and manifest.options == options


def _command(folder: Path, out: Path) -> str:
    words = ["python", "data_prep/convert.py", "--source", str(folder), "--out", str(out)]
    return shlex.join([*words, "--overwrite"])


def _check_writable(out: Path, where: str) -> None:
    try:
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise DataError(
            f"{where}: cannot write {out}: {error.strerror}; convert the folder to another place "
            f"({command('data_prep/convert.py')}) and name that file, or data.pipeline=timm, which "
            "reads folders"
        ) from None
