"""Memory of a GPU, by hand and by what must hold for every stage."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from irpe_ds.config import RunConfig, load_config
from irpe_ds.models.build import build_model
from irpe_ds.planner.memory import largest_micro_batch, memory
from irpe_ds.planner.profile import Profile, profile
from irpe_ds.planner.zero import read_zero
from tests.planner.conftest import DEIT, QUICKSTART, cluster, tiny, zero

ALL = sorted(Path("ds_configs").glob("*.json"))
N = 2752


def of(stage: int, gpus: int = 4, images: int = 1, config: str = DEIT, **section: Any) -> Any:
    run = load_config(config, ["train.ema_decay=0.9"])
    return memory(tiny(), zero(stage, **section), cluster(gpus), run, images, context_gib=0)


class TestByHand:
    def test_stage_0_has_all_of_everything(self) -> None:
        found = of(0)
        assert (found.weights, found.gradients) == (2 * N, 2 * N)
        assert found.optimizer == (4 + 8) * N
        assert found.ema == 4 * N

    def test_lion_has_one_moment(self) -> None:
        run = load_config(DEIT, ["optim.name=lion"])
        assert memory(tiny(), zero(0), cluster(4), run, 1, context_gib=0).optimizer == (4 + 4) * N

    def test_stage_1_shares_states(self) -> None:
        found = of(1)
        assert (found.weights, found.gradients) == (2 * N, 2 * N)
        assert found.optimizer == (4 + 8) * N // 4
        assert found.buckets == 2 * 1000 + 4 * 1000  # the bucket, and the copy that is sent

    def test_stage_2_shares_gradients_too(self) -> None:
        assert of(2).gradients == 2 * N // 4
        assert of(2, overlap_comm=True).buckets == 2 * 2 * 1000 + 4 * 1000

    def test_stage_3_shares_weights_but_keeps_what_it_gathers(self) -> None:
        found = of(3, stage3_param_persistence_threshold=100)
        assert found.weights == 2 * N // 4 + 2 * N
        assert found.between_updates < of(2).between_updates + of(2).gradients + 2 * 1000

    def test_an_offloaded_optimizer_is_on_the_host(self) -> None:
        found = of(2, offload_optimizer={"device": "cpu"})
        assert (found.optimizer, found.gradients) == (0, 0)
        assert found.host == (4 + 8 + 4 + 4) * N // 4  # masters, moments, average, gradients

    def test_what_is_frozen_has_weights_alone(self) -> None:
        counted = tiny()
        first = replace(counted.parameters[0], group=None)
        frozen = replace(counted, parameters=(first, *counted.parameters[1:]))
        run = load_config(DEIT, ["train.ema_decay=0.9"])
        left = N - 64 * 32
        for stage, ranks in ((0, 1), (1, 4), (2, 4), (3, 4)):
            section = zero(stage, stage3_param_persistence_threshold=100)
            found = memory(frozen, section, cluster(4), run, 1, context_gib=0)
            assert found.weights == of(stage, stage3_param_persistence_threshold=100).weights
            assert (found.optimizer, found.ema) == (12 * left // ranks, 4 * left // ranks)
            assert found.gradients == 2 * left // (4 if stage > 1 else 1)

    def test_activations_of_a_batch(self) -> None:
        assert of(0, images=3).activations == 3 * (1000 + 2 * 100)

    def test_an_update_needs_fp32_gradients_when_activations_are_gone(self) -> None:
        found = of(0)
        assert found.total == (2 + 2 + 12 + 4) * N + max(1200 + 4 * N, 4 * N)

    def test_the_start_has_one_whole_parameter_beside_what_stays(self) -> None:
        assert of(0).start == (2 + 12 + 4) * N + 4 * 64 * 32
        assert of(1).start == max(2 * N + (12 + 4) * N // 4, 4 * N) + 4 * 64 * 32
        stays = of(3, stage3_param_persistence_threshold=100).between_updates
        assert of(3, stage3_param_persistence_threshold=100).start == stays + 4 * 64 * 32


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
class TestEveryStage:
    def test_more_gpus_never_need_more_memory(
        self, path: Path, deit: RunConfig, deit_profile: Profile
    ) -> None:
        totals = [
            memory(deit_profile, read_zero(path), cluster(gpus), deit, 64, 1.5).total
            for gpus in (8, 16, 64, 512, 4096)
        ]
        # Padding to equal parts may add a few numbers for each parameter.
        assert all(more <= fewer * 1.001 for fewer, more in pairwise(totals))

    def test_the_largest_micro_batch_fits_and_one_more_does_not(
        self, path: Path, deit: RunConfig, deit_profile: Profile
    ) -> None:
        limit = 80 * 2**30
        largest = largest_micro_batch(deit_profile, read_zero(path), cluster(8), deit, 1.5)
        assert largest > 100
        totals = [
            memory(deit_profile, read_zero(path), cluster(8), deit, images, 1.5).total
            for images in (largest, largest + 1)
        ]
        assert totals[0] <= limit < totals[1]


class TestProfile:
    """Counts on tensors without memory, against tensors with it."""

    @pytest.mark.parametrize("precision", ["fp32", "autocast"])
    def test_what_is_saved_is_what_autograd_saves(self, precision: str) -> None:
        config = load_config(QUICKSTART, ["model.impl=reference", f"train.precision={precision}"])
        counted = profile(config)
        model = build_model(config.model).train()
        saved: dict[int, int] = {}

        def save(x: torch.Tensor) -> torch.Tensor:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        sizes = []
        for images in (2, 4):
            saved.clear()
            enabled = precision == "autocast"
            with (
                torch.autograd.graph.saved_tensors_hooks(save, lambda x: x),
                torch.autocast("cpu", torch.bfloat16, enabled=enabled),
            ):
                out = model(torch.randn(images, 3, 24, 24))
            own = {x.untyped_storage().data_ptr() for x in _tensors(model)}
            sizes.append(sum(size for key, size in saved.items() if key not in own))
            del out
        assert counted.saved == (sizes[1] - sizes[0]) // 2

    def test_fused_attention_keeps_no_scores(self) -> None:
        # A block of DeiT-S in bf16 keeps, in tensors of 197 x 384: inputs of two norms, their
        # outputs, q k v, attention's output, twice 4 of the MLP: 16; and 6 x 197 log-sum-exps.
        # Beside the blocks: the image, and input and output of the last norm.
        block = 16 * 197 * 384 * 2 + 6 * 197 * 4
        counted = profile(load_config(DEIT, ["model.impl=fused", "model.drop_path=0"]))
        rest = 3 * 224 * 224 * 2 + 2 * 197 * 384 * 2
        assert counted.saved == pytest.approx(12 * block + rest, rel=0.001)
        scores = 12 * 6 * 197 * 197 * 2
        gathered = profile(load_config(DEIT, ["model.impl=gather", "model.drop_path=0"]))
        assert gathered.saved > counted.saved + scores

    def test_fused_attention_keeps_bucket_sums_on_values(self) -> None:
        config = "launch/configs/imagenet/deit_small_{}.yaml"
        k, qkv = (
            profile(load_config(config.format(on), ["model.impl=fused"])) for on in ("k", "qkv")
        )
        sums = 12 * 6 * 197 * 7 * 8 * 2  # 7 classes of rows, 8 slots, bf16
        assert qkv.saved == k.saved + sums

    def test_recomputation_keeps_one_tensor_a_block(self, deit_profile: Profile) -> None:
        counted = profile(load_config(DEIT, ["model.grad_checkpointing=true"]))
        assert counted.saved < deit_profile.saved / 10
        assert counted.saved_by_block == pytest.approx(deit_profile.saved / 12, rel=0.05)

    def test_recomputation_of_every_third_block(self, deit_profile: Profile) -> None:
        counted = profile(load_config(DEIT, ["model.grad_checkpointing=3"]))
        assert counted.recomputed == pytest.approx(1 / 3)
        assert counted.saved == pytest.approx(deit_profile.saved * 2 / 3, rel=0.05)
        assert counted.saved_by_block == pytest.approx(deit_profile.saved / 12, rel=0.05)

    def test_parameters_are_the_models(self, deit_profile: Profile) -> None:
        assert deit_profile.numel == 22_089_064


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]
