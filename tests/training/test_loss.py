"""The loss: by hand, and what a teacher does and is not to do."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from irpe_ds.config import DistillConfig, RunConfig
from irpe_ds.errors import ConfigError
from irpe_ds.models.build import build_model
from irpe_ds.training.loss import DistillationLoss, Loss, build_loss

CPU = torch.device("cpu")
TEACHER = "test_resnet"
STUDENT = "deit_tiny_distilled_patch16_224"
LOGITS = [[1.0, 0.0, -1.0], [0.5, 2.0, 0.0]]
DISTILLED = [[0.0, 1.0, 0.0], [-1.0, 0.0, 3.0]]
TEACHING = [[2.0, 0.0, 1.0], [0.0, 1.0, 0.5]]
LABELS = [2, 1]
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write a teacher's weights, with statistics that are not the first ones."""

    def save(classes: int = 10) -> Path:
        teacher = timm.create_model(TEACHER, num_classes=classes)
        teacher.train()(torch.randn(8, 3, 64, 64))
        torch.save(teacher.state_dict(), tmp_path / "teacher.pth")
        return tmp_path / "teacher.pth"

    return save


def run_config(distill: dict[str, Any], name: str = STUDENT, **sections: Any) -> RunConfig:
    model = {"name": name, "num_classes": 10, "img_size": 64, "rpe": {"on": "k"}}
    model["options"] = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    values = {"name": "x", "model": model, "data": {"train": "a", "val": "b"}}
    return RunConfig.model_validate(values | sections | {"distill": distill})


class Fixed(nn.Module):
    """A teacher that always says the same."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.tensor(TEACHING)


def log_softmax(row: list[float]) -> list[float]:
    total = math.log(sum(math.exp(x) for x in row))
    return [x - total for x in row]


def cross_entropy(logits: list[list[float]], targets: list[list[float]]) -> float:
    pairs = zip(logits, targets, strict=True)
    rows = [
        -sum(q * p for q, p in zip(target, log_softmax(row), strict=True)) for row, target in pairs
    ]
    return sum(rows) / len(rows)


def one_hot(labels: list[int], smoothing: float = 0.0) -> list[list[float]]:
    off = smoothing / 3
    return [[off + (1 - smoothing) * (label == k) for k in range(3)] for label in labels]


def teaching(kind: str, tau: float = 1.0) -> float:
    if kind == "hard":
        return cross_entropy(DISTILLED, one_hot([0, 1]))
    total = 0.0
    for student, teacher in zip(DISTILLED, TEACHING, strict=True):
        p = log_softmax([x / tau for x in teacher])
        q = log_softmax([x / tau for x in student])
        total += sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
    return total * tau**2 / 6


class TestByHand:
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_labels(self, smoothing: float) -> None:
        found = Loss(smoothing)(torch.empty(0), torch.tensor(LOGITS), torch.tensor(LABELS))
        assert found.item() == pytest.approx(cross_entropy(LOGITS, one_hot(LABELS, smoothing)))

    def test_probabilities(self) -> None:
        targets = [[0.2, 0.5, 0.3], [0.0, 0.9, 0.1]]
        found = Loss(0.0)(torch.empty(0), torch.tensor(LOGITS), torch.tensor(targets))
        assert found.item() == pytest.approx(cross_entropy(LOGITS, targets))

    @pytest.mark.parametrize("targets", [[2, 1], [[0.2, 0.0, 0.8], [0.0, 1.0, 0.0]]])
    def test_binary_cross_entropy_has_every_label_in_full(self, targets: Any) -> None:
        found = Loss(0.0, "bce")(torch.empty(0), torch.tensor(LOGITS), torch.tensor(targets))
        present = [[type(targets[0]) is list, 0, 1], [0, 1, 0]]
        losses = [
            math.log1p(math.exp(-x if there else x))
            for row, labels in zip(LOGITS, present, strict=True)
            for x, there in zip(row, labels, strict=True)
        ]
        assert found.item() == pytest.approx(sum(losses) / 6)

    @pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize(("kind", "tau"), [("hard", 1.0), ("soft", 1.0), ("soft", 3.0)])
    def test_teacher(self, kind: str, tau: float, alpha: float) -> None:
        distill = DistillConfig(kind=kind, weights="x", alpha=alpha, tau=tau)
        loss = DistillationLoss(0.1, distill, Fixed(), torch.float32)
        outputs = torch.tensor(LOGITS), torch.tensor(DISTILLED)
        found = loss(torch.zeros(2, 3, 8, 8), outputs, torch.tensor(LABELS))
        labels = cross_entropy(LOGITS, one_hot(LABELS, 0.1))
        assert found.item() == pytest.approx((1 - alpha) * labels + alpha * teaching(kind, tau))

    def test_in_float32_whatever_the_logits_are(self) -> None:
        outputs, targets = torch.tensor(LOGITS).bfloat16(), torch.tensor(LABELS)
        found = Loss(0.0)(torch.empty(0), outputs, targets)
        assert found.dtype == torch.float32
        assert torch.equal(found, F.cross_entropy(outputs.float(), targets))


class TestBuild:
    @pytest.mark.parametrize(
        ("augment", "smoothing"),
        [
            ({"label_smoothing": 0.1}, 0.1),
            ({"label_smoothing": 0.1, "mixup": 0.8}, 0.0),
            ({"label_smoothing": 0.1, "cutmix": 1.0}, 0.0),
            ({}, 0.0),
        ],
    )
    def test_mixing_smooths_the_targets_itself(
        self, augment: dict[str, float], smoothing: float
    ) -> None:
        loss = build_loss(run_config({}, augment=augment))
        assert type(loss) is Loss
        assert loss.smoothing == smoothing

    @pytest.mark.parametrize("kind", ["none", "hard"])
    def test_bce_is_of_the_labels_with_a_teacher_too(self, kind: str, save: Save) -> None:
        distill = {"kind": kind, "teacher": TEACHER, "weights": save(), "alpha": 0.0}
        loss = build_loss(run_config(distill, train={"loss": "bce"}))
        logits, labels = torch.randn(4, 10), torch.tensor([1, 2, 3, 4])
        outputs = logits if kind == "none" else (logits, torch.randn(4, 10))
        expected = F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, 10).float())
        torch.testing.assert_close(loss(torch.randn(4, 3, 64, 64), outputs, labels), expected)

    def test_without_a_teacher_any_model_is_left_as_it_is(self) -> None:
        config = run_config({})
        model = build_model(config.model)
        build_loss(config).prepare(model)
        assert model.train()(torch.randn(2, 3, 64, 64)).shape == (2, 10)

    def test_no_head_for_the_teacher(self, save: Save) -> None:
        distill = {"kind": "hard", "teacher": TEACHER, "weights": save()}
        config = run_config(distill, name="deit_tiny_patch16_224")
        loss = build_loss(config)
        with pytest.raises(ConfigError, match=r"^model\.name: .* distillation head.*distill\.kind"):
            loss.prepare(build_model(config.model))

    @pytest.mark.parametrize(
        ("values", "where", "got"),
        [
            ({"teacher": "regnetx_161"}, "distill.teacher", "'regnetx_161' (did you mean"),
            ({"weights": "nowhere.pth"}, "distill.weights", "nothing at nowhere.pth"),
            ({"teacher": "resnet18"}, "distill.weights", "tensor"),
        ],
    )
    def test_mistakes(self, values: dict[str, str], where: str, got: str, save: Save) -> None:
        distill = {"kind": "hard", "teacher": TEACHER, "weights": save()} | values
        with pytest.raises(ConfigError) as caught:
            build_loss(run_config(distill))
        assert caught.value.where == where
        assert got in str(caught.value.got)

    def test_a_teacher_of_other_classes(self, save: Save) -> None:
        distill = {"kind": "hard", "teacher": TEACHER, "weights": save(classes=7)}
        with pytest.raises(ConfigError, match=r"^distill\.weights: .* \(7, .*, not \(10, "):
            build_loss(run_config(distill))


class TestTeacher:
    @pytest.fixture(params=["hard", "soft"])
    def config(self, request: pytest.FixtureRequest, save: Save) -> RunConfig:
        distill = {"kind": request.param, "teacher": TEACHER, "weights": save(), "tau": 2.0}
        return run_config(distill, train={"precision": "fp32"})

    def test_a_student_with_an_encoding_learns_with_both_heads(self, config: RunConfig) -> None:
        torch.manual_seed(0)
        student, loss = build_model(config.model), build_loss(config)
        plain = build_model(config.model.model_copy(update={"rpe": None}))
        plain.load_state_dict({k: v for k, v in student.state_dict().items() if "rpe_" not in k})
        for model in (student, plain):
            loss.prepare(model)
        images, labels = torch.randn(4, 3, 64, 64), torch.tensor([1, 2, 3, 4])
        logits, distilled = student.train()(images)
        torch.testing.assert_close((logits, distilled), plain.train()(images))  # zero tables
        before = {key: value.clone() for key, value in loss.state_dict().items()}
        found = loss(images, (logits, distilled), labels)
        found.backward()

        expected = timm.create_model(TEACHER, num_classes=10)
        expected.load_state_dict(torch.load(config.distill.weights))
        with torch.no_grad():
            said = expected.eval()(images)
        own = DistillationLoss(0.0, config.distill, nn.Identity(), torch.float32)
        part = own._from_teacher(distilled, said)
        torch.testing.assert_close(found, (F.cross_entropy(logits, labels) + part) / 2)
        for name in ("head", "head_dist", "blocks.1.attn.rpe_k"):
            assert all(p.grad.any() for p in student.get_submodule(name).parameters()), name
        assert all(torch.equal(value, before[key]) for key, value in loss.state_dict().items())
        assert not any(p.requires_grad for p in loss.parameters())
        assert student.eval()(images).shape == (4, 10)

    @pytest.mark.parametrize(
        ("precision", "dtype"),
        [("fp32", torch.float32), ("bf16", torch.bfloat16), ("autocast", torch.bfloat16)],
    )
    def test_computes_as_the_run_does(
        self, config: RunConfig, precision: str, dtype: torch.dtype
    ) -> None:
        train = config.train.model_copy(update={"precision": precision})
        loss = build_loss(config.model_copy(update={"train": train}))
        products: list[torch.dtype] = []
        loss.teacher.conv1.register_forward_hook(lambda _, __, out: products.append(out.dtype))
        images = torch.randn(4, 3, 64, 64).to(torch.bfloat16 if precision == "bf16" else None)
        outputs = torch.randn(4, 10), torch.randn(4, 10)
        assert loss(images, outputs, torch.arange(4)).dtype == torch.float32
        assert products == [dtype]

    def test_follows_the_resolution(self, tmp_path: Path) -> None:
        name, narrow = "deit_tiny_patch16_224_ctx_product_50_shared_k", (64, 32)
        config = run_config({"kind": "hard", "teacher": name, "weights": tmp_path / "vit.pth"})
        model = config.model.model_copy(update={"resolutions": ((0, 32), (1, 64))})
        config = config.model_copy(update={"model": model})
        teacher = timm.create_model(name, num_classes=10, img_size=64)
        torch.save(teacher.state_dict(), tmp_path / "vit.pth")
        loss = build_loss(config)
        for pixels in narrow:
            outputs = torch.randn(2, 10), torch.randn(2, 10)
            assert loss(torch.randn(2, 3, pixels, pixels), outputs, torch.arange(2)).isfinite()
