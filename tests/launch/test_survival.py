"""A run ends with the same model whatever happens to it on the way.

IRPE_KILLS=20 kills every stage and precision twenty times; the default is what CI has time for.
"""

import json
import os
import random
import shutil
import signal
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from irpe_ds.errors import DataError
from tests.launch.outcomes import KINDS, PER_EPOCH, UPDATES, losses, same_bits, slow, tensors, zero
from tests.launch.ranks import Ranks, rows

pytestmark = pytest.mark.dist

KILLS = int(os.environ.get("IRPE_KILLS", "0"))
CASES = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]


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


@pytest.mark.parametrize(
    ("stage", "precision", "times"),
    [(*case, KILLS) for case in CASES]
    if KILLS
    else [(1, "fp32", 2), slow(1, "bf16", 4), slow(3, "fp32", 4)],
)
def test_killed_again_and_again(
    stage: int,
    precision: str,
    times: int,
    common: list[str],
    output: Path,
    undisturbed: Any,
    tmp_path: Path,
) -> None:
    whole, name = undisturbed(stage, precision), f"killed-{stage}-{precision}-{times}"
    run = [*common, *zero(stage, precision), f"name={name}"]
    run.append("train.save_every=1")  # a good part of the time goes into saving
    last = output / f"{name}/checkpoints/update-{UPDATES:08d}"
    moments = random.Random(f"{stage} {precision} {times}")
    kills = saving = 0
    while kills < times:
        if last.exists():
            same_bits(whole, output / name)
            shutil.rmtree(output / name)
        ranks = Ranks(tmp_path, 2, [(run, "auto")], slow_saves)
        if moments.random() < 0.7:
            wait_for_saves(last.parent, moments.randint(1, 3), ranks)
            time.sleep(moments.uniform(0, 0.15))
            saving += 1
        else:
            time.sleep(moments.uniform(0, 4))
        ranks.kill()
        kills += 1
    assert times < 20 or saving >= 10
    Ranks(tmp_path, 2, [(run, "auto")]).succeed()
    same_bits(whole, output / name)


@pytest.mark.parametrize(
    ("number", "precision"),
    [
        (signal.SIGTERM, "fp32"),
        *(slow(number, "bf16") for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)),
    ],
)
def test_a_signal_saves_and_ends(
    number: int, precision: str, common: list[str], output: Path, undisturbed: Any, tmp_path: Path
) -> None:
    whole = undisturbed(1, precision)
    name = signal.Signals(number).name
    run = [*common, *zero(1, precision), f"name={name}", "train.log_every=4"]
    ranks = Ranks(tmp_path, 2, [(run, "never")], slow_steps)
    ranks.wait_for(", loss ")  # it trains
    ranks.signal(number, [1])  # to one rank: all must agree
    assert ranks.wait() == [75, 75], ranks.output()
    text = ranks.output()
    assert f"stopped by {name} after update" in text or "a signal to another rank" in text
    Ranks(tmp_path, 2, [(run, "auto")]).succeed()
    for kind in KINDS:
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


@pytest.mark.slow
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


def wait_for_saves(folder: Path, count: int, ranks: Ranks) -> None:
    """Wait until this many checkpoints are begun, or the run ends."""
    hidden = ".update-*.partial"
    before, begun = set(folder.glob(hidden)), set[Path]()
    while len(begun) < count and any(process.is_alive() for process in ranks.processes):
        begun |= set(folder.glob(hidden)) - before
        time.sleep(0.01)


def slow_saves() -> None:
    """A checkpoint is on its way most of the time."""
    from irpe_ds.checkpoint import writer

    write = writer.write_shards

    def slow(*arguments: Any) -> Any:
        time.sleep(0.1)
        written = write(*arguments)
        time.sleep(0.1)
        return written

    writer.write_shards = slow
    slow_steps()


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


@pytest.mark.parametrize("dying", [slow(0), 1])
def test_a_rank_that_dies_is_named(dying: int, common: list[str], tmp_path: Path) -> None:
    run = [*common, *zero(1), f"name=dead-{dying}"]
    ranks = Ranks(tmp_path, 2, [(run, "never")], be_impatient)
    ranks.wait_for(", loss ")  # it trains
    ranks.signal(signal.SIGKILL, [dying])
    codes = ranks.wait(600)
    assert (codes[dying], codes[1 - dying]) == (-signal.SIGKILL, 1), ranks.output()
    assert f"error: rank {dying} on {socket.gethostname()} is gone" in ranks.output()
    assert "Traceback" not in ranks.output()


def be_impatient() -> None:
    """Fifteen seconds of silence are too many."""
    from irpe_ds.cluster import heartbeat

    heartbeat.SILENCE_SECONDS = 15.0
    slow_steps()


@pytest.mark.parametrize("silent", [0, slow(1)])
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


def linger_impatiently() -> None:
    be_impatient()
    linger()


@pytest.mark.slow
def test_a_rank_that_dies_in_an_evaluation_is_named_before_the_launcher_kills(
    common: list[str], tmp_path: Path
) -> None:
    """DeepSpeed's launcher sends the others SIGTERM; ranks exchange nothing in an evaluation."""
    ranks = Ranks(tmp_path, 2, [([*common, *zero(1), "name=mourned"], "never")], linger_impatiently)
    ranks.wait_for("evaluating")
    ranks.signal(signal.SIGKILL, [1])
    ranks.signal(signal.SIGTERM, [0])
    assert ranks.wait(600) == [1, -signal.SIGKILL], ranks.output()
    assert f"error: rank 1 on {socket.gethostname()} has not answered for 7.5 s" in ranks.output()


def fail(error: Exception, where: str) -> None:
    """The second rank breaks in the fifth update, or in the first evaluation."""
    from irpe_ds.training import trainer
    from irpe_ds.training.trainer import Trainer

    be_impatient()
    step, evaluate = Trainer.step, trainer.evaluate

    def broken(self: Any, batch: Any, micro_step: int) -> Any:
        if (self.update, self.ranks.rank, where) == (4, 1, "update"):
            raise error
        return step(self, batch, micro_step)

    def unable(model: Any, batches: Any, prepare: Any, ranks: Any, *more: Any) -> Any:
        if (ranks.rank, where) == (1, "evaluation"):
            raise error
        return evaluate(model, batches, prepare, ranks, *more)

    Trainer.step, trainer.evaluate = broken, unable  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("error", "where", "said", "codes"),
    [
        (RuntimeError("broken on purpose"), "update", "RuntimeError: broken on purpose", [1, 1]),
        slow(DataError("a.beton", "images", "dust"), "evaluation", "a.beton: expected ", [2, 2]),
        slow(MemoryError(), "update", "MemoryError", [1, 1]),
    ],
)
def test_the_others_say_whose_error_it_was(
    error: Exception, where: str, said: str, codes: list[int], common: list[str], tmp_path: Path
) -> None:
    run = [*common, *zero(2), f"name=broken-{type(error).__name__}"]
    ranks = Ranks(tmp_path, 2, [(run, "never")], partial(fail, error, where))
    assert ranks.wait(600) == codes, ranks.output()
    first, second = (Path(f"{ranks.log}.{rank}").read_text() for rank in range(2))
    assert f"[rank 0] error: rank 1 on {socket.gethostname()} failed: {said}" in first
    assert "Traceback" not in first
    assert said in second
    assert "gloo" not in second


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
