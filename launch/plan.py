"""Plan a run: `python launch/plan.py --config x.yaml --gpu H100 --gpus 64 [section.key=value ...]`.

Nothing is trained. Memory and bytes are counted; speed follows from them and from shares of what
data sheets promise, which are assumed, or fitted to a scaling experiment's results by --calibrate.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this tree's irpe_ds, whatever is installed

from irpe_ds.cli import run
from irpe_ds.config import load_config
from irpe_ds.errors import ConfigError, UserError
from irpe_ds.planner.calibrate import calibrate, read_results
from irpe_ds.planner.communication import collectives
from irpe_ds.planner.hardware import BACKENDS, Cluster, build_cluster, find_gpu
from irpe_ds.planner.plan import (
    IMAGENET_IMAGES,
    IMAGENET_KB,
    Row,
    Scenario,
    plan,
    plan_micro_batch,
    strong,
    weak,
)
from irpe_ds.planner.profile import profile
from irpe_ds.planner.step import Assumptions
from irpe_ds.planner.zero import Zero, read_zero
from irpe_ds.plots.plan import draw

SHARES = {
    "flop_share": "of the peak of matrix products",
    "memory_share": "of the GPU's memory bandwidth, for all other operators",
    "link_share": "of the links' rates",
    "launch_us": "microseconds of the host for each operator",
    "latency": "times the latencies of the library's tables",
    "hook_us": "microseconds of the host for each parameter, in a pass of ZeRO 3",
    "context_gib": "GiB for CUDA, NCCL and libraries",
    "host_gb_s": "GB/s of a host's memory, for what is offloaded",
    "pcie_share": "of PCIe's rate, for what is offloaded",
}
"""Inputs that no count gives, and what each is a share or a number of."""


def main() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would warn that it finds no GPU
    arguments = _parser().parse_intermixed_args()
    if arguments.out is not None and arguments.out.suffix != ".png":
        raise ConfigError("--out", "a name that ends in .png", arguments.out)
    gpu = find_gpu(arguments.gpu)
    intra = arguments.intra or ("nvlink" if gpu.nvlink_gb_s else "pcie")
    cluster = build_cluster(
        gpu,
        arguments.gpus,
        arguments.per_node,
        intra,
        arguments.inter,
        arguments.nics,
        arguments.backend,
    )
    scenario, origin = _scenario(arguments, cluster)
    settings = _settings(scenario.config.train.deepspeed)
    if arguments.micro_batch is None:
        row = plan(scenario, cluster, settings)
    else:
        row = plan_micro_batch(scenario, cluster, arguments.micro_batch)
    per_gpu = arguments.micro_batch or min(128, scenario.largest(cluster))
    same_batch = list(strong(scenario, cluster))
    same_load = list(weak(scenario, cluster, per_gpu))
    _print_answer(scenario, row)
    _print_sent(scenario, row)
    _print_memory(scenario, row, settings)
    global_batch = scenario.config.train.global_batch
    _print_scaling(f"Global batch of {global_batch} images (strong scaling)", same_batch)
    _print_scaling(f"{per_gpu} images on every GPU (weak scaling)", same_load)
    _print_origin(scenario, cluster, origin)
    if arguments.out is not None:
        try:
            _draw(arguments.out, scenario, row, (same_batch, same_load), settings, origin)
        except OSError as error:
            raise ConfigError("--out", "a file that can be written", error) from None
        print(f"\n{arguments.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Memory, speed and cost of a run on a cluster.")
    add = parser.add_argument
    add("--config", required=True, metavar="YAML", help="the run's configuration")
    own = "NAME:peak_tflops=..,memory_gib=..,memory_gb_s=.."
    add("--gpu", required=True, metavar="NAME", help=f"H100, A100, ..., or {own}")
    add("--gpus", required=True, type=int, metavar="N", help="in all nodes")
    add("--per-node", type=int, default=8, metavar="N", help="GPUs of a node")
    add("--intra", metavar="LINK", help="in a node: nvlink, pcie or a rate such as 300GB/s")
    add("--inter", default="400Gb/s", metavar="RATE", help="of a network card, such as 400Gb/s")
    add("--nics", type=int, metavar="N", help="network cards of a node; default: one for each GPU")
    add("--backend", choices=BACKENDS, default="nccl", help="gloo: for runs on CPUs")
    add("--micro-batch", type=int, metavar="N", help="images on every GPU; default: the recipe's")
    add("--images", type=int, default=IMAGENET_IMAGES, metavar="N", help="of the training set")
    add("--image-kb", type=float, default=IMAGENET_KB, metavar="X", help="mean size, 1000 bytes")
    add(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="results of a scaling experiment, CSV or JSON",
    )
    add("--out", type=Path, metavar="PNG", help="draw it for 1 to 4096 GPUs")
    for name, meaning in SHARES.items():
        add(f"--{name.replace('_', '-')}", type=float, metavar="X", help=meaning)
    add("overrides", nargs="*", metavar="section.key=value")
    return parser


def _scenario(arguments: argparse.Namespace, cluster: Cluster) -> tuple[Scenario, dict[str, str]]:
    """What to plan, and where each of its assumptions comes from."""
    given = {name: getattr(arguments, name) for name in SHARES}
    numbers = given | {name: getattr(arguments, name) for name in ("images", "image_kb")}
    for name, value in numbers.items():
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')}", "a number above 0", value)
    config = load_config(arguments.config, arguments.overrides)
    scenario = Scenario(
        config=config,
        profile=profile(config),
        zero=read_zero(config.train.deepspeed),
        assumed=Assumptions(**{name: x for name, x in given.items() if x is not None}),
        images=arguments.images,
        image_kb=arguments.image_kb,
    )
    origin = {name: "assumed" if x is None else "given" for name, x in given.items()}
    if arguments.calibrate is None:
        return scenario, origin
    rpe = "" if config.model.rpe is None else config.model.rpe.on
    wanted = (config.model.name, config.train.precision, rpe)
    model = config.model.model_dump(mode="json")
    shape = {key: model[key] for key in ("img_size", "options", "grad_checkpointing")}
    results = read_results(arguments.calibrate, *wanted, shape)
    files = _settings(config.train.deepspeed)
    zeros: dict[int | str, Zero] = dict(files.items())
    zeros |= {zero.stage: zero for zero in files.values() if "+" not in zero.name}
    zeros[scenario.zero.stage] = scenario.zero
    found = calibrate(scenario, cluster, results, zeros)
    for name in found.assumed.fitted:
        if given[name] is not None:
            raise ConfigError(f"--{name.replace('_', '-')}", "no value: it is fitted", given[name])
    source = f"fitted to {found.results} results in {arguments.calibrate}"
    worst = f"; the worst is {100 * found.worst:.1f} % off"
    origin |= {name: source + worst for name in found.assumed.fitted}
    return replace(scenario, assumed=found.assumed), origin


def _settings(path: Path) -> dict[str, Zero]:
    """ZeRO settings by name: those of the run, and of the files beside them that have some."""
    found = {}
    for file in sorted({path, *path.parent.glob("*.json")}):
        try:
            found[file.stem] = read_zero(file)
        except UserError:
            if file == path:
                raise
    return found


def _print_answer(scenario: Scenario, row: Row) -> None:
    found, cluster, train = scenario.profile, row.cluster, scenario.config.train
    print(
        f"{scenario.config.model.name}: {found.numel / 1e6:.2f} M parameters, "
        f"{found.flops / 1e9:.2f} GFLOP forward, {train.precision}, attention {found.impl}, "
        f"{scenario.zero.name}"
    )
    print(
        f"on {cluster.gpus} {cluster.gpu.name} in {cluster.nodes} nodes: {row.micro_batch} images "
        f"x {row.accumulation} micro-steps x {cluster.gpus} GPUs = {row.global_batch} an update\n"
    )
    parts = [f"{name} {1e3 * x:.2f}" for name, x in row.step.split.items()]
    print(f"- update: {1e3 * row.step.total:.2f} ms ({', '.join(parts)} exposed)")
    print(f"- throughput: {row.images_per_s:,.0f} img/s, efficiency {100 * row.efficiency:.0f} %")
    epochs = f"{train.epochs} epochs of {scenario.images:,} images"
    print(f"- {epochs}: {row.hours:,.2f} hours, {row.gpu_hours:,.1f} GPU-hours")
    nodes = row.cluster.nodes
    print(
        f"- loader: {row.images_per_s / nodes:,.0f} img/s and {row.storage_gb_s / nodes:.2f} GB/s "
        f"on each node, {row.storage_gb_s:.2f} GB/s in all, unless the files are cached"
    )
    used = f"{row.memory.gib()['total']:.1f} of {cluster.gpu.memory_gib:g} GiB"
    print(f"- memory: {used}; up to {row.largest} images fit")
    print(f"- bottleneck: {row.bottleneck}")
    for what in scenario.uncounted:
        print(f"- not counted: {what}")


def _print_sent(scenario: Scenario, row: Row) -> None:
    rows = collectives(scenario.profile, scenario.zero, row.cluster, row.accumulation)
    print("\n## What a GPU sends for an update\n")
    print(
        "| collective | of | among | calls | vector (MB) | sent (MB) |\n|---|---|---|---|---|---|"
    )
    for send in rows:
        ranks = send.ranks(row.cluster, scenario.zero.partition)
        sent = send.sent(ranks, row.cluster.backend) / 1e6
        vector = f"{send.payload / 1e6:.2f} | {sent:.2f}"
        print(f"| {send.kind} | {send.what} | {ranks} | {send.calls} | {vector} |")


def _print_memory(scenario: Scenario, row: Row, settings: Mapping[str, Zero]) -> None:
    """A row for every ZeRO setting, at the micro-batch of the plan."""
    columns = ("weights", "gradients", "optimizer", "ema", "activations", "buckets", "context")
    print(f"\n## Memory of a GPU (GiB) with {row.micro_batch} images\n")
    print(f"| ds_configs/ | {' | '.join(columns)} | total | host | largest micro-batch |")
    print("|" + "---|" * (len(columns) + 4))
    for name, zero in settings.items():
        other = replace(scenario, zero=zero)
        gib = other.memory(row.cluster, row.micro_batch).gib()
        cells = [f"{gib[column]:.2f}" for column in (*columns, "total", "host")]
        mark = " (the run's)" if zero == scenario.zero else ""
        print(f"| {name}{mark} | {' | '.join(cells)} | {other.largest(row.cluster) or 'none'} |")


def _print_scaling(title: str, rows: Sequence[Row]) -> None:
    print(f"\n## {title}\n")
    if not rows:
        print("does not fit")
        return
    print(
        "| GPUs | images per GPU | update (ms) | communication (ms) | img/s | efficiency | ", end=""
    )
    print("hours | GPU-hours | storage (GB/s) | bottleneck |\n" + "|" + "---|" * 10)
    for row in rows:
        micro = f"{row.micro_batch}" + (f" x {row.accumulation}" if row.accumulation > 1 else "")
        times = f"{1e3 * row.step.total:.2f} | {1e3 * row.step.communication:.2f}"
        speed = f"{row.images_per_s:,.0f} | {100 * row.efficiency:.0f} %"
        cost = f"{row.hours:.2f} | {row.gpu_hours:,.1f} | {row.storage_gb_s:.2f}"
        print(f"| {row.cluster.gpus} | {micro} | {times} | {speed} | {cost} | {row.bottleneck} |")


def _print_origin(scenario: Scenario, cluster: Cluster, origin: Mapping[str, str]) -> None:
    print("\n## Where the numbers come from\n")
    print(
        "No figure above is measured. Counted: parameters, operations, activations, bytes moved and"
    )
    print(f"sent. The GPU: {cluster.gpu.source}. The links: as given. Beside these:\n")
    print("| input | value | of what | from | measured |\n|---|---|---|---|---|")
    for name, meaning in SHARES.items():
        value = getattr(scenario.assumed, name)
        measured = "indirectly" if origin[name].startswith("fitted") else "no"
        print(f"| {name} | {value:.3g} | {meaning} | {origin[name]} | {measured} |")


def _draw(
    path: Path,
    scenario: Scenario,
    row: Row,
    rows: tuple[list[Row], list[Row]],
    settings: Mapping[str, Zero],
    origin: Mapping[str, str],
) -> None:
    cluster, batch = row.cluster, row.micro_batch
    memory = {
        name: replace(scenario, zero=zero).memory(cluster, batch) for name, zero in settings.items()
    }
    title = (
        f"{scenario.config.model.name}, {scenario.config.train.precision}, "
        f"{scenario.zero.name}, nodes of {cluster.per_node} {cluster.gpu.name}"
    )
    fitted = [name for name, source in origin.items() if source.startswith("fitted")]
    shares = [
        f"{getattr(scenario.assumed, name):.2g} {meaning} "
        f"({'fitted' if name in fitted else origin[name]})"
        for name, meaning in list(SHARES.items())[:3]
    ]
    note = (
        "Planned, not measured. Memory, operations and bytes are counted; speed takes these "
        f"shares:\n{'; '.join(shares)}."
    )
    draw(path, title, note, rows, row, memory)


if __name__ == "__main__":
    run(main)
