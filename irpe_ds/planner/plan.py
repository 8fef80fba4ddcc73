"""A run on a cluster: what fits, how fast it is, what it costs, what bounds it."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from irpe_ds.config import RunConfig
from irpe_ds.errors import ConfigError, UserError
from irpe_ds.planner.assumptions import IMAGENET_IMAGES, IMAGENET_KB, Assumptions
from irpe_ds.planner.hardware import Cluster
from irpe_ds.planner.memory import Memory, largest_micro_batch, memory
from irpe_ds.planner.profile import Profile
from irpe_ds.planner.step import StepTime, step_time
from irpe_ds.planner.zero import Zero

SIZES = tuple(2**n for n in range(13))
"""Numbers of GPUs, or of nodes, in tables and figures: 1 to 4096."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Everything that a plan depends on except the cluster."""

    config: RunConfig
    profile: Profile
    zero: Zero
    assumed: Assumptions
    images: int = IMAGENET_IMAGES
    """Images in the training set."""
    image_kb: float = IMAGENET_KB
    """Mean size of a stored image, 1000 bytes."""

    @property
    def not_counted(self) -> list[str]:
        """What the configuration asks for that the plan leaves out."""
        found = []
        if self.config.distill.kind != "none":
            found.append("the teacher (distill.teacher), its passes and its memory")
        if self.config.model.resolutions:
            pixels = self.config.model.img_size
            found.append(f"model.resolutions: every epoch is planned at {pixels} pixels")
        if self.config.model.freeze:
            found.append("model.freeze: all parameters are planned as trained")
        return found

    @property
    def multiple(self) -> int:
        """The images of a forward pass are a multiple of this."""
        return 2 if self.config.augment.mixup or self.config.augment.cutmix else 1

    def with_accumulation(self, micro_steps: int) -> "Scenario":
        """The same with so many micro-steps in an update."""
        train = self.config.train.model_copy(update={"accumulation": micro_steps})
        return replace(self, config=self.config.model_copy(update={"train": train}))

    def memory(self, cluster: Cluster, micro_batch: int) -> Memory:
        context = self.assumed.context_gib
        return memory(self.profile, self.zero, cluster, self.config, micro_batch, context)

    def largest(self, cluster: Cluster) -> int:
        """The largest micro-batch that fits; 0 if none does."""
        context = self.assumed.context_gib
        found = largest_micro_batch(self.profile, self.zero, cluster, self.config, context)
        return found - found % self.multiple

    def step_time(self, cluster: Cluster, micro_batch: int, accumulation: int) -> StepTime:
        shape = (micro_batch, accumulation)
        return step_time(self.profile, self.zero, cluster, self.config, *shape, self.assumed)


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One run on one cluster."""

    cluster: Cluster
    micro_batch: int
    accumulation: int
    step: StepTime
    memory: Memory
    largest: int
    """The largest micro-batch that fits."""
    efficiency: float
    """Images per second of a GPU, over what its forward and backward passes alone could reach."""
    hours: float
    """To the last epoch, training alone."""
    image_kb: float
    loader_img_s: float

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.accumulation * self.cluster.gpus

    @property
    def images_per_s(self) -> float:
        return self.global_batch / self.step.total

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.cluster.gpus

    @property
    def storage_gb_s(self) -> float:
        """What the loaders of all nodes read while nothing is cached, 1e9 bytes per second."""
        return self.images_per_s * self.image_kb / 1e6

    @property
    def loader_cores(self) -> int:
        """Cores of each node that decode its images."""
        return math.ceil(self.images_per_s / self.cluster.nodes / self.loader_img_s)

    @property
    def bottleneck(self) -> str:
        return self.step.bottleneck(self.cluster)


def plan_global_batch(
    scenario: Scenario, cluster: Cluster, zero_configs: Mapping[str, Zero] | None = None
) -> PlanRow:
    """The recipe's global batch on these GPUs, in as few micro-steps as fit.

    Args:
        zero_configs: by name; those that would fit are named where this scenario does not.

    Raises:
        ConfigError: the global batch does not divide evenly, or not even one image fits.
    """
    train, gpus = scenario.config.train, cluster.gpus
    if not scenario.largest(cluster):
        raise _does_not_fit(scenario, cluster, zero_configs or {})
    for accumulation in range(train.accumulation, train.global_batch + 1):
        micro, rest = divmod(train.global_batch, gpus * accumulation)
        if micro < scenario.multiple:
            break
        if rest or micro % scenario.multiple:
            continue
        own = scenario.with_accumulation(accumulation)
        largest = own.largest(cluster)
        if micro <= largest:
            return _row(own, cluster, micro, accumulation, largest)
    unit = f"a multiple of {scenario.multiple * gpus * train.accumulation}"
    expected = f"{unit}: {scenario.multiple} images or more for each of {gpus} GPUs"
    raise ConfigError("train.global_batch", expected, train.global_batch)


def _does_not_fit(
    scenario: Scenario, cluster: Cluster, zero_configs: Mapping[str, Zero]
) -> ConfigError:
    others = {name: replace(scenario, zero=zero) for name, zero in zero_configs.items()}
    fitting = [name for name, other in others.items() if other.largest(cluster)]
    least = scenario.memory(cluster, scenario.multiple).total / 2**30
    expected = f"{least:.1f} GiB or more for {scenario.zero.name} on {cluster.gpus} GPUs"
    if fitting:
        expected += f", or train.deepspeed of {', '.join(fitting)}, which fit"
    elif others:
        totals = [other.memory(cluster, scenario.multiple).total for other in others.values()]
        expected += f"; no other stage fits, the smallest needs {min(totals) / 2**30:.1f} GiB"
    got = f"{cluster.gpu.memory_gib:g} GiB on one {cluster.gpu.name}"
    return ConfigError("memory", expected, got)


def plan_micro_batch(scenario: Scenario, cluster: Cluster, micro_batch: int) -> PlanRow:
    """So many images on every GPU, whatever the global batch becomes.

    Raises:
        ConfigError: they do not fit, or no run can have so many.
    """
    if micro_batch < 1 or micro_batch % scenario.multiple:
        expected = f"a positive multiple of {scenario.multiple}"
        raise ConfigError("--micro-batch", expected, micro_batch)
    largest = scenario.largest(cluster)
    if micro_batch > largest:
        expected = f"at most {largest}, the most that fit under {scenario.zero.name}"
        raise ConfigError("--micro-batch", expected, micro_batch)
    return _row(scenario, cluster, micro_batch, scenario.config.train.accumulation, largest)


def strong_scaling(scenario: Scenario, cluster: Cluster) -> Iterator[PlanRow]:
    """The recipe on 1 to 4096 GPUs, as far as its global batch can be divided."""
    for part in _sizes(cluster):
        try:
            yield plan_global_batch(scenario, part)
        except UserError:
            continue


def weak_scaling(scenario: Scenario, cluster: Cluster, micro_batch: int) -> Iterator[PlanRow]:
    """The same micro-batch on 1 to 4096 GPUs; the global batch grows with them."""
    for part in _sizes(cluster):
        largest = scenario.largest(part)
        if micro_batch <= largest:
            accumulation = scenario.config.train.accumulation
            yield _row(scenario, part, micro_batch, accumulation, largest)


def _sizes(cluster: Cluster) -> Iterator[Cluster]:
    """Parts of a node, whole nodes, and the cluster itself."""
    within = {gpus for gpus in SIZES if gpus <= cluster.per_node}
    nodes = {cluster.per_node * number for number in SIZES}
    for gpus in sorted(within | nodes | {cluster.gpus}):
        if gpus <= max(SIZES[-1], cluster.gpus):
            yield replace(cluster, gpus=gpus)


def _row(
    scenario: Scenario, cluster: Cluster, micro_batch: int, accumulation: int, largest: int
) -> PlanRow:
    step = scenario.step_time(cluster, micro_batch, accumulation)
    images = scenario.config.train.epochs * scenario.images / cluster.gpus
    speed = micro_batch * accumulation / step.total
    return PlanRow(
        cluster=cluster,
        micro_batch=micro_batch,
        accumulation=accumulation,
        step=step,
        memory=scenario.memory(cluster, micro_batch),
        largest=largest,
        efficiency=speed / _best_of_one(scenario, cluster, micro_batch),
        hours=images / speed / 3600,
        image_kb=scenario.image_kb,
        loader_img_s=scenario.assumed.loader_img_s,
    )


def _best_of_one(scenario: Scenario, cluster: Cluster, micro_batch: int) -> float:
    """Images per second of the passes alone on one GPU, with the largest micro-batch that fits.

    With `micro_batch` where that is larger, as for models that do not fit on one GPU at all.
    """
    alone = replace(cluster, gpus=1)
    images = max(micro_batch, scenario.largest(alone))
    step = scenario.step_time(alone, images, 1)
    return images / (step.forward + step.backward)
