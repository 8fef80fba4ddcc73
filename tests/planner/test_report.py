"""The advice of a plan."""

import re
from pathlib import Path

import pytest

from irpe_ds.config import RunConfig
from irpe_ds.planner.assumptions import Assumptions
from irpe_ds.planner.loading import data_advice
from irpe_ds.planner.plan import Scenario, plan_global_batch, strong_scaling
from irpe_ds.planner.profile import Profile
from irpe_ds.planner.report import Report
from irpe_ds.planner.zero import read_zero
from tests.planner.conftest import cluster

ZEROS = {name: read_zero(Path(f"ds_configs/{name}.json")) for name in ("zero0", "zero1", "zero3")}


def report(deit: RunConfig, counted: Profile, gpus: int, file: str, compiled: bool) -> Report:
    train = deit.train.model_copy(update={"compile": compiled})
    own = Scenario(
        config=deit.model_copy(update={"train": train}),
        profile=counted,
        zero=ZEROS[file],
        assumed=Assumptions(),
    )
    machines = cluster(gpus)
    return Report(
        scenario=own,
        origins={},
        zero_configs=ZEROS,
        row=plan_global_batch(own, machines),
        data_advice="",
        micro_batch=16,
        strong=list(strong_scaling(own, machines)),
        weak=[],
    )


def test_compiling_or_another_stage_is_named(deit: RunConfig, deit_profile: Profile) -> None:
    eager = report(deit, deit_profile, 8, "zero1", False)
    assert eager.advice.startswith("train.compile=true is faster: ")
    hooks = report(deit, deit_profile, 8, "zero3", True)
    assert hooks.advice.startswith("train.deepspeed of zero")


def test_fewer_gpus_are_named_when_they_are_faster(deit: RunConfig, deit_profile: Profile) -> None:
    """16 nodes wait for their slow network; one node has no network."""
    many = report(deit, deit_profile, 128, "zero3", True)
    rows = [row for row in many.strong if row.cluster.gpus < 128]
    fastest = max(rows, key=lambda row: row.images_per_s)
    assert fastest.images_per_s > many.row.images_per_s
    assert many.advice == (
        f"{fastest.cluster.gpus} GPUs are faster: {fastest.images_per_s:,.0f} img/s"
    )


@pytest.mark.parametrize(
    ("memory_gb", "storage_gb_s", "expected"),
    [
        (None, None, r"141 GB, data.order=global if a node has 201 GB of memory or more, else "),
        (512, None, r"141 GB, data.order=global, as 512 GB of memory hold them$"),
        (
            128,
            None,
            r"141 GB, data.order=blocks data.os_cache=false data.window=16384, which "
            r"holds 1.8 GB in a node's memory, as 128 GB do not hold the data$",
        ),
        (
            512,
            0.2,
            r"hold them; while nothing is cached, the storage gives 1,818 of the [\d,]+ img/s$",
        ),
        (512, 1000, r"hold them$"),
    ],
)
def test_the_order_of_images_follows_from_memory_and_storage(
    deit: RunConfig,
    deit_profile: Profile,
    memory_gb: float | None,
    storage_gb_s: float | None,
    expected: str,
) -> None:
    planned = report(deit, deit_profile, 8, "zero1", False)
    found = data_advice(planned.scenario, planned.row, memory_gb, storage_gb_s)
    assert re.search(expected, found)
