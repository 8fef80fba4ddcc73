"""What one image costs a model, counted on fake tensors from the operators that it calls."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from irpe_ds.config import RunConfig
from irpe_ds.data.loaders import Batch
from irpe_ds.data.rng import image_keys
from irpe_ds.errors import ConfigError, UserError
from irpe_ds.models.attention import RPEAttention
from irpe_ds.models.build import build_model
from irpe_ds.models.create import recompute_blocks
from irpe_ds.models.flops import forward_flops
from irpe_ds.ops.fused import kernel_shape, unsupported_reason
from irpe_ds.training.batch import Inputs
from irpe_ds.training.optim import parameter_groups
from irpe_ds.training.precision import MODEL, PRODUCTS

IMPLEMENTATIONS = ("auto", "fused", "gather", "reference")
"""Implementations of the op whose memory the planner knows."""
HALF_UNDER_AUTOCAST = (nn.Linear, nn.Conv2d)
"""Layers whose gradients DeepSpeed sends in half precision under autocast.

Of LOWER_PRECISION_SAFE_MODULES in DeepSpeed 0.19.8, runtime/torch_autocast.py, those that vision
transformers have; tests/planner/test_deepspeed.py fails when the bytes differ.
"""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One tensor of weights, in the order of the forward pass."""

    name: str
    shape: tuple[int, ...]
    group: int | None
    """Number of its group in the optimizer, of each of which stages 1 and 2 make one flat tensor;
    None: it is not trained."""
    half_gradient: bool
    """Whether DeepSpeed sends its gradient in half precision under autocast."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Call:
    """A module that ran in the forward pass."""

    parameters: tuple[str, ...]
    """Names of its own parameters, without those of its submodules."""
    calls: tuple["Call", ...]
    """Submodules that ran, in order."""
    is_trained: bool = True
    """Whether the backward pass comes through it."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Counts of one model in training; bytes and FLOPs are of one image."""

    parameters: tuple[Parameter, ...]
    call: Call
    """The whole model."""
    precision: str
    impl: str
    """Attention implementation that is counted."""
    flops: int
    """FLOPs of the matrix products of the forward pass."""
    saved: int
    """Bytes of activations that autograd saves for the backward pass."""
    saved_once: int
    """Bytes saved for any number of images, such as casts of the weights."""
    largest: int
    """Bytes of the largest saved tensor, without activation checkpointing."""
    saved_by_block: int
    """Bytes that one block saves, without activation checkpointing."""
    traffic: tuple[int, int]
    """Bytes that operators read and write in the forward and the backward pass."""
    traffic_once: tuple[int, int]
    """The same of the weights, for any number of images."""
    kernels: tuple[int, int]
    """Operators that move data in the forward and the backward pass, for any number of images."""
    input_kernels: int
    """Those that normalise, augment, erase and mix, once every operation has images."""
    recomputed: float
    """Share of the blocks whose activations are computed again in the backward pass."""

    @property
    def numel(self) -> int:
        return sum(p.numel for p in self.parameters)

    @property
    def trained(self) -> tuple[Parameter, ...]:
        """Parameters that have gradients and states."""
        return tuple(p for p in self.parameters if p.group is not None)

    @property
    def bytes(self) -> int:
        """Bytes of one element of the model's parameters."""
        return torch.finfo(MODEL[self.precision]).bits // 8


def profile(config: RunConfig) -> Profile:
    """Count a training step of a configuration's model; nothing is computed.

    Raises:
        ConfigError: the model cannot be built or run on fake images, or the planner does not know
            the op's memory.
    """
    try:
        return _profile(config)
    except UserError:
        raise
    except Exception as error:  # of any type: the models are timm's
        expected = f"a model that runs on images of {config.model.img_size} pixels without data"
        got = f"{config.model.name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ConfigError("model.name", expected, got) from error


def _profile(config: RunConfig) -> Profile:
    plain = config.model.without_weights().model_copy(update={"impl": "auto"})
    if config.model.impl not in IMPLEMENTATIONS:
        expected = f"one of {', '.join(IMPLEMENTATIONS)}, whose memory the planner knows"
        raise ConfigError("model.impl", expected, config.model.impl)
    with torch.device("meta"):
        model = build_model(plain).train().to(MODEL[config.train.precision])
    call, parameters = _call(model, config), tuple(_parameters(model, config))
    impl = _replace_attention(model, config.model.impl, PRODUCTS[config.train.precision])
    every, depth = config.model.grad_checkpointing, max(1, len(getattr(model, "blocks", ())))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu")
        one, two = (_count(model, config, images) for images in (2, 4))
        whole = two
        if every:
            recompute_blocks(model, 0)
            whole = _count(model, config, 4)
    per_image = [(b - a) // 2 for a, b in zip(one.bytes, two.bytes, strict=True)]
    return Profile(
        parameters=parameters,
        call=call,
        precision=config.train.precision,
        impl=impl,
        flops=forward_flops(config.model),
        saved=per_image[0],
        saved_once=max(0, one.bytes[0] - 2 * per_image[0]),
        largest=whole.largest // 4,
        saved_by_block=whole.bytes[0] // 4 // depth,
        traffic=(per_image[1], per_image[2]),
        traffic_once=(one.bytes[1] - 2 * per_image[1], one.bytes[2] - 2 * per_image[2]),
        kernels=two.kernels,
        input_kernels=_input_kernels(config),
        recomputed=len(range(0, depth, every)) / depth if every else 0.0,
    )


def _call(model: nn.Module, config: RunConfig) -> Call:
    """Run a model on the meta device once to see which modules run, in which order."""
    running: list[list[Call]] = [[]]

    def begin(*_: Any) -> None:
        running.append([])

    def end(own: tuple[str, ...], out: Any) -> None:
        inner, found = running.pop(), tree_flatten(out)[0]
        is_trained = any(isinstance(x, Tensor) and x.requires_grad for x in found)
        running[-1].append(Call(own, tuple(inner), is_trained))

    known = dict(model.named_parameters())  # a shared parameter has its first name alone
    handles = []
    for prefix, module in model.named_modules():
        if isinstance(module, RPEAttention):
            module.impl = "reference"
        names = module.named_parameters(prefix, recurse=False)
        own = tuple(name for name, _ in names if name in known)
        handles.append(module.register_forward_pre_hook(begin))
        handles.append(module.register_forward_hook(lambda *args, own=own: end(own, args[2])))
    model(_images(config, 2, "meta"))  # batch normalisation refuses one
    for handle in handles:
        handle.remove()
    ((call,),) = running
    return call


def _input_kernels(config: RunConfig) -> int:
    """Operators between decoded images and the model, with more images than any of them needs."""
    device, keys = torch.device("meta"), image_keys(np.arange(256), seed=0, epoch=0)
    inputs, labels = Inputs(config, device), torch.empty(256, dtype=torch.int64, device=device)
    images = torch.empty(256, 3, 32, 32, dtype=torch.uint8, device=device)
    with _Traffic() as counted:
        inputs(Batch(images, labels, keys))
    return counted.kernels


def _images(config: RunConfig, number: int, device: str) -> Tensor:
    height, width = config.model.img_size
    dtype = MODEL[config.train.precision]
    return torch.empty(number, 3, height, width, dtype=dtype, device=device)


def _parameters(model: nn.Module, config: RunConfig) -> Iterator[Parameter]:
    groups = {
        id(p): number
        for number, group in enumerate(parameter_groups(model, config))
        for p in group["params"]
    }
    half = {
        id(p)
        for module in model.modules()
        if isinstance(module, HALF_UNDER_AUTOCAST)
        for p in module.parameters(recurse=False)
    }
    for name, p in model.named_parameters():
        yield Parameter(
            name=name, shape=tuple(p.shape), group=groups.get(id(p)), half_gradient=id(p) in half
        )


@dataclass(frozen=True)
class _Counts:
    bytes: tuple[int, int, int]
    """Saved, and moved in the forward and the backward pass."""
    largest: int
    kernels: tuple[int, int]


class _Traffic(TorchDispatchMode):
    """Adds up the bytes that operators read and write; views and allocations move none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
        inputs = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        shared = {x.untyped_storage()._cdata for x in inputs}
        is_view = not func._schema.is_mutable and any(
            x.untyped_storage()._cdata in shared for x in results
        )
        if results and not is_view and "empty" not in func.__name__:
            self.bytes += sum(x.numel() * x.element_size() for x in (*inputs, *results))
            self.kernels += 1
        return out


def _count(model: nn.Module, config: RunConfig, images: int) -> _Counts:
    """Count one forward and backward pass of a batch of fake tensors."""
    saved: dict[int, Tensor] = {}

    def save(x: Tensor) -> Tensor:
        saved[x.untyped_storage()._cdata] = x
        return x

    weights = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    batch = _images(config, images, "cpu")
    cast = torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "autocast")
    with _Traffic() as forward, cast, _FusedCalls():
        with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
            out = model(batch)
            out = out[0] if isinstance(out, tuple) else out
        loss = out.float().sum()
    with _Traffic() as backward:
        loss.backward()
    model.zero_grad()
    sizes = [x.untyped_storage().nbytes() for key, x in saved.items() if key not in weights]
    return _Counts(
        (sum(sizes), forward.bytes, backward.bytes),
        max(sizes, default=0),
        (forward.kernels, backward.kernels),
    )


def _replace_attention(model: nn.Module, impl: str, dtype: torch.dtype) -> str:
    """Make RPEAttention save and move what it does on a GPU; returns the implementation."""
    used = "timm's fused attention"
    for parent in list(model.modules()):
        attention: Any = getattr(parent, "attn", None)
        if not isinstance(attention, RPEAttention):
            continue
        key = attention.dispatch_key("cuda", dtype)
        reason = unsupported_reason(key)
        if impl == "fused" and reason is not None:
            raise ConfigError("model.impl", "an implementation that can run the model", reason)
        used = impl if impl != "auto" else "fused" if reason is None else "gather"
        if used == "fused":
            shape = kernel_shape(key, keys=False)
            sums = shape.rpe_v.row_classes * shape.rpe_v.slots if shape else 0
            parent.attn = _FusedAttention(attention, sums)
        else:
            attention.impl = "reference"
    return used


class _FusedCalls(TorchFunctionMode):
    """Makes calls of PyTorch's fused attention save and move what they do on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = args[:3]
        if not (q.ndim == 4 and q.shape == k.shape == v.shape):
            return func(*args, **kwargs)  # such as pooling by attention: little of a model
        mask = kwargs.get("attn_mask")
        mask = None if mask is None else mask.expand(*q.shape[:3], k.shape[2])
        return _Fused.apply(q.to(v.dtype), k.to(v.dtype), v, 0, mask)


class _FusedAttention(nn.Module):
    """Attention that saves what a fused kernel saves: inputs, output, log-sum-exp and, with
    relative position on values, so many bucket sums of each query."""

    def __init__(self, attention: Any, sums: int) -> None:
        super().__init__()
        self.attention, self.sums = attention, sums

    def forward(self, x: Tensor, rope: Tensor | None = None, **_: Any) -> Tensor:
        out = _Fused.apply(*self.attention.project(x, rope), self.sums)
        return self.attention.merge(out, x)


class _Fused(torch.autograd.Function):
    """Moves as many bytes as `ops/fused.py`: four tensors forward, twelve backward."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sums: int, mask: Tensor | None = None
    ) -> Tensor:
        batch, heads, length, dim = q.shape
        lse = q.new_empty(batch, heads, length, dtype=torch.float32)
        out = q.new_empty(batch, length, heads, dim).transpose(1, 2)
        torch.addcmul(q, k, v, out=out)
        ctx.save_for_backward(q, k, v, out, lse, q.new_empty(batch, length, heads, sums), mask)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *_, mask = ctx.saved_tensors
        return (
            torch.addcmul(grad, k, v),
            torch.addcmul(grad, q, v),
            torch.addcmul(grad, out, q),
            None,
            None if mask is None else torch.zeros_like(mask),
        )
