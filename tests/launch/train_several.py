"""Train several runs one after the other in the same processes, to start them only once.

deepspeed tests/launch/train_several.py RUNS.json: a list of [overrides, resume], of the quickstart
or of the YAML that comes third. With IRPE_TEST_KERNELS, a library of tests/ops/kernels/host.py,
model.impl=fused runs on the CPU.
"""

import json
import os
import sys
from pathlib import Path

import torch

from irpe_ds.cli import run
from irpe_ds.config import load_config
from irpe_ds.ops import dispatch
from irpe_ds.ops.build import library
from irpe_ds.training.run import train


def main() -> None:
    kernels = os.environ.get("IRPE_TEST_KERNELS")
    if kernels:
        library.load()
        torch.ops.load_library(kernels)
        row = dispatch.IMPLEMENTATIONS["fused"]
        dispatch.IMPLEMENTATIONS["fused"] = row._replace(devices=("cpu",))
    for overrides, resume, *yaml in json.loads(Path(sys.argv[-1]).read_text()):
        (path,) = yaml or ("launch/configs/quickstart.yaml",)
        train(load_config(path, overrides), resume)


if __name__ == "__main__":
    run(main)
