"""A GPU in name only: fake CUDA tensors, and an error wherever the host would wait for the GPU.

FakeTensorMode computes shapes and devices, on a machine without a GPU too, and raises where
devices differ. What PyTorch and the fused kernels ask of a GPU itself is replaced here.
"""

import linecache
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from irpe_ds.ops import dispatch, factors, fused_kernels, fused_op
from irpe_ds.ops.build import library

ROOT = Path(__file__).parents[2]
OURS = ("irpe_ds", "ops", "tests")
"""Its folders that a fault may be in."""
OPS = torch.ops.irpe_ds
COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
DEPENDS_ON_DATA = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Of an operator whose result, or its size, the host has to read."""
INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default}
INDEXING |= {torch.ops.aten.index_put_.default, torch.ops.aten._index_put_impl_.default}
"""Which count the ones of a boolean index on the host."""


class Misplaced(AssertionError):
    """An operator makes the host wait for the GPU, or mixes tensors of the two; says where."""


@contextmanager
def fake_gpu() -> Iterator[TorchDispatchMode]:
    """Tensors made here are fake, those on `cuda` too.

    Yields:
        A context in which Misplaced is raised at the first operator with tensors of both devices,
        copy to the host, copy from memory of the host that is not pinned, or value that the host
        reads.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)

    def factors_on(maps: Any, device: torch.device, *, transposed: bool = False) -> Any:
        made = factors.factor(maps, torch.device("cpu"), transposed=transposed)
        if device.type == "cpu":
            return made
        with _disable_current_modes(), fake:
            return factors.Factors(*(fake.from_tensor(x).to(device) for x in made))

    row = dispatch.IMPLEMENTATIONS["fused"]._replace(unavailable_reason=lambda key: None)
    for cached in (dispatch._resolve_and_warn, fused_op.shape):  # so that this is the first call
        cached.cache_clear()
    with (
        mock.patch.dict(dispatch.IMPLEMENTATIONS, fused=row),
        mock.patch.object(library, "_unavailable_on_gpu", return_value=library.load().cpu),
        mock.patch.object(fused_op, "factor", factors_on),
        mock.patch.object(fused_op, "device_of"),
        mock.patch.object(fused_kernels, "_launch"),
        torch.compiler.set_stance("force_eager"),  # FlexAttention: Dynamo refuses a _Watch
        mock.patch.object(FakeTensor, "data_ptr", return_value=0),
        mock.patch.object(torch, "Generator", return_value=torch.Generator()),
        fake,
    ):
        yield _Watch()
    dispatch._resolve_and_warn.cache_clear()


class _Watch(TorchDispatchMode):
    """Sees every operator before it runs; runs the body of those of `fused`."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.pinned: dict[int, Tensor] = {}  # kept alive, so that no other has its storage

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        fault = self.fault(func, args, kwargs)
        if fault is not None:
            raise Misplaced(f"{_place()}: {func} {fault}")
        if func in (OPS.fused_forward.default, OPS.fused_backward.default):
            with self:
                return getattr(fused_op, func._schema.name.partition("::")[2])(*args, **kwargs)
        if func is torch.ops.aten._pin_memory.default:
            func, kwargs = torch.ops.aten.clone.default, {"pin_memory": True}
        is_pinned = kwargs.pop("pin_memory", False)
        out = func(*args, **kwargs)
        if is_pinned:
            self.pinned[out.untyped_storage()._cdata] = out
        return out

    def fault(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """What is wrong with a call, if anything."""
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        devices = {x.device.type for x in tensors}
        if func in COPIES:
            source = tensors[-1]
            target = torch.device(kwargs.get("device") or tensors[0].device).type
            if (source.device.type, target) == ("cuda", "cpu"):
                return "copies to the host"
            if source.device.type != target and not self.is_asynchronous(source, args, kwargs):
                return "waits for a copy from the host: non_blocking needs pinned memory"
            return None
        if "cuda" not in devices:
            return None
        if {x.device.type for x in tensors if x.dim()} == {"cpu", "cuda"}:
            return "has tensors of the host and of the GPU"
        if func in INDEXING:
            is_mask = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
            return "has a boolean index, whose ones the host counts" if is_mask else None
        if func is torch.ops.aten.one_hot.default and args[1] > 0:
            return None  # the number of classes is given
        depends = DEPENDS_ON_DATA & {*getattr(func, "tags", ())}
        return "has a result that the host waits for" if depends else None

    def is_asynchronous(self, source: Tensor, args: tuple[Any, ...], kwargs: Any) -> bool:
        non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
        return non_blocking and source.untyped_storage()._cdata in self.pinned


def _place() -> str:
    """The innermost line of this repository that runs, but for this file's."""
    for frame, line in traceback.walk_stack(sys._getframe(1)):
        path = Path(frame.f_code.co_filename).resolve()
        if path.is_relative_to(ROOT) and path != Path(__file__).resolve():
            place = path.relative_to(ROOT)
            if place.parts[0] in OURS:
                return f"{place}:{line} `{linecache.getline(str(path), line).strip()}`"
    return "PyTorch"


@torch.no_grad()
def backward(loss: Tensor) -> None:
    """`loss.backward()`, one node after another: PyTorch's engine asks CUDA for a GPU's streams."""
    uses = Counter(child for node in _nodes(loss.grad_fn) for child, _ in node.next_functions)
    received = {loss.grad_fn: {0: torch.ones_like(loss)}}
    ready: list[Any] = [loss.grad_fn]
    while ready:
        node = ready.pop()
        slots, grads = received.pop(node, {}), ()
        if slots:
            call = getattr(node, "apply", node)
            grads = call(*(slots.get(n) for n in range(len(node._input_metadata))))
            grads = grads if isinstance(grads, tuple) else (grads,)
        for n, (child, slot) in enumerate(node.next_functions):
            if child is None:
                continue
            if slots and grads[n] is not None:
                of, sums = child._input_metadata[slot], received.setdefault(child, {})
                grad = grads[n].sum_to_size(of.shape).to(of.dtype)
                sums[slot] = sums[slot] + grad if slot in sums else grad
            uses[child] -= 1
            if not uses[child]:
                ready.append(child)


def _nodes(root: Any) -> set[Any]:
    """Those of the graph that a backward goes through."""
    found, left = {root}, [root]
    while left:
        new = {child for child, _ in left.pop().next_functions if child is not None} - found
        found |= new
        left += new
    return found
