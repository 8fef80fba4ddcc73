"""Image files found, read and classified; scored where folders name classes."""

import csv
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from irpe_ds.data.beton.images import DAMAGE, open_image
from irpe_ds.data.beton.sources import IMAGE_BYTES, is_image
from irpe_ds.data.parallel import map_in_order, progress
from irpe_ds.data.rgb import to_rgb
from irpe_ds.errors import ConfigError
from irpe_ds.files import read_regular

Transform = Callable[[Image.Image], Tensor]


class ImageFile(NamedTuple):
    """An image to classify."""

    path: Path
    label: int | None
    """Its true class, if a folder says it."""


class Prediction(NamedTuple):
    """What a model says of an image."""

    image: ImageFile
    probabilities: NDArray[np.float32] | None
    """(classes,); None if the image cannot be read."""
    error: str = ""
    """Why it cannot be read."""

    def top(self, count: int) -> list[tuple[int, float]]:
        """The classes with the highest probabilities, and these; highest first."""
        if self.probabilities is None:
            return []
        order = np.argsort(-self.probabilities, kind="stable")[:count]
        return [(int(label), float(self.probabilities[label])) for label in order]


def find_images(paths: Sequence[Path], classes: Sequence[str]) -> list[ImageFile]:
    """The files among these paths, and the images in the folders among them, at any depth.

    The true class of an image is the outermost of its folders that has the name of a class; for a
    file that is the folder it lies in.

    Raises:
        ConfigError: there are none.
    """
    numbers, found = {name: number for number, name in enumerate(classes)}, []
    for path in paths:
        files = _images_in(path) if path.is_dir() else [path]
        above = path.absolute() if path.is_dir() else path.absolute().parent
        for file in files:
            folders = (above.name, *file.relative_to(path).parts[:-1])
            label = next((numbers[name] for name in folders if name in numbers), None)
            found.append(ImageFile(file, label))
    if not found:
        raise ConfigError("images", "at least one", f"none in {', '.join(map(str, paths))}")
    return found


def _images_in(root: Path) -> Iterator[Path]:
    """The images in a folder, by name; links are followed, to every folder once."""
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        there = os.stat(folder)
        if (there.st_dev, there.st_ino) in seen:
            folders.clear()
            continue
        seen.add((there.st_dev, there.st_ino))
        folders[:] = sorted(name for name in folders if name[0] != ".")
        yield from (Path(folder, name) for name in sorted(names) if is_image(name))


def read_image(path: Path) -> Image.Image:
    """An image file as RGB, read as a conversion reads it: EXIF orientation is ignored.

    Raises:
        Those of DAMAGE: it cannot be read, or is no image, or a damaged one.
    """
    with open_image(read_regular(path, IMAGE_BYTES)) as image:
        return to_rgb(image)


@torch.inference_mode()
def predict(
    model: nn.Module,
    transform: Transform,
    images: Sequence[ImageFile],
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
) -> Iterator[Prediction]:
    """Classify images, in order; one that cannot be read has its error in place of probabilities.

    Args:
        transform: makes (3, H, W) of an RGB image.
        batch_size: images of a forward pass.
        workers: reading threads.
    """
    model = model.to(device).eval()
    inputs = map_in_order(partial(_input, transform), images, workers=workers)
    with closing(inputs), progress("predict", len(images)) as bar:
        pairs = zip(images, inputs, strict=True)
        while batch := list(islice(pairs, batch_size)):
            good = [pixels for _, pixels in batch if isinstance(pixels, Tensor)]
            rows: Iterator[NDArray[np.float32]] = iter(())
            if good:
                logits = model(torch.stack(good).to(device)).float()
                rows = iter(logits.softmax(dim=1).cpu().numpy())
            for image, pixels in batch:
                bar.update()
                if isinstance(pixels, Tensor):
                    yield Prediction(image, next(rows))
                else:
                    yield Prediction(image, None, pixels)


def _input(transform: Transform, image: ImageFile) -> Tensor | str:
    """What the model takes of an image, or why it cannot be read."""
    try:
        return transform(read_image(image.path))
    except DAMAGE as error:
        reason = error.strerror if isinstance(error, OSError) else None
        return reason or " ".join(str(error).split()) or type(error).__name__


class Scores(NamedTuple):
    """How the predictions for images of known classes compare with these."""

    confusion: NDArray[np.int64]
    """(classes, classes): images by true class (row) and predicted class (column)."""

    @property
    def images(self) -> int:
        """Images of known classes that could be read."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Share of these that are of the class predicted first."""
        return float(self.confusion.trace() / self.images)

    def of_class(self, label: int) -> dict[str, float | int | None]:
        """Precision, recall, F1 and number of images of a class; None where it is undefined."""
        hits = int(self.confusion[label, label])
        images, predicted = (int(self.confusion.sum(axis)[label]) for axis in (1, 0))
        return {
            "precision": hits / predicted if predicted else None,
            "recall": hits / images if images else None,
            "f1": 2 * hits / (images + predicted) if images + predicted else None,
            "images": images,
        }


def score(predictions: Sequence[Prediction], num_classes: int) -> Scores | None:
    """The scores of predictions; None if no image has a known class."""
    confusion = np.zeros((num_classes, num_classes), np.int64)
    for image, probabilities, _ in predictions:
        if image.label is not None and probabilities is not None:
            confusion[image.label, int(probabilities.argmax())] += 1
    return Scores(confusion) if confusion.any() else None


def worst_mistakes(predictions: Sequence[Prediction], count: int) -> list[Prediction]:
    """Those that are wrong with the highest probability, the worst first."""
    wrong = [p for p in predictions if p.image.label is not None and p.probabilities is not None]
    wrong = [p for p in wrong if p.top(1)[0][0] != p.image.label]
    return sorted(wrong, key=lambda p: -p.top(1)[0][1])[:count]


def to_csv(predictions: Sequence[Prediction], classes: Sequence[str], count: int) -> str:
    """A row per image: file, true class, the `count` classes predicted first, error."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"{what}_{n}" for n in range(1, count + 1) for what in ("class", "probability")]
    writer.writerow(["file", "true_class", *columns, "error"])
    for prediction in predictions:
        image, _, error = prediction
        true = "" if image.label is None else classes[image.label]
        cells = [cell for n, x in prediction.top(count) for cell in (classes[n], f"{x:.6f}")]
        cells += [""] * (2 * count - len(cells))
        writer.writerow([image.path, true, *cells, error])
    return text.getvalue()


def to_json(
    predictions: Sequence[Prediction], classes: Sequence[str], count: int, scores: Scores | None
) -> dict[str, Any]:
    """The same with the scores, for JSON."""
    return {
        "classes": list(classes),
        "images": [
            {
                "file": str(p.image.path),
                "true_class": None if p.image.label is None else classes[p.image.label],
                "top": [{"class": classes[n], "probability": x} for n, x in p.top(count)],
                "error": p.error or None,
            }
            for p in predictions
        ],
        "scores": scores
        and {
            "images": scores.images,
            "accuracy": scores.accuracy,
            "classes": {name: scores.of_class(n) for n, name in enumerate(classes)},
            "confusion": scores.confusion.tolist(),
        },
    }
