"""Plan a run: `python launch/plan.py --config x.yaml --gpu H100 --gpus 64 [section.key=value ...]`.

Nothing is trained. Memory and bytes are counted; speed follows from them and from shares of the
rates in data sheets, which are assumed, or fitted to a scaling experiment's results by --calibrate.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this tree's irpe_ds, whatever is installed

from irpe_ds.cli import run
from irpe_ds.errors import ConfigError, printable
from irpe_ds.planner.assumptions import IMAGENET_IMAGES, IMAGENET_KB, MEANINGS
from irpe_ds.planner.hardware import BACKENDS, build_cluster, find_gpu
from irpe_ds.plots.style import check_out, save_figure


def main() -> None:
    args = _parser().parse_intermixed_args()
    check_out(args.out)
    for name in (*MEANINGS, "images", "image_kb", "memory_gb", "storage_gb_s"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')}", "a number above 0", value)
    gpu = find_gpu(args.gpu)
    intra = args.intra or ("nvlink" if gpu.nvlink_gb_s else "pcie")
    links = (intra, args.inter, args.nics, args.backend)
    cluster = build_cluster(gpu, args.gpus, args.per_node, *links)

    from irpe_ds.config import load_config

    config = load_config(args.config, args.overrides)
    # Without it DeepSpeed 0.19 warns on stderr, on a machine without a GPU, that it found none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

    from irpe_ds.planner.report import build_report, to_text

    values = {name: getattr(args, name) for name in MEANINGS}
    given = {name: value for name, value in values.items() if value is not None}
    about = (args.images, args.image_kb, given, args.calibrate, args.micro_batch)
    report = build_report(config, cluster, *about, args.memory_gb, args.storage_gb_s)
    print(printable(to_text(report)))
    if args.out:
        from irpe_ds.plots.plan import draw_plan

        print()
        save_figure(draw_plan(report), args.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Memory, speed and cost of a run on a cluster.")
    add = parser.add_argument
    add("--config", required=True, metavar="YAML", help="the run's configuration")
    own = "NAME:peak_tflops=..,memory_gib=..,memory_gb_s=.."
    add("--gpu", required=True, metavar="NAME", help=f"H100, A100, ..., or {own}")
    add("--gpus", required=True, type=int, metavar="N", help="on all nodes together")
    add("--per-node", type=int, default=8, metavar="N", help="GPUs of a node")
    add("--intra", metavar="LINK", help="in a node: nvlink, pcie or a rate such as 300GB/s")
    add("--inter", default="400Gb/s", metavar="RATE", help="of a network card, such as 400Gb/s")
    add("--nics", type=int, metavar="N", help="network cards of a node; default: one for each GPU")
    add("--backend", choices=BACKENDS, default="nccl", help="gloo: for runs on CPUs")
    add("--micro-batch", type=int, metavar="N", help="images on every GPU; default: the recipe's")
    add("--images", type=int, default=IMAGENET_IMAGES, metavar="N", help="in the training set")
    add("--image-kb", type=float, default=IMAGENET_KB, metavar="X", help="mean size, 1000 bytes")
    add("--memory-gb", type=float, metavar="X", help="of a node, for advice on data.order")
    add("--storage-gb-s", type=float, metavar="X", help="what the storage gives all nodes together")
    results = "results of a scaling experiment, CSV or JSON"
    add("--calibrate", type=Path, metavar="FILE", help=results)
    drawn = "draw the plan for 1 to 4096 GPUs: PNG, PDF or SVG; may be repeated"
    add("--out", type=Path, action="append", default=[], metavar="FILE", help=drawn)
    for name, meaning in MEANINGS.items():
        add(f"--{name.replace('_', '-')}", type=float, metavar="X", help=meaning)
    add("overrides", nargs="*", metavar="section.key=value")
    return parser


if __name__ == "__main__":
    run(main)
