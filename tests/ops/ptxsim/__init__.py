"""CUDA kernels without a GPU: an interpreter of PTX behind the CUDA driver API (README.md)."""

from tests.ops.ptxsim.simulator import LIMITS, LineCount, Simulator, build

__all__ = ["LIMITS", "LineCount", "Simulator", "build"]
