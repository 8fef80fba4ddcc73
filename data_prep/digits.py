"""Write scikit-learn's digits as an ImageFolder: small, real, no download.

    python data_prep/digits.py --out data/digits

1,797 handwritten digits (UCI optdigits test set), 8 x 8 grey values, enlarged to 32 x 32 RGB.
Writes OUT/train/<0..9>/NNNN.jpg and OUT/val/<0..9>/NNNN.jpg, where NNNN is the digit's index in
load_digits: 80 % and 20 % of each class, the same in every run.
"""

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this tree's irpe_ds, whatever is installed

import numpy as np
from PIL import Image

from irpe_ds.cli import run
from irpe_ds.errors import ConfigError

SIDE = 32  # pixels
QUALITY = 95  # of the JPEGs
DARKEST = 16  # values of load_digits count the black pixels of 4 x 4 blocks
VAL_SHARE = 0.2


def split(labels: np.ndarray) -> dict[str, int]:
    """Relative path of each image, such as `train/3/0042.jpg`, and its index."""
    generator = np.random.default_rng(0)
    files: dict[str, int] = {}
    for label in range(10):
        members = generator.permutation(np.flatnonzero(labels == label))
        num_val = round(VAL_SHARE * len(members))
        for position, index in enumerate(members.tolist()):
            part = "val" if position < num_val else "train"
            files[f"{part}/{label}/{index:04d}.jpg"] = index
    return files


def write(folder: Path, files: dict[str, int], images: np.ndarray) -> None:
    """Write images (N, 8, 8), values 0 to 16, to their paths under `folder`."""
    for name, index in files.items():
        grey = np.rint(images[index] * (255 / DARKEST)).astype(np.uint8)
        large = Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        large.convert("RGB").save(folder / name, quality=QUALITY)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write scikit-learn's digits as an ImageFolder.")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    out: Path = parser.parse_args().out

    from sklearn.datasets import load_digits

    digits = load_digits()
    files = split(digits.target)
    num_train = sum(name.startswith("train/") for name in files)
    contents = f"{num_train} training and {len(files) - num_train} validation images"
    if out.exists():
        if {path.relative_to(out).as_posix() for path in out.rglob("*.jpg")} != files.keys():
            raise ConfigError("--out", "a new or a complete folder", f"{out}, which is neither")
        print(f"{out}: {contents} already exist")
        return
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    write(partial, files, digits.images)
    partial.rename(out)
    print(f"{out}: wrote {contents} of 10 classes")


if __name__ == "__main__":
    run(main)
