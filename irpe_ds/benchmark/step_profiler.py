"""Time of each phase of an update, and bytes of each collective."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

COLLECTIVES = {
    "all_reduce": "all_reduce",
    "inference_all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
    "broadcast": "broadcast",
    "reduce": "reduce",
}
"""Methods of DeepSpeed's communication backend (0.19.8, comm/torch.py: TorchBackend), by kind.

Another version may send by a method that is missing here; then tests/launch/test_scaling.py finds
fewer bytes than the planner counts.
"""


class StepProfiler:
    """While entered, assigns every second to one phase and counts every byte sent.

    Phases are `data` (waiting for it), `forward` (with augmentation and loss), `backward`,
    `optimizer` and `communication`. To separate them, the device is synchronized where a phase ends
    and collectives are synchronous: nothing overlaps, so an update takes longer than without the
    profiler. Waiting in a collective for a slower rank counts as communication.

    Args:
        trainer: a `Trainer`. Methods of its engine, its meter and DeepSpeed's backend are wrapped.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._stack = ["forward"]
        self._patches = ExitStack()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.bytes: Counter[str] = Counter()
        """By collective, of the whole vector: the input of reductions, the output of gathers."""

    def __enter__(self) -> "StepProfiler":
        from deepspeed.comm import comm

        engine, meter = self._trainer.engine, self._trainer.meter
        for owner, name, phase in (
            (meter, "wait", "data"),
            (engine, "backward", "backward"),
            (engine, "step", "optimizer"),
        ):
            self._patch(owner, name, self._timed(getattr(owner, name), phase))
        for name, kind in COLLECTIVES.items():
            self._patch(comm.cdb, name, self._counted(getattr(comm.cdb, name), kind))
        self._synchronize()
        self._since = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._account()
        self._patches.close()

    def _patch(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        """Replace a method of one object until exit."""
        if name in vars(owner):
            self._patches.callback(setattr, owner, name, vars(owner)[name])
        else:
            self._patches.callback(delattr, owner, name)
        setattr(owner, name, function)

    def _timed(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._phase(phase):
                return function(*args, **kwargs)

        return timed

    def _counted(self, function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        @wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            alone = self._trainer.ranks.world_size == 1
            if not alone and self._stack[-1] != "communication":  # some are made of others
                self.bytes[kind] += max(map(_size, (*args, *kwargs.values())))
            with self._phase("communication"):
                work = function(*args, **kwargs)
                if hasattr(work, "wait"):
                    work.wait()
                return work

        return counted

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._account()
        self._stack.append(name)
        try:
            yield
        finally:
            self._account()
            self._stack.pop()

    def _account(self) -> None:
        """Add the time since the last call to the current phase."""
        self._synchronize()
        now = time.perf_counter()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def _synchronize(self) -> None:
        if self._trainer.ranks.device.type == "cuda":
            torch.cuda.synchronize()


def _size(x: Any) -> int:
    """Bytes of a tensor or a list of tensors; 0 for anything else."""
    if isinstance(x, list | tuple):
        return sum(map(_size, x))
    return x.numel() * x.element_size() if isinstance(x, Tensor) else 0
