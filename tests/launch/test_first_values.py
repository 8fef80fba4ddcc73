"""First weights: a function of seed and name, and on no rank more of them than its part."""

import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from irpe_ds.config import load_config
from irpe_ds.models.build import build_deferred
from irpe_ds.planner.memory import memory
from irpe_ds.planner.profile import profile
from irpe_ds.planner.zero import read_zero
from tests.launch.outcomes import saved, slow, zero
from tests.launch.ranks import CONFIG, Ranks, free_port
from tests.planner.conftest import cluster

pytestmark = pytest.mark.dist


def save_only() -> None:
    """In place of training."""
    from irpe_ds.training.trainer import Trainer

    def train_epoch(self: Any, log: Any) -> None:
        self.save(log)
        self.finish_save()
        self.update = self.length.last_update

    Trainer.train_epoch = train_epoch  # type: ignore[method-assign]


def drawn(run: list[str]) -> dict[str, torch.Tensor]:
    """First values as they are drawn, in the opposite order."""
    config = load_config(CONFIG, run)
    model, initial = build_deferred(config.model, config.seed)
    names = [name for name, _ in model.named_parameters()]
    return {name: initial.read(name) for name in reversed(names)}


@pytest.mark.parametrize("world_size", [slow(1), 2, slow(4)])
def test_stage_and_ranks_do_not_matter(
    world_size: int, common: list[str], output: Path, tmp_path: Path
) -> None:
    cases = [(stage, "fp32") for stage in range(4)] + [(3, "bf16")]
    names = [f"first-{world_size}-{stage}-{precision}" for stage, precision in cases]
    runs = [
        [*common, *zero(*case), f"name={name}"] for case, name in zip(cases, names, strict=True)
    ]
    Ranks(tmp_path, world_size, [(run, "never") for run in runs], save_only).succeed()
    expected = drawn(runs[0])
    for name in names:
        path = output / name / "checkpoints/update-00000000"
        for kind in ("weights", "ema"):
            found = saved(path, kind)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], value) for key, value in expected.items()), name
        assert not any(moment.any() for moment in saved(path, "exp_avg").values())


class NewBytes(TorchDispatchMode):
    """The most bytes of tensors that operations make and that are there at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not any(returned.alias_info for returned in func._schema.returns):
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    size = tensor.untyped_storage().nbytes()
                    self.now += size
                    self.most = max(self.most, self.now)
                    weakref.finalize(tensor, self._freed, size)
        return result

    def _freed(self, size: int) -> None:
        self.now -= size


def count_bytes() -> None:
    """Print the most bytes of tensors while the model gets its memory and its values, and what the
    exchange of weights and averages takes besides."""
    from irpe_ds.training import engine
    from irpe_ds.training.trainer import Trainer

    save_only()
    setup, like, read = Trainer.setup_engine, engine.like, engine.FirstValues.read
    most = 0

    def look() -> None:
        nonlocal most
        tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
        storages = {x.untyped_storage()._cdata: x.untyped_storage() for x in tensors if x.is_cpu}
        most = max(most, sum(storage.nbytes() for storage in storages.values()))

    def watched(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            result = function(*arguments)
            look()
            return result

        return call

    def setup_engine(self: Any, start: Any, model: Any, *others: Any) -> None:
        gc.collect()
        gc.freeze()  # looks see what is made from now on
        setup(self, start, model, *others)
        look()
        sizes = [parameter.ds_numel for parameter in model.parameters()]
        with NewBytes() as new, self.state.average():
            pass
        counts = f"MOST {most} OF {sum(sizes)} LARGEST {max(sizes)} AVERAGE {new.most}"
        print(counts, flush=True)

    engine.like, engine.FirstValues.read = watched(like), watched(read)  # type: ignore[method-assign]
    Trainer.setup_engine = setup_engine  # type: ignore[method-assign]


def test_no_moment_has_the_whole(common: list[str], output: Path, tmp_path: Path) -> None:
    """Partition, master, moments, average and gradient: 24 bytes a parameter, shared by 4 ranks."""
    wide = ["model.options.depth=8", "model.options.embed_dim=64", "name=counted"]
    zero3 = tmp_path / "zero3.json"
    zero3.write_text(
        '{"zero_optimization": {"stage": 3, "reduce_bucket_size": 1000, '
        '"stage3_prefetch_bucket_size": 1000, "stage3_param_persistence_threshold": 0}}'
    )
    run = [*common, *zero(3), *wide, f"train.deepspeed={zero3}"]
    ranks = Ranks(tmp_path, 4, [(run, "never")], count_bytes)
    ranks.succeed()
    lines = [line.split() for line in ranks.output().splitlines() if line.startswith("MOST")]
    assert len(lines) == 4
    config = load_config(CONFIG, run)
    planned = memory(profile(config), read_zero(zero3), cluster(4), config, 1, context_gib=0).start
    for _, most, _, total, _, largest, _, average in lines:
        assert int(most) <= 24 * int(total) / 4 + 4 * 4 * int(largest)
        assert int(most) < 0.4 * 24 * int(total)
        assert int(most) == pytest.approx(planned, rel=0.01)
        assert 0 < int(average) <= 4 * int(largest)


@pytest.mark.slow
def test_partitions_score_as_the_whole(
    common: list[str], output: Path, run: Any, tmp_path: Path
) -> None:
    """launch/evaluate.py under ZeRO-3: each rank reads and holds its part."""
    training = [*common, *zero(3), "name=scored", "train.max_updates=4"]
    Ranks(tmp_path, 2, [(training, "never")]).succeed()
    for ema in ((), ("--ema",)):
        evaluate = ("launch/evaluate.py", "--run", output / "scored", *ema, "--pipeline", "ffcv")
        port = ("--master_port", str(free_port()))
        whole, parts = (
            run(*launcher, *evaluate)
            for launcher in ((sys.executable,), ("deepspeed", "--num_accelerators", "2", *port))
        )
        (line,) = (line for line in whole.stdout.splitlines() if "top-1" in line)
        assert line in parts.stdout, parts.stderr
