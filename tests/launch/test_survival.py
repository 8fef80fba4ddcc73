"""A run ends with the same model whatever happens to it on the way.

IRPE_KILLS=20 kills every stage and precision twenty times; the default is what CI has time for.
"""

import functools
import json
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from irpe_ds.data.order import train_order
from irpe_ds.data.rng import image_keys
from tests.launch.ranks import Ranks, rows

pytestmark = pytest.mark.dist

KILLS = int(os.environ.get("IRPE_KILLS", "0"))


def slow(*values: Any) -> Any:
    """A case that `make test-slow` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


CASES = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]
FILES = ("weights", "ema", "optimizer")
UPDATES, PER_EPOCH, BATCH = 30, 14, 96


@pytest.fixture(scope="module")
def common(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of every run here; the output folder is the first."""
    return [
        f"output={tmp_path_factory.mktemp('survival')}",
        *(f"data.train={digits}/train.beton", f"data.val={digits}/val.beton"),
        *("train.epochs=3", f"train.global_batch={BATCH}", "train.log_every=1"),
        *("train.ema_decay=0.9", f"train.max_updates={UPDATES}", "data.workers=1"),
        *("model.options.depth=2", "optim.warmup_epochs=1", "optim.lr=1e-3"),
    ]


@pytest.fixture
def output(common: list[str]) -> Path:
    return Path(common[0].removeprefix("output="))


def zero(stage: int, precision: str = "fp32", accumulation: int = 1) -> list[str]:
    return [
        f"train.deepspeed=ds_configs/zero{stage}.json",
        *(f"train.precision={precision}", f"train.accumulation={accumulation}"),
    ]


EPS = "optim.eps=1e-4"
"""Of AdamW where sums in another order are compared: it would make 1e-3 of a gradient that is zero
but for rounding, such as that of the keys' bias, which softmax does not see."""


def tensors(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoints/update-{UPDATES:08d}/{kind}.safetensors")


def losses(folder: Path) -> torch.Tensor:
    found = [row["loss"] for row in rows(folder, "train")]
    assert len(found) == UPDATES
    return torch.tensor(found, dtype=torch.float64)


def same_bits(one: Path, other: Path) -> None:
    """Compare all that two runs have left."""
    for kind in ("train", "eval"):
        assert rows(one, kind) == rows(other, kind)
    for kind in FILES:
        expected, got = tensors(one, kind), tensors(other, kind)
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[name], got[name]) for name in expected), kind


@pytest.fixture(scope="module")
def parity(common: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder of runs STAGE-ACCUMULATION-RANKS of the same global batch, made when asked for."""
    logs = tmp_path_factory.mktemp("parity")

    @functools.cache
    def made(ranks: int) -> Path:
        runs = [
            (
                [*common, EPS, *zero(stage, accumulation=steps), f"name={stage}-{steps}-{ranks}"],
                "never",
            )
            for stage in range(4)
            for steps in (1, 4)
        ]
        Ranks(logs, ranks, runs).succeed(1800)
        return Path(common[0].removeprefix("output="))

    return made


@pytest.mark.parametrize("ranks", [1, 2, slow(4)])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("stage", range(4))
def test_stages_ranks_and_accumulation_agree(
    parity: Callable[[int], Path], stage: int, accumulation: int, ranks: int
) -> None:
    reference, run = parity(1) / "0-1-1", parity(ranks) / f"{stage}-{accumulation}-{ranks}"
    torch.testing.assert_close(losses(run), losses(reference), rtol=0, atol=1e-4)
    expected = tensors(reference, "ema")
    for name, average in tensors(run, "ema").items():
        torch.testing.assert_close(average, expected[name], rtol=0, atol=1e-6, msg=name)


def test_the_average_is_one(parity: Callable[[int], Path]) -> None:
    """It lies between the first weights and the last, and is neither."""
    run = parity(2) / "3-1-2"
    weights, average = tensors(run, "weights"), tensors(run, "ema")
    assert average.keys() == weights.keys()
    assert not torch.equal(weights["head.weight"], average["head.weight"])
    scores = rows(run, "eval")[-1]
    assert scores["ema_loss"] != scores["loss"]


def note_keys(folder: Path) -> None:
    """Write down which images every rank trains on, by their keys."""
    from irpe_ds.training.trainer import Trainer

    step = Trainer.step

    def noting(self: Any, batch: Any, micro_step: int) -> Any:
        with (folder / f"{os.getpid()}.keys").open("a") as file:
            file.write(json.dumps([self.update, batch.keys.tolist()]) + "\n")
        return step(self, batch, micro_step)

    Trainer.step = noting  # type: ignore[method-assign]


def test_ranks_and_stages_change_on_the_way(
    common: list[str], output: Path, parity: Callable[[int], Path], tmp_path: Path
) -> None:
    for ranks, stage, updates in ((2, 1, 9), (1, 3, 20), (4, 0, UPDATES)):
        run = [*common, EPS, *zero(stage), "name=changing", f"train.max_updates={updates}"]
        resume = "never" if ranks == 2 else "auto"
        Ranks(tmp_path, ranks, [(run, resume)], partial(note_keys, tmp_path)).succeed()
    assert "with ranks: 2 -> 1; ZeRO stage: 1 -> 3" in (output / "changing/log.txt").read_text()
    torch.testing.assert_close(
        losses(output / "changing"), losses(parity(2) / "1-1-2"), rtol=0, atol=1e-3
    )
    lines = "".join(path.read_text() for path in tmp_path.glob("*.keys")).splitlines()
    seen = sorted((update, key) for update, keys in map(json.loads, lines) for key in keys)
    expected = []
    for update in range(UPDATES):
        epoch, done = divmod(update, PER_EPOCH)
        order = {"batch_size": BATCH, "accumulation": 1, "rank": 0, "world_size": 1}
        samples, repeats = train_order(1438, **order, seed=0, epoch=epoch)
        keys = image_keys(samples, seed=0, epoch=epoch, repeats=repeats)
        assert len(np.unique(samples)) == PER_EPOCH * BATCH
        expected += [(update, int(key)) for key in keys[done * BATCH : (done + 1) * BATCH]]
    assert seen == sorted(expected)


def test_precision_changes_on_the_way(
    common: list[str], output: Path, parity: Callable[[int], Path], tmp_path: Path
) -> None:
    precisions = ("fp32", "bf16", "autocast", "fp32")
    runs = [
        ([*common, EPS, *zero(2, precision), "name=mixed", f"train.max_updates={updates}"], resume)
        for precision, updates, resume in zip(
            precisions, (8, 16, 23, UPDATES), ("never", "auto", "auto", "auto"), strict=True
        )
    ]
    Ranks(tmp_path, 2, runs).succeed()
    torch.testing.assert_close(
        losses(output / "mixed"), losses(parity(2) / "2-1-2"), rtol=0, atol=0.02
    )


@pytest.fixture(scope="module")
def undisturbed(common: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs left alone, two ranks, that interrupted ones are compared with; made when asked for."""
    logs, made = tmp_path_factory.mktemp("undisturbed"), {}

    def make(stage: int, precision: str) -> Path:
        name = f"whole-{stage}-{precision}"
        if name not in made:
            Ranks(
                logs, 2, [([*common, *zero(stage, precision), f"name={name}"], "never")]
            ).succeed()
            made[name] = Path(common[0].removeprefix("output=")) / name
        return made[name]

    return make


@pytest.mark.parametrize(("stage", "precision"), CASES if KILLS else [(1, "bf16"), slow(3, "fp32")])
def test_killed_again_and_again(
    stage: int, precision: str, common: list[str], output: Path, undisturbed: Any, tmp_path: Path
) -> None:
    whole = undisturbed(stage, precision)
    run = [*common, *zero(stage, precision), f"name=killed-{stage}-{precision}"]
    run.append("train.save_every=1")  # a good part of the time goes into saving
    last = output / f"killed-{stage}-{precision}/checkpoints/update-{UPDATES:08d}"
    moments = random.Random(f"{stage} {precision}")
    kills = 0
    while kills < (KILLS or 4) and not last.exists():
        ranks = Ranks(tmp_path, 2, [(run, "auto")], slow_steps)
        if moments.random() < 0.6:
            ranks.wait_for("ranks on CPU, attention op")  # it begins to train
            time.sleep(moments.uniform(0, 1))
        else:
            time.sleep(moments.uniform(0, 4))
        ranks.kill()
        kills += 1
    assert kills > (KILLS or 4) // 2
    Ranks(tmp_path, 2, [(run, "auto")]).succeed()
    same_bits(whole, output / f"killed-{stage}-{precision}")


@pytest.mark.parametrize("number", [signal.SIGTERM, slow(signal.SIGUSR1), slow(signal.SIGINT)])
def test_a_signal_saves_and_ends(
    number: int, common: list[str], output: Path, undisturbed: Any, tmp_path: Path
) -> None:
    whole = undisturbed(1, "bf16")
    name = signal.Signals(number).name
    run = [*common, *zero(1, "bf16"), f"name={name}", "train.log_every=4"]
    ranks = Ranks(tmp_path, 2, [(run, "never")], slow_steps)
    ranks.wait_for(", loss ")  # it trains
    ranks.signal(number, [1])  # to one rank: all must agree
    assert ranks.wait() == [75, 75], ranks.output()
    text = ranks.output()
    assert f"stopped by {name} after update" in text or "a signal to another rank" in text
    Ranks(tmp_path, 2, [(run, "auto")]).succeed()
    for kind in FILES:
        expected, got = tensors(whole, kind), tensors(output / name, kind)
        assert all(torch.equal(expected[key], got[key]) for key in expected)
    assert rows(output / name, "eval") == rows(whole, "eval")
    means = [row["loss"] for row in rows(output / name, "train")]
    found = losses(whole).tolist()
    ends = sorted({*range(4, UPDATES + 1, 4), PER_EPOCH, 2 * PER_EPOCH, UPDATES})
    expected_means = [np.mean(found[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    np.testing.assert_allclose(means, expected_means, rtol=1e-12)


def linger() -> None:
    """Evaluations take their time."""
    from irpe_ds.training import trainer

    evaluate = trainer.evaluate

    def slow(model: Any, batches: Any, *arguments: Any) -> Any:
        def slowly() -> Any:
            for batch in batches:
                print("evaluating", flush=True)
                time.sleep(0.5)
                yield batch

        return evaluate(model, slowly(), *arguments)

    trainer.evaluate = slow


def test_a_signal_during_the_last_evaluation(
    common: list[str], output: Path, undisturbed: Any, tmp_path: Path
) -> None:
    """It is made up for, and counts."""
    whole = undisturbed(1, "bf16")
    run = [*common, *zero(1, "bf16"), "name=late"]
    Ranks(tmp_path, 2, [([*run, "train.max_updates=28"], "never")]).succeed()
    ranks = Ranks(tmp_path, 2, [(run, "auto")], linger)
    ranks.wait_for("evaluating")
    ranks.signal(signal.SIGTERM)
    assert ranks.wait() == [75, 75], ranks.output()
    checkpoint = output / f"late/checkpoints/update-{UPDATES:08d}/checkpoint.json"
    assert json.loads(checkpoint.read_text())["scores"] == {}
    Ranks(tmp_path, 2, [(run, "auto")]).succeed()
    assert rows(output / "late", "eval")[-1] == rows(whole, "eval")[-1]
    assert [row["update"] for row in rows(output / "late", "eval")] == [14, 28, 30]
    assert json.loads(checkpoint.read_text())["scores"]


def test_two_runs_do_not_share_a_folder(common: list[str], tmp_path: Path) -> None:
    run = [*common, *zero(0), "name=shared"]
    first = Ranks(tmp_path, 1, [(run, "never")], hang)
    first.wait_for("hanging")
    second = Ranks(tmp_path, 2, [(run, "auto")])
    assert second.wait(600) == [2, 2]
    assert "run folder is locked by another running process" in second.output()
    first.kill()


def test_a_signal_to_every_process_finds_no_worker_dead(
    common: list[str], output: Path, tmp_path: Path
) -> None:
    """As launchers send it, who end whole trees of processes."""
    run = [*common, *zero(0), "name=workers", "data.pipeline=timm", "train.epochs=50"]
    ranks = Ranks(tmp_path, 1, [([*run, "train.max_updates=600"], "never")], slow_steps)
    ranks.wait_for(", loss ")  # it trains
    rank = psutil.Process(ranks.processes[0].pid)
    workers = rank.children()
    assert workers
    for process in (*workers, rank):
        process.send_signal(signal.SIGTERM)
    assert ranks.wait() == [75], ranks.output()
    (saved,) = (output / "workers/checkpoints").iterdir()
    assert int(saved.name[-8:]) > 0


def slow_steps() -> None:
    """A quarter of a second more for every update."""
    from irpe_ds.training.trainer import Trainer

    update = Trainer.train_update

    def slow(self: Any, *arguments: Any) -> None:
        time.sleep(0.25)
        update(self, *arguments)

    Trainer.train_update = slow  # type: ignore[method-assign]


def lose_the_terminal() -> None:
    """Nobody reads what the ranks write after their third update."""
    from irpe_ds.training.trainer import Trainer

    slow_steps()
    update = Trainer.train_update

    def lonely(self: Any, *arguments: Any) -> None:
        if self.update == 3:
            reads, writes = os.pipe()
            os.close(reads)
            os.dup2(writes, 1)
            os.dup2(writes, 2)
        update(self, *arguments)

    Trainer.train_update = lonely  # type: ignore[method-assign]


def test_a_signal_saves_when_the_launcher_has_gone(
    common: list[str], output: Path, tmp_path: Path
) -> None:
    """As under pdsh, which a signal ends before the ranks."""
    run = [*common, *zero(1), "name=lonely"]
    ranks = Ranks(tmp_path, 2, [(run, "never")], lose_the_terminal)
    end = time.monotonic() + 600
    while (
        not (output / "lonely/metrics.jsonl").exists() or len(rows(output / "lonely", "train")) < 5
    ):
        assert time.monotonic() < end, ranks.output()
        time.sleep(0.1)
    ranks.signal(signal.SIGTERM)
    assert ranks.wait() == [75, 75], ranks.output()
    (saved,) = (output / "lonely/checkpoints").iterdir()
    assert int(saved.name[-8:]) >= 5


def test_ctrl_c_after_another_signal_ends_at_once(common: list[str], tmp_path: Path) -> None:
    run = [*common, *zero(0), "name=impatient"]
    ranks = Ranks(tmp_path, 2, [(run, "never")], hang)
    ranks.wait_for("hanging")
    ranks.signal(signal.SIGTERM)
    time.sleep(2.5)
    ranks.signal(signal.SIGTERM)
    time.sleep(0.5)
    assert ranks.wait(0) == [None, None]
    ranks.signal(signal.SIGINT)
    assert ranks.wait(600) == [128 + signal.SIGINT] * 2


def hang() -> None:
    """The first update never ends."""
    from irpe_ds.training.trainer import Trainer

    def update(self: Any, *_: Any) -> None:
        print("hanging", flush=True)
        time.sleep(3600)

    Trainer.train_update = update  # type: ignore[method-assign]


def test_the_others_end_with_a_rank_that_dies(common: list[str], tmp_path: Path) -> None:
    run = [*common, *zero(1, "bf16"), "name=dead"]
    ranks = Ranks(tmp_path, 2, [(run, "never")], slow_steps)
    ranks.wait_for(", loss ")  # it trains
    ranks.signal(signal.SIGKILL, [1])
    code, killed = ranks.wait(600)
    assert killed == -signal.SIGKILL
    assert code not in (0, 75, None), ranks.output()


def be_impatient() -> None:
    """Fifteen seconds of silence are too many."""
    from irpe_ds.cluster import heartbeat

    heartbeat.SILENCE_SECONDS = 15.0
    slow_steps()


@pytest.mark.parametrize("silent", [0, 1])
def test_a_rank_that_falls_silent_is_named(silent: int, common: list[str], tmp_path: Path) -> None:
    """As when a host hangs: its connections stay open."""
    run = [*common, *zero(1), f"name=silent-{silent}", "train.epochs=50", "train.max_updates=600"]
    ranks = Ranks(tmp_path, 3, [(run, "never")], be_impatient)
    ranks.wait_for(", loss ")  # it trains
    ranks.signal(signal.SIGSTOP, [silent])
    others = [rank for rank in range(3) if rank != silent]
    end = time.monotonic() + 600
    while any(ranks.processes[rank].is_alive() for rank in others):
        assert time.monotonic() < end
        time.sleep(0.1)
    ranks.kill()
    assert [ranks.processes[rank].exitcode for rank in others] == [1, 1]
    said = f"error: rank {silent} on {socket.gethostname()} has not answered for 15 s"
    assert ranks.output().count(said) == 2


def fail() -> None:
    """The second rank breaks in the fifth update."""
    from irpe_ds.training.trainer import Trainer

    step = Trainer.step

    def broken(self: Any, batch: Any, micro_step: int) -> Any:
        if (self.update, self.ranks.rank) == (4, 1):
            raise RuntimeError("broken on purpose")
        return step(self, batch, micro_step)

    Trainer.step = broken  # type: ignore[method-assign]


def test_an_error_of_one_rank_is_shown_and_ends_all(common: list[str], tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2, [([*common, *zero(2), "name=broken"], "never")], fail)
    codes = ranks.wait(600)
    assert None not in codes
    assert 0 not in codes
    assert "RuntimeError: broken on purpose" in ranks.output()


def be_of_another_version() -> None:
    """The second rank has another timm."""
    from irpe_ds.cluster import consistency

    versions = consistency.package_versions

    def package_versions() -> dict[str, str]:
        return versions() | ({"timm": "0.3.2"} if os.environ["RANK"] == "1" else {})

    consistency.package_versions = package_versions


def test_a_rank_with_another_version_is_named(common: list[str], tmp_path: Path) -> None:
    run = [*common, *zero(1), "name=mixed-up"]
    ranks = Ranks(tmp_path, 3, [(run, "never")], be_of_another_version)
    assert ranks.wait(600) == [2, 2, 2]
    assert ranks.output().count(f"error: rank 1 on {socket.gethostname()}: expected timm ") == 3
    assert ", got 0.3.2" in ranks.output()
    assert "Traceback" not in ranks.output()


def poison(updates: range) -> None:
    """What the second rank sees in some updates is not finite."""
    from irpe_ds.training.trainer import Trainer

    step = Trainer.step

    def poisoned(self: Any, batch: Any, micro_step: int) -> Any:
        normalize = self.normalize
        if self.update + 1 in updates and self.ranks.rank == 1:
            self.normalize = lambda images: normalize(images) * float("nan")
        try:
            return step(self, batch, micro_step)
        finally:
            self.normalize = normalize

    Trainer.step = poisoned  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), slow(0, "bf16"), slow(1, "fp32"), (3, "bf16")]
)
def test_updates_that_are_not_finite_are_left_out(
    stage: int, precision: str, common: list[str], output: Path, tmp_path: Path
) -> None:
    name = f"skips-{stage}-{precision}"
    run = [*common, *zero(stage, precision), f"name={name}", "train.max_skips=3"]
    Ranks(tmp_path, 2, [(run, "never")], partial(poison, range(3, 6))).succeed()
    lines = (output / name / "skipped.jsonl").read_text().splitlines()
    skipped = {row["update"]: row["samples"] for row in map(json.loads, lines)}
    permutation = np.random.default_rng([0, 0]).permutation(1438)
    assert skipped == {u: permutation[(u - 1) * BATCH : u * BATCH].tolist() for u in (3, 4, 5)}
    for kind in FILES:
        assert all(tensor.isfinite().all() for tensor in tensors(output / name, kind).values())
    assert torch.isfinite(losses(output / name)).all()
    manifest = output / name / f"checkpoints/update-{UPDATES:08d}/checkpoint.json"
    assert json.loads(manifest.read_text())["steps"] == UPDATES - 3


def test_too_many_of_them_end_the_run(common: list[str], output: Path, tmp_path: Path) -> None:
    run = [*common, *zero(1, "bf16"), "name=hopeless", "train.max_skips=4"]
    ranks = Ranks(tmp_path, 2, [(run, "never")], partial(poison, range(18, 100)))
    assert ranks.wait() == [1, 1]
    assert "error: 5 updates in a row, up to 22, had gradients" in ranks.output()
    assert "Traceback" not in ranks.output()
    assert len((output / "hopeless/skipped.jsonl").read_text().splitlines()) == 5
    (checkpoint,) = (output / "hopeless/checkpoints").iterdir()
    assert checkpoint.name == f"update-{PER_EPOCH:08d}"


def test_an_overflow_in_fp16_is_the_loss_scales(
    common: list[str], output: Path, tmp_path: Path
) -> None:
    run = [*common, *zero(1, "fp16"), "name=fp16"]
    Ranks(tmp_path, 2, [(run, "never")], partial(poison, range(3, 6))).succeed()
    assert not (output / "fp16/skipped.jsonl").exists()
    scales = [row["loss_scale"] for row in rows(output / "fp16", "train")]
    assert scales[1] / scales[5] == 4  # hysteresis lets the first pass
    assert torch.isfinite(losses(output / "fp16")).all()
