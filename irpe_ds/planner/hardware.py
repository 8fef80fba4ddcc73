"""GPUs and the links between them, as rows of tables with their sources."""

import math
import re
from dataclasses import dataclass
from typing import Any

from irpe_ds.errors import ConfigError


@dataclass(frozen=True)
class GPU:
    """A data sheet's figures; links per direction."""

    name: str
    """A key of models.flops.PEAK_TFLOPS, unless peak_tflops is given."""
    memory_gib: float
    memory_gb_s: float
    """Memory bandwidth, 1e9 bytes per second."""
    nvlink_gb_s: float | None
    """To the other GPUs of its node, all links together. None: no NVLink."""
    pcie_gb_s: float
    fp32_tflops: float
    """Matrix products in fp32 without TF32."""
    source: str
    tf32: bool = True
    """Whether fp32 products may use TF32, at half the rate of bf16."""
    bf16: bool = True
    """Whether it multiplies in bf16, at the rate of fp16."""
    eager: float = 1.0
    """Share of the bandwidth of compiled operators that eager ones reach, where it is known."""
    peak_tflops: float | None = None
    """Dense half precision with fp32 accumulation. None: the row of PEAK_TFLOPS."""

    def peak_flops(self, precision: str, tf32: bool) -> float:
        """Peak FLOP/s of matrix products under `train.precision`.

        Raises:
            ConfigError: the GPU does not multiply in it.
        """
        from irpe_ds.models.flops import PEAK_TFLOPS  # imports torch: options are checked before

        if precision in ("bf16", "autocast") and not self.bf16:
            expected = f"fp16 or fp32: {self.name} has no bf16"
            raise ConfigError("train.precision", expected, precision)
        half = PEAK_TFLOPS[self.name] if self.peak_tflops is None else self.peak_tflops
        if precision != "fp32":
            return 1e12 * half
        return 1e12 * (half / 2 if tf32 and self.tf32 else self.fp32_tflops)


GPUS = {
    row.name: row
    for row in (
        GPU("H200", 141, 4800, 450, 64, 66.9, "NVIDIA H200 data sheet, SXM", eager=0.33),
        GPU("H100", 80, 3350, 450, 64, 66.9, "NVIDIA H100 data sheet, SXM", eager=0.33),
        GPU("H100 PCIe", 80, 2000, None, 64, 51.2, "NVIDIA H100 data sheet, PCIe", eager=0.33),
        GPU("A100", 80, 2039, 300, 32, 19.5, "NVIDIA A100 data sheet, 80 GB SXM"),
        GPU("L40S", 48, 864, None, 32, 91.6, "NVIDIA L40S data sheet"),
        GPU("RTX 4090", 24, 1008, None, 32, 82.6, "NVIDIA Ada architecture white paper"),
        GPU("RTX 3090", 24, 936, None, 32, 35.6, "NVIDIA GA102 architecture white paper"),
        GPU("V100", 32, 900, 150, 16, 15.7, "NVIDIA V100 data sheet, 32 GB SXM2", False, False),
    )
}
"""Memory in GiB as the data sheet has it; NVLink bridges between pairs of cards are left out.

`eager` of Hopper lies between what two published figures ask for: 0.23 for a ViT of 22 M, 2,305
img/s eager and 7,716 compiled (synthetic data, bf16, one H100), 0.48 for NeMo's ViT g/14.
"""


@dataclass(frozen=True)
class Protocol:
    """Microseconds of a collective under a protocol, once and for each hop."""

    name: str
    rate: float
    """Share of a link's rate that carries data, the rest being flags."""
    ring_base: float
    tree_base: float
    ring: tuple[float, float]
    """A hop of a ring within a node, and between nodes."""
    tree: tuple[float, float]


NVLINK = (
    Protocol("LL", 1 / 2, 6.6, 6.8, (0.6, 2.7), (0.6, 5.0)),
    Protocol("LL128", 15 / 16, 14.0, 14.0, (1.9, 4.0), (1.25, 8.5)),
    Protocol("Simple", 1.0, 8.4, 8.4, (3.4, 14.0), (4.0, 14.0)),
)
"""Nodes with NVLink; NCCL, src/graph/tuning.cc: baseLat and hwLat of NVLINK and NET."""

PCIE = (
    Protocol("LL", 1 / 2, 6.6, 6.8, (1.0, 2.7), (1.0, 5.0)),
    Protocol("Simple", 1.0, 8.4, 8.4, (5.7, 14.0), (4.0, 14.0)),
)
"""Nodes without it, from the same tables; LL128 needs NVLink."""

TCP = (Protocol("TCP", 1.0, 200.0, 200.0, (100.0, 100.0), (100.0, 100.0)),)
"""Gloo, as measured with two processes of a Xeon over a virtual link: 200 to 700 us per call."""

BACKENDS = ("nccl", "gloo")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs and their links; rates in bytes per second and direction."""

    gpu: GPU
    gpus: int
    per_node: int
    intra: float
    """From one GPU to the others of its node."""
    inter: float
    """From one node to the others, all its network cards together."""
    nics: int
    """Network cards of a node."""
    protocols: tuple[Protocol, ...]
    backend: str = "nccl"
    """One of BACKENDS: nccl between GPUs, gloo between CPUs."""

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.per_node)


def find_gpu(name: str) -> GPU:
    """The row of a GPU by its name in any case, or a row that the user gives, as for a CPU.

    `NAME:peak_tflops=0.1,memory_gib=4,memory_gb_s=10` is such a row; nvlink_gb_s,
    pcie_gb_s and fp32_tflops are optional.

    Raises:
        ConfigError: an unknown name, or a missing or malformed number.
    """
    if ":" in name:
        return _own_gpu(*name.split(":", 1))
    found = {key.lower(): row for key, row in GPUS.items()}.get(name.lower())
    if found is None:
        raise ConfigError("--gpu", f"one of {', '.join(GPUS)}", repr(name))
    return found


def _own_gpu(name: str, text: str) -> GPU:
    required = ("peak_tflops", "memory_gib", "memory_gb_s")
    numbers = {"nvlink_gb_s": None, "pcie_gb_s": 32.0, "fp32_tflops": None}
    expected = (
        f"{name}:key=number,... with {', '.join(required)}, and optionally {', '.join(numbers)}"
    )
    try:
        given = {key: float(x) for key, x in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise ConfigError("--gpu", expected, repr(text)) from None
    fits = set(required) <= given.keys() <= {*required, *numbers}
    if not fits or not all(0 < x < float("inf") for x in given.values()):
        raise ConfigError("--gpu", expected, repr(text))
    row: dict[str, Any] = numbers | given
    if row["fp32_tflops"] is None:
        row["fp32_tflops"] = row["peak_tflops"]
    return GPU(name=name, source="as given", tf32=False, **row)


def build_cluster(
    gpu: GPU,
    gpus: int,
    per_node: int,
    intra: str,
    inter: str,
    nics: int | None = None,
    backend: str = "nccl",
) -> Cluster:
    """So many GPUs in nodes, with these links between them.

    Args:
        intra: `nvlink`, `pcie`, or a rate such as `300GB/s`.
        inter: rate of one network card, such as `400Gb/s`.
        nics: network cards of a node. None: one for each of its GPUs.
        backend: one of BACKENDS.

    Raises:
        ConfigError: a link that the GPU lacks, a malformed rate, or a partly filled node.
    """
    nics = per_node if nics is None else nics
    for name, count in (("--gpus", gpus), ("--per-node", per_node), ("--nics", nics)):
        if count < 1:
            raise ConfigError(name, "a positive integer", count)
    if gpus > per_node and gpus % per_node:
        raise ConfigError("--gpus", f"whole nodes of {per_node} GPUs (--per-node)", gpus)
    protocols = TCP if backend == "gloo" else PCIE if intra == "pcie" else NVLINK
    if intra == "nvlink":
        if gpu.nvlink_gb_s is None:
            expected = f"pcie or a rate: {gpu.name} has no NVLink to all GPUs of its node"
            raise ConfigError("--intra", expected, intra)
        intra_rate = 1e9 * gpu.nvlink_gb_s
    elif intra == "pcie":
        intra_rate = 1e9 * gpu.pcie_gb_s
    else:
        intra_rate = parse_rate("--intra", intra, "nvlink, pcie or a rate such as 300GB/s")
    inter_rate = parse_rate("--inter", inter, "a rate such as 400Gb/s") * nics
    return Cluster(
        gpu=gpu,
        gpus=gpus,
        per_node=per_node,
        intra=intra_rate,
        inter=inter_rate,
        nics=nics,
        protocols=protocols,
        backend=backend,
    )


def parse_rate(where: str, text: str, expected: str = "a rate such as 400Gb/s") -> float:
    """Bytes per second of `400Gb/s`, `200Mbit/s` or `50GB/s`: b and bit are bits, B is bytes.

    Raises:
        ConfigError: the text is not a rate, or not a positive one.
    """
    match = re.fullmatch(r"([0-9.]+)\s*([KMGT]?)(b|bit|B)(?:/s|ps)", text.strip())
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or not 0 < number < math.inf:
        raise ConfigError(where, expected, repr(text))
    factor = {"": 1e0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[match[2]]
    return number * factor / (1 if match[3] == "B" else 8)
