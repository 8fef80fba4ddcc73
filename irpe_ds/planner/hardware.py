"""GPUs and the links between them, as rows of tables with their sources."""

import re
from dataclasses import dataclass, replace
from typing import Any

from irpe_ds.errors import ConfigError
from irpe_ds.models.flops import PEAK_TFLOPS


@dataclass(frozen=True, kw_only=True)
class GPU:
    """What a data sheet says of one GPU; links per direction."""

    name: str
    """A key of PEAK_TFLOPS, which has the products of half precision."""
    memory_gib: float
    memory_gb_s: float
    """Bandwidth of its memory, 1e9 bytes per second."""
    nvlink_gb_s: float | None
    """To the other GPUs of its node, all links together. None: it has none."""
    pcie_gb_s: float
    fp32_tflops: float
    """Products of fp32 matrices without TF32."""
    tf32: bool = True
    """Whether products of fp32 matrices may use TF32, at half the rate of bf16."""
    bf16: bool = True
    """Whether it multiplies bf16 at the rate of fp16."""
    peak_tflops: float | None = None
    """Dense products of half precision with fp32 sums. None: the row of PEAK_TFLOPS."""
    source: str

    def peak_flops(self, precision: str, tf32: bool) -> float:
        """Operations per second of matrix products under `train.precision`.

        Raises:
            ConfigError: the GPU has no products in it.
        """
        if precision in ("bf16", "autocast") and not self.bf16:
            expected = f"fp16 or fp32: {self.name} has no products of bf16"
            raise ConfigError("train.precision", expected, precision)
        half = PEAK_TFLOPS[self.name] if self.peak_tflops is None else self.peak_tflops
        if precision != "fp32":
            return 1e12 * half
        return 1e12 * (half / 2 if tf32 and self.tf32 else self.fp32_tflops)


def _gpu(
    name: str,
    memory: float,
    bandwidth: float,
    nvlink: float | None,
    pcie: float,
    fp32: float,
    source: str,
    ampere: bool = True,
) -> GPU:
    return GPU(
        name=name,
        memory_gib=memory,
        memory_gb_s=bandwidth,
        nvlink_gb_s=nvlink,
        pcie_gb_s=pcie,
        fp32_tflops=fp32,
        tf32=ampere,
        bf16=ampere,
        source=source,
    )


GPUS = {
    row.name: row
    for row in (
        _gpu("H200", 141, 4800, 450, 64, 66.9, "NVIDIA H200 data sheet, SXM"),
        _gpu("H100", 80, 3350, 450, 64, 66.9, "NVIDIA H100 data sheet, SXM"),
        _gpu("H100 PCIe", 80, 2000, None, 64, 51.2, "NVIDIA H100 data sheet, PCIe"),
        _gpu("A100", 80, 2039, 300, 32, 19.5, "NVIDIA A100 data sheet, 80 GB SXM"),
        _gpu("L40S", 48, 864, None, 32, 91.6, "NVIDIA L40S data sheet"),
        _gpu("RTX 4090", 24, 1008, None, 32, 82.6, "NVIDIA Ada architecture white paper"),
        _gpu("RTX 3090", 24, 936, None, 32, 35.6, "NVIDIA GA102 architecture white paper"),
        _gpu("V100", 32, 900, 150, 16, 15.7, "NVIDIA V100 data sheet, 32 GB SXM2", ampere=False),
    )
}
"""Memory in GiB as the data sheet names it; NVLink bridges of pairs of cards are left out."""


@dataclass(frozen=True)
class Protocol:
    """Microseconds of a collective under a protocol, once and for each step."""

    name: str
    rate: float
    """Share of a link's rate that is left for data beside flags."""
    ring_base: float
    tree_base: float
    ring: tuple[float, float]
    """A step of a ring within a node, and between nodes."""
    tree: tuple[float, float]


NVLINK = (
    Protocol("LL", 1 / 2, 6.6, 6.8, (0.6, 2.7), (0.6, 5.0)),
    Protocol("LL128", 15 / 16, 14.0, 14.0, (1.9, 4.0), (1.25, 8.5)),
    Protocol("Simple", 1.0, 8.4, 8.4, (3.4, 14.0), (4.0, 14.0)),
)
"""Of nodes with NVLink; NCCL, src/graph/tuning.cc: baseLat and hwLat of NVLINK and NET."""

PCIE = (
    Protocol("LL", 1 / 2, 6.6, 6.8, (1.0, 2.7), (1.0, 5.0)),
    Protocol("Simple", 1.0, 8.4, 8.4, (5.7, 14.0), (4.0, 14.0)),
)
"""Of nodes without, from the same tables; LL128 needs NVLink."""

TCP = (Protocol("TCP", 1.0, 200.0, 200.0, (100.0, 100.0), (100.0, 100.0)),)
"""Of Gloo, as two processes of a Xeon had it over a virtual link, 200 to 700 us a collective."""

BACKENDS = ("nccl", "gloo")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs and how they are joined; rates in bytes per second and direction."""

    gpu: GPU
    gpus: int
    per_node: int
    intra: float
    """Of one GPU to the others of its node."""
    inter: float
    """Of one node to the others, all its network cards together."""
    nics: int
    """Network cards of a node."""
    protocols: tuple[Protocol, ...]
    backend: str = "nccl"
    """nccl between GPUs, gloo between CPUs: which collectives it has, and how they are made."""

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.per_node)

    def with_gpus(self, gpus: int) -> "Cluster":
        """The same machines, but so many GPUs in all."""
        return replace(self, gpus=gpus)


def find_gpu(name: str) -> GPU:
    """The row of a GPU, by its name in any case; or one that the user gives, which may be a CPU.

    `NAME:peak_tflops=0.1,memory_gib=4,memory_gb_s=10` is such a row, and may have nvlink_gb_s,
    pcie_gb_s and fp32_tflops.

    Raises:
        ConfigError: there is none, or a number of it is missing or none.
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
    expected = f"{name}:key=number,... with {', '.join(required)}, and maybe {', '.join(numbers)}"
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
    """So many GPUs in nodes, joined as the arguments of the planner say.

    Args:
        intra: `nvlink`, `pcie`, or a rate such as `300GB/s`.
        inter: rate of one network card, such as `400Gb/s`.
        nics: network cards of a node. None: one for each of its GPUs.
        backend: one of BACKENDS.

    Raises:
        ConfigError: a link that the GPU does not have, no rate, or GPUs that do not fill nodes.
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
        ConfigError: it is no rate, or none above zero.
    """
    match = re.fullmatch(r"([0-9.]+)\s*([KMGT]?)(b|bit|B)(?:/s|ps)", text.strip())
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or number <= 0:
        raise ConfigError(where, expected, repr(text))
    factor = {"": 1e0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[match[2]]
    return number * factor / (1 if match[3] == "B" else 8)
