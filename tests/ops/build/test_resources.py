"""Registers and spills of the CUDA kernels, as their compilers tell them."""

from typing import Any

import pytest

from irpe_ds.ops.bench import resources


def slow(*case: Any) -> Any:
    """A case that `make test-slow` runs."""
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
def test_gather_and_bucket_sum_stay_in_registers(architecture: str) -> None:
    kernels = {kernel.name: kernel for kernel in resources.kernel_resources(architecture)}
    assert len(kernels) == 16
    assert kernels.keys() >= {"gather<double, false>", "bucket_sum<bfloat16, true>"}
    for kernel in kernels.values():
        assert (kernel.stack, kernel.spills) == (0, 0), kernel


@pytest.mark.parametrize(
    ("architecture", "name", "model", "stack", "spills"),
    [
        ("sm_80", "forward", resources.DEIT_K, 0, 0),
        ("sm_90", "forward", resources.DEIT_K, 0, 0),
        slow("sm_90", "forward", resources.DEIT_384_K, 0, 0),
        slow("sm_80", "forward", resources.DEIT_QKV, 0, 0),
        slow("sm_90", "forward", resources.DEIT_QKV, 0, 0),
        slow("sm_80", "backward_queries", resources.DEIT_K, 0, 0),
        slow("sm_90", "backward_queries", resources.DEIT_K, 0, 0),
        slow("sm_80", "backward_queries", resources.DEIT_384_K, 32, 72),
        slow("sm_90", "backward_queries", resources.DEIT_384_K, 0, 0),
        slow("sm_80", "backward_queries", resources.DEIT_QKV, 0, 0),
        slow("sm_90", "backward_queries", resources.DEIT_QKV, 0, 0),
        slow("sm_80", "backward_keys", resources.DEIT_K, 0, 0),
        slow("sm_90", "backward_keys", resources.DEIT_K, 0, 0),
        slow("sm_80", "backward_keys", resources.DEIT_384_K, 0, 0),
        slow("sm_90", "backward_keys", resources.DEIT_384_K, 40, 152),  # 11 warps
        slow("sm_80", "backward_keys", resources.DEIT_QKV, 0, 0),
        slow("sm_90", "backward_keys", resources.DEIT_QKV, 0, 0),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_the_fused_kernels_spill_little(
    architecture: str, name: str, model: resources.Model, stack: int, spills: int
) -> None:
    """At most `spills` bytes stored and loaded, in the order of the code, by each thread."""
    kernel, plan, shared_bytes = resources.fused_resources(name, model, architecture)
    assert kernel.stack <= stack, kernel
    assert kernel.spills <= spills, kernel
    assert plan.warps * 32 * kernel.registers <= 65536  # what a multiprocessor has
    assert 0 < shared_bytes <= resources.SHARED_BYTES[architecture]
