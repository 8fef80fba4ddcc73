"""pytest fixture: where impl="fused" runs, on a simulated GPU and on a real one."""

from collections.abc import Iterator

import pytest

from tests.ops.fused_problems import SimulatedDevice, simulated
from tests.ops.ptxsim import Simulator

pytest_plugins = ["tests.ops.ptxsim.fixtures"]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The type of the tensors' device."""
    if request.param == "cuda":
        yield "cuda"
        return
    simulator: Simulator = request.getfixturevalue("simulator")
    with simulated(SimulatedDevice(simulator.driver)):
        yield "cpu"
    assert not simulator.findings()
