"""From the loader's uint8 batch to the model's input: normalise, augment and mix on the device."""

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor

from irpe_ds.config import AugmentConfig, DataConfig, RunConfig
from irpe_ds.data.augment.policies import Augment, Erase
from irpe_ds.data.loaders import Batch


class Normalize:
    """(x / 255 - mean) / std per channel: uint8 (B, 3, H, W) to float32 on the device."""

    def __init__(self, data: DataConfig, device: torch.device) -> None:
        mean, std = torch.tensor(data.mean), torch.tensor(data.std)
        self.factor = (1 / (255 * std)).view(3, 1, 1).to(device)
        self.shift = (-mean / std).view(3, 1, 1).to(device)
        self.device = device

    def __call__(self, images: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True)
        return torch.addcmul(self.shift, images.float(), self.factor)


def build_augment(config: RunConfig) -> Augment:
    """RandAugment, three-augment, colour jitter; none if timm's pipeline did them on the host.

    Raises:
        ConfigError: unknown augmentation name.
    """
    augment = Augment(config.augment, config.data.mean)  # checks the names for either pipeline
    if config.data.pipeline == "timm":
        done = config.augment.model_copy(update={"auto": None, "color_jitter": 0.0})
        augment = Augment(done, config.data.mean)
    return augment


def build_erase(augment: AugmentConfig) -> Erase:
    """Random erasing, of either pipeline."""
    return Erase(augment.erase, augment.erase_mode, augment.erase_count)


def build_mixup(config: RunConfig) -> Mixup | None:
    """timm's mixup and cutmix, which also smooth the labels; None when both are off."""
    augment = config.augment
    if not augment.mixup and not augment.cutmix:
        return None
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mix_prob,
        switch_prob=augment.mix_switch_prob,
        label_smoothing=augment.label_smoothing,
        num_classes=config.model.class_count,
    )


class Inputs:
    """Training batches as the model takes them: augmented, normalised, erased and mixed.

    Raises:
        ConfigError: unknown augmentation name.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self._device = device
        self._augment, self._normalize = build_augment(config), Normalize(config.data, device)
        self._erase, self._mixup = build_erase(config.augment), build_mixup(config)

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) float32, and labels (B,) or, mixed, their shares (B, classes)."""
        images = batch.images.to(self._device, non_blocking=True)
        images = self._erase(self._normalize(self._augment(images, batch.keys)), batch.keys)
        targets = batch.labels.to(self._device, non_blocking=True)
        if self._mixup is not None:
            images, targets = self._mixup(images, targets)
        return images, targets


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make dropout, drop path and mixing of one forward pass a function of these three numbers.

    A resumed run then equals an uninterrupted one, without generator states in checkpoints.
    """
    torch_seed, numpy_seed = np.random.SeedSequence([seed, step, rank]).generate_state(2)
    torch.manual_seed(int(torch_seed))
    np.random.seed(int(numpy_seed))
