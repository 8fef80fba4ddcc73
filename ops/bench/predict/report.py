"""Predictions side by side: the kernels of this tree and plain flash, as lines of text."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from irpe_ds.ops.bench.predict import flash, kernels
from irpe_ds.ops.bench.predict.calibration import Comparison
from irpe_ds.ops.bench.predict.gpus import GPU
from irpe_ds.ops.bench.predict.prediction import Prediction, Problem

KERNELS = tuple(kernels.MATRICES_MOVED)
"""The forward, and the two passes of the backward."""
DIRECTIONS = {"forward": KERNELS[:1], "backward": KERNELS[1:]}


class Case(NamedTuple):
    """What is predicted together."""

    gpu: GPU
    problem: Problem


class Row(NamedTuple):
    """The kernels of a case, by name, with flash beside them: `flash forward`, `flash backward`."""

    case: Case
    predictions: dict[str, Prediction]

    def microseconds(self, names: Iterable[str]) -> float:
        return sum(self.predictions[name].microseconds for name in names)

    def ratio(self, *directions: str) -> float | None:
        """To flash, of a forward, a backward or both; None where a kernel is left out."""
        ours = [name for direction in directions for name in DIRECTIONS[direction]]
        theirs = [f"flash {direction}" for direction in directions]
        if not self.predictions.keys() >= {*ours, *theirs}:
            return None
        return self.microseconds(ours) / self.microseconds(theirs)

    def as_json(self) -> dict[str, object]:
        gpu, problem = self.case
        ratios = {" + ".join(x): self.ratio(*x) for x in RATIOS}
        of_each = {
            name: x._asdict() | {"of_a_head": x.of_a_head._asdict()}
            for name, x in self.predictions.items()
        }
        return {"gpu": gpu.name, **problem._asdict(), "ratios": ratios, "kernels": of_each}


RATIOS = (("forward",), ("backward",), ("forward", "backward"))


def predict(case: Case, names: Iterable[str] = KERNELS) -> Row:
    """The kernels of these names, and flash in the directions that they belong to.

    Raises:
        Unavailable: a compiler or a tool is missing.
        ConfigError: the kernels do not fit.
    """
    gpu, problem = case
    plain = {"forward": flash.forward, "backward": flash.backward}
    found = {name: kernels.predict(name, problem, gpu) for name in names}
    for direction, parts in DIRECTIONS.items():
        if not found.keys().isdisjoint(parts):
            found[f"flash {direction}"] = plain[direction](problem, gpu)
    return Row(case, found)


def lines(row: Row) -> Iterator[str]:
    """Of a row, each of them told to be predicted."""
    gpu, problem = row.case
    height, width = problem.grid
    title = f"predicted {gpu.name} {problem.on.upper():3} {height}x{width} D {problem.head_dim:3}"
    for name, x in row.predictions.items():
        waits = ", ".join(f"{reason} {share:.0%}" for reason, share in [*x.waits.items()][:4])
        counts = "{:7,.0f} instructions {:6,.0f} mma {:7,.0f} wavefronts".format(*x.of_a_head)
        yield f"{title} {name:16} {x.microseconds:7.1f} us; a head {counts}; waits {waits}"
    ratios = {" + ".join(x): row.ratio(*x) for x in RATIOS}
    known = [f"{name} {ratio:.2f}" for name, ratio in ratios.items() if ratio is not None]
    if known:
        yield f"{title} of flash's time: {', '.join(known)}"


def calibration_line(x: Comparison) -> str:
    """Of a measurement that others have made."""
    gpu, head_dim, tokens, forward, backward, source = x.measured
    times = (
        f"{name} {predicted:.0f} for {measured:.0f} measured ({predicted / measured - 1:+.0%})"
        for name, predicted, measured in (
            ("forward", x.forward, forward),
            ("backward", x.backward, backward),
        )
    )
    where = f"predicted FlashAttention-2, {gpu}, D {head_dim}, {tokens} tokens, TFLOP/s"
    return f"{where}: {', '.join(times)}; {source}"
