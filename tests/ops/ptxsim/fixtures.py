"""pytest fixtures: the simulator, built once for all workers of a test run."""

import os
from collections.abc import Iterator

import pytest

from tests.ops.ptxsim.simulator import Simulator, build


@pytest.fixture(scope="session")
def ptx_simulator(tmp_path_factory: pytest.TempPathFactory) -> Simulator:
    """Kernels run on the CPU tensors made within its `watch()`."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # one worker builds for all, the others wait
        folder = folder.parent
    return build(folder / "ptxsim")


@pytest.fixture
def simulator(ptx_simulator: Simulator) -> Iterator[Simulator]:
    """Nothing found yet; the test's tensors are global memory."""
    ptx_simulator.clear()
    with ptx_simulator.watch():
        yield ptx_simulator
