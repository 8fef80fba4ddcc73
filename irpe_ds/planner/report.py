"""The plan of a run as text: the answer, what is sent, memory, scaling, and what is assumed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from irpe_ds.config import RunConfig
from irpe_ds.errors import ConfigError, UserError
from irpe_ds.files import or_shipped
from irpe_ds.planner.assumptions import IMAGENET_IMAGES, MEANINGS, Assumptions
from irpe_ds.planner.deepspeed import collectives, version_note
from irpe_ds.planner.hardware import Cluster
from irpe_ds.planner.loading import data_advice
from irpe_ds.planner.memory import Memory
from irpe_ds.planner.plan import (
    PlanRow,
    Scenario,
    plan_global_batch,
    plan_micro_batch,
    strong_scaling,
    weak_scaling,
)
from irpe_ds.planner.profile import profile
from irpe_ds.planner.zero import Zero, read_zero

LARGEST_DEFAULT = 128
"""Images per GPU of the table of weak scaling, if they fit and --micro-batch does not say."""
MEMORY_COLUMNS = ("weights", "gradients", "optimizer", "ema", "activations", "buckets", "context")


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that the text and the figure of a plan show."""

    scenario: Scenario
    origins: Mapping[str, str]
    """Where each assumption comes from: assumed, given or fitted."""
    zero_configs: Mapping[str, Zero]
    """By name, the run's among them."""
    row: PlanRow
    """The run on the cluster."""
    data_advice: str
    """Which order of images to take."""
    micro_batch: int
    """Images per GPU of weak scaling."""
    strong: Sequence[PlanRow]
    weak: Sequence[PlanRow]

    @property
    def memory(self) -> dict[str, Memory]:
        """Memory under every ZeRO config, at the run's micro-batch."""
        scenario = self.scenario.with_accumulation(self.row.accumulation)
        return {
            name: replace(scenario, zero=zero).memory(self.row.cluster, self.row.micro_batch)
            for name, zero in self.zero_configs.items()
        }

    @property
    def advice(self) -> str:
        """What would be faster, most important first."""
        run, scenario = self.row, self.scenario.with_accumulation(self.row.accumulation)
        fewer = [
            row
            for row in self.strong
            if row.cluster.gpus < run.cluster.gpus and row.global_batch == run.global_batch
        ]
        best = max(fewer, key=lambda row: row.images_per_s, default=run)
        if best.images_per_s > run.images_per_s:
            return f"{best.cluster.gpus} GPUs are faster: {best.images_per_s:,.0f} img/s"
        train = scenario.config.train.model_copy(update={"compile": True})
        compiled = scenario.config.model_copy(update={"train": train})
        others = {
            f"train.deepspeed of {name}": replace(scenario, zero=zero)
            for name, zero in self.zero_configs.items()
        }
        others["train.compile=true"] = replace(scenario, config=compiled)
        shape = (run.cluster, run.micro_batch, run.accumulation)
        speeds = {
            name: run.global_batch / other.step_time(*shape).total
            for name, other in others.items()
            if run.micro_batch <= other.largest(run.cluster)
        }
        name, speed = max(speeds.items(), key=lambda item: item[1])
        if speed > 1.01 * run.images_per_s:
            return f"{name} is faster: {speed:,.0f} img/s"
        return "none: neither fewer GPUs, another JSON of the folder nor train.compile is faster"


def build_report(
    config: RunConfig,
    cluster: Cluster,
    images: int,
    image_kb: float,
    given: Mapping[str, Any],
    calibration: Path | None = None,
    micro_batch: int | None = None,
    memory_gb: float | None = None,
    storage_gb_s: float | None = None,
) -> Report:
    """Plan a run on a cluster.

    Args:
        images: in the training set.
        image_kb: mean size of a stored image, 1000 bytes.
        given: assumptions that the user gives.
        calibration: results of a scaling experiment to fit the others to.
        micro_batch: images per GPU. None: the recipe's global batch.
        memory_gb: memory of a node, 1e9 bytes, if known.
        storage_gb_s: what the storage gives all nodes together, if known.

    Raises:
        ConfigError: a mistake in the configuration or the results, or the run does not fit.
    """
    scenario = Scenario(
        config=config,
        profile=profile(config),
        zero=read_zero(config.train.deepspeed),
        assumed=Assumptions(**given),
        images=images,
        image_kb=image_kb,
    )
    zero_configs = _read_zero_configs(config.train.deepspeed)
    origins = {name: "given" if name in given else "assumed" for name in MEANINGS}
    if calibration is not None:
        scenario, fitted = _calibrated(scenario, cluster, calibration, zero_configs)
        for name in fitted.keys() & given.keys():
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(option, "no value: it is fitted", given[name])
        origins |= fitted
    if micro_batch is None:
        row = plan_global_batch(scenario, cluster, zero_configs)
    else:
        row = plan_micro_batch(scenario, cluster, micro_batch)
    per_gpu = micro_batch or min(LARGEST_DEFAULT, scenario.largest(cluster))
    return Report(
        scenario=scenario,
        origins=origins,
        zero_configs=zero_configs,
        row=row,
        data_advice=data_advice(scenario, row, memory_gb, storage_gb_s),
        micro_batch=per_gpu,
        strong=list(strong_scaling(scenario, cluster)),
        weak=list(weak_scaling(scenario, cluster, per_gpu)),
    )


def _calibrated(
    scenario: Scenario, cluster: Cluster, path: Path, zero_configs: Mapping[str, Zero]
) -> tuple[Scenario, dict[str, str]]:
    """The scenario with fitted assumptions, and the origin of each of these."""
    try:
        from irpe_ds.planner.calibrate import calibrate, read_results
    except ModuleNotFoundError as error:
        raise ConfigError(f"--calibrate needs {error.name}: pip install irpe-ds[data]") from None
    config = scenario.config
    rpe = "" if config.model.rpe is None else config.model.rpe.on
    model = config.model.model_dump(mode="json")
    shape = {key: model[key] for key in ("img_size", "options", "grad_checkpointing")}
    results = read_results(path, config.model.name, config.train.precision, rpe, shape)
    zeros: dict[int | str, Zero] = dict(zero_configs.items())
    zeros |= {zero.stage: zero for zero in zero_configs.values() if "+" not in zero.name}
    zeros[scenario.zero.stage] = scenario.zero
    found = calibrate(scenario, cluster, results, zeros)
    origin = f"fitted to {found.results} results in {path}; largest error {100 * found.worst:.1f} %"
    return replace(scenario, assumed=found.assumed), dict.fromkeys(found.assumed.fitted, origin)


def _read_zero_configs(path: Path) -> dict[str, Zero]:
    """By name: the run's file, and those JSON files beside it that have ZeRO settings."""
    found = {}
    for file in sorted({path, *or_shipped(path).parent.glob("*.json")}):
        try:
            found[file.stem] = read_zero(file)
        except UserError:
            if file == path:
                raise
    return found


def to_text(report: Report) -> str:
    """The report in Markdown."""
    global_batch = report.scenario.config.train.global_batch
    lines = [
        *_answer(report),
        *_sent(report),
        *_memory(report),
        *_scaling(f"Global batch of {global_batch} images (strong scaling)", report.strong),
        *_scaling(f"{report.micro_batch} images on every GPU (weak scaling)", report.weak),
        *_origins(report),
    ]
    return "\n".join(lines)


def _answer(report: Report) -> Iterator[str]:
    scenario, row = report.scenario, report.row
    counted, cluster, train = scenario.profile, row.cluster, scenario.config.train
    yield (
        f"{scenario.config.model.name}: {counted.numel / 1e6:.2f} M parameters, "
        f"{counted.flops / 1e9:.2f} GFLOP forward, {train.precision}, attention {counted.impl}, "
        f"{scenario.zero.name}"
    )
    nodes = f"{cluster.nodes} node" + "s" * (cluster.nodes > 1)
    yield (
        f"on {cluster.gpus} {cluster.gpu.name} in {nodes}: {row.micro_batch} images "
        f"x {row.accumulation} micro-steps x {cluster.gpus} GPUs = {row.global_batch} per update\n"
    )
    parts = ", ".join(f"{name} {1e3 * x:.2f}" for name, x in row.step.parts.items())
    yield f"- update: {1e3 * row.step.total:.2f} ms ({parts} exposed)"
    speed = f"{row.images_per_s:,.0f} img/s {'compiled' if train.compile else 'eager'}"
    yield f"- throughput: {speed}, efficiency {100 * row.efficiency:.0f} %"
    per_node = row.images_per_s / cluster.nodes, row.storage_gb_s / cluster.nodes
    cores = f"{row.loader_cores} core" + "s" * (row.loader_cores > 1)
    yield (
        f"- loader: {cores} of each node for its {per_node[0]:,.0f} img/s, and "
        f"{per_node[1]:.2f} GB/s ({row.storage_gb_s:.2f} in all) unless the files are cached"
    )
    yield f"- data: {report.data_advice}"
    yield f"- advice: {report.advice}"
    imagenet = " (ImageNet; --images for another set)" * (scenario.images == IMAGENET_IMAGES)
    epochs = f"{train.epochs} epochs of {scenario.images:,} images{imagenet}"
    yield f"- {epochs}: {row.hours:,.2f} hours, {row.gpu_hours:,.1f} GPU-hours"
    gib = row.memory.gib()
    used = f"{gib['total']:.1f} of {cluster.gpu.memory_gib:g} GiB, {gib['start']:.1f} at the start"
    yield f"- memory: {used}; up to {row.largest} images fit"
    yield f"- bottleneck: {row.bottleneck}"
    yield from (f"- not counted: {what}" for what in scenario.not_counted)
    note = version_note()
    if note is not None:
        yield f"- caution: {note}"


def _table(*head: str) -> Iterator[str]:
    yield _line(*head)
    yield "|" + "---|" * len(head)


def _line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _sent(report: Report) -> Iterator[str]:
    zero, row = report.scenario.zero, report.row
    yield "\n## What a GPU sends in an update\n"
    yield from _table("collective", "of", "ranks", "calls", "vector (MB)", "sent (MB)")
    for send in collectives(report.scenario.profile, zero, row.cluster, row.accumulation):
        ranks = send.ranks(row.cluster, zero.zero_hpz_partition_size)
        sent = send.sent(ranks, row.cluster.backend) / 1e6
        sizes = f"{send.payload / 1e6:.2f}", f"{sent:.2f}"
        yield _line(send.kind, send.content, ranks, send.calls, *sizes)


def _memory(report: Report) -> Iterator[str]:
    cluster = report.row.cluster
    yield f"\n## Memory of a GPU (GiB) with {report.row.micro_batch} images\n"
    yield from _table("ds_configs/", *MEMORY_COLUMNS, "total", "host", "largest micro-batch")
    for name, memory in report.memory.items():
        zero, gib = report.zero_configs[name], memory.gib()
        sizes = [f"{gib[column]:.2f}" for column in (*MEMORY_COLUMNS, "total", "host")]
        mark = " (the run's)" if zero == report.scenario.zero else ""
        largest = replace(report.scenario, zero=zero).largest(cluster) or "none"
        yield _line(f"{name}{mark}", *sizes, largest)


def _scaling(title: str, rows: Sequence[PlanRow]) -> Iterator[str]:
    yield f"\n## {title}\n"
    if not rows:
        yield "does not fit"
        return
    head = ("GPUs", "images per GPU", "update (ms)", "communication (ms)", "img/s", "efficiency")
    yield from _table(*head, "hours", "GPU-hours", "storage (GB/s)", "bottleneck")
    for row in rows:
        yield _line(
            row.cluster.gpus,
            f"{row.micro_batch}" + (f" x {row.accumulation}" if row.accumulation > 1 else ""),
            f"{1e3 * row.step.total:.2f}",
            f"{1e3 * row.step.communication:.2f}",
            f"{row.images_per_s:,.0f}",
            f"{100 * row.efficiency:.0f} %",
            f"{row.hours:.2f}",
            f"{row.gpu_hours:,.1f}",
            f"{row.storage_gb_s:.2f}",
            row.bottleneck,
        )


def _origins(report: Report) -> Iterator[str]:
    yield "\n## Where the numbers come from\n"
    yield "No figure above is measured. Parameters, FLOPs, activations and bytes are counted."
    yield f"GPU: {report.row.cluster.gpu.source}. Links: as given. Beside these:\n"
    yield from _table("input", "value", "of what", "from", "measured")
    for name, meaning in MEANINGS.items():
        origin, value = report.origins[name], getattr(report.scenario.assumed, name)
        measured = "indirectly" if origin.startswith("fitted") else "no"
        yield _line(name, f"{value:.3g}", meaning, origin, measured)
