"""How long an update takes, and what bounds it."""

from dataclasses import dataclass

from irpe_ds.config import RunConfig
from irpe_ds.models.flops import TRAINING
from irpe_ds.planner.assumptions import Assumptions
from irpe_ds.planner.communication import Collective, collective_seconds
from irpe_ds.planner.deepspeed import collectives, shard_size
from irpe_ds.planner.hardware import Cluster
from irpe_ds.planner.profile import Profile
from irpe_ds.planner.zero import Zero


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one update of one rank."""

    forward: float
    backward: float
    optimizer: float
    communication: float
    """Exposed: not overlapped with forward and backward."""
    overlapped: float
    """Communication beside forward and backward."""
    products: float
    """Matrix products in forward and backward."""
    launches: float
    """Host time to launch the operators of augmentation, forward and backward."""
    latency: float
    """All communication's time on infinitely fast links."""
    offload: float
    """Of the optimizer: transfers to and from the host, and the host's own work."""

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        """The four parts of the update."""
        names = ("forward", "backward", "optimizer", "communication")
        return {name: getattr(self, name) for name in names}

    def bottleneck(self, cluster: Cluster) -> str:
        """What most of the update is spent on, in words."""
        compute = self.forward + self.backward
        largest = max(compute, self.optimizer, self.communication)
        if largest == compute:
            if self.launches >= 0.99 * compute:
                return "launching operators: too few images per GPU"
            if self.products > compute / 2:
                return "matrix products"
            return "memory bandwidth of the GPU"
        if largest == self.optimizer:
            what = "offloading" if self.offload > self.optimizer / 2 else "memory bandwidth"
            return f"the optimizer's update ({what})"
        link = "between nodes" if cluster.nodes > 1 else "within the node"
        late = self.latency > (self.communication + self.overlapped) / 2
        return f"communication {link} ({'latency' if late else 'bandwidth'})"


def step_time(
    profile: Profile,
    zero: Zero,
    cluster: Cluster,
    config: RunConfig,
    micro_batch: int,
    accumulation: int,
    assumed: Assumptions,
) -> StepTime:
    """The time of one update of this many micro-steps."""
    gpu = cluster.gpu
    peak = gpu.peak_flops(profile.precision, config.train.tf32) * assumed.flop_share
    bandwidth = 1e9 * gpu.memory_gb_s * assumed.memory_share
    bandwidth *= 1.0 if config.train.compile else gpu.eager
    backwards = TRAINING - 1 + profile.recomputed
    products = [factor * profile.flops * micro_batch / peak for factor in (1, backwards)]
    passes, launches = [], 0.0
    for n in (0, 1):
        moved = micro_batch * profile.traffic[n] + profile.traffic_once[n]
        kernels = profile.kernels[n] + (profile.input_kernels if n == 0 else 0)
        device, host = products[n] + moved / bandwidth, assumed.launch_us * kernels
        hooks = assumed.hook_us * len(profile.parameters) if zero.stage == 3 else 0.0
        if cluster.backend == "gloo":  # the host is the device
            device, hooks = device + 1e-6 * hooks, 0.0
        host = 1e-6 * (host + hooks)
        passes.append(accumulation * max(device, host))
        launches += accumulation * host
    sends = collectives(profile, zero, cluster, accumulation)
    exposed, overlapped, latency = _communication(sends, zero, cluster, passes, assumed)
    optimizer, offload = _update(profile, zero, cluster, config, assumed)
    return StepTime(
        forward=passes[0],
        backward=passes[1],
        optimizer=optimizer,
        communication=exposed,
        overlapped=overlapped,
        products=accumulation * sum(products),
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
    """Seconds exposed, overlapped, and of latency in both."""
    exposed = latency = 0.0
    beside = {"forward": 0.0, "backward": 0.0}
    for send in sends:
        late, transfer = collective_seconds(
            send, cluster, zero.zero_hpz_partition_size, assumed.link_share
        )
        late *= assumed.latency
        latency += late
        share = send.exposed if send.overlaps else 1.0
        exposed += share * (late + transfer)
        if send.overlaps:
            beside[send.overlaps] += (1 - share) * (late + transfer)
    room = dict(zip(beside, passes, strict=True))
    over = sum(max(0.0, beside[name] - room[name]) for name in beside)
    return exposed + over, sum(beside.values()) - over, latency


def _update(
    profile: Profile, zero: Zero, cluster: Cluster, config: RunConfig, assumed: Assumptions
) -> tuple[float, float]:
    """Seconds of AdamW and the moving average, and how many of them offloading takes."""
    shard = shard_size(profile, zero, cluster.gpus)
    # Read and written: master, two moments, average; read: gradient; and the model's own weights.
    has_ema = config.train.ema_decay is not None
    moved = shard * (24 + 4 + 2 * profile.bytes + (12 if has_ema else 0))
    if not zero.offload_optimizer:
        return moved / (1e9 * cluster.gpu.memory_gb_s * assumed.memory_share), 0.0
    ranks_here = min(cluster.gpus, cluster.per_node)
    over_pcie = 2 * shard * profile.bytes / (1e9 * cluster.gpu.pcie_gb_s * assumed.pcie_share)
    taken = moved * ranks_here / (1e9 * assumed.host_gb_s) + over_pcie
    return taken, taken
