"""The CUDA kernels' own source, compiled for the host, against the definition.

Once as it is, and once more under AddressSanitizer (`test_under_address_sanitizer`), which starts
this file again with IRPE_TEST_SANITIZER set. Every kernel runs twice, its threads in
opposite orders, and must give the same bits.
"""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.ops.kernels.host import GXX, KERNELS, OPTIONS, SANITIZED

TYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}


class Problem(ctypes.Structure):
    """irpe::cuda::Problem of ops/csrc/cuda/rpe.h."""

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


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels as a host library."""
    library = tmp_path_factory.mktemp("kernels") / "kernels.so"
    source = ["-shared", str(KERNELS / "exports.cpp"), "-o", str(library)]
    subprocess.run([*GXX, "-std=c++17", *OPTIONS, *source], check=True)
    return ctypes.CDLL(str(library))


def run(
    kernels: ctypes.CDLL, name: str, lookups: Tensor, pairs: Tensor, ids: Tensor, columns: bool
) -> None:
    """Calls gather or bucket_sum of (B, H, T, N) lookups and (B, H, Q, K) pairs."""
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
    assert getattr(kernels, f"run_{name}")(ctypes.byref(problem)) == 0


def same_bits_in_both_orders(kernels: ctypes.CDLL, out: Tensor, call: Callable[[], None]) -> Tensor:
    """`out` after call(), for threads that run first to last and last to first."""
    results = []
    for reverse in (0, 1):
        kernels.reverse_threads(reverse)
        out.fill_(float("nan"))
        call()
        results.append(out.clone())
    kernels.reverse_threads(0)
    assert torch.equal(*results), "the order of the threads shows"
    assert not results[0].isnan().any(), "something was not written"
    return results[0]


SIZES = [  # B, H, tokens, others, N
    (1, 1, 1, 1, 1),
    (2, 3, 7, 5, 4),
    (1, 5, 50, 50, 50),
    (1, 2, 33, 129, 2),
    (1, 1, 197, 197, 50),
    (1, 2, 5, 9, 700),
    (0, 2, 5, 9, 3),
    (1, 2, 64, 0, 3),
]


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sizes", SIZES)
class TestGatherAndBucketSum:
    def test_gather(
        self, kernels: ctypes.CDLL, sizes: tuple[int, ...], dtype: torch.dtype, columns: bool
    ) -> None:
        b, h, tokens, others, n = sizes
        torch.manual_seed(1)
        wide = torch.randn(b, tokens, h, n + 3).to(dtype)  # strided, as of a projection
        lookups = wide.transpose(1, 2)[..., :n]
        ids = torch.randint(n, (tokens, others), dtype=torch.int32)
        expected = lookups.gather(-1, ids.long().expand(b, h, -1, -1))
        expected = expected.mT.contiguous() if columns else expected
        out = torch.empty_like(expected)

        def call() -> None:
            run(kernels, "gather", lookups, out, ids, columns)

        assert torch.equal(same_bits_in_both_orders(kernels, out, call), expected)

    def test_bucket_sum(
        self, kernels: ctypes.CDLL, sizes: tuple[int, ...], dtype: torch.dtype, columns: bool
    ) -> None:
        b, h, tokens, others, n = sizes
        torch.manual_seed(1)
        pairs = torch.randn(b, h, *((others, tokens) if columns else (tokens, others))).to(dtype)
        ids = torch.randint(n, (tokens, others), dtype=torch.int32)
        own_first = (pairs.mT if columns else pairs).double()
        expected = torch.zeros(b, h, tokens, n, dtype=torch.float64)
        expected.scatter_add_(-1, ids.long().expand(b, h, -1, -1), own_first)
        sums = torch.empty(b, h, tokens, n, dtype=dtype)

        def call() -> None:
            run(kernels, "bucket_sum", sums, pairs, ids, columns)

        out = same_bits_in_both_orders(kernels, sums, call).double()
        accumulated = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        atol, rtol = max(others, 1) * accumulated, torch.finfo(dtype).eps
        torch.testing.assert_close(out, expected, atol=atol, rtol=rtol)


NONE, RACE, LONELY_BARRIER, BEYOND_SHARED, BEYOND_INPUT, WRONG_ID = range(6)


class TestTheHarnessFindsFaults:
    """Each fault in a process of its own: some of them end it."""

    def outcome(self, fault: int, reverse: int, library: str) -> subprocess.CompletedProcess[str]:
        script = f"""
import ctypes
kernels = ctypes.CDLL({library!r})
kernels.reverse_threads({reverse})
numbers = (ctypes.c_float * 256)(*range(256))
out = (ctypes.c_float * 256)()
kernels.test_fault({fault}, numbers, out, 256)
print(list(out))
"""
        environment = {**os.environ, "PYTHONMALLOC": "malloc"}  # AddressSanitizer's to watch
        command = [sys.executable, "-c", script]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    def test_none(self, kernels: ctypes.CDLL) -> None:
        expected = str(torch.arange(256.0).roll(-1).tolist())
        assert self.outcome(NONE, 0, kernels._name).stdout.strip() == expected
        assert self.outcome(NONE, 1, kernels._name).stdout.strip() == expected

    def test_a_missing_barrier_shows_in_the_order(self, kernels: ctypes.CDLL) -> None:
        outputs = {self.outcome(RACE, reverse, kernels._name).stdout for reverse in (0, 1)}
        assert len(outputs) == 2

    def test_threads_that_never_meet(self, kernels: ctypes.CDLL) -> None:
        done = self.outcome(LONELY_BARRIER, 0, kernels._name)
        assert done.returncode != 0
        assert "threads wait for each other at different places" in done.stderr

    @pytest.mark.skipif(not SANITIZED, reason="AddressSanitizer's to find")
    @pytest.mark.parametrize("fault", [BEYOND_SHARED, BEYOND_INPUT])
    def test_addresses_beyond_the_end(self, kernels: ctypes.CDLL, fault: int) -> None:
        done = self.outcome(fault, 0, kernels._name)
        assert done.returncode != 0
        assert "heap-buffer-overflow" in done.stderr

    def test_an_id_out_of_range_stops_the_kernel(self, kernels: ctypes.CDLL) -> None:
        done = self.outcome(WRONG_ID, 0, kernels._name)
        assert done.returncode != 0
        assert "an id is out of range" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(SANITIZED, reason="this is that run")
def test_under_address_sanitizer() -> None:
    def of_gcc(name: str) -> str:
        command = ["g++", f"-print-file-name={name}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    environment = {
        **os.environ,
        "IRPE_TEST_SANITIZER": "1",
        "LD_PRELOAD": f"{of_gcc('libasan.so')}:{of_gcc('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
    }
    pytest_again = [sys.executable, "-m", "pytest", "-q", "-m", "not (gpu or slow)", __file__]
    done = subprocess.run(pytest_again, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
