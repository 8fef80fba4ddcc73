"""Describe a data set: classes, sizes, duplicates, mean and deviation, pictures of its images.

    python data_prep/describe.py data/mine/train.beton
    python data_prep/describe.py photos/train --config launch/configs/folder.yaml augment.auto=3a

FILE is a .beton file, a folder of class folders, or a .tar of them. With --config, also views of
images as that run would show them to its model, under their labels. Writes report.html and its
pictures, description.png, classes.png and views.png, into --out.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1]))  # this tree's irpe_ds, whatever is installed

from irpe_ds.cli import run
from irpe_ds.data.parallel import check_workers
from irpe_ds.errors import ConfigError, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from irpe_ds.config import RunConfig
    from irpe_ds.data.description import Description

REPORT = "report.html"
NUMBERS, CLASSES, VIEWS = "description.png", "classes.png", "views.png"
IMAGES = 2000
"""That are decoded, unless --images says another number."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="a .beton file, a folder, or a .tar")
    add("--out", type=Path, default=Path("description"), help="folder to write (description)")
    add("--config", type=Path, metavar="YAML", help="of the run whose augmentation is drawn")
    add("--images", type=int, default=IMAGES, help=f"read and decoded at most ({IMAGES})")
    add("--seed", type=int, default=0, help="of the choice of these, and of those drawn (0)")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="threads (all cores)")
    add("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    for name, value, least in (("--images", args.images, 1), ("--seed", args.seed, 0)):
        if value < least:
            raise ConfigError(name, f"at least {least}", value)
    check_workers(args.workers)
    if args.overrides and args.config is None:
        raise ConfigError("section.key=value", "--config before it", args.overrides[0])
    return args


def main() -> None:
    args = arguments()
    config = None if args.config is None else read_recipe(args.config, args.file, args.overrides)

    from irpe_ds.data.description import describe, to_text  # PyTorch and FFCV: seconds
    from irpe_ds.data.pipelines.timm import open_images

    images = open_images(args.file, "FILE")
    found = describe(images, count=args.images, seed=args.seed, workers=args.workers)
    print(printable(to_text(found)), end="\n\n", flush=True)

    from irpe_ds.plots.description import draw_description
    from irpe_ds.plots.views import draw_classes, draw_views

    figures = {NUMBERS: draw_description(found), CLASSES: draw_classes(images, args.seed)}
    if config is not None:
        figures[VIEWS] = draw_views(images, config, args.config)
    write(args.out, found, figures)


def read_recipe(recipe: Path, file: Path, overrides: list[str]) -> "RunConfig":
    """The configuration of a run, with this data set in place of its own."""
    from irpe_ds.config import load_config

    name = json.dumps(str(file))  # a string of YAML too
    own = [f"data.train={name}", f"data.val={name}", "data.workers=1", "model.num_classes=auto"]
    if file.suffix != ".beton":  # read in place, as only pipeline timm does
        own.append("data.pipeline=timm")
    return load_config(recipe, [*overrides, *own])


def write(out: Path, description: "Description", figures: "dict[str, Figure]") -> None:
    """Write the pictures and the report; a picture of an earlier call that is not drawn goes."""
    from irpe_ds.files import replace_file
    from irpe_ds.plots.description import to_html
    from irpe_ds.plots.style import save_figure

    paths = [out / name for name in figures]
    for figure, path in zip(figures.values(), paths, strict=True):
        save_figure(figure, [path])
    try:
        if VIEWS not in figures:
            (out / VIEWS).unlink(missing_ok=True)
        replace_file(out / REPORT, to_html(description, paths))
    except OSError as error:
        raise ConfigError(f"--out: cannot write to {out}: {error.strerror}") from None
    print(out / REPORT)


if __name__ == "__main__":
    run(main)
