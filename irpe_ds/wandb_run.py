"""The run at Weights & Biases: its id, also as a trial of a sweep, and what it is sent."""

import os
import re
import secrets
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from irpe_ds.errors import ConfigError, ExitCode
from irpe_ds.files import read_regular, replace_file

if TYPE_CHECKING:
    from numpy import ndarray

ID_FILE = "wandb_id.txt"
ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
TITLE = 63
"""Characters of an alert's title that W&B takes."""
BEST = {"top1": "max", "top5": "max", "loss": "min"}
"""Which value of an evaluation's metrics, and of their `ema_`, W&B's summary keeps."""


def trial_name(name: str) -> str:
    """The name of a run; in a sweep it ends with W&B's id, or trials would share a run folder.

    Raises:
        ConfigError: WANDB_RUN_ID is not an id.
    """
    run_id = os.environ.get("WANDB_RUN_ID", "")
    if not os.environ.get("WANDB_SWEEP_ID") or not run_id or run_id in name:
        return name
    return f"{name}-{_checked('WANDB_RUN_ID', run_id)}"


def run_id(folder: Path, resumed: bool) -> str:
    """The id of a run folder's W&B run: WANDB_RUN_ID, as in a sweep, or the one that it keeps.

    Raises:
        ConfigError: it is not an id.
        OSError: the folder's file cannot be read or written.
    """
    file, where = folder / ID_FILE, "WANDB_RUN_ID"
    found = os.environ.get(where, "")
    if not found and resumed and file.exists():
        found, where = read_regular(file, 1000).decode(errors="replace").strip(), str(file)
    found = _checked(where, found) if found else secrets.token_hex(4)
    replace_file(file, found + "\n")
    return found


def _checked(where: str, text: str) -> str:
    if not ID.fullmatch(text):
        raise ConfigError(where, "the id of a W&B run: letters, digits, - and _", repr(text))
    return text


class WandbSink:
    """One W&B run, with metrics `{kind}/{name}` over `update`.

    W&B cannot remove points: after a resume it shows those of repeated updates twice.

    Args:
        say: is told how to send an offline run to W&B, and which checkpoint was not sent.
        finish_seconds: for the last upload.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        config: Mapping[str, Any],
        resumed: bool,
        say: Callable[[str], None],
        finish_seconds: float,
        *,
        mode: Literal["online", "offline"],
        project: str,
        entity: str | None,
        tags: Sequence[str],
        group: str | None = None,
        job_type: str | None = None,
        notes: str | None = None,
        artifacts: str = "none",
    ) -> None:
        import wandb

        if mode == "online" and not wandb.login(prompt=False):
            raise RuntimeError("no API key; run `wandb login` or set log.wandb.mode=offline")
        self._say, self._id, self._name = say, run_id(folder, resumed), name
        self._run = wandb.init(
            id=self._id,
            resume="allow",
            reinit="create_new",  # a run that the caller may have open is left alone
            name=name,
            config=dict(config),
            allow_val_change=True,
            dir=folder,
            mode=mode,
            project=project,
            entity=entity,
            tags=list(tags),
            group=group,
            job_type=job_type,
            notes=notes,
            settings=wandb.Settings(
                console="off",  # or print() would wait for W&B
                finish_timeout=finish_seconds,
                finish_timeout_raises=True,
            ),
        )
        self._run.define_metric("update")
        self._run.define_metric("*", step_metric="update")
        for key, best in BEST.items():
            for metric in (f"eval/{key}", f"eval/ema_{key}"):
                self._run.define_metric(metric, step_metric="update", summary=best)
        if mode == "offline":  # a folder for each time that the run was started
            say(f"W&B is offline: wandb sync {shlex.quote(str(folder))}/wandb/offline-run-*")

    def write(self, kind: str, update: int, values: Mapping[str, float]) -> None:
        named = {f"{kind}/{key}": value for key, value in values.items()}
        self._run.log({"update": update, **named})

    def picture(self, name: str, update: int, pixels: "ndarray") -> None:
        import wandb

        self._run.log({"update": update, name: wandb.Image(pixels)})

    def table(self, name: str, update: int, rows: Sequence[Mapping[str, object]]) -> None:
        import wandb

        data = [[*row.values()] for row in rows]
        self._run.log({"update": update, name: wandb.Table(columns=[*rows[0]], data=data)})

    def checkpoint(
        self, folder: Path, update: int, scores: Mapping[str, float], aliases: Sequence[str]
    ) -> None:
        """Send a checkpoint as a version of the artifact `checkpoint-ID`; W&B copies it first."""
        import wandb

        about = {"run": self._name, "update": update, **scores}
        artifact = wandb.Artifact(f"checkpoint-{self._id}", type="model", metadata=about)
        try:
            for file in sorted(folder.iterdir()):
                artifact.add_file(str(file), skip_cache=True)
        except (OSError, ValueError) as error:  # older ones are removed while W&B lags behind
            self._say(f"{folder} was not sent to W&B: {error}")
        else:
            self._run.log_artifact(artifact, aliases=["latest", *aliases])

    def close(self, exit_code: ExitCode, reason: str) -> None:
        if exit_code == ExitCode.REQUEUE:
            self._run.mark_preempting()
        if reason:
            stopped = exit_code == ExitCode.REQUEUE
            title = f"Stopped: {self._name}" if stopped else f"Failed: {self._name}"
            self._run.alert(title[:TITLE], reason, level="WARN" if stopped else "ERROR")
        self._run.finish(exit_code=int(exit_code))
