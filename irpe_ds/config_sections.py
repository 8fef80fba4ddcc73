"""The sections of a run's configuration.

docs/config.md is made from their words: `python docs/config_reference.py > docs/config.md`. Where
timm, DeiT or Hugging Face's Trainer has another name for a key, its docstring ends with it.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import (
    AfterValidator,
    ConfigDict,
    StrictBool,
)

from irpe_ds.config_types import (
    ClassCount,
    Count,
    Decay,
    EraseMode,
    Every,
    EveryNth,
    Fraction,
    Freeze,
    Interval,
    Natural,
    NonNegative,
    OptimizerName,
    Positive,
    Probability,
    Share,
    Size,
    Source,
    ascending,
    from_the_first_epoch,
)
from irpe_ds.errors import ConfigError
from irpe_ds.rpe.config import RPEConfig


class Section(pydantic.BaseModel):
    """Frozen; unknown keys and values of the wrong type are errors."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class ModelConfig(Section):
    name: str
    """Any timm model name, or one of ours (`launch/zoo.py` prints them)."""
    rpe: RPEConfig | None = None
    """The encoding to equip the model with. None: the model as its name says."""
    impl: str = "auto"
    """Implementation of the attention op: `auto`, or one that runs or fails, without a fallback.
    HF: attn_implementation."""
    num_classes: ClassCount = 1000
    """Must equal the class count of the data; `auto` takes it from data.train."""
    img_size: Size = (224, 224)
    """Input height and width, pixels."""
    resolutions: Annotated[
        tuple[tuple[Natural, Count], ...], AfterValidator(from_the_first_epoch)
    ] = ()
    """Progressive resolution, [epoch, pixels] pairs: [[0, 160], [100, 192], [200, 224]] trains at
    160 pixels from epoch 0, at 192 from 100. Validation uses img_size. Empty: img_size always."""
    drop_path: Probability = 0.0
    """Stochastic depth rate of the last block; earlier blocks have less, linearly. timm:
    drop_path_rate."""
    pretrained: StrictBool = False
    """Start from the weights that timm knows for `name`, or of our names from the released ones:
    ./NAME.pth, torch.hub's cache, or a download. Other classes get a new head."""
    weights: Source | None = None
    """Weights to start from: .pth, .safetensors, the folder of a checkpoint or an export; a URL, or
    a repository of Hugging Face's hub. None: random initialisation. timm: initial-checkpoint; DeiT:
    finetune."""
    new_head: StrictBool = False
    """Ignore the classifier in `weights` and initialise a new one, for other classes. timm:
    reset_classifier."""
    freeze: Freeze = 0
    """What is not trained: that many first blocks, and what is before them; or parameters and
    modules by name, with wildcards and exceptions: `[patch_embed, "blocks.[0-5]"]`, or all but head
    and tables, `["*", "!head", "!*.rpe_?"]`. 0: nothing."""
    grad_checkpointing: EveryNth = 0
    """Recompute activations in the backward pass instead of storing them: of every block (true), or
    of every n-th, which is faster and takes more memory. timm: grad-checkpointing; HF:
    gradient_checkpointing."""
    options: dict[str, Any] = {}
    """Further keyword arguments of `timm.create_model`, such as patch_size or depth. timm:
    model-kwargs."""

    @pydantic.model_validator(mode="after")
    def _new_head_of_what(self) -> "ModelConfig":
        if self.new_head and self.weights is None:
            raise ConfigError("new_head", "false without model.weights: all starts anew", "true")
        if self.pretrained and self.weights is not None:
            raise ConfigError("pretrained", "false with model.weights, which it names", "true")
        return self

    def without_weights(self) -> "ModelConfig":
        """The same model with its own first values, whatever `weights` and `options` say."""
        options = {key: value for key, value in self.options.items() if key != "pretrained"}
        other = {"weights": None, "pretrained": False, "new_head": False, "options": options}
        return self.model_copy(update=other)

    @property
    def class_count(self) -> int:
        """`num_classes`, once it is known.

        Raises:
            ConfigError: it is still `auto`.
        """
        if self.num_classes == "auto":
            raise ConfigError("model.num_classes", "a number, as no data is read here", "auto")
        return self.num_classes

    def size_at(self, epoch: int) -> tuple[int, int]:
        """Input height and width of a training epoch, pixels."""
        sizes = [(pixels, pixels) for first, pixels in self.resolutions if first <= epoch]
        return sizes[-1] if sizes else self.img_size


class DataConfig(Section):
    train: Path
    """Training set: a .beton file or a folder of class folders; with pipeline `timm` also another
    source of data_prep/convert.py that needs no options."""
    val: Path | None = None
    """Validation set, in the same formats. None: a share of the training set."""
    val_share: Fraction | None = None
    """That share, of each class; used without `val`."""
    val_seed: Natural = 0
    """Seed of the choice of those images."""
    pipeline: Literal["ffcv", "timm"] = "ffcv"
    """`ffcv`: decoded in threads, resized by area, augmented on the device. `timm`: timm's own
    transforms in worker processes, bicubic; the reference, and slower."""
    workers: Count | None = None
    """Decoding threads or processes per rank. None: the cores of the host divided by its ranks.
    PyTorch: num_workers."""
    scaled_decoding: StrictBool = False
    """Decode a JPEG at 1/2, 1/4 or 1/8 of its size where the training crop is then still no smaller
    than the model's input: less work for large images, slightly other pixels. Pipeline `ffcv`.
    Pillow: draft."""
    order: Literal["global", "blocks"] = "global"
    """Of training images in an epoch. `global`: a permutation of all. `blocks`: a permutation of
    blocks of 16 neighbours in the file, mixed within `window`, which slow storage reads faster."""
    window: Count = 16384
    """Images that order `blocks` mixes; all ranks together hold up to so many in memory. At least
    16 times train.global_batch: otherwise an update has more images of the same class."""
    os_cache: StrictBool = True
    """Leave what has been read in the system's page cache. False: for data larger than the memory.
    Pipeline `ffcv`. FFCV: os_cache."""
    stage: Path | None = None
    """Folder on a disk of each node, to which a run copies .beton files before it reads them, or
    finds them from a run before. None: they are read where they are."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Channel means of the normalisation, for pixels in [0, 1]."""
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """Channel deviations of the normalisation, for pixels in [0, 1]."""
    val_crop: Share = 0.875
    """Share of the shorter side that the centre crop of validation keeps. timm: crop_pct."""

    @pydantic.model_validator(mode="after")
    def _has_validation(self) -> "DataConfig":
        if self.val is None and self.val_share is None:
            raise ConfigError("val", "a path, or data.val_share, a share of data.train", "nothing")
        return self

    @property
    def mixed(self) -> int | None:
        """Images that the order of an epoch mixes; None: all."""
        return self.window if self.order == "blocks" else None

    def path(self, part: Literal["train", "val"]) -> Path:
        """What the images of a part are read from."""
        return self.train if part == "train" or self.val is None else self.val


class AugmentConfig(Section):
    crop: Literal["random_resized", "simple"] = "random_resized"
    """`simple`: DeiT III's for large sets; the image is scaled to cover the model's size, and the
    crop may pass its border by up to 4 pixels, mirrored there. DeiT: src."""
    scale: Annotated[tuple[Share, Share], AfterValidator(ascending)] = (0.08, 1.0)
    """Area of the random resized crop, as a share of the image; smallest and largest."""
    ratio: Annotated[tuple[Positive, Positive], AfterValidator(ascending)] = (3 / 4, 4 / 3)
    """Aspect ratio of the random resized crop, width over height; smallest and largest."""
    hflip: Probability = 0.5
    """Probability of a horizontal flip."""
    auto: str | None = None
    """RandAugment or three-augment, by timm's names: `rand-m9-mstd0.5-inc1`, `3a`. None: neither.
    timm, DeiT: aa (auto_augment)."""
    color_jitter: NonNegative = 0.0
    """Brightness, contrast and saturation vary by up to this factor; not combined with
    RandAugment."""
    erase: Probability = 0.0
    """Probability of random erasing: a random box of the image becomes noise. timm: reprob."""
    erase_mode: EraseMode = "pixel"
    """What becomes of the box: noise (`pixel`), one random colour (`rand`) or the mean colour
    (`const`). timm: remode."""
    erase_count: Count = 1
    """Most boxes in an image; it gets a random number of them, which share the area. timm:
    recount."""
    repeats: Count = 1
    """Repeated augmentation: augmented copies of an image per epoch, which then has fewer different
    images. timm: aug-repeats; DeiT: 3 with repeated-aug."""
    mixup: NonNegative = 0.0
    """Alpha of mixup; 0 turns it off."""
    cutmix: NonNegative = 0.0
    """Alpha of cutmix; 0 turns it off."""
    mix_prob: Probability = 1.0
    """Probability that a batch is mixed at all. timm: mixup-prob."""
    mix_switch_prob: Probability = 0.5
    """Probability of cutmix rather than mixup when both are on. timm: mixup-switch-prob."""
    label_smoothing: Probability = 0.0
    """Probability mass spread over all classes. timm, DeiT: smoothing."""


class OptimConfig(Section):
    name: OptimizerName = "adamw"
    """timm's optimizers that treat every number by itself, as ZeRO needs: it cuts tensors into
    pieces. `lion` wants a smaller lr and more weight_decay than AdamW; `sgd` has Nesterov momentum
    and a weight decay that is not decoupled. timm: opt."""
    lr: Positive = 5e-4
    """Peak learning rate for `lr_batch` images; scaled linearly with train.global_batch. timm:
    lr-base."""
    lr_batch: Count = 512
    """Images in the batch that `lr` is meant for. timm: lr-base-size."""
    warmup_lr: NonNegative = 1e-6
    """Learning rate of the first update; not scaled."""
    min_lr: NonNegative = 1e-5
    """Learning rate at the end of the cosine schedule; not scaled."""
    warmup_epochs: NonNegative = 5
    """Length of the linear warm-up, epochs."""
    weight_decay: NonNegative = 0.05
    """Decoupled weight decay. One-dimensional parameters and those in timm's no_weight_decay have
    none."""
    layer_decay: Share = 1.0
    """Layer-wise learning rate decay: a block's rate as a share of the next block's. 1: none. timm:
    layer-decay."""
    betas: tuple[Decay, Decay] | None = None
    """Decay rates of the moments; the first is sgd's momentum. None: 0.9 and 0.999, of lion 0.9 and
    0.99. timm: opt-betas, momentum; HF: adam_beta1, adam_beta2."""
    eps: Positive = 1e-8
    """Added to the denominator of AdamW's and NAdamW's step. timm: opt-eps; HF: adam_epsilon."""
    clip_grad: Positive | None = None
    """Largest global gradient norm. None: no clipping. HF: max_grad_norm; DeepSpeed:
    gradient_clipping."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _usual_betas(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("betas") is None:
            return values | {"betas": (0.9, 0.99 if values.get("name") == "lion" else 0.999)}
        return values


class TrainConfig(Section):
    epochs: Count = 300
    """Passes over the training set; the cosine schedule ends with the last. HF:
    num_train_epochs."""
    global_batch: Count = 1024
    """Images per update, over all ranks and accumulation steps: global_batch_size. DeepSpeed:
    train_batch_size."""
    accumulation: Count = 1
    """Forward and backward passes per update: gradient accumulation steps. timm: grad-accum-steps;
    HF, DeepSpeed: gradient_accumulation_steps."""
    precision: Literal["fp32", "bf16", "fp16", "autocast"] = "bf16"
    """Arithmetic of the model; master weights stay in fp32. `bf16` and `fp16` cast the model,
    `autocast` leaves it in fp32 and lets PyTorch choose bf16 operator by operator."""
    tf32: StrictBool = True
    """On NVIDIA GPUs fp32 matrix products use TensorFloat-32: 10 bits of mantissa, several times
    faster; PyTorch's default when DeiT was trained."""
    compile: StrictBool = False
    """Compile the model with torch.compile; the first update takes minutes longer. timm, HF:
    torchcompile, torch_compile."""
    loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    """`bce`: binary cross entropy of each class, mean over classes too; an image mixed of two has
    both labels in full, as in DeiT III. Needs label_smoothing 0. Evaluations report cross entropy.
    timm, DeiT: bce-loss."""
    ema_decay: Decay | None = None
    """Keep an exponential moving average of the weights, in fp32, with this decay per update. None:
    no average. timm, DeiT: model-ema-decay."""
    ema_warmup: StrictBool = False
    """Begin with less decay, (1 + n) / (10 + n) after n updates if that is smaller: an average of a
    short run forgets its first weights. timm: model-ema-warmup."""
    deepspeed: Path = Path("ds_configs/zero1.json")
    """DeepSpeed JSON with ZeRO and communication settings only."""
    max_updates: Count | None = None
    """Stop after this many updates, for short experiments; the schedule is not shortened. HF:
    max_steps."""
    log_every: Count = 50
    """Updates between two rows of the training log. timm: log-interval; HF: logging_steps."""
    eval_every: Every = Interval(1, "epoch")
    """How often the model is evaluated and saved; minutes are looked at when a row is logged. After
    the last update it always is. timm: val-interval; HF: eval_steps."""
    save_every: Every | None = None
    """How often it is saved beside that. None: with evaluations only. timm: recovery-interval; HF:
    save_steps."""
    keep_checkpoints: Count = 3
    """How many of the newest checkpoints are kept, beside the best. timm: checkpoint-hist; HF:
    save_total_limit."""
    max_skips: Natural = 10
    """How many updates in a row may be skipped because a gradient is not finite (NaN or inf) before
    the run stops: max_nonfinite_steps."""
    profile: Count | None = None
    """Trace this many updates with torch.profiler: traces/rank-N.json.gz in the run folder."""
    join_seconds: Positive = 45.0
    """Rendezvous timeout: how long the ranks wait for each other at the start before those that are
    absent are named. Raise it where some hosts load Python much more slowly than others."""


class DistillConfig(Section):
    kind: Literal["none", "soft", "hard"] = "none"
    """What the distillation head learns from a teacher: nothing, its probabilities (`soft`) or its
    predicted class (`hard`). DeiT: distillation-type."""
    teacher: str = "regnety_160"
    """Any timm model name, or one of ours."""
    weights: Source | None = None
    """The teacher's weights, required with a teacher, as `model.weights`. DeiT: teacher-path."""
    alpha: Probability = 0.5
    """Weight of the teacher's part of the loss; the labels' part has the rest. DeiT:
    distillation-alpha."""
    tau: Positive = 1.0
    """Temperature of soft distillation. DeiT: distillation-tau."""

    @pydantic.model_validator(mode="after")
    def _teacher_is_there(self) -> "DistillConfig":
        if self.kind != "none" and self.weights is None:
            raise ConfigError("weights", f"the weights of {self.teacher}", "nothing")
        return self


class WandbConfig(Section):
    mode: Literal["online", "offline", "disabled"] = "disabled"
    """Whether Weights & Biases gets the run, and when."""
    project: str = "irpe-ds"
    """Project that the run belongs to."""
    entity: str | None = None
    """User or team. None: the account's default."""
    tags: tuple[str, ...] = ()
    """Free labels."""
    group: str | None = None
    """Runs that belong together, such as those of a scaling experiment."""
    job_type: str | None = None
    """What the run is for, such as `train` or `ablation`: W&B filters by it."""
    notes: str | None = None
    """A remark, shown with the run."""
    artifacts: Literal["none", "best", "all"] = "none"
    """Checkpoints that W&B keeps: none, the best one once the run is complete, or every one that
    is evaluated. The run then waits up to 15 minutes at its end for the upload."""


class LogConfig(Section):
    wandb: WandbConfig = WandbConfig()
    tensorboard: StrictBool = False
    """Write TensorBoard events into the run folder too."""
    images: Natural = 16
    """Augmented training images with their labels, in a picture that W&B and TensorBoard get at the
    start."""
    tables_every: Count | None = None
    """Epochs between pictures of the relative position tables for W&B and TensorBoard; drawn after
    an evaluation. None: never."""
    confusion: StrictBool = False
    """Send the confusion matrix and each class's scores at the end of the run, of the average of
    the weights if there is one; for at most 1000 classes."""
