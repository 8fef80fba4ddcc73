"""Bytes sent and kept: the planner's counts against DeepSpeed on two CPU ranks."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from irpe_ds.config import load_config
from irpe_ds.planner.communication import Collective
from irpe_ds.planner.deepspeed import collectives
from irpe_ds.planner.memory import memory
from irpe_ds.planner.profile import profile
from irpe_ds.planner.zero import zero_of
from tests.forks import ENVIRONMENT
from tests.launch.ranks import free_port
from tests.planner.conftest import QUICKSTART, cluster

RANKS = 2
BUCKETS = {"reduce_bucket_size": 60_000, "allgather_bucket_size": 60_000}
STAGE_3 = {"reduce_bucket_size": 60_000, "stage3_param_persistence_threshold": 3072}  # as one has
LETS_GO = {**STAGE_3, "stage3_max_reuse_distance": 0}
ZERO = {
    "stage 0": {"stage": 0},
    "stage 1": {"stage": 1, **BUCKETS},
    "stage 2": {"stage": 2, **BUCKETS},
    "stage 3": {"stage": 3, **STAGE_3},
    "stage 3, small prefetch": {"stage": 3, "stage3_prefetch_bucket_size": 1000, **STAGE_3},
    "stage 3, lets go": {"stage": 3, "stage3_prefetch_bucket_size": 1000, **LETS_GO},
    "stage 3, larger prefetch": {"stage": 3, "stage3_prefetch_bucket_size": 20_000, **LETS_GO},
    "stage 3, few live": {
        **{"stage": 3, "stage3_prefetch_bucket_size": 20_000, **LETS_GO},
        "stage3_max_live_parameters": 10_000,
    },
    "stage 3, no prefetch": {"stage": 3, "stage3_prefetch_bucket_size": 0, **LETS_GO},
}
Case = tuple[str, str, int, int]
"""Of ZERO, precision, accumulation and the value of model.freeze."""
CASES: list[Case] = [
    *((name, "bf16", 2, 0) for name in ZERO),
    *((name, "fp32", 1, 0) for name in ("stage 0", "stage 1", "stage 3")),
    *((f"stage {stage}", "bf16", 2, 2) for stage in range(4)),
    ("stage 3, lets go", "bf16", 2, 2),
    ("stage 0", "fp32", 1, 2),
    # Last: DeepSpeed remembers autocast (TORCH_AUTOCAST_INITIALIZED) for the engines after it.
    *((name, "autocast", 2, 0) for name in ("stage 1", "stage 3")),
]


def overrides(precision: str, accumulation: int, freeze: int) -> list[str]:
    batch = RANKS * accumulation * 2
    return [
        f"train.precision={precision}",
        f"train.accumulation={accumulation}",
        f"train.global_batch={batch}",
        f"model.freeze={freeze}",
        "train.ema_decay=0.99",
    ]


def instructions(case: Case, *changes: str) -> dict[str, Any]:
    """What the ranks are told of a case, with further overrides."""
    name, *rest = case
    return {"zero": ZERO[name], "overrides": [*overrides(*rest), *changes]}


def counted(case: Case, *changes: str) -> list[Collective]:
    """What the planner says that they send."""
    name, _, accumulation, _ = case
    config = load_config(QUICKSTART, instructions(case, *changes)["overrides"])
    return collectives(profile(config), zero_of(ZERO[name]), cluster(RANKS), accumulation)


@cache
def measured() -> dict[Case, dict[str, Any]]:
    """What two ranks do in all cases, one after the other."""
    cases = json.dumps([instructions(case) for case in CASES])
    port = str(free_port())
    script = [sys.executable, "-m", "tests.planner.deepspeed_ranks"]
    with TemporaryDirectory() as folder, ExitStack() as opened:
        outputs = [Path(folder) / f"output-{rank}" for rank in range(RANKS)]
        ranks = [
            subprocess.Popen(
                [*script, str(rank), "2", "127.0.0.1", port, folder, cases],
                cwd=Path(__file__).parents[2],
                env={**os.environ, **ENVIRONMENT},
                stdout=opened.enter_context(output.open("w")),  # a pipe that nobody reads fills up
                stderr=subprocess.STDOUT,
            )
            for rank, output in enumerate(outputs)
        ]
        try:
            for each in ranks:
                each.wait(timeout=900)
        finally:
            for each in ranks:
                each.kill()
        return dict(zip(CASES, results_of(outputs[0].read_text()), strict=True))


def results_of(output: str) -> list[dict[str, Any]]:
    """What the first rank has printed for each case."""
    lines = [line for line in output.splitlines() if line.startswith("MEASURED ")]
    assert lines, output[-3000:]
    return [json.loads(line.removeprefix("MEASURED ")) for line in lines]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case)))
class TestAgainstDeepSpeed:
    def test_sends_the_bytes_that_were_counted(self, case: Case) -> None:
        expected: dict[str, int] = {}
        for send in counted(case):
            expected[send.kind] = expected.get(send.kind, 0) + send.payload
        sent = measured()[case]["sent"]
        norms = 100  # a few numbers of the gradient's norm and of overflows
        assert sent.keys() <= {*expected, "all_reduce"}
        for kind in expected:
            assert sent[kind] == pytest.approx(expected[kind], rel=0.0005, abs=norms)
        if "all_reduce" not in expected:
            assert sent.get("all_reduce", 0) <= norms

    def test_its_communication_logger_says_the_same(self, case: Case) -> None:
        sent, logged = measured()[case]["sent"], dict(measured()[case]["logged"])
        if "all_gather" in sent:  # logged is what a rank puts in
            assert RANKS * logged.pop("all_gather_into_tensor") == sent.pop("all_gather")
        assert {name.removesuffix("_tensor"): size for name, size in logged.items()} == sent

    def test_keeps_the_states_that_were_counted(self, case: Case) -> None:
        name, *rest = case
        config = load_config(QUICKSTART, overrides(*rest))
        counted = memory(
            profile(config), zero_of(ZERO[name]), cluster(RANKS), config, 2, context_gib=0
        )
        assert measured()[case]["live"] == pytest.approx(counted.between_updates, rel=0.03)
