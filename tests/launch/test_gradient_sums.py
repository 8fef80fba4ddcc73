"""Gradients of many micro-steps in bf16 against their exact sums."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launch.outcomes import slow, zero
from tests.launch.ranks import Ranks

pytestmark = pytest.mark.dist


def keep_gradients(folder: Path) -> None:
    """Write down the gradients of a run's first update, and each rank's exact sums of them."""
    from deepspeed.utils import safe_get_full_grad

    from irpe_ds.training import engine
    from irpe_ds.training.trainer import Trainer

    step, build_gradient_sums = Trainer.step, engine.build_gradient_sums
    exact: dict[str, Any] = {}

    def build(model: Any, *others: Any) -> Any:
        exact.clear()
        for name, parameter in model.named_parameters():  # hooks run in the order of registration
            parameter.register_post_accumulate_grad_hook(partial(add, name))
        return build_gradient_sums(model, *others)

    def add(name: str, parameter: Any) -> None:
        exact[name] = exact.get(name, 0) + parameter.grad.double()

    def keeping(self: Any, batch: Any, micro_step: int) -> Any:
        apply = self.engine.step

        def keep_and_apply() -> None:
            if self.engine.is_gradient_accumulation_boundary():
                named = dict(self.engine.module.named_parameters())
                found = {name: safe_get_full_grad(p).double() for name, p in named.items()}
                torch.save((found, exact), folder / f"{self.config.name}-{self.ranks.rank}.pt")
            apply()

        self.engine.step = keep_and_apply
        try:
            return step(self, batch, micro_step)
        finally:
            self.engine.step = apply

    Trainer.step = keeping  # type: ignore[method-assign]
    engine.build_gradient_sums = build


@pytest.mark.parametrize(("ranks", "micro_steps", "images"), [(2, 64, 2), slow(1, 1024, 1)])
def test_they_are_rounded_once(
    ranks: int, micro_steps: int, images: int, common: list[str], tmp_path: Path
) -> None:
    batch = f"train.global_batch={ranks * micro_steps * images}"
    once = [*common, batch, "train.max_updates=1", f"output={tmp_path}"]
    runs = [
        ([*once, *zero(stage, "bf16", micro_steps), f"name=stage-{stage}"], "never")
        for stage in range(4)
    ]
    Ranks(tmp_path, ranks, runs, partial(keep_gradients, tmp_path)).succeed(1800)
    for stage in range(4):
        saved = [torch.load(tmp_path / f"stage-{stage}-{rank}.pt") for rank in range(ranks)]
        found, expected = (
            saved[0][0],
            {name: sum(exact[name] for _, exact in saved) / ranks for name in saved[0][0]},
        )
        missed = sum((found[name] - expected[name]).square().sum() for name in expected)
        size = sum(x.square().sum() for x in expected.values())
        assert float(missed / size) ** 0.5 < 0.004, stage  # bf16 rounds by at most 2^-8
