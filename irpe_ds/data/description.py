"""What a data set consists of: classes, sizes, bytes, duplicates, mean and deviation of channels.

The tables of a .beton file tell most of it of every image. The rest, and all but the labels of a
folder or archive, is of a random sample: reading a million images takes hours.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from irpe_ds.data.beton.images import DAMAGE
from irpe_ds.data.beton.reader import DatasetInfo
from irpe_ds.data.order import Samples
from irpe_ds.data.parallel import map_in_order, progress
from irpe_ds.data.pipelines.timm import BetonImages, Images
from irpe_ds.errors import DataError

LISTED = 20
"""Classes that are listed one by one in text; of more, the smallest and the largest."""
PAIRS = 5
"""Duplicates that are listed."""
SIZES = ("width", "height", "bytes")
QUANTILES = {"smallest": 0, "1 %": 0.01, "median": 0.5, "99 %": 0.99, "largest": 1}


@dataclass(frozen=True, kw_only=True)
class Description:
    """Counts and measures of a data set."""

    path: Path
    classes: Sequence[str]
    """Names in label order; numbers where the data set has no names."""
    counts: NDArray[np.int64]
    """Images of each class."""
    widths: NDArray[np.int64]
    heights: NDArray[np.int64]
    """Pixels of the images that were measured: of all, or of the sample."""
    sizes: NDArray[np.int64]
    """Stored bytes of the same images."""
    compared: int
    """Images whose bytes were compared with each other's."""
    copies: int
    """Images of them that are equal to an earlier one."""
    conflicting: int
    """Copies whose equal is in another class."""
    pairs: Sequence[str]
    """Some copies and their equals, in words."""
    seed: int
    """Of the sample."""
    decoded: int
    """Images of the sample."""
    values: NDArray[np.float64]
    """(3, 256): how often the sample has each value of red, green and blue, in shares. Every image
    weighs the same, as in training, where all have one size."""
    bad: Sequence[str]
    """Images of the sample that cannot be read, with the reasons."""

    @property
    def num_samples(self) -> int:
        """Images in the data set."""
        return int(self.counts.sum())

    @property
    def mean(self) -> NDArray[np.float64]:
        """Of each channel, for values in [0, 1]."""
        return self.values @ np.linspace(0, 1, 256)

    @property
    def std(self) -> NDArray[np.float64]:
        """Deviation of each channel, for values in [0, 1]."""
        squares = self.values @ np.linspace(0, 1, 256) ** 2
        return np.sqrt(np.maximum(squares - self.mean**2, 0))


class _Measured(NamedTuple):
    """One image of the sample."""

    sample: int
    width: int
    height: int
    size: int
    """Stored bytes."""
    digest: int
    """First 64 bits of their SHA-256."""
    values: NDArray[np.float64]
    """(3, 256) shares."""


def describe(images: Images, *, count: int, seed: int, workers: int) -> Description:
    """Describe a data set.

    Args:
        count: images to read and decode at most, drawn at random.
        workers: threads.

    Raises:
        DataError: no image of the sample can be read.
    """
    info, labels = images.info, images.labels
    samples = choose(len(labels), count, seed)
    good, bad = list[_Measured](), list[str]()
    with progress("reading", len(samples)) as bar:
        for found in map_in_order(partial(_measure, images), samples.tolist(), workers=workers):
            if isinstance(found, _Measured):
                good.append(found)
            else:
                bad.append(found)
            bar.update()
    if not good:
        expected = f"one image that can be read among the {len(samples)} tried"
        raise DataError(info.path, expected, f"none: {bad[0]}")
    measured, widths, heights, sizes = (
        np.array([getattr(image, key) for image in good], np.int64)
        for key in ("sample", "width", "height", "size")
    )
    digests = np.array([image.digest for image in good], np.uint64)
    if isinstance(images, BetonImages):
        entries, hashes = images.beton.entries, images.beton.hashes
        widths, heights, sizes = (entries[key].astype(np.int64) for key in SIZES)
        if hashes is not None:
            measured, digests = np.arange(len(hashes)), hashes
    names = class_names(info, labels)
    equal = _duplicates(measured, digests, labels[measured])
    return Description(
        path=info.path,
        classes=names,
        counts=np.bincount(labels, minlength=len(names)),
        widths=widths,
        heights=heights,
        sizes=sizes,
        compared=len(digests),
        copies=equal.copies,
        conflicting=equal.conflicting,
        pairs=[
            " = ".join(f"{_name(images, n)} ({names[labels[n]]})" for n in pair)
            for pair in equal.pairs
        ],
        seed=seed,
        decoded=len(good),
        values=np.mean([image.values for image in good], axis=0),
        bad=bad,
    )


def class_names(info: DatasetInfo, labels: NDArray[np.int64]) -> Sequence[str]:
    """The names of the classes, or their numbers where a file has no names."""
    return info.classes or [str(number) for number in range(int(labels.max()) + 1)]


def choose(total: int, count: int, seed: int) -> Samples:
    """At most `count` of `total` samples, at random, ascending."""
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(total, min(count, total), replace=False))


def _measure(images: Images, sample: int) -> _Measured | str:
    """One image, or why it cannot be read."""
    try:
        data, image = images.read(sample), images.open(sample)
        values = np.reshape(image.convert("RGB").histogram(), (3, 256))
    except DAMAGE as error:
        return f"{_name(images, sample)}: {error}"
    digest = int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
    return _Measured(sample, *image.size, len(data), digest, values / (image.width * image.height))


def _name(images: Images, sample: int) -> str:
    """Its name below that of the data set."""
    path = images.info.path
    return images.name(sample).removeprefix(f"{path}: ").removeprefix(f"{path}/")


class _Duplicates(NamedTuple):
    copies: int
    """Images that are equal to an earlier one."""
    conflicting: int
    """Images whose equal has another label."""
    pairs: list[tuple[int, int]]
    """At most PAIRS samples and their equals; those with two labels first."""


def _duplicates(
    samples: Samples, digests: NDArray[np.uint64], labels: NDArray[np.int64]
) -> _Duplicates:
    """Which samples are equal to an earlier one, by their digests."""
    order = np.argsort(digests, kind="stable")
    equal = np.flatnonzero(digests[order][1:] == digests[order][:-1])
    first, second = order[equal], order[equal + 1]
    differ = labels[first] != labels[second]
    some = np.argsort(~differ, kind="stable")[:PAIRS]
    pairs = [(int(samples[first[n]]), int(samples[second[n]])) for n in some]
    return _Duplicates(len(equal), int(differ.sum()), pairs)


def quantiles(description: Description) -> list[tuple[str, ...]]:
    """A table of what varies between images: a head, then a line per measure."""
    d = description
    measures = {
        "width": (d.widths, ",.0f"),
        "height": (d.heights, ",.0f"),
        "aspect ratio": (d.widths / d.heights, ".2f"),
        "kilobytes": (d.sizes / 1000, ",.1f"),
        "images of a class": (d.counts, ",.0f"),
    }
    lines = [
        (name, *(format(x, form) for x in np.quantile(values, [*QUANTILES.values()])))
        for name, (values, form) in measures.items()
    ]
    return [("", *QUANTILES), *lines]


def facts(description: Description) -> list[str]:
    """In sentences: how much was read, the most frequent size, duplicates, damage."""
    d = description
    sizes, often = np.unique(d.widths << 32 | d.heights, return_counts=True)
    width, height = divmod(int(sizes[often.argmax()]), 1 << 32)
    share = 100 * often.max() / often.sum()
    copies = f"{d.copies:,}, {d.conflicting:,} of them in two classes" if d.copies else "none"
    measured, tried = _of(len(d.widths), d), d.decoded + len(d.bad)
    found = [
        f"Sizes and bytes of {measured}; most frequent: {width} x {height} pixels, {share:.3g} %",
        f"Duplicates among {_of(d.compared, d)}: {copies}",
        *(f"  {pair}" for pair in d.pairs),
    ]
    if d.bad:
        found.append(f"Cannot be read: {len(d.bad):,} of {_of(tried, d)}")
        found += [f"  {reason}" for reason in d.bad[:LISTED]]
    return found


def _of(count: int, description: Description) -> str:
    total = description.num_samples
    if count == total:
        return f"all {total:,} images"
    return f"{count:,} of {total:,} images (seed {description.seed})"


def title(description: Description) -> str:
    """The data set in a line."""
    d = description
    about = "" if len(d.sizes) == d.num_samples else "about "
    size = d.sizes.mean() * d.num_samples
    total = f"{size / 1e9:,.1f} GB" if size > 1e9 else f"{size / 1e6:,.1f} MB"
    return f"{d.path}: {d.num_samples:,} images of {len(d.classes):,} classes in {about}{total}"


def ranked(description: Description) -> list[tuple[str, ...]]:
    """A table of classes and their images, the largest first."""
    d = description
    order = np.argsort(-d.counts, kind="stable")
    return [("class", "images"), *((d.classes[n], f"{d.counts[n]:,}") for n in order)]


def yaml_lines(description: Description) -> str:
    """Mean and deviation as they stand in a run's YAML."""
    means, stds = (
        ", ".join(f"{x:.4f}" for x in channels) for channels in (description.mean, description.std)
    )
    return f"data:\n  mean: [{means}]\n  std: [{stds}]"


def weighing(description: Description) -> str:
    """What mean and deviation are taken over."""
    return f"Mean and deviation of {_of(description.decoded, description)}, each of equal weight"


def to_text(description: Description) -> str:
    """A description for the terminal."""
    head, *classes = ranked(description)
    if len(classes) > LISTED:
        rest = f"... {len(classes) - LISTED:,} more"
        classes = [*classes[: LISTED // 2], (rest, ""), *classes[-LISTED // 2 :]]
    parts = [
        title(description),
        _aligned(quantiles(description)),
        "\n".join(facts(description)),
        _aligned([head, *classes]),
        f"{weighing(description)}; for the YAML of a run:",
        yaml_lines(description),
    ]
    return "\n\n".join(parts)


def _aligned(table: Sequence[Sequence[str]]) -> str:
    """Lines of text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in table
    )
