"""A model without values, and the first value of each parameter, drawn when it is read."""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Generator, Tag, Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from irpe_ds.errors import UserError

logger = logging.getLogger(__name__)
UNINITIALISED = {
    getattr(torch.ops.aten, name)
    for name in (
        *("empty", "empty_like", "empty_permuted", "empty_strided"),
        *("new_empty", "new_empty_strided"),
    )
}
OVERWRITES = {
    getattr(torch.ops.aten, name)
    for name in ("bernoulli_", "copy_", "fill_", "normal_", "random_", "uniform_", "zero_")
}
"""After these nothing is left of the values before."""


class Initial:
    """The first values of a model's parameters, by their names in `model.named_parameters()`.

    What initialisation draws is a function of seed and name: the same bits on every rank, for one
    parameter alone and in any order. A GPU's generator gives other bits than a CPU's.
    """

    def __init__(self) -> None:
        self._readers: dict[str, Callable[[torch.device], Tensor]] = {}

    def read(self, name: str, device: torch.device | str | None = None) -> Tensor:
        """The first value of a parameter: a new tensor of its full shape, in its dtype.

        Args:
            device: where to draw; None: PyTorch's default device.
        """
        device = torch.get_default_device() if device is None else torch.device(device)
        with torch.no_grad():
            return self._readers[name](device)

    def draw(self, name: str, record: "_Record", seed: int) -> None:
        """The first value will be drawn."""
        self._readers[name] = partial(record.read, seed=seed, name=name)

    def replace(self, name: str, value: Tensor, dtype: torch.dtype) -> None:
        """The first value will be a copy of this one, which may be in a mapped file until then."""
        self._readers[name] = lambda device: value.to(device, dtype, copy=True)

    def hold(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        """The first value will be the present one; returns the parameter on the meta device."""
        self.replace(name, parameter.detach(), parameter.dtype)
        return like(parameter, torch.empty_like(parameter, device="meta"))


def defer(build: Callable[[], nn.Module], seed: int) -> tuple[nn.Module, Initial]:
    """What `build` returns, with its parameters on the meta device, and their first values.

    Operations on parameters are recorded, and run when a parameter is read. Values are held of
    those parameters only that are made of a tensor with values, as by
    `nn.Parameter(torch.ones(...))`, or that `build` computes with. Where recording fails, all are.
    Buffers are as `build` makes them. The generator of the CPU is left as it was.

    Raises:
        Exception: what `build` raises.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            with _Recorder() as recorder:
                model = build()
            return model, recorder.finish(model, seed)
        except UserError:
            raise
        except Exception as error:  # if it is not the recorder's fault, `build` raises it again
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        torch.default_generator.manual_seed(seed)
        model = build()
    logger.warning("%s is initialised as a whole: %s", type(model).__name__, reason)
    initial = Initial()
    replace_parameters(model, initial.hold)
    return model, initial


def materialize(
    model: nn.Module, initial: Initial, device: torch.device | str | None = None
) -> nn.Module:
    """Give every parameter of a deferred model its first value, in place; returns the model."""
    replace_parameters(model, lambda name, meta: like(meta, initial.read(name, device)))
    return model


def replace_parameters(model: nn.Module, make: Callable[[str, nn.Parameter], nn.Parameter]) -> None:
    """Put `make(name, parameter)` in the place of every parameter, in the order of their names.

    A shared parameter is made once, under its first name, and stays shared.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None:
                if parameter not in made:
                    made[parameter] = make(f"{prefix}.{key}" if prefix else key, parameter)
                setattr(module, key, made[parameter])  # nn.LSTM has a list to keep up to date


def like(parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
    """A parameter of this value, with `requires_grad` and the attributes of another."""
    made = nn.Parameter(value, parameter.requires_grad)
    vars(made).update(vars(parameter))
    return made


@dataclass
class _Record:
    """How a parameter gets its first value."""

    parameter: nn.Parameter
    """Stands for the parameter while the model is built: a FakeTensor, without memory."""
    value: Tensor | None
    """What the operations start from; None: uninitialised memory."""
    operations: list[Callable[[Tensor, Generator | None], None]] = field(default_factory=list)
    overwritten: int = 0
    """Elements that operations overwrite; those of views that overlap count twice."""

    def draw(self, device: torch.device, generator: Generator | None) -> Tensor:
        """The value; a generator of None is the device's own."""
        drawn = torch.empty(self.parameter.shape, dtype=self.parameter.dtype, device=device)
        if self.value is not None:
            drawn.copy_(self.value)
        for operation in self.operations:
            operation(drawn, generator)
        return drawn

    def read(self, device: torch.device, *, seed: int, name: str) -> Tensor:
        """The value, a function of seed and name."""
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        return self.draw(device, Generator(device).manual_seed(int.from_bytes(digest[:8], "big")))


class _Recorder(TorchDispatchMode):
    """While it is active, parameters are fake as soon as a module has them.

    Not on the meta device, on which `torch.nn.init.trunc_normal_` does nothing: a FakeTensor says
    that it is on the parameter's device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fakes = FakeTensorMode()
        self.fake_attributes: set[str] = set()
        self.records: dict[int, _Record] = {}  # by storage
        self.originals = WeakTensorKeyDictionary()  # parameter -> the fake one in its place
        self.uninitialised: dict[int, Tensor] = {}  # by storage, kept: no other gets its address
        self.failure: Exception | None = None

    def __enter__(self) -> "_Recorder":
        register: Any = register_module_parameter_registration_hook
        self.hook = register(self._register)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.hook.remove()
        self.uninitialised.clear()

    def _register(
        self, module: nn.Module, name: str, parameter: nn.Parameter | None
    ) -> nn.Parameter | None:
        """The parameter that a module gets in place of this one; None: this one."""
        if isinstance(parameter, FakeTensor):
            record = self._record(parameter)
            if record is None or record.parameter is not parameter:
                self._fail(f"{name} is a view of another parameter")
        if type(parameter) is not nn.Parameter or parameter.is_meta:
            return None
        if parameter not in self.originals:
            meta = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            memory = FakeTensor(self.fakes, meta, parameter.device)
            fake = nn.Parameter(memory, parameter.requires_grad)
            self.fake_attributes |= vars(fake).keys()
            vars(fake).update(vars(parameter))
            empty = self.uninitialised.pop(_storage(parameter), None) is not None
            self.records[_storage(fake)] = _Record(fake, None if empty else parameter.detach())
            self.originals[parameter] = fake
        return self.originals[parameter]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        written = [
            leaf
            for i, argument in enumerate(func._schema.arguments)
            if argument.alias_info and argument.alias_info.is_write
            for leaf in tree_leaves(args[i] if i < len(args) else kwargs.get(argument.name))
        ]
        if any(self._record(leaf) for leaf in written):
            if len(written) > 1 or written[0] is not args[0] or Tag.inplace_view in func.tags:
                self._fail(f"{func} on a parameter")
            self._add(func, *args, **kwargs)
            return args[0]
        returns = func._schema.returns
        if written or not (returns and returns[0].alias_info):  # else a view, also of a parameter
            args, kwargs = tree_map(self._value, (args, kwargs))
        result = func(*args, **kwargs)
        if func.overloadpacket in UNINITIALISED:
            self.uninitialised[_storage(result)] = result
        for leaf in written:
            self.uninitialised.pop(_storage(leaf), None)
            if any(_storage(leaf) == _storage(original) for original in self.originals):
                self._fail(f"{func} on a tensor that a parameter was made of")
        return result

    def _add(self, func: Any, target: Tensor, *args: Any, **kwargs: Any) -> None:
        """Record an operation on a parameter or on a view of it."""
        record = self.records[_storage(target)]
        args, kwargs = tree_map(
            lambda x: self._value(x).clone() if isinstance(x, Tensor) else x, (args, kwargs)
        )
        draws = any(argument.name == "generator" for argument in func._schema.arguments)
        place = target.size(), target.stride(), target.storage_offset()

        def operation(value: Tensor, generator: Generator | None) -> None:
            extra = {"generator": generator} if draws else {}
            func(value.as_strided(*place), *args, **(kwargs | extra))

        if func.overloadpacket in OVERWRITES:
            record.overwritten += target.numel()
            if target.numel() == record.parameter.numel():
                record.value, record.operations = None, []
        record.operations.append(operation)

    def _value(self, x: Any) -> Any:
        """In place of a parameter or a view of it its value, drawn now and kept."""
        record = self._record(x)
        if record is None:
            return x
        if record.operations or record.value is None:
            record.value, record.operations = record.draw(x.device, None), []
        return record.value.as_strided(x.size(), x.stride(), x.storage_offset())

    def _record(self, x: Any) -> _Record | None:
        return self.records.get(_storage(x)) if isinstance(x, FakeTensor) else None

    def _fail(self, reason: str) -> NoReturn:
        self.failure = RuntimeError(reason)  # for `finish`, where the model catches it
        raise self.failure

    def finish(self, model: nn.Module, seed: int) -> Initial:
        """Put the model's parameters on the meta device; returns their first values."""
        if self.failure:
            raise self.failure
        if any(isinstance(buffer, FakeTensor) for buffer in model.buffers()):
            raise RuntimeError("a buffer is a view of a parameter")
        initial = Initial()

        def to_meta(name: str, parameter: nn.Parameter) -> nn.Parameter:
            record = self._record(parameter)
            if record is None:  # it was on the meta device, or no module has registered it
                return initial.hold(name, parameter)
            if record.value is None and record.overwritten < parameter.numel():
                raise RuntimeError(f"{name} has no first value")
            initial.draw(name, record, seed)
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            meta = like(parameter, empty)
            for key in self.fake_attributes:
                vars(meta).pop(key, None)
            return meta

        replace_parameters(model, to_meta)
        return initial


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
