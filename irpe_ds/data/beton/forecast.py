"""An estimate of a conversion: its size and time, and bad images."""

import shutil
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from irpe_ds.data.beton.convert import Announce, listed, read_image
from irpe_ds.data.beton.journal import Journal
from irpe_ds.data.beton.left_out import count_extensions
from irpe_ds.data.beton.options import StorageOptions
from irpe_ds.data.beton.places import existing, target, temporary_folder
from irpe_ds.data.beton.sources import Files, Source
from irpe_ds.data.beton.writer import file_size

_TRIALS = 100  # images that are converted at most


@dataclass(frozen=True)
class Forecast:
    """An estimate of a conversion."""

    images: int
    """Images in the source."""
    classes: int
    """Number of classes."""
    left_out: int
    """Source files without an image extension."""
    extensions: str
    """How many of them have which."""
    size: int
    """Expected bytes of the .beton file."""
    free: int
    """Bytes free on its disk."""
    journal: int
    """Bytes of the journal beside it, until the end."""
    temporary: int
    """Bytes in `temporary_folder` while images are listed."""
    temporary_free: int
    """Bytes free there."""
    seconds: float
    """Expected duration, from the speed of the trial."""
    bad: dict[str, str]
    """Bad images among those tried, with reasons."""


def forecast(
    source: Source,
    out: Path,
    options: StorageOptions,
    *,
    workers: int,
    announce: Announce = lambda listing: None,
) -> Forecast:
    """Convert some images of a source, spread evenly, without writing anything.

    Raises:
        DataError: the source has no images.
    """
    with closing(Journal(None, {})) as journal, closing(Files(source)) as files:
        listing = listed(journal, source, announce)
        count, total = journal.totals()
        trials = list(journal.images(0, step=-(-count // _TRIALS)))
        read = stored = 0
        bad = {}
        since = time.monotonic()
        for item in trials:
            member, result = read_image(files, options, item)
            if isinstance(result, str):
                bad[f"{member.category}/{member.name}"] = result
            else:
                read += member.size
                stored += len(result[0].payload)
        each = (time.monotonic() - since) / len(trials)
        extensions = count_extensions(name for name, _ in journal.left_out())
        journal_bytes, temporary = journal.needs()
    return Forecast(
        images=count,
        classes=len(listing.classes),
        left_out=listing.left_out,
        extensions=extensions,
        size=file_size(count, round(total * (stored / read if read else 1))),
        free=shutil.disk_usage(existing(target(out).parent)).free,
        journal=journal_bytes,
        temporary=temporary,
        temporary_free=shutil.disk_usage(temporary_folder()).free,
        seconds=count * each / workers,
        bad=bad,
    )
