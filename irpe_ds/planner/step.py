"""How long an update takes, and what most of that time goes to."""

from dataclasses import dataclass

from irpe_ds.config import RunConfig
from irpe_ds.models.flops import TRAINING
from irpe_ds.planner.communication import Collective, collectives, seconds
from irpe_ds.planner.hardware import Cluster
from irpe_ds.planner.memory import shard_size
from irpe_ds.planner.profile import Profile
from irpe_ds.planner.zero import Zero


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Inputs that no count gives; each is assumed until a calibration fits it."""

    flop_share: float = 0.7
    """Share of the GPU's peak that matrix products reach."""
    memory_share: float = 0.8
    """Share of its memory bandwidth that all other operators reach."""
    link_share: float = 0.8
    """Share of the links' rates that collectives reach."""
    launch_us: float = 10.0
    """Host time of one operator, microseconds; a GPU that is faster waits for it."""
    latency: float = 1.0
    """Latency of collectives, as a multiple of what tables of their library say."""
    hook_us: float = 100.0
    """Host time of ZeRO 3 for a parameter in a pass, to gather it and to let it go."""
    context_gib: float = 1.5
    """Memory of CUDA, NCCL and libraries."""
    host_gb_s: float = 200.0
    """Memory bandwidth of a node's host, which an offloaded optimizer shares."""
    pcie_share: float = 0.8
    """Share of PCIe's rate that offloading reaches."""
    fitted: tuple[str, ...] = ()
    """Names of those that a calibration has fitted."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of one update of one rank."""

    forward: float
    backward: float
    optimizer: float
    communication: float
    """What is waited for, beyond the passes that it goes on beside."""
    hidden: float
    """Communication beside the passes."""
    arithmetic: float
    """Of forward and backward: matrix products alone."""
    launches: float
    """Of forward and backward: what the host needs to start their operators."""
    latency: float
    """Of all communication: what would be left on infinitely fast links."""
    offload: float
    """Of the optimizer: transfers to and from the host, and the host's own work."""

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.optimizer + self.communication

    @property
    def split(self) -> dict[str, float]:
        """The four parts of the step."""
        names = ("forward", "backward", "optimizer", "communication")
        return {name: getattr(self, name) for name in names}

    def bottleneck(self, cluster: Cluster) -> str:
        """What most of the step goes to, in words."""
        compute = self.forward + self.backward
        parts = {"compute": compute, "update": self.optimizer, "wait": self.communication}
        largest = max(parts, key=parts.__getitem__)
        if largest == "update":
            what = "offloading" if self.offload > self.optimizer / 2 else "memory bandwidth"
            return f"the update of the weights ({what})"
        if largest == "wait":
            link = "between nodes" if cluster.nodes > 1 else "within the node"
            late = self.latency > (self.communication + self.hidden) / 2
            return f"communication {link} ({'latency' if late else 'bandwidth'})"
        if self.launches >= 0.99 * compute:
            return "starting operators: the batch of a GPU is too small"
        if self.arithmetic > compute / 2:
            return "matrix products"
        return "memory bandwidth of the GPU"


def step(
    profile: Profile,
    zero: Zero,
    cluster: Cluster,
    config: RunConfig,
    micro_batch: int,
    accumulation: int,
    assumed: Assumptions,
) -> Step:
    """The time of one update of so many micro-steps."""
    gpu = cluster.gpu
    peak = gpu.peak_flops(profile.precision, config.train.tf32) * assumed.flop_share
    bandwidth = 1e9 * gpu.memory_gb_s * assumed.memory_share
    backwards = TRAINING if profile.recompute else TRAINING - 1
    products = [images * profile.flops * micro_batch / peak for images in (1, backwards)]
    passes, launches = [], 0.0
    for n in (0, 1):
        moved = micro_batch * profile.traffic[n] + profile.traffic_once[n]
        computed, started = products[n] + moved / bandwidth, assumed.launch_us * profile.kernels[n]
        hooks = assumed.hook_us * len(profile.parameters) if zero.stage == 3 else 0.0
        if cluster.backend == "gloo":  # host and device are one
            computed, hooks = computed + 1e-6 * hooks, 0.0
        started = 1e-6 * (started + hooks)
        passes.append(accumulation * max(computed, started))
        launches += accumulation * started
    sends = collectives(profile, zero, cluster, accumulation)
    waited, hidden, latency = _communication(sends, zero, cluster, passes, assumed)
    optimizer, offload = _update(profile, zero, cluster, config, assumed)
    return Step(
        forward=passes[0],
        backward=passes[1],
        optimizer=optimizer,
        communication=waited,
        hidden=hidden,
        arithmetic=accumulation * sum(products),
        launches=launches,
        latency=latency,
        offload=offload,
    )


def _communication(
    sends: list[Collective],
    zero: Zero,
    cluster: Cluster,
    passes: list[float],
    assumed: Assumptions,
) -> tuple[float, float, float]:
    """Seconds that are waited for, that are hidden, and that are latency."""
    waited = latency = 0.0
    beside = {"forward": 0.0, "backward": 0.0}
    for send in sends:
        late, transfer = seconds(send, cluster, zero.partition, assumed.link_share)
        late *= assumed.latency
        latency += late
        share = send.waited if send.hides_in else 1.0
        waited += share * (late + transfer)
        if send.hides_in:
            beside[send.hides_in] += (1 - share) * (late + transfer)
    room = dict(zip(beside, passes, strict=True))
    over = sum(max(0.0, beside[name] - room[name]) for name in beside)
    return waited + over, sum(beside.values()) - over, latency


def _update(
    profile: Profile, zero: Zero, cluster: Cluster, config: RunConfig, assumed: Assumptions
) -> tuple[float, float]:
    """Seconds of AdamW and the moving average, and of those the host's and its link's."""
    shard = shard_size(profile, zero, cluster.gpus)
    # Read and written: master, two moments, average; read: gradient; and the model's own weights.
    average = config.train.ema_decay is not None
    moved = shard * (24 + 4 + 2 * profile.bytes + (12 if average else 0))
    if not zero.offload_optimizer:
        return moved / (1e9 * cluster.gpu.memory_gb_s * assumed.memory_share), 0.0
    ranks_here = min(cluster.gpus, cluster.per_node)
    over_pcie = 2 * shard * profile.bytes / (1e9 * cluster.gpu.pcie_gb_s * assumed.pcie_share)
    taken = moved * ranks_here / (1e9 * assumed.host_gb_s) + over_pcie
    return taken, taken
