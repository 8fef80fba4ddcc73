"""A run on a cluster: what fits, how fast it is, what it costs, what holds it back."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from irpe_ds.config import RunConfig
from irpe_ds.errors import ConfigError, UserError
from irpe_ds.planner.hardware import Cluster
from irpe_ds.planner.memory import Memory, largest_micro_batch, memory
from irpe_ds.planner.profile import Profile
from irpe_ds.planner.step import Assumptions, Step, step
from irpe_ds.planner.zero import Zero

IMAGENET_IMAGES = 1_281_167
IMAGENET_KB = 110.0
"""Training images of ImageNet-1K, and the mean size of its JPEG files in 1000 bytes."""

SIZES = tuple(2**n for n in range(13))
"""Numbers of GPUs, or of nodes, of tables and figures: 1 to 4096."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Everything that a plan depends on but the cluster."""

    config: RunConfig
    profile: Profile
    zero: Zero
    assumed: Assumptions
    images: int = IMAGENET_IMAGES
    """Of the training set."""
    image_kb: float = IMAGENET_KB

    @property
    def uncounted(self) -> list[str]:
        """What the configuration asks for that the plan leaves out."""
        found = []
        if self.config.distill.kind != "none":
            found.append("the teacher (distill.teacher), its passes and its memory")
        if self.config.model.resolutions:
            found.append(
                f"model.resolutions: every epoch is of {self.config.model.img_size} pixels"
            )
        return found

    @property
    def multiple(self) -> int:
        """What the images of a forward pass are a multiple of."""
        return 2 if self.config.augment.mixup or self.config.augment.cutmix else 1

    def memory(self, cluster: Cluster, micro_batch: int) -> Memory:
        context = self.assumed.context_gib
        return memory(self.profile, self.zero, cluster, self.config, micro_batch, context)

    def largest(self, cluster: Cluster) -> int:
        """The largest micro-batch that fits; 0 if none does."""
        context = self.assumed.context_gib
        found = largest_micro_batch(self.profile, self.zero, cluster, self.config, context)
        return found - found % self.multiple


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run on one cluster."""

    cluster: Cluster
    micro_batch: int
    accumulation: int
    step: Step
    memory: Memory
    largest: int
    """The largest micro-batch that fits."""
    efficiency: float
    """Images per second of a GPU, as a share of what its passes alone would reach at best."""
    hours: float
    """To the last epoch, training alone."""
    image_kb: float

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
        """What the loaders of all nodes read, 1e9 bytes per second, while nothing is cached."""
        return self.images_per_s * self.image_kb / 1e6

    @property
    def bottleneck(self) -> str:
        return self.step.bottleneck(self.cluster)


def plan(scenario: Scenario, cluster: Cluster, settings: Mapping[str, Zero] | None = None) -> Row:
    """The recipe's global batch on these GPUs, in as few micro-steps as fit.

    Args:
        settings: other ZeRO settings by name, to tell which would do where not even one image fits.

    Raises:
        ConfigError: the global batch cannot be shared by them, or not even one image fits.
    """
    train, gpus = scenario.config.train, cluster.gpus
    largest = scenario.largest(cluster)
    if not largest:
        raise _does_not_fit(scenario, cluster, settings or {})
    for accumulation in range(train.accumulation, train.global_batch + 1):
        micro, rest = divmod(train.global_batch, gpus * accumulation)
        if micro < scenario.multiple:
            break
        if not rest and micro <= largest and micro % scenario.multiple == 0:
            return _row(scenario, cluster, micro, accumulation, largest)
    unit = f"a multiple of {scenario.multiple * gpus * train.accumulation}"
    expected = f"{unit}: {scenario.multiple} images or more for each of {gpus} GPUs"
    raise ConfigError("train.global_batch", expected, train.global_batch)


def _does_not_fit(
    scenario: Scenario, cluster: Cluster, settings: Mapping[str, Zero]
) -> ConfigError:
    found = {name: replace(scenario, zero=zero) for name, zero in settings.items()}
    fitting = [name for name, other in found.items() if other.largest(cluster)]
    least = scenario.memory(cluster, scenario.multiple).total / 2**30
    expected = f"{least:.1f} GiB or more for {scenario.zero.name} on {cluster.gpus} GPUs"
    if fitting:
        expected += f", or train.deepspeed of {', '.join(fitting)}, which fit"
    elif settings:
        fullest = [other.memory(cluster, scenario.multiple).total for other in found.values()]
        expected += f"; no other stage fits, the smallest needs {min(fullest) / 2**30:.1f} GiB"
    got = f"{cluster.gpu.memory_gib:g} GiB of one {cluster.gpu.name}"
    return ConfigError("memory", expected, got)


def plan_micro_batch(scenario: Scenario, cluster: Cluster, micro_batch: int) -> Row:
    """So many images on every GPU, whatever the global batch becomes.

    Raises:
        ConfigError: they do not fit, or no run can have so many.
    """
    if micro_batch < 1 or micro_batch % scenario.multiple:
        expected = f"a positive multiple of {scenario.multiple}"
        raise ConfigError("--micro-batch", expected, micro_batch)
    largest = scenario.largest(cluster)
    if micro_batch > largest:
        expected = f"at most {largest}, which is what fits under {scenario.zero.name}"
        raise ConfigError("--micro-batch", expected, micro_batch)
    return _row(scenario, cluster, micro_batch, scenario.config.train.accumulation, largest)


def strong(scenario: Scenario, cluster: Cluster) -> Iterator[Row]:
    """The recipe on 1 to 4096 GPUs, as far as its global batch can be shared."""
    for size in _sizes(cluster):
        try:
            yield plan(scenario, size)
        except UserError:
            continue


def weak(scenario: Scenario, cluster: Cluster, micro_batch: int) -> Iterator[Row]:
    """The same micro-batch on 1 to 4096 GPUs; the global batch grows with them."""
    for size in _sizes(cluster):
        largest = scenario.largest(size)
        if micro_batch <= largest:
            accumulation = scenario.config.train.accumulation
            yield _row(scenario, size, micro_batch, accumulation, largest)


def _sizes(cluster: Cluster) -> Iterator[Cluster]:
    """A part of a node, nodes, and the cluster itself."""
    within = {gpus for gpus in SIZES if gpus <= cluster.per_node}
    nodes = {cluster.per_node * number for number in SIZES}
    for gpus in sorted(within | nodes | {cluster.gpus}):
        if gpus <= max(SIZES[-1], cluster.gpus):
            yield cluster.with_gpus(gpus)


def _row(
    scenario: Scenario, cluster: Cluster, micro_batch: int, accumulation: int, largest: int
) -> Row:
    shape = (micro_batch, accumulation)
    taken = step(
        scenario.profile, scenario.zero, cluster, scenario.config, *shape, scenario.assumed
    )
    updates = scenario.config.train.epochs * scenario.images / cluster.gpus
    speed = micro_batch * accumulation / taken.total
    return Row(
        cluster=cluster,
        micro_batch=micro_batch,
        accumulation=accumulation,
        step=taken,
        memory=scenario.memory(cluster, micro_batch),
        largest=largest,
        efficiency=speed / best_of_one(scenario, cluster, micro_batch),
        hours=updates / speed / 3600,
        image_kb=scenario.image_kb,
    )


def best_of_one(scenario: Scenario, cluster: Cluster, micro_batch: int) -> float:
    """Images per second of the passes alone on one GPU, with the largest micro-batch that fits.

    One of `micro_batch` where that is larger, as for models that do not fit on one GPU at all.
    """
    alone = cluster.with_gpus(1)
    images = max(micro_batch, scenario.largest(alone))
    config, assumed = scenario.config, scenario.assumed
    taken = step(scenario.profile, scenario.zero, alone, config, images, 1, assumed)
    return images / (taken.forward + taken.backward)
