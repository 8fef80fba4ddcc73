"""Write a synthetic data set whose label is the offset between two marks.

    python data_prep/offsets.py --out data/offsets

Noise of 40 x 40 pixels with a red disc and a blue cross, each filling a patch of 8 x 8. The label
is the direction from the disc to the cross, which is in one of its 8 neighbouring patches. The disc
is uniform over the patches with 8 neighbours, for every label. So neither mark alone tells the
label, and a model without positions cannot exceed chance, 12.5 %. Writes
OUT/train/<n, ne, ...>/NNNN.png and OUT/val/..., the same bytes in every run.
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

GRID, PATCH = 5, 8  # patches per side, pixels per side of a patch
OFFSETS = {  # (rows down, columns right) from the disc to the cross
    "n": (-1, 0),
    "ne": (-1, 1),
    "e": (0, 1),
    "se": (1, 1),
    "s": (1, 0),
    "sw": (1, -1),
    "w": (0, -1),
    "nw": (-1, -1),
}
IMAGES = {"train": 500, "val": 100}  # per class
MEAN, DEVIATION = 128, 16  # of the noise, grey values
RED, BLUE = (200, 40, 40), (40, 60, 200)


def draw(offset: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    """One image, uint8 (40, 40, 3)."""
    side = GRID * PATCH
    noise = generator.normal(MEAN, DEVIATION, (side, side, 1)).repeat(3, axis=2)
    image = noise.clip(0, 255).astype(np.uint8)
    disc = generator.integers(1, GRID - 1, size=2)
    y, x = np.mgrid[:PATCH, :PATCH] - (PATCH - 1) / 2
    marks = ((disc, np.hypot(y, x) < 3.6, RED), (disc + offset, abs(abs(y) - abs(x)) < 1, BLUE))
    for (row, column), shape, colour in marks:
        image[row * PATCH :, column * PATCH :][:PATCH, :PATCH][shape] = colour
    return image


def write(folder: Path) -> None:
    """Write all images under `folder`."""
    for part, count in IMAGES.items():
        for label, (name, offset) in enumerate(OFFSETS.items()):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                generator = np.random.default_rng([list(IMAGES).index(part), label, number])
                image = Image.fromarray(draw(offset, generator))
                image.save(folder / part / name / f"{number:04d}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write images of two marks at eight offsets.")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    out: Path = parser.parse_args().out
    train, val = (len(OFFSETS) * count for count in IMAGES.values())
    contents = f"{train} training and {val} validation images"
    if out.exists():
        if sum(1 for _ in out.rglob("*.png")) != train + val:
            raise ConfigError("--out", "a new or a complete folder", f"{out}, which is neither")
        print(f"{out}: {contents} already exist")
        return
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    write(partial)
    partial.rename(out)
    print(f"{out}: wrote {contents} of {len(OFFSETS)} classes")


if __name__ == "__main__":
    run(main)
