"""A calibration finds the shares that results were made with."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from irpe_ds.benchmark.report import to_csv
from irpe_ds.config import RunConfig
from irpe_ds.errors import ConfigError
from irpe_ds.planner.assumptions import Assumptions
from irpe_ds.planner.calibrate import Result, calibrate, planned_seconds, read_results
from irpe_ds.planner.plan import Scenario
from irpe_ds.planner.profile import Profile
from irpe_ds.planner.step import step_time
from irpe_ds.planner.zero import Zero, read_zero
from tests.planner.conftest import cluster

TRUE = Assumptions(flop_share=0.35, memory_share=0.4, link_share=0.25, hook_us=300, latency=2)
ZEROS: dict[int | str, Zero] = {n: read_zero(Path(f"ds_configs/zero{n}.json")) for n in range(4)}
HEADER = "model,ranks,nodes,stage,micro_batch,accumulation,images_per_s"
ROW = '{"model": "m", "ranks": %s, "nodes": 2, "stage": 1, "micro_batch": 64, "images_per_s": %s}'
AXES, DEEPSPEED = '9, "axes": [1]', '9, "deepspeed": 5'


@pytest.fixture
def scenario(deit: RunConfig, deit_profile: Profile) -> Scenario:
    return Scenario(config=deit, profile=deit_profile, zero=ZEROS[1], assumed=Assumptions())


def result(scenario: Scenario, ranks: int, nodes: int, stage: int, noise: float = 0) -> Result:
    """What a run would give that reaches the true shares."""
    at = replace(cluster(16), gpus=ranks, per_node=ranks // nodes)
    taken = step_time(scenario.profile, ZEROS[stage], at, scenario.config, 128, 2, TRUE)
    speed = 256 * ranks / taken.total * (1 + noise)
    return Result(
        ranks=ranks, nodes=nodes, stage=stage, micro_batch=128, accumulation=2, images_per_s=speed
    )


class TestCalibrate:
    def test_recovers_the_shares(self, scenario: Scenario) -> None:
        measured = [
            result(scenario, ranks, nodes, stage)
            for ranks, nodes in ((1, 1), (8, 1), (16, 2))
            for stage in range(4)
        ]
        found = calibrate(scenario, cluster(16), measured, ZEROS)
        assert found.assumed.flop_share == pytest.approx(TRUE.flop_share, rel=1e-3)
        assert found.assumed.memory_share == pytest.approx(TRUE.memory_share, rel=1e-3)
        assert found.assumed.link_share == pytest.approx(TRUE.link_share, rel=1e-2)
        assert found.assumed.hook_us == pytest.approx(TRUE.hook_us, rel=1e-2)
        assert found.assumed.latency == pytest.approx(TRUE.latency, rel=1e-2)
        shares = ("flop_share", "memory_share", "link_share")
        assert found.assumed.fitted == (*shares, "hook_us", "latency")
        assert found.worst < 1e-3
        assert found.results == 12

    def test_one_link_calibrates_the_others(self, scenario: Scenario) -> None:
        """Fitted on one and two nodes, right at stage 3 on sixteen."""
        runs = ((1, 1, 0), (1, 1, 3), (16, 2, 1), (16, 2, 3))
        measured = [result(scenario, *run) for run in runs]
        found = calibrate(scenario, cluster(16), measured, ZEROS).assumed
        at = cluster(128)
        times = [
            step_time(scenario.profile, ZEROS[3], at, scenario.config, 128, 1, assumed).total
            for assumed in (found, TRUE)
        ]
        assert times[0] == pytest.approx(times[1], rel=0.02)

    def test_noise_moves_them_little(self, scenario: Scenario) -> None:
        measured = [
            result(scenario, ranks, nodes, 1, noise)
            for ranks, nodes, noise in ((1, 1, 0.02), (1, 1, -0.02), (16, 2, 0.02), (16, 2, -0.02))
        ]
        found = calibrate(scenario, cluster(16), measured, ZEROS)
        assert found.assumed.flop_share == pytest.approx(TRUE.flop_share, rel=0.02)
        assert found.worst == pytest.approx(0.02, rel=0.3)

    def test_without_communication_the_links_stay_assumed(self, scenario: Scenario) -> None:
        found = calibrate(scenario, cluster(16), [result(scenario, 1, 1, 0)], ZEROS)
        assert found.assumed.fitted == ("flop_share", "memory_share")
        assert found.assumed.link_share == Assumptions().link_share
        assert found.assumed.flop_share == pytest.approx(TRUE.flop_share, rel=1e-3)

    def test_a_stage_without_settings(self, scenario: Scenario) -> None:
        with pytest.raises(ConfigError, match="--calibrate: expected results of 1, got stage 0"):
            calibrate(scenario, cluster(16), [result(scenario, 1, 1, 0)], {1: ZEROS[1]})


class TestRead:
    def test_csv(self, tmp_path: Path) -> None:
        path = tmp_path / "results.csv"
        path.write_text(f"{HEADER}\nm,8,2,1,64,,1000\nm,8,2,1,64,2,\nother,1,1,0,8,1,5\n")
        assert read_results(path, "m", "bf16") == [
            Result(ranks=8, nodes=2, stage=1, micro_batch=64, accumulation=1, images_per_s=1000.0)
        ]

    def test_results_of_a_scaling_experiment(self, tmp_path: Path) -> None:
        path = tmp_path / "results.json"
        row = dict(zip(HEADER.split(","), ("m", 8, 2, 1, 64, 1, 1000), strict=True))
        row |= {"network": "200Mbit/s", "rpe": "k"}
        row |= {"axes": {"nodes": 2, "train.deepspeed": "ds_configs/zero1_offload.json"}}
        row |= {"deepspeed": "zero1_offload"}
        failed = {"model": "m", "error": "gone"}
        others = [row | {"rpe": "qkv"}, row | {"axes": {"model.img_size": 384}}]
        path.write_text(json.dumps({"rows": [row, failed, *others]}))
        (found,) = read_results(path, "m", "bf16", "k")
        assert (found.network, found.file) == (25e6, "zero1_offload")
        path = tmp_path / "results.csv"
        path.write_text(to_csv([row, *others]))
        assert read_results(path, "m", "bf16", "k") == [found]

    def test_of_another_model_of_that_name(self, tmp_path: Path) -> None:
        path = tmp_path / "results.json"
        row = dict(zip(HEADER.split(","), ("m", 8, 2, 1, 64, 1, 1000), strict=True))
        path.write_text(json.dumps({"settings": {"model": {"img_size": 24}}, "rows": [row]}))
        assert read_results(path, "m", "bf16", shape={"img_size": 24, "options": {}})
        with pytest.raises(ConfigError, match=r"model\.img_size: expected 224, got 24"):
            read_results(path, "m", "bf16", shape={"img_size": 224, "options": {}})

    def test_a_card_s_rate_is_that_of_each_card(self, scenario: Scenario) -> None:
        slow = replace(result(scenario, 16, 2, 1), network=1e9)
        machines = replace(cluster(16), per_node=8, nics=4)
        expected = replace(machines, inter=4e9)
        reached = replace(scenario, assumed=TRUE)
        taken = replace(reached, zero=ZEROS[1]).step_time(expected, 128, 2).total
        assert planned_seconds(reached, machines, slow, ZEROS) == pytest.approx(taken)

    def test_json(self, tmp_path: Path) -> None:
        path = tmp_path / "results.json"
        row = dict(zip(HEADER.split(","), ("m", 8, 2, 1, 64, 1, 1000), strict=True))
        rows = [row, row | {"precision": "fp32"}, row | {"images_per_s": None}]
        path.write_text(json.dumps(rows))
        assert len(read_results(path, "m", "bf16")) == 1

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("x.csv", "model,ranks\nm,1\n", "row 1: expected the columns model, .* named nodes"),
            ("x.csv", f"{HEADER}\nm,8,2,1,64,1,fast\n", "row 1: expected numbers"),
            ("x.csv", f"{HEADER}\nm,8,3,1,64,1,9\n", "row 1: expected positive numbers, whole"),
            ("x.csv", f"{HEADER}\nm,8,2,1,64,1,nan\n", "row 1: expected positive numbers"),
            ("x.csv", f"{HEADER}\nother,8,2,1,64,1,9\n", "expected results of m in bf16, got none"),
            ("x.csv", f"{HEADER},error\nm,8\n", "got none among 1"),
            ("x.csv", "model,images_per_s,error\nm,9,\n", "columns .* named ranks"),
            ("x.csv", f"{HEADER}\nm,8,2,1,64,1,inf\n", "row 1: expected positive numbers"),
            ("x.csv", f"{HEADER}\nm,8,2,1_0,64,1,9\n", "row 1: expected numbers, got '1_0'"),
            ("x.csv", f"{HEADER}\nm,8,2,1,64,1,9,10\n", "row 1: expected 7 cells, got 8"),
            ("x.csv", f"{HEADER},ranks\nm,8,2,1,64,1,9,8\n", "expected every column once"),
            ("x.csv", f"{HEADER}\n{'m' * 200_000}\n", "expected valid CSV"),
            ("x.csv", f"{HEADER},axes\nm,8,2,1,64,1,9,[]\n", "row 1: axes: expected a valid dict"),
            ("x.csv", f"{HEADER},network\nm,8,2,1,64,1,9,{'9' * 400}Gb/s\n", "network: expected"),
            ("x.csv", "\udcff", "expected valid CSV"),
            ("x.csv", "", "got none among 0"),
            ("x.json", f"[{ROW % ('true', '9')}]", "row 1: expected numbers, got True"),
            ("x.json", f"[{ROW % ('8.5', '9')}]", "row 1: expected numbers, got 8.5"),
            ("x.json", f"[{ROW % ('8', '1' + '0' * 400)}]", "row 1: expected numbers"),
            ("x.json", f"[{ROW % ('8', '[9]')}]", "row 1: expected numbers"),
            ("x.json", f"[{ROW % ('8', AXES)}]", "row 1: axes: expected an object"),
            ("x.json", f"[{ROW % ('8', DEEPSPEED)}]", "deepspeed: expected text"),
            ("x.json", '{"rows": 5}', "expected a list of rows, got int"),
            ("x.json", '{"settings": 5, "rows": [null]}', "expected a list of rows, got list"),
            ("x.json", "[" * 5000, "too many nested brackets"),
            ("x.json", "{", "expected valid JSON"),
            ("x.json", "{}", "expected a list of rows, got dict"),
        ],
    )
    def test_mistakes(self, tmp_path: Path, name: str, text: str, message: str) -> None:
        path = tmp_path / name
        path.write_text(text, errors="surrogateescape")
        with pytest.raises(ConfigError, match=message) as error:
            read_results(path, "m", "bf16")
        assert len(str(error.value)) < 600

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="--calibrate: expected a readable CSV or JSON"):
            read_results(tmp_path / "none.csv", "m", "bf16")
