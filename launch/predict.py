"""Classify images: CSV, JSON, and where folders name their classes, scores and pictures.

python launch/predict.py --model runs/photos photos/val --out predictions
python launch/predict.py --model exported/ one.jpg another.jpg

An image whose folder has the name of a class is taken to be of that class. One that cannot be read
is a row with its error; the rest is classified, and the exit code is 2.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1]))  # this tree's irpe_ds, whatever is installed

from irpe_ds.cli import run
from irpe_ds.errors import ConfigError, DataError, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from irpe_ds.prediction import Prediction, Scores

SHOWN = 20
"""Classes, and with --out images, that are printed at most."""
CSV, JSON = "predictions.csv", "predictions.json"
CONFUSION, MISTAKES = "confusion.png", "mistakes.png"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="run folder, export folder or exported file")
    add("images", type=Path, nargs="+", metavar="PHOTO|FOLDER", help="images, or folders of them")
    add("--out", type=Path, metavar="FOLDER", help="to write to; without it only print")
    add("--top", type=int, default=5, metavar="K", help="classes listed per image (5)")
    add("--batch-size", type=int, default=32, help="images per forward pass (32)")
    args = parser.parse_args()
    for name, value in (("--top", args.top), ("--batch-size", args.batch_size)):
        if value < 1:
            raise ConfigError(name, "at least 1", value)
    return args


def main() -> None:
    args = arguments()
    missing = next((path for path in args.images if not path.exists()), None)
    if missing is not None:
        raise ConfigError("images", "images or folders that exist", missing)

    import torch

    if not torch.cuda.is_available():  # without it DeepSpeed 0.19 warns that it found no GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")

    import irpe_ds
    from irpe_ds.cluster.process_group import device_type
    from irpe_ds.prediction import find_images, predict, score

    model, transform, names = irpe_ds.load(args.model)
    images = find_images(args.images, names or ())
    done = predict(
        model,
        transform,
        images,
        batch_size=args.batch_size,
        workers=len(os.sched_getaffinity(0)),
        device=torch.device(device_type()),
    )
    predictions = list(done)
    count = next((len(p.probabilities) for p in predictions if p.probabilities is not None), 0)
    classes = names or [str(number) for number in range(count)]
    scores = score(predictions, len(classes))
    if args.out is not None:
        write(args.out, predictions, classes, min(args.top, len(classes)), scores)
    say(predictions, classes, scores, args.out)
    bad = sum(p.probabilities is None for p in predictions)
    if bad:
        where = "" if args.out is None else f": the column error of {args.out / CSV}"
        raise DataError(f"{bad} of {len(images)} images cannot be read{where}")


def write(
    out: Path,
    predictions: "Sequence[Prediction]",
    classes: "Sequence[str]",
    top: int,
    scores: "Scores | None",
) -> None:
    """Write the files, and remove pictures of an earlier call that this one has no reason for."""
    from irpe_ds.files import replace_file
    from irpe_ds.plots.predictions import MISTAKES as ON_A_SHEET
    from irpe_ds.plots.predictions import draw_confusion, draw_mistakes
    from irpe_ds.plots.style import save_figure
    from irpe_ds.prediction import to_csv, to_json, worst_mistakes

    try:
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / CSV, to_csv(predictions, classes, top))
        found = to_json(predictions, classes, top, scores)
        replace_file(out / JSON, json.dumps(found, indent=1) + "\n")
        for name in (CONFUSION, MISTAKES):
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: cannot write to {out}: {error.strerror}") from None
    if scores is None:
        return
    save_figure(draw_confusion(scores, classes, "Confusion matrix"), [out / CONFUSION])
    if wrong := worst_mistakes(predictions, len(predictions)):
        save_figure(draw_mistakes(wrong[:ON_A_SHEET], len(wrong), classes), [out / MISTAKES])


def say(
    predictions: "Sequence[Prediction]",
    classes: "Sequence[str]",
    scores: "Scores | None",
    out: Path | None,
) -> None:
    for prediction in predictions if out is None or len(predictions) <= SHOWN else ():
        top = ", ".join(f"{classes[n]} {100 * x:.1f} %" for n, x in prediction.top(3))
        print(printable(f"{prediction.image.path}: {top or prediction.error}"))
    if scores is None:
        print("No image lies in a folder with the name of a class: there are no scores")
    else:
        right = f"{100 * scores.accuracy:.1f} % of {scores.images} images of known classes"
        print(f"{right} are predicted right")
        rows = [(name, scores.of_class(n)) for n, name in enumerate(classes)]
        rows = [(name, row) for name, row in rows if row["images"]]
        for name, row in rows if len(rows) <= SHOWN else ():
            shown = (row["precision"], row["recall"], row["f1"])
            cells = ["   -" if x is None else f"{x:.2f}" for x in shown]
            precision, recall, f1 = cells
            text = f"precision {precision}  recall {recall}  F1 {f1}  n {row['images']}"
            print(f"  {printable(name)[:24]:<24}  {text}")
    if out is not None:
        made = [name for name in (CSV, JSON, CONFUSION, MISTAKES) if (out / name).exists()]
        print(f"{out}: {', '.join(made)}")


if __name__ == "__main__":
    run(main)
