"""The CUDA kernels of gather and bucket sum, launched by their own host code on the simulator."""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from irpe_ds.ops.build.toolchain import CSRC
from tests.ops.ptxsim import Simulator
from tests.ops.ptxsim.nvcc import compile_library, load

pytest_plugins = ["tests.ops.ptxsim.fixtures"]

FUNCTIONS = {  # of rpe.h
    "gather": "_ZN4irpe4cuda6gatherERKNS0_7ProblemEPv",
    "bucket_sum": "_ZN4irpe4cuda10bucket_sumERKNS0_7ProblemEPv",
}
TYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
ORDERS = ("first", "last", "random")


class Problem(ctypes.Structure):
    """irpe::cuda::Problem of rpe.h."""

    _fields_ = [
        ("type", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("B", ctypes.c_int64),
        ("H", ctypes.c_int64),
        ("tokens", ctypes.c_int32),
        ("others", ctypes.c_int32),
        ("N", ctypes.c_int32),
        ("ids", ctypes.c_void_p),
        ("lookups", ctypes.c_void_p),
        ("stride_b", ctypes.c_int64),
        ("stride_h", ctypes.c_int64),
        ("stride_t", ctypes.c_int64),
        ("pairs", ctypes.c_void_p),
    ]


@pytest.fixture(scope="session")
def library(ptx_simulator: Simulator) -> Path:
    return compile_library(ptx_simulator, CSRC / "cuda" / "rpe.cu")


@pytest.fixture(scope="session")
def kernels(library: Path) -> ctypes.CDLL:
    return load(library)


def run(
    kernels: ctypes.CDLL, name: str, lookups: Tensor, pairs: Tensor, ids: Tensor, columns: bool
) -> int:
    """The error of gather or bucket_sum of (B, H, T, N) lookups and (B, H, Q, K) pairs."""
    taken = ids if name == "gather" and not columns else ids.T.contiguous()
    b, h, tokens, n = lookups.shape
    problem = Problem(
        type=TYPES[pairs.dtype],
        columns=columns,
        B=b,
        H=h,
        tokens=tokens,
        others=ids.shape[1],
        N=n,
        ids=taken.data_ptr(),
        lookups=lookups.data_ptr(),
        stride_b=lookups.stride(0),
        stride_h=lookups.stride(1),
        stride_t=lookups.stride(2),
        pairs=pairs.data_ptr(),
    )
    return getattr(kernels, FUNCTIONS[name])(ctypes.byref(problem), None)


def same_bits_in_every_order(simulator: Simulator, out: Tensor, call: Callable[[], int]) -> Tensor:
    """`out`, of which NaN is left where call() writes nothing: that differs from itself."""
    results = []
    for order in ORDERS:
        out.fill_(float("nan"))
        with simulator.options(order=order):
            assert call() == 0, simulator.error()
        results.append(out.clone())
    assert all(torch.equal(result, results[0]) for result in results)
    return results[0]


SIZES = [  # B, H, tokens, others, N
    (1, 1, 1, 1, 1),
    (2, 3, 7, 5, 4),
    (1, 5, 50, 50, 50),
    (1, 2, 33, 129, 2),
    pytest.param((1, 1, 197, 197, 50), marks=pytest.mark.slow),
    (1, 2, 5, 9, 700),
    (0, 2, 5, 9, 3),
    (1, 2, 64, 0, 3),
]


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sizes", SIZES)
class TestDefinition:
    def test_gather(
        self,
        simulator: Simulator,
        kernels: ctypes.CDLL,
        sizes: tuple[int, ...],
        dtype: torch.dtype,
        columns: bool,
    ) -> None:
        b, h, tokens, others, n = sizes
        wide = torch.empty(b, tokens, h, n + 3, dtype=dtype)  # strided, as of a projection
        lookups = wide.transpose(1, 2)[..., :n]
        lookups.normal_()
        ids = torch.randint(n, (tokens, others), dtype=torch.int32)
        expected = lookups.gather(-1, ids.long().expand(b, h, -1, -1))
        expected = expected.mT.contiguous() if columns else expected
        out = torch.empty_like(expected)

        def call() -> int:
            return run(kernels, "gather", lookups, out, ids, columns)

        assert torch.equal(same_bits_in_every_order(simulator, out, call), expected)

    def test_bucket_sum(
        self,
        simulator: Simulator,
        kernels: ctypes.CDLL,
        sizes: tuple[int, ...],
        dtype: torch.dtype,
        columns: bool,
    ) -> None:
        b, h, tokens, others, n = sizes
        pairs = torch.randn(b, h, *((others, tokens) if columns else (tokens, others))).to(dtype)
        ids = torch.randint(n, (tokens, others), dtype=torch.int32)
        own_first = (pairs.mT if columns else pairs).double()
        expected = torch.zeros(b, h, tokens, n, dtype=torch.float64)
        expected.scatter_add_(-1, ids.long().expand(b, h, -1, -1), own_first)
        sums = torch.empty(b, h, tokens, n, dtype=dtype)

        def call() -> int:
            return run(kernels, "bucket_sum", sums, pairs, ids, columns)

        out = same_bits_in_every_order(simulator, sums, call).double()
        accumulated = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        atol, rtol = max(others, 1) * accumulated, torch.finfo(dtype).eps
        torch.testing.assert_close(out, expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("id_", [3, -1, 2**31 - 1])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_id_out_of_range_stops_the_kernel(
    simulator: Simulator, kernels: ctypes.CDLL, name: str, columns: bool, id_: int
) -> None:
    ids = torch.zeros(5, 5, dtype=torch.int32)
    ids[4, 2] = id_
    assert run(kernels, name, torch.zeros(1, 1, 5, 3), torch.zeros(1, 1, 5, 5), ids, columns) != 0
    (found,) = simulator.findings()
    assert re.search(f"{name}_kernel.*: 1 x trap at rpe.cu", found)


BARRIER = b"bar.warp.sync"
BARRIERS = {  # of a kernel, by name and columns
    ("gather", False): 2,
    ("gather", True): 2,
    ("bucket_sum", False): 4,
    ("bucket_sum", True): 2,
}


def without_barrier(library: bytes, number: int) -> bytes:
    """The library with this __syncwarp of every kernel made a comment of its PTX."""
    upto = rb"\A((?:.*?%b){%d}.*?)%b" % (BARRIER, number, BARRIER)
    kernels = library.split(b".entry ")
    return b".entry ".join(re.sub(upto, rb"\1//r.warp.sync", x, flags=re.DOTALL) for x in kernels)


@pytest.mark.parametrize("number", range(max(BARRIERS.values())))
def test_every_syncwarp_is_missed(
    simulator: Simulator, library: Path, tmp_path: Path, number: int
) -> None:
    """Each one of each kernel, where lookups take several slices of shared memory."""
    assert library.read_bytes().count(BARRIER) == sum(BARRIERS.values()) * len(TYPES)
    planted = tmp_path / "planted.so"
    planted.write_bytes(without_barrier(library.read_bytes(), number))
    kernels, ids = load(planted), torch.randint(400, (4, 40), dtype=torch.int32)
    for (name, columns), barriers in BARRIERS.items():
        for dtype in TYPES:
            simulator.clear()
            pairs = torch.zeros(1, 1, *((40, 4) if columns else (4, 40)), dtype=dtype)
            lookups = torch.zeros(1, 1, 4, 400, dtype=dtype)
            run(kernels, name, lookups, pairs, ids, columns)
            found = simulator.findings()
            assert bool(found) == (number < barriers), (name, columns, dtype)
            assert all("race, shared" in line for line in found), found


def test_unknown_instructions_are_an_error_of_every_launch(
    simulator: Simulator, library: Path, tmp_path: Path
) -> None:
    planted = tmp_path / "planted.so"
    planted.write_bytes(library.read_bytes().replace(BARRIER, b"brk.warp.sync"))
    kernels, ids = load(planted), torch.zeros(5, 5, dtype=torch.int32)
    for name in FUNCTIONS:
        assert run(kernels, name, torch.zeros(1, 1, 5, 3), torch.zeros(1, 1, 5, 5), ids, False) != 0
        assert "unknown instruction brk.warp.sync" in simulator.error()
