"""Times by hand, what must hold for all of them, and what others have published."""

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from irpe_ds.config import RunConfig, load_config
from irpe_ds.errors import ConfigError
from irpe_ds.models.flops import PEAK_TFLOPS
from irpe_ds.planner.assumptions import Assumptions
from irpe_ds.planner.hardware import GPUS, build_cluster, find_gpu, parse_rate
from irpe_ds.planner.plan import (
    PlanRow,
    Scenario,
    plan_global_batch,
    plan_micro_batch,
    strong_scaling,
    weak_scaling,
)
from irpe_ds.planner.profile import Profile, profile
from irpe_ds.planner.step import StepTime, step_time
from irpe_ds.planner.zero import read_zero
from tests.planner.conftest import DEIT, cluster, tiny, zero

EXACT = Assumptions(flop_share=1, memory_share=1, link_share=1, launch_us=0.001)


def scenario(config: RunConfig, found: Profile, file: str = "zero1", **changes: Any) -> Scenario:
    own = read_zero(Path(f"ds_configs/{file}.json"))
    return Scenario(config=config, profile=found, zero=own, assumed=Assumptions(**changes))


def taken(stage: int = 0, gpus: int = 1, accumulation: int = 1, **own: Any) -> StepTime:
    shape = (load_config(DEIT, ["train.compile=true"]), 8, accumulation, EXACT)
    return step_time(tiny(), zero(stage, **own), cluster(gpus), *shape)


class TestByHand:
    def test_passes_are_products_and_traffic(self) -> None:
        # H100: 989.4 TFLOP/s, 3350 GB/s.
        found = taken()
        forward = 8 * 1e6 / 989.4e12 + 8 * 10_000 / 3350e9
        assert found.forward == pytest.approx(forward)
        assert found.backward == pytest.approx(8 * 2e6 / 989.4e12 + 8 * 20_000 / 3350e9)
        assert taken(accumulation=3).forward == pytest.approx(3 * forward)

    def test_eager_operators_of_a_hopper_are_slower(self) -> None:
        eager = step_time(tiny(), zero(0), cluster(1), load_config(DEIT), 8, 1, EXACT)
        assert eager.forward == pytest.approx(8 * 1e6 / 989.4e12 + 8 * 10_000 / (0.33 * 3350e9))
        assert eager.optimizer == taken().optimizer

    def test_the_host_starts_no_more_than_so_many_operators(self) -> None:
        slow = replace(EXACT, launch_us=1000)
        found = step_time(tiny(), zero(0), cluster(1), load_config(DEIT), 8, 1, slow)
        assert (found.forward, found.backward) == pytest.approx((0.015, 0.020))
        assert "launching operators" in found.bottleneck(cluster(1))

    def test_an_update_reads_and_writes_its_shard(self) -> None:
        # AdamW 24, gradient 4, weights 2 x 2, average 12 bytes for each of 2752 weights.
        assert taken().optimizer == pytest.approx(44 * 2752 / 3350e9)
        assert taken(stage=1, gpus=4).optimizer == pytest.approx(44 * 688 / 3350e9)

    def test_stage_0_waits_for_all_it_sends(self) -> None:
        found = taken(gpus=4)
        # NCCL's LL on a ring: 6.6 and 2 x 3 steps of 0.6 us, and half of 100 GB/s.
        assert found.communication == pytest.approx(10.2e-6 + 2 * 3 / 4 * 11008 / 50e9)
        assert found.overlapped == 0

    def test_overlap_hides_all_but_the_last_bucket(self) -> None:
        plain, beside = taken(2, 4), taken(2, 4, overlap_comm=True)
        assert plain.overlapped == 0
        assert beside.communication + beside.overlapped == pytest.approx(plain.communication)
        # What is hidden is at most what the backward pass has room for.
        assert beside.overlapped <= beside.backward * (1 + 1e-9)

    def test_offloading_is_slower(self) -> None:
        assert taken(2, 4, offload_optimizer={"device": "cpu"}).optimizer > taken(2, 4).optimizer


class TestPlan:
    def test_of_the_recipe(self, deit: RunConfig, deit_profile: Profile) -> None:
        row = plan_global_batch(scenario(deit, deit_profile), cluster(64))
        assert (row.micro_batch, row.accumulation, row.global_batch) == (16, 1, 1024)
        assert row.images_per_s == pytest.approx(1024 / row.step.total)
        assert row.hours == pytest.approx(300 * 1_281_167 / row.images_per_s / 3600)
        assert row.gpu_hours == pytest.approx(64 * row.hours)
        assert row.storage_gb_s == pytest.approx(row.images_per_s * 110e3 / 1e9)
        assert row.loader_cores == math.ceil(row.images_per_s / 8 / 704)

    def test_accumulates_what_does_not_fit(self, deit: RunConfig, deit_profile: Profile) -> None:
        small = replace(find_gpu("H100"), memory_gib=10)
        row = plan_global_batch(scenario(deit, deit_profile), replace(cluster(1), gpu=small))
        assert (row.micro_batch, row.accumulation) == (256, 4)
        assert row.memory.total <= 10 * 2**30

    def test_too_small_a_gpu_is_one_line(self, deit: RunConfig, deit_profile: Profile) -> None:
        small = replace(find_gpu("H100"), memory_gib=1)
        with pytest.raises(
            ConfigError, match=r"memory: expected 2\.\d GiB or more for stage 1 on 1"
        ):
            plan_global_batch(scenario(deit, deit_profile), replace(cluster(1), gpu=small))

    def test_stages_that_would_fit_are_named(self, deit: RunConfig, deit_profile: Profile) -> None:
        zero_configs = {
            name: read_zero(Path(f"ds_configs/{name}.json")) for name in ("zero1", "zero3")
        }
        own, machines = scenario(deit, deit_profile, "zero0"), cluster(8)
        least = {
            name: replace(own, zero=zero).memory(machines, own.multiple).total / 2**30
            for name, zero in {"zero0": own.zero, **zero_configs}.items()
        }
        between = replace(
            machines.gpu, memory_gib=(least["zero0"] + max(least["zero1"], least["zero3"])) / 2
        )
        with pytest.raises(ConfigError, match="of zero1, zero3, which fit"):
            plan_global_batch(own, replace(machines, gpu=between), zero_configs)
        tiny_gpu = replace(machines.gpu, memory_gib=1)
        with pytest.raises(ConfigError, match="no other stage fits, the smallest needs"):
            plan_global_batch(own, replace(machines, gpu=tiny_gpu), zero_configs)

    def test_a_model_that_does_not_fit_on_one(self, deit: RunConfig, deit_profile: Profile) -> None:
        own = scenario(deit, deit_profile, "zero3")
        machines = cluster(64)
        alone, all_of_them = (own.memory(c, 2).total / 2**30 for c in (cluster(1), machines))
        small = replace(machines.gpu, memory_gib=(alone + all_of_them) / 2)
        row = plan_global_batch(own, replace(machines, gpu=small))
        assert own.largest(replace(cluster(1), gpu=small)) == 0
        assert 0 < row.efficiency <= 1

    def test_too_many_gpus_for_the_batch(self, deit: RunConfig, deit_profile: Profile) -> None:
        with pytest.raises(ConfigError, match=r"train\.global_batch: expected a multiple of 2048"):
            plan_global_batch(scenario(deit, deit_profile), cluster(1024))

    def test_a_batch_that_does_not_fit(self, deit: RunConfig, deit_profile: Profile) -> None:
        with pytest.raises(ConfigError, match="--micro-batch: expected at most 2"):
            plan_micro_batch(scenario(deit, deit_profile), cluster(8), 10_000)

    @pytest.mark.parametrize("images", [0, -4, 65])
    def test_a_batch_that_no_run_can_have(
        self, images: int, deit: RunConfig, deit_profile: Profile
    ) -> None:
        with pytest.raises(ConfigError, match="--micro-batch: expected a positive multiple of 2"):
            plan_micro_batch(scenario(deit, deit_profile), cluster(8), images)

    def test_nodes_of_six_gpus(self, deit: RunConfig, deit_profile: Profile) -> None:
        rows = weak_scaling(scenario(deit, deit_profile), cluster(18, per_node=6), 64)
        assert [row.cluster.gpus for row in rows][:7] == [1, 2, 4, 6, 12, 18, 24]

    @pytest.mark.parametrize("file", ["zero0", "zero1", "zero2", "zero3", "zeropp"])
    def test_efficiency_falls_with_gpus(
        self, deit: RunConfig, deit_profile: Profile, file: str
    ) -> None:
        own = scenario(deit, deit_profile, file)
        for rows in (
            list(strong_scaling(own, cluster(8))),
            list(weak_scaling(own, cluster(8), 128)),
        ):
            shares = [row.efficiency for row in rows]
            assert all(0 < share <= 1 for share in shares)
            assert shares == sorted(shares, reverse=True)
            assert [row.cluster.gpus for row in rows][:4] == [1, 2, 4, 8]


@pytest.mark.slow
class TestPublished:
    """What others have measured, within 25 % of the plan with the shares assumed by default.

    Those shares were chosen with DeiT-S and DeiT-B of these in view; the models then had attention
    in separate operators, which the plan takes as fused.

    timm, results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv: DeiT in mixed precision on an
    RTX 3090, with the batch sizes of that file.
    """

    @pytest.mark.parametrize(
        ("model", "batch", "images_per_s"),
        [
            ("deit_tiny_patch16_224", 512, 2290.33),
            ("deit_small_patch16_224", 384, 1050.7),
            ("deit_base_patch16_224", 192, 390.04),
            ("vit_large_patch16_224", 64, 117.2),
        ],
    )
    def test_timm(self, model: str, batch: int, images_per_s: float) -> None:
        changes = [f"model.name={model}", "train.precision=autocast", "train.ema_decay=null"]
        config = load_config("launch/configs/imagenet/deit_small.yaml", changes)
        alone = build_cluster(find_gpu("RTX 3090"), 1, 1, "pcie", "100Gb/s")
        row = plan_micro_batch(scenario(config, profile(config), "zero0"), alone, batch)
        assert row.images_per_s == pytest.approx(images_per_s, rel=0.25)


@pytest.mark.slow
class TestPublishedNodes:
    """ViT g/14 under NVIDIA NeMo on 1 to 16 nodes of 8 GPUs, bf16, global batch 4096.

    NeMo's user guide, "Vision Transformer, Performance": DGX A100 and DGX H100 SuperPOD. The H100's
    are 29 % of its peak in matrix products, where the A100's are 45 % of theirs, both out of the
    box as the guide says: they are held after a calibration at one node.
    """

    GLOBAL_BATCH = 4096

    def plan(self, gpu: str, nodes: int) -> PlanRow:
        changes = ["model.name=vit_giant_patch14_224", f"train.global_batch={self.GLOBAL_BATCH}"]
        changes += [f"train.accumulation={max(1, 8 // nodes)}", "train.ema_decay=null"]
        config = load_config("launch/configs/imagenet/deit_small.yaml", changes)
        machines = build_cluster(find_gpu(gpu), 8 * nodes, 8, "nvlink", "200Gb/s")
        return plan_global_batch(scenario(config, self.counted()), machines)

    @staticmethod
    @cache
    def counted() -> Profile:
        return profile(load_config(DEIT, ["model.name=vit_giant_patch14_224", "model.rpe=null"]))

    def test_a100(self) -> None:
        for nodes, images_per_s in ((1, 693), (2, 1347), (4, 2642), (8, 5454), (16, 10644)):
            found = self.plan("A100", nodes).images_per_s
            assert found == pytest.approx(images_per_s, rel=0.25), nodes

    def test_h100_from_one_node_to_sixteen(self) -> None:
        measured = ((1, 1428), (2, 2846), (4, 5737), (8, 11222), (16, 21561))
        factor = 1428 / self.plan("H100", 1).images_per_s
        for nodes, images_per_s in measured:
            found = factor * self.plan("H100", nodes).images_per_s
            assert found == pytest.approx(images_per_s, rel=0.25), nodes


class TestHardware:
    def test_every_gpu_has_its_peak(self) -> None:
        assert GPUS.keys() == PEAK_TFLOPS.keys()

    def test_fp32_without_tf32_is_slower(self) -> None:
        gpu = find_gpu("h100")
        peaks = [gpu.peak_flops(p, tf32) for p, tf32 in (("bf16", True), ("fp32", True))]
        assert peaks == [989.4e12, 494.7e12]
        assert gpu.peak_flops("fp32", False) == pytest.approx(66.9e12)

    @pytest.mark.parametrize(
        ("text", "rate"),
        [("400Gb/s", 50e9), ("50 GB/s", 50e9), ("200Mbit/s", 25e6), ("100Gbps", 12.5e9)],
    )
    def test_rates(self, text: str, rate: float) -> None:
        assert parse_rate("--inter", text) == rate

    @pytest.mark.parametrize("text", ["400", "Gb/s", "-1Gb/s", "0Gb/s", "1.2.3Gb/s", "fast"])
    def test_no_rates(self, text: str) -> None:
        with pytest.raises(ConfigError, match="--inter: expected a rate such as 400Gb/s"):
            parse_rate("--inter", text)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((12, 8, "nvlink", "400Gb/s"), "--gpus: expected whole nodes of 8 GPUs"),
            ((0, 8, "nvlink", "400Gb/s"), "--gpus: expected a positive integer"),
            ((8, 0, "nvlink", "400Gb/s"), "--per-node: expected a positive integer"),
            ((8, 8, "ethernet", "400Gb/s"), "--intra: expected nvlink, pcie or a rate"),
        ],
    )
    def test_mistakes(self, arguments: tuple[int, int, str, str], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            build_cluster(find_gpu("H100"), *arguments)

    def test_no_network_cards(self) -> None:
        with pytest.raises(ConfigError, match="--nics: expected a positive integer, got 0"):
            build_cluster(find_gpu("H100"), 8, 8, "nvlink", "400Gb/s", nics=0)

    def test_a_gpu_without_bf16(self) -> None:
        volta = find_gpu("V100")
        assert volta.peak_flops("fp16", True) == 125e12
        with pytest.raises(ConfigError, match=r"train\.precision: expected fp16 or fp32: V100 has"):
            volta.peak_flops("bf16", True)

    def test_a_gpu_without_nvlink(self) -> None:
        with pytest.raises(ConfigError, match="--intra: expected pcie or a rate: L40S has no"):
            build_cluster(find_gpu("L40S"), 8, 8, "nvlink", "400Gb/s")

    def test_a_row_of_ones_own(self) -> None:
        gpu = find_gpu("core:peak_tflops=0.1,memory_gib=4,memory_gb_s=10")
        assert (gpu.name, gpu.memory_gib, gpu.nvlink_gb_s) == ("core", 4, None)
        assert gpu.peak_flops("bf16", True) == gpu.peak_flops("fp32", True) == 0.1e12

    @pytest.mark.parametrize(
        "text",
        [
            "core:",
            "core:peak_tflops=1",
            "core:peak_tflops=1,memory_gib=4,memory_gb_s=fast",
            "core:peak_tflops=1,memory_gib=4,memory_gb_s=0",
            "core:peak_tflops=1,memory_gib=4,memory_gb_s=1,cores=2",
        ],
    )
    def test_a_wrong_row(self, text: str) -> None:
        with pytest.raises(ConfigError, match="--gpu: expected core:key=number,"):
            find_gpu(text)

    def test_an_unknown_gpu(self) -> None:
        with pytest.raises(ConfigError, match=r"--gpu: expected one of H200, H100, .* got 'H1000'"):
            find_gpu("H1000")
