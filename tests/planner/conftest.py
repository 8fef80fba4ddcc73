"""Small models and machines that can be counted by hand."""

from typing import Any

import pytest

from irpe_ds.config import RunConfig, load_config
from irpe_ds.planner.hardware import Cluster, build_cluster, find_gpu
from irpe_ds.planner.profile import Call, Parameter, Profile, profile
from irpe_ds.planner.zero import Zero, zero_of

QUICKSTART = "launch/configs/quickstart.yaml"
DEIT = "launch/configs/imagenet/deit_small_k.yaml"


def cluster(gpus: int, per_node: int = 8, gpu: str = "H100") -> Cluster:
    return build_cluster(find_gpu(gpu), gpus, per_node, "100GB/s", "80Gb/s")


def zero(stage: int, **section: Any) -> Zero:
    return zero_of({"stage": stage, "reduce_bucket_size": 1000, **section})


def tiny(precision: str = "bf16") -> Profile:
    """Three parameters: 64 x 32, 64 and 10 x 64; 2752 numbers in two groups."""
    shapes: tuple[tuple[int, ...], ...] = ((64, 32), (64,), (10, 64))
    return Profile(
        parameters=tuple(
            Parameter(name=str(n), shape=s, group=len(s) - 1, half_gradient=n != 1)
            for n, s in enumerate(shapes)
        ),
        call=Call((), tuple(Call((str(n),), ()) for n in range(len(shapes)))),
        precision=precision,
        impl="fused",
        flops=1_000_000,
        saved=1000,
        saved_once=0,
        largest=100,
        saved_by_block=500,
        traffic=(10_000, 20_000),
        traffic_once=(0, 0),
        kernels=(10, 20),
        input_kernels=5,
        recomputed=0.0,
    )


@pytest.fixture(scope="session")
def deit() -> RunConfig:
    return load_config(DEIT)


@pytest.fixture(scope="session")
def deit_profile(deit: RunConfig) -> Profile:
    return profile(deit)
