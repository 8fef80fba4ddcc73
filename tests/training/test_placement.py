"""Training on a GPU: every tensor is on its device, and nothing makes the host wait for it."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from irpe_ds.checkpoint.reader import EMA
from irpe_ds.cluster.process_group import Ranks
from irpe_ds.config import DistillConfig, RunConfig
from irpe_ds.data.loaders import Batch
from irpe_ds.data.rng import image_keys
from irpe_ds.models.build import build_model
from irpe_ds.ops import dispatch
from irpe_ds.training import precision
from irpe_ds.training.batch import Inputs, Normalize
from irpe_ds.training.evaluation import evaluate
from irpe_ds.training.loss import DistillationLoss, Loss, build_loss
from irpe_ds.training.metrics import Meter
from irpe_ds.training.optim import AdamW
from irpe_ds.training.trainer import Trainer
from tests.training.fake_gpu import Misplaced, backward, fake_gpu

SIZE = 64
RANKS = Ranks(
    rank=0, world_size=1, device=torch.device("cuda:0"), cpu_group=None, hostnames=["here"]
)
RECIPE = {"auto": "rand-m9-mstd0.5-inc1", "erase": 0.5, "mixup": 0.8, "cutmix": 1.0}
TINY = {"depth": 2, "embed_dim": 64, "num_heads": 2}
QKV = {"on": "qkv"}
IMPLEMENTATIONS = [
    ("reference", QKV),
    ("gather", QKV),
    ("fused", QKV),
    ("fused", {"on": "qk", "mode": "bias"}),
    ("low_rank", {"on": "qk", "method": "cross"}),
]


def run_config(augment: dict[str, Any] | None = None, **model: Any) -> RunConfig:
    values = {"name": "vit_tiny_patch16_224", "num_classes": 10, "img_size": SIZE, **model}
    data = {"train": "a.beton", "val": "b.beton"}
    return RunConfig.model_validate(
        {"name": "x", "model": values, "data": data, "augment": augment or RECIPE}
    )


def decoded(images: int) -> tuple[Tensor, Tensor]:
    """Images and labels as the pipelines return them, in pinned memory."""
    pixels = torch.empty((images, SIZE, SIZE, 3), dtype=torch.uint8, pin_memory=True)
    return pixels.permute(0, 3, 1, 2), torch.empty(images, dtype=torch.int64, pin_memory=True)


def check_step(config: RunConfig, model: nn.Module, loss: Loss, images: int = 4) -> None:
    """A forward and backward pass of the trainer, and its entry in the meter."""
    model.bfloat16()
    with fake_gpu() as watch:
        model.to_empty(device="cuda")
        loss.to_empty(device="cuda")
        trainer: Any = SimpleNamespace(
            config=config,
            ranks=RANKS,
            update=0,
            train_inputs=Inputs(config, RANKS.device),
            dtype=precision.MODEL[config.train.precision],
            gradient_sums=None,
            loss=loss,
            engine=mock.Mock(side_effect=model, backward=backward),
        )
        trainer.inputs = partial(Trainer.inputs, trainer)
        meter, keys = Meter(RANKS, {}), image_keys(np.arange(images), seed=0, epoch=0)
        with watch:
            meter.add(Trainer.step(trainer, Batch(*decoded(images), keys), 0), images)
        assert all(p.grad is not None and p.grad.is_cuda for p in model.parameters())


@pytest.mark.parametrize(("impl", "rpe"), IMPLEMENTATIONS)
def test_every_implementation(impl: str, rpe: dict[str, Any]) -> None:
    config = run_config(impl=impl, rpe=rpe, options=TINY, drop_path=0.1)
    check_step(config, build_model(config.model), build_loss(config))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex() -> None:
    """Its forward: the backward is PyTorch's own, and its compiler refuses to be watched."""
    model = build_model(run_config(impl="flex", rpe={"on": "qk"}, options=TINY).model)
    with fake_gpu() as watch, torch.no_grad():
        model.to_empty(device="cuda")
        images = torch.empty(2, 3, SIZE, SIZE, device="cuda")
        with watch:
            assert model(images).is_cuda


def test_no_implementation_is_left_out() -> None:
    rows = dispatch.IMPLEMENTATIONS.items()
    on_cuda = {name for name, row in rows if not row.devices or "cuda" in row.devices}
    assert {name for name, _ in IMPLEMENTATIONS} | {"flex"} == on_cuda


class Linear(nn.Module):
    """A model of one layer, with `heads` heads."""

    def __init__(self, heads: int = 1) -> None:
        super().__init__()
        self.layer, self.heads = nn.Linear(3 * SIZE**2, 10 * heads), heads

    def forward(self, images: Tensor) -> Any:
        logits = self.layer(images.flatten(1)).chunk(self.heads, 1)
        return logits if self.heads > 1 else logits[0]


@pytest.mark.parametrize(
    "augment",
    [
        {"auto": "rand-m9-mstd0.5-p1-inc1", "erase": 1.0},
        {"auto": "3a", "color_jitter": 0.3, "label_smoothing": 0.1},
        {"mixup": 0.8},
        {"cutmix": 1.0},
    ],
)
def test_every_augmentation(augment: dict[str, Any]) -> None:
    """64 images, so that every operation has some."""
    config = run_config(augment)
    check_step(config, Linear(), build_loss(config), images=64)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_distillation(kind: str) -> None:
    distill = DistillConfig(kind=kind, weights="x.pth")
    loss = DistillationLoss(0.0, distill, Linear(), torch.float32)
    check_step(run_config(), Linear(heads=2), loss)


def test_evaluation() -> None:
    """The sums are read once, after the last batch."""
    totals = SimpleNamespace(tolist=lambda: [1.0, 1.0, 1.0, 1.0])
    ranks: Any = SimpleNamespace(device=RANKS.device, all_reduce_sum=lambda sums: totals)
    model, valid = Linear(), torch.tensor([True, True, False])
    with fake_gpu() as watch:
        model.to_empty(device="cuda")
        normalize = Normalize(run_config().data, RANKS.device)
        with watch:
            scores = evaluate(model, [(*decoded(3), valid)] * 2, normalize, ranks)
    assert scores["images"] == 1


@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_the_optimizer_waits_only_to_know_whether_it_skips(skip_nonfinite: bool) -> None:
    with fake_gpu() as watch:
        weights = nn.Parameter(torch.zeros(3, 3, device="cuda"))
        weights.grad = torch.zeros_like(weights)
        optimizer = AdamW([weights], ema_decay=0.9, skip_nonfinite=False)
        optimizer.step()
        optimizer.state[weights][EMA] = torch.zeros_like(weights)
        optimizer.skip_nonfinite = skip_nonfinite
        with watch:
            if skip_nonfinite:
                with pytest.raises(Misplaced, match=r"optim\.py.*isfinite.* the host waits for"):
                    optimizer.step()
            else:
                optimizer.step()


HERE = r"^tests/training/test_placement\.py:\d+ `.*`: aten\.\S+ "


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda x: x.sum().item(), "has a result that the host waits for"),
        (lambda x: bool(x.any()), "has a result that the host waits for"),
        (lambda x: x.nonzero(), "has a result that the host waits for"),
        (lambda x: x[x > 0], "has a boolean index"),
        (lambda x: x.__setitem__(x > 0, x.sum()), "has a boolean index"),
        (lambda x: x.cpu(), "copies to the host"),
        (lambda x: torch.empty(3).copy_(x, non_blocking=True), "copies to the host"),
        (lambda x: torch.ones(3).to(x.device, non_blocking=True), "waits for a copy"),
        (lambda x: torch.empty(3, pin_memory=True).to(x.device), "waits for a copy"),
        (lambda x: x.copy_(torch.ones(3)), "waits for a copy"),
        (lambda x: torch.tensor([1.0], device=x.device), "waits for a copy"),
        (lambda x: x + torch.ones(3), "has tensors of the host and of the GPU"),
        (lambda x: x[torch.arange(3)], "has tensors of the host and of the GPU"),
    ],
)
def test_a_fault_is_found(fault: Callable[[Tensor], object], message: str) -> None:
    with fake_gpu() as watch, watch, pytest.raises(Misplaced, match=HERE + message):
        fault(torch.zeros(3, device="cuda"))


def test_a_fault_in_the_backward_is_found() -> None:
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * grad.sum().item()

    with fake_gpu() as watch, watch:
        x = torch.zeros(3, device="cuda", requires_grad=True)
        loss = Reads.apply(x).sum()
        with pytest.raises(Misplaced, match=HERE + "has a result that the host waits for"):
            backward(loss)
