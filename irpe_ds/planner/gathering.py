"""Which parameters ZeRO 3 gathers, in the order of its coordinator (DeepSpeed 0.19).

Before a module runs, what it needs and does not have is gathered; then the next uses on the list of
all uses, up to stage3_prefetch_bucket_size elements; uses of what is there already are skipped.
After a module has run its parameters are let go, but for those whose next use was skipped, or lies
within stage3_max_reuse_distance elements.

In 18 settings of these, tried on the quickstart's model, two ranks send what is counted here: 12 to
the byte, five to 1.5 %, and to 6 % with a distance of twice the model's size.
"""

from bisect import bisect
from collections import deque
from collections.abc import Iterator, Sequence

from irpe_ds.planner.profile import Call, Parameter
from irpe_ds.planner.zero import Zero

Events = list[tuple[bool, Sequence[str]]]
"""Modules, by their parameters, in the order in which they begin (True) and have run (False)."""


def gathered(call: Call, parameters: Sequence[Parameter], zero: Zero) -> list[str]:
    """Names in the order in which they are gathered in one forward and backward pass.

    Args:
        call: the outermost module.
        parameters: all of the model.
    """
    every = {p.name: p.numel for p in parameters}
    size = {name: n for name, n in every.items() if n >= zero.persistence_threshold}
    events: Events = [*_events(call, 1), *_events(call, -1)]
    steps = [names for begins, names in events if begins]
    uses: dict[str, list[int]] = {name: [] for name in every}
    passed = [0]
    for step, names in enumerate(steps):
        passed.append(passed[-1] + sum(every[name] for name in names))
        for name in names:
            uses[name].append(step)
    ahead = deque((name, step) for step, names in enumerate(steps) for name in names)
    found: list[str] = []
    there: set[str] = set()
    listed: dict[str, int] = {}
    """The step of the last use of a parameter that was taken off the list."""

    def gather(names: Sequence[str]) -> int:
        new = [name for name in names if name in size and name not in there]
        found.extend(new)
        there.update(new)
        return sum(size[name] for name in new)

    step = 0
    for begins, names in events:
        if begins:
            gather(names)
            wanted = {name for name in names if listed.get(name, -1) < step}
            while ahead and wanted:
                name, listed_step = ahead.popleft()
                listed[name] = listed_step
                wanted.discard(name)
            prefetched = 0
            while ahead and prefetched < zero.prefetch_bucket:
                name, listed_step = ahead.popleft()
                listed[name] = listed_step
                prefetched += gather([name])
            step += 1
            continue
        for name in names:
            following = uses[name][bisect(uses[name], step - 1) :]
            near = following and passed[following[0]] - passed[step] < zero.max_reuse_distance
            if listed.get(name, -1) <= step and not near:
                there.discard(name)
    return found


def _events(call: Call, turn: int) -> Iterator[tuple[bool, Sequence[str]]]:
    """Of a module and those in it, in order (turn 1) or backwards (turn -1)."""
    yield True, call.parameters
    for inner in call.calls[::turn]:
        yield from _events(inner, turn)
    yield False, call.parameters
