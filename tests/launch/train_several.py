"""Train several runs one after the other in the same processes, to start them only once.

deepspeed tests/launch/train_several.py RUNS.json: a list of [overrides, resume].
"""

import json
import sys
from pathlib import Path

from irpe_ds.cli import run
from irpe_ds.config import load_config
from irpe_ds.training.run import train


def main() -> None:
    for overrides, resume in json.loads(Path(sys.argv[-1]).read_text()):
        train(load_config("launch/configs/quickstart.yaml", overrides), resume)


if __name__ == "__main__":
    run(main)
