"""Train several runs one after the other in the same processes, to start them only once.

deepspeed tests/launch/train_several.py RUNS.json: a list of [overrides, resume], of the quickstart
or of the YAML that comes third. With IRPE_TEST_SIMULATOR, the folder of a built PTX simulator,
model.impl=fused runs on the CPU.
"""

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # this tree's irpe_ds and tests

from irpe_ds.cli import run
from irpe_ds.config import load_config
from irpe_ds.training.run import train


def main() -> None:
    with ExitStack() as gpu:
        if "IRPE_TEST_SIMULATOR" in os.environ:
            from tests.ops.fused_problems import SimulatedDevice, simulated
            from tests.ops.ptxsim.simulator import build

            simulator = build(Path(os.environ["IRPE_TEST_SIMULATOR"]))
            gpu.enter_context(simulator.watch())
            gpu.enter_context(simulated(SimulatedDevice(simulator.driver)))
        for overrides, resume, *yaml in json.loads(Path(sys.argv[-1]).read_text()):
            (path,) = yaml or ("launch/configs/quickstart.yaml",)
            train(load_config(path, overrides), resume)


if __name__ == "__main__":
    run(main)
