"""Run logs to write and to read in tests."""

from pathlib import Path
from typing import Any

from irpe_ds.config_sections import WandbConfig
from irpe_ds.runlog import RunLog, read_rows

DISABLED = WandbConfig().model_dump()
OFFLINE = WandbConfig(mode="offline", tags=("test",)).model_dump()


def open_log(folder: Path, **options: Any) -> RunLog:
    return RunLog(folder, **{"name": "run", "config": {"seed": 0}, "wandb": DISABLED, **options})


def updates(folder: Path, kind: str) -> list[int]:
    return [row["update"] for row in read_rows(folder / "metrics.jsonl") if row["kind"] == kind]


def write_updates(folder: Path, last: int) -> None:
    """Training rows of updates 1 to last, evaluation rows of the even ones."""
    with open_log(folder) as log:
        for update in range(1, last + 1):
            log.log("train", update, {"loss": 1 / update})
            if update % 2 == 0:
                log.log("eval", update, {"top1": 10.0 * update})
