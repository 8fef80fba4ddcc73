"""A run as a job of SLURM: preempted, cancelled, failed, and one of an array."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from irpe_ds.errors import ExitCode
from tests.launch.hosts import python_environment
from tests.launch.ranks import CONFIG, Ranks, rows
from tests.launch.slurm import Slurm, missing

REASON = missing()
with_slurm = pytest.mark.skipif(REASON is not None, reason=REASON or "")
pytestmark = pytest.mark.dist

SCRIPT = Path(__file__).parents[2] / "launch/slurm/train.sbatch"
UPDATES = 160
Job = Callable[..., tuple[int, dict[str, list[str]]]]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Run the script around a rank that does something: its exit code, and what it called."""
    does = {
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\n"$@"',
        "python": "eval $RANK_DOES",
        "squeue": "echo $STATE",
        "scontrol": "",
    }
    for name, body in does.items():
        tool = tmp_path / name
        tool.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/{name}.got\n{body}\n')
        tool.chmod(0o755)

    def job(
        rank_does: str, *arguments: str, state: str = "RUNNING", element: str | None = None
    ) -> tuple[int, dict[str, list[str]]]:
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "3"}
        environment |= {"SLURM_JOB_ID": "7", "RANK_DOES": rank_does, "STATE": state}
        if element is not None:
            environment |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": element}
        done = subprocess.run(["bash", SCRIPT, *arguments], env=environment, cwd=tmp_path)
        calls = {got.stem: got.read_text().splitlines() for got in tmp_path.glob("*.got")}
        return done.returncode, calls

    return job


@pytest.mark.parametrize("rank_does", ["exit 75", "kill -TERM $$", "kill -USR1 $$"])
def test_a_run_that_was_asked_to_stop_is_requeued(rank_does: str, job: Job) -> None:
    code, calls = job(rank_does, "--config", "x.yaml", "output=a folder")
    assert code == 75
    options = ["--resume", "auto", "--config", "x.yaml", "output=a folder"]
    assert calls["python"] == ["-u", "-m", "irpe_ds", "train", *options]
    assert calls["scontrol"] == ["requeue", "7"]


@pytest.mark.parametrize(
    ("rank_does", "state", "expected"),
    [
        ("exit 0", "RUNNING", 0),
        ("exit 2", "RUNNING", 2),
        ("kill -KILL $$", "RUNNING", 137),
        ("exit 75", "COMPLETING", 75),
    ],
)
def test_no_other_is(rank_does: str, state: str, expected: int, job: Job) -> None:
    code, calls = job(rank_does, state=state)
    assert code == expected
    assert "scontrol" not in calls


@pytest.mark.parametrize("code", sorted({*ExitCode, 74, 76, 130, 137, 255}))
def test_exactly_the_exit_code_requeue_requeues(code: int, job: Job) -> None:
    ended, calls = job(f"exit {int(code)}")
    assert ended == code
    assert ("scontrol" in calls) == (code == ExitCode.REQUEUE)


def test_an_element_of_an_array_is_a_run_of_its_own(job: Job) -> None:
    code, calls = job("exit 75", "name=x-%a", "seed=%a", element="12")
    assert code == 75
    assert calls["python"][-2:] == ["name=x-12", "seed=12"]
    assert calls["squeue"][1] == "--jobs=7_12"
    assert calls["scontrol"] == ["requeue", "7_12"]


def test_an_array_of_one_name_is_refused(job: Job) -> None:
    code, calls = job("exit 0", "name=x", element="0")
    assert (code, calls) == (ExitCode.MISTAKE, {})


def test_outside_an_array_nothing_is_replaced(job: Job) -> None:
    _, calls = job("exit 0", "name=x-%a")
    assert calls["python"][-1] == "name=x-%a"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with Slurm(tmp_path_factory.mktemp("slurm"), python_environment()) as slurm:
        yield slurm


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def common(digits: Path, output: Path) -> list[str]:
    return [
        *(f"output={output}", f"data.train={digits}/train.beton", f"data.val={digits}/val.beton"),
        *("train.epochs=20", "train.global_batch=96", "train.log_every=1", "train.precision=fp32"),
        *(f"train.max_updates={UPDATES}", "train.save_every=5", "model.options.depth=2"),
        *("optim.warmup_epochs=1", "data.workers=1"),
    ]


@pytest.fixture(scope="module")
def alone(common: list[str], output: Path) -> Path:
    """The folder of a run of two ranks that nothing happens to."""
    Ranks(output, 2, [([*common, "name=alone"], "never")]).succeed()
    return output / "alone"


def submit(slurm: Slurm, common: list[str], name: str, *options: str) -> str:
    """Train a run of this name with a rank on each node, or as the options say."""
    log = f"--output={slurm.folder}/%A_%a.log"
    place = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0")
    overrides = [*common, f"name={name}"]
    command = [*place, log, *options, SCRIPT, "--config", CONFIG, *overrides]
    return slurm.call("sbatch", "--parsable", *command)


def wait_for_checkpoint(slurm: Slurm, job: str, folder: Path) -> None:
    end = time.monotonic() + 600
    while not any(folder.glob("checkpoints/update-*")):
        assert time.monotonic() < end, slurm.log(job)
        time.sleep(0.1)


def assert_same_rows(folder: Path, alone: Path) -> None:
    for kind in ("train", "eval"):
        assert rows(folder, kind) == rows(alone, kind)


@with_slurm
@pytest.mark.slow
def test_the_element_that_is_signalled_goes_on_alone(
    slurm: Slurm, common: list[str], output: Path, alone: Path
) -> None:
    array = submit(slurm, common, "element-%a", "--array=0-1")
    wait_for_checkpoint(slurm, f"{array}_1", output / "element-1")
    slurm.call("scancel", "--signal=USR1", f"{array}_1")
    for number in range(2):
        job = slurm.wait_for(f"{array}_{number}", "COMPLETED")
        assert job["Restarts"] == str(number)
        assert_same_rows(output / f"element-{number}", alone)
    log = slurm.log(f"{array}_1")
    assert "resuming from" in log


@with_slurm
@pytest.mark.slow
def test_a_job_that_is_preempted_goes_on(
    slurm: Slurm, common: list[str], output: Path, alone: Path
) -> None:
    one_node = ("--nodes=1", "--ntasks-per-node=2")
    job = submit(slurm, common, "preempted", *one_node)
    wait_for_checkpoint(slurm, job, output / "preempted")
    urgent = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null")
    slurm.call("sbatch", *urgent, "--wrap=true")
    assert slurm.wait_for(job, "COMPLETED")["Restarts"] == "1"
    assert_same_rows(output / "preempted", alone)


@with_slurm
@pytest.mark.slow
def test_a_job_that_is_cancelled_has_saved_and_ends(
    slurm: Slurm, common: list[str], output: Path
) -> None:
    job = submit(slurm, common, "cancelled")
    wait_for_checkpoint(slurm, job, output / "cancelled")
    slurm.call("scancel", job)
    assert slurm.wait_for(job, "CANCELLED")["Restarts"] == "0"
    assert "stopped by SIGTERM" in slurm.log(job)


@with_slurm
@pytest.mark.slow
def test_a_mistake_fails_the_job(slurm: Slurm, common: list[str]) -> None:
    job = slurm.wait_for(submit(slurm, [*common, "train.epoch=3"], "mistaken"), "FAILED")
    assert (job["ExitCode"], job["Restarts"]) == ("2:0", "0")
