"""Write a synthetic ImageNet in ImageNet's own layouts, for tests and benchmarks.

    python data_prep/synthetic.py --out data/synthetic --images 2000 --classes 10

The photos are random crops of scikit-learn's two sample photos, about 500 x 375 pixels and 110 KB
each; the same seed writes the same bytes. Under OUT, with the same training images in each:
    folder/train/<synset>/<name>.JPEG    ImageFolder
    train.tar                            class folders in a tar, its members shuffled
    ILSVRC2012_img_train.tar             a tar of class tars <synset>.tar, as ImageNet has it
    wds/train-000000.tar ...             WebDataset shards of jpg, cls and json; wds/classes.txt
and the validation images, --images / 10 of them but at least one per class:
    folder/val/<synset>/ILSVRC2012_val_00000001.JPEG
    ILSVRC2012_img_val.tar               flat, in order
    ILSVRC2012_devkit_t12.tar.gz         their labels as ImageNet has them
    val_synsets.txt                      their labels as a list of synsets, in order
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this tree's irpe_ds, whatever is installed

from irpe_ds.cli import run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--images", type=int, default=2000, help="training images")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--oddities", action="store_true", help="plant odd but undamaged images")
    parser.add_argument("--bad", action="store_true", help="plant damaged files and non-images")
    parser.add_argument("--enlarge", type=int, default=1, help="times the sides of the photos")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    from data_prep.synthetic_imagenet import write

    made = write(**vars(args))
    for file in made.planted:
        print(f"{file.kind:12} {file.path}")
    print(
        f"{args.out}: wrote {len(made.train)} training and {len(made.val)} validation images "
        f"of {len(made.synsets)} classes"
    )


if __name__ == "__main__":
    run(main)
