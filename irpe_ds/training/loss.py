"""The loss of a forward pass: on the labels, and on what a teacher says."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from irpe_ds.config import DistillConfig, ModelConfig, RunConfig
from irpe_ds.errors import ConfigError, UserError
from irpe_ds.models.build import build_model, load_weights
from irpe_ds.models.pretrained import local_file
from irpe_ds.models.vision_transformer import set_resolution
from irpe_ds.training.precision import PRODUCTS


class Loss(nn.Module):
    """The loss on the labels, computed in float32.

    Args:
        smoothing: of the labels, with cross entropy.
        kind: `cross_entropy`, or `bce`: binary cross entropy of every class, whose target is 1 if
            the label has a share in the image and 0 if not (DeiT III, section 3).
    """

    def __init__(self, smoothing: float, kind: str = "cross_entropy") -> None:
        super().__init__()
        self.smoothing, self.kind = smoothing, kind

    def prepare(self, model: nn.Module) -> None:
        """Make the model return what the loss needs; call it before DeepSpeed wraps the model."""

    def forward(self, images: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over the batch, and over the classes with `bce`.

        Args:
            images: (B, 3, H, W), the model's input.
            outputs: (B, C), its logits.
            targets: labels (B,), or probabilities (B, C).
        """
        logits = outputs.float()
        if self.kind == "cross_entropy":
            return F.cross_entropy(logits, targets, label_smoothing=self.smoothing)
        if targets.ndim == 1:
            targets = F.one_hot(targets, logits.shape[1])
        return F.binary_cross_entropy_with_logits(logits, (targets > 0).float())


class DistillationLoss(Loss):
    """(1 - alpha) * loss on the labels + alpha * loss on a teacher's outputs, as in DeiT.

    The student has two heads: one is trained on the labels, the other on the teacher's outputs.

    Args:
        teacher: the model to learn from; it is not trained, and computes in `dtype`.
    """

    def __init__(
        self,
        smoothing: float,
        distill: DistillConfig,
        teacher: nn.Module,
        dtype: torch.dtype,
        kind: str = "cross_entropy",
    ) -> None:
        super().__init__(smoothing, kind)
        self.distill, self.dtype = distill, dtype
        self.teacher = teacher.eval().requires_grad_(False)

    def prepare(self, model: Any) -> None:
        """Make the student return the logits of both heads in training.

        Raises:
            ConfigError: it has no distillation head.
        """
        if not hasattr(model, "set_distilled_training"):
            with_head = "a model with a distillation head, such as deit_small_distilled_patch16_224"
            expected = f"{with_head}, for distill.kind {self.distill.kind}"
            raise ConfigError("model.name", expected, f"a {type(model).__name__} without one")
        model.set_distilled_training(True)

    def forward(self, images: Tensor, outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:  # type: ignore[override]
        """The mean over the batch; `outputs` are the logits of both heads, (B, C) each."""
        logits, distilled = outputs
        loss = super().forward(images, logits, targets)
        from_teacher = self._from_teacher(distilled.float(), self._teacher_logits(images))
        return torch.lerp(loss, from_teacher, self.distill.alpha)

    def _from_teacher(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.distill.kind == "hard":
            return F.cross_entropy(student, teacher.argmax(dim=1))
        tau = self.distill.tau
        divergence = F.kl_div(
            F.log_softmax(student / tau, dim=1),
            F.log_softmax(teacher / tau, dim=1),
            reduction="sum",
            log_target=True,
        )
        return divergence * tau**2 / student.numel()  # DeiT divides by the classes too

    @torch.no_grad()
    def _teacher_logits(self, images: Tensor) -> Tensor:
        """The teacher's logits, (B, C) in float32."""
        height, width = images.shape[-2:]
        set_resolution(self.teacher, (height, width))
        mixed = self.dtype != torch.float32
        with torch.autocast(images.device.type, self.dtype, enabled=mixed):
            return self.teacher(images.float()).float()


def build_loss(config: RunConfig) -> Loss:
    """The loss of a run; reads the teacher's weights if it has one.

    Raises:
        ConfigError: unknown teacher, or a file that does not hold its weights for these classes.
    """
    augment, distill = config.augment, config.distill
    mixed = augment.mixup > 0 or augment.cutmix > 0
    smoothing = 0.0 if mixed else augment.label_smoothing  # mixup smooths the targets itself
    if distill.kind == "none":
        return Loss(smoothing, config.train.loss)
    dtype = PRODUCTS[config.train.precision]
    teacher = _build_teacher(config)
    return DistillationLoss(smoothing, distill, teacher, dtype, config.train.loss)


def _build_teacher(config: RunConfig) -> nn.Module:
    distill, student = config.distill, config.model
    assert distill.weights is not None  # DistillConfig ensures it
    model = ModelConfig(
        name=distill.teacher,
        num_classes=student.class_count,
        img_size=student.img_size,
        resolutions=student.resolutions,
    )
    try:
        teacher = build_model(model)
    except UserError as error:
        raise ConfigError("distill.teacher", error.expected, error.got) from None
    path = local_file(distill.weights, "distill.weights")
    load_weights(teacher, path, where="distill.weights")
    return teacher
