"""An ablation: the same training with and without a part, by several seeds.

Its YAML is that of a run, mostly a `base:` and a name, with a section `ablation`.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from threading import Lock
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from irpe_ds.config import RunConfig, Section, validate
from irpe_ds.config_file import apply, read_values
from irpe_ds.config_types import Natural
from irpe_ds.environment import read_environment
from irpe_ds.errors import ConfigError, UserError
from irpe_ds.files import open_own, replace_file
from irpe_ds.provenance import cpu_name
from irpe_ds.runlog import METRICS, read_rows

SECTION = "ablation"
SLUG = r"^\w[\w.-]*$"


class Ablation(Section):
    """The section `ablation`: what to compare."""

    variants: Annotated[
        dict[Annotated[str, Field(pattern=SLUG)], dict[str, Any]], Field(min_length=2)
    ]
    """By name, the keys in which a variant differs; others are compared with the first."""
    seeds: Annotated[tuple[Natural, ...], Field(min_length=2)] = (0, 1, 2, 3, 4)
    """Every variant is trained with each."""


class Trial(NamedTuple):
    """One training."""

    variant: str
    seed: int
    config: RunConfig


def load_ablation(path: Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, list[Trial]]:
    """What the trainings share, and the trainings: of every variant the first seed, and so on.

    Raises:
        ConfigError: a mistake in the file, or in the configuration of a variant.
    """
    values = read_values(path, overrides)
    if not isinstance(values.get(SECTION), dict):
        raise ConfigError(path, f"a section {SECTION} with variants", values.get(SECTION))
    ablation = validate(Ablation, values.pop(SECTION), SECTION)
    common = validate(RunConfig, values)
    return common, [
        Trial(name, seed, _config(common, name, changes, seed))
        for seed in ablation.seeds
        for name, changes in ablation.variants.items()
    ]


def _config(common: RunConfig, name: str, changes: Mapping[str, Any], seed: int) -> RunConfig:
    values = common.model_dump(mode="json")
    for key, value in changes.items():
        apply(values, key, value)
    own = {"name": f"{name}-{seed}", "output": str(common.folder), "seed": seed}
    return validate(RunConfig, values | own)


def run_ablation(
    common: RunConfig,
    trials: Sequence[Trial],
    command: Sequence[str],
    jobs: int = 1,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train what is not trained yet; the results so far are in results.json after each training.

    Args:
        command: what trains one run on one rank, without its --config.
        jobs: how many run at a time; with GPUs each takes the next one.

    Raises:
        UserError: a training failed; the others that were running have ended.
    """
    common.folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    writing = Lock()

    def finish(trial: Trial, number: int) -> None:
        place = f"[{number + 1}/{len(trials)}] {trial.config.name}"
        seconds = 0.0
        if not is_finished(trial.config):
            started = time.monotonic()
            train(trial.config, command, number % jobs, jobs)
            seconds = time.monotonic() - started
        row = result_of(trial)
        with writing:  # the file's temporary name is always the same
            rows[trial.config.name] = row
            say(f"{place}: top-1 {row['top1']:.2f} %" + (f", {seconds:.0f} s" if seconds else ""))
            write_results(common, trials, rows)

    with ThreadPoolExecutor(jobs) as pool:
        ended = [pool.submit(partial(finish, trial, n)) for n, trial in enumerate(trials)]
        try:
            for future in ended:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return write_results(common, trials, rows)


def is_finished(config: RunConfig) -> bool:
    """Whether a run has been evaluated after its last epoch."""
    if not (config.folder / METRICS).exists():
        return False
    scores = [row for row in read_rows(config.folder / METRICS) if row["kind"] == "eval"]
    return bool(scores) and scores[-1].get("epoch") == config.train.epochs


def train(config: RunConfig, command: Sequence[str], job: int, jobs: int) -> None:
    """Train one run to its end, from its newest checkpoint if it has any.

    Job `job` of `jobs` at a time has its share of the cores, and one GPU where there are some.
    """
    config.output.mkdir(parents=True, exist_ok=True)
    file, log = (config.output / f"{config.name}.{suffix}" for suffix in ("yaml", "log"))
    replace_file(file, config.dump())
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", str(job)).split(",")
    environment = {
        **{"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // jobs))},
        **os.environ,
        **{"CUDA_VISIBLE_DEVICES": gpus[job % len(gpus)]},
    }
    with open_own(log, "w") as output:
        code = subprocess.run(
            [*command, "--config", str(file), "--resume", "auto"],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
        ).returncode
    if code:
        raise UserError(f"{config.name}: the training ended with exit code {code}; see {log}")


def result_of(trial: Trial) -> dict[str, Any]:
    """What a finished training reached, after its last epoch."""
    folder = trial.config.folder
    score = [row for row in read_rows(folder / METRICS) if row["kind"] == "eval"][-1]
    environment = read_environment(folder)
    return {
        "variant": trial.variant,
        "seed": trial.seed,
        "top1": score["top1"],
        "loss": score["loss"],
        "images": score["images"],
        "commit": environment.commit,
        "device": environment.device,
        "torch": environment.packages.get("torch"),
    }


def write_results(
    common: RunConfig, trials: Sequence[Trial], rows: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """Write results.json: of the trainings that have ended, in the order of the trials."""
    results = {
        "name": common.name,
        "config": common.model_dump(mode="json", exclude={"name", "output", "log", "seed"}),
        "cpu": cpu_name(),
        "rows": [rows[t.config.name] for t in trials if t.config.name in rows],
    }
    replace_file(common.folder / "results.json", json.dumps(results, indent=1) + "\n")
    return results


class Summary(NamedTuple):
    """A variant over its seeds; accuracies in % of images."""

    variant: str
    top1: dict[int, float]
    """By seed."""
    gains: tuple[float, ...]
    """Over the first variant, by seed."""

    def __str__(self) -> str:
        text = f"{self.variant:20} {_spread([*self.top1.values()])} %, n = {len(self.top1)}"
        return text + (f", {_spread(self.gains, '+')} points" if any(self.gains) else "")


def _spread(values: Sequence[float], sign: str = "") -> str:
    deviation = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{fmean(values):{sign}.2f}{deviation}"


def summarise(results: Mapping[str, Any]) -> list[Summary]:
    """The variants in the order of the results."""
    scores: dict[str, dict[int, float]] = {}
    for row in results["rows"]:
        scores.setdefault(row["variant"], {})[row["seed"]] = row["top1"]
    first = next(iter(scores.values()), {})
    return [
        Summary(name, own, tuple(own[s] - first[s] for s in own if s in first))
        for name, own in scores.items()
    ]
