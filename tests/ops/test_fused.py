"""The fused kernels' own source, run on the host through their PyTorch operators.

Once as it is and once more under AddressSanitizer. Every case runs twice, the threads of a block in
opposite orders, and must give the same bits. The tests marked gpu repeat them on a GPU.
"""

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from irpe_ds.errors import ConfigError
from irpe_ds.ops import irpe_attention
from irpe_ds.ops.packed_ids import packed_ids
from irpe_ds.ops.reference import bucket_sum
from irpe_ds.rpe.buckets import BucketMap
from irpe_ds.rpe.config import RPEConfig
from irpe_ds.rpe.tables import build_maps, build_table
from tests.ops.kernels.host import Host

SUBSETS = ["".join(on) for n in (1, 2, 3) for on in combinations("qkv", n)]
ENCODINGS = [
    RPEConfig(method=method, mode=mode, on=on, ratio=ratio, shared_heads=shared)
    for method, ratio in (("product", 1.9), ("euclidean", 20), ("quantization", 33), ("cross", 20))
    for mode, on in (("contextual", "qkv"), ("bias", "qk"))
    for shared in (True, False)
]
Grid = tuple[int, int]
GRIDS: list[tuple[int, Grid, int]] = [  # length, grid, skip
    (7, (2, 3), 1),
    (50, (7, 7), 1),
    (129, (16, 8), 1),
    (197, (14, 14), 1),
    (198, (14, 14), 2),
    (256, (16, 16), 0),
    (257, (16, 16), 1),
    (577, (24, 24), 1),
    (1025, (32, 32), 1),
]
DTYPES = [torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
pytestmark = [pytest.mark.usefixtures("host"), pytest.mark.parametrize("device", DEVICES)]


class Problem:
    """Random inputs in low precision, and the gradients that the op gives for them."""

    def __init__(
        self,
        rpe: RPEConfig | None,
        device: str,
        *,
        grid: Grid = (5, 9),
        skip: int = 1,
        batch: int = 2,
        heads: int = 2,
        dim: int = 64,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        length = skip + grid[0] * grid[1]

        def numbers(*shape: int, std: float = 1.0) -> Tensor:
            return (torch.randn(shape) * std).to(device, dtype)

        self.leaves = {  # as of a projection: the heads of a token lie next to each other
            name: numbers(batch, length, heads, dim).transpose(1, 2) for name in "qkv"
        }
        self.grad_out = numbers(batch, length, heads, dim).transpose(1, 2)
        self.maps: dict[str, BucketMap] = {}
        for target in rpe.on if rpe else "":
            maps = [m.to(device) for m in build_maps(rpe, *grid, skip)]
            for name, table in build_table(rpe, target, maps, heads, dim).named_parameters():
                key = f"rpe_{target}.{name}"
                self.leaves[key] = numbers(*table.shape, std=0.5)
                self.maps[key] = maps["rp_cols" in name]
        self.options: dict[str, Any] = {}

    def run(self, dtype: torch.dtype | None = None, **options: Any) -> dict[str, Tensor]:
        """Output and every gradient, of a computation in dtype or in that of the inputs."""
        leaves = {
            name: x.detach().to(dtype or x.dtype).requires_grad_()
            for name, x in self.leaves.items()
        }
        terms = {
            f"rpe_{target}": tuple(
                (leaves[key], m) for key, m in self.maps.items() if key.startswith(f"rpe_{target}")
            )
            for target in "qkv"
        }
        qkv = (leaves[name] for name in "qkv")
        out = irpe_attention(*qkv, **terms, **self.options, **options)
        grads = torch.autograd.grad(out, list(leaves.values()), self.grad_out.to(out.dtype))
        return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}

    def check(self, host: Host) -> dict[str, Tensor]:
        """The error is at most twice that of eager PyTorch in the same precision.

        Errors are root mean squares. A quarter of the dtype's epsilon, what rounding the result
        costs, is granted on top.
        """
        results = host.same_bits_in_both_orders(lambda: self.run(impl="fused"))
        exact = self.run(torch.float64, impl="reference")
        eager = self.run(impl="reference")
        for name, want in exact.items():
            got = results[name]
            assert got.dtype == self.grad_out.dtype
            assert got.shape == want.shape
            error, allowed = (
                (x.double() - want).square().mean().sqrt() for x in (got, eager[name])
            )
            rounding = torch.finfo(got.dtype).eps / 4 * want.square().mean().sqrt()
            assert error <= 2 * allowed + rounding, f"{name}: {error:.2e}, eager {allowed:.2e}"
        return results


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def ids(rpe: RPEConfig) -> str:
    return f"{rpe.method}-{rpe.mode}-{'shared' if rpe.shared_heads else 'per_head'}"


class TestAgainstEager:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("dim", [64, 32])
    @pytest.mark.parametrize("on", SUBSETS)
    def test_every_subset(
        self, host: Host, device: str, on: str, dim: int, dtype: torch.dtype
    ) -> None:
        Problem(RPEConfig(on=on), device, batch=3, heads=3, dim=dim, dtype=dtype).check(host)

    @pytest.mark.parametrize(("dim", "dtype"), [(64, torch.float16), (32, torch.bfloat16)])
    @pytest.mark.parametrize("rpe", ENCODINGS, ids=ids)
    def test_every_encoding(
        self, host: Host, device: str, rpe: RPEConfig, dim: int, dtype: torch.dtype
    ) -> None:
        Problem(rpe, device, skip=2, batch=5, dim=dim, dtype=dtype).check(host)

    @pytest.mark.parametrize("on", ["k", "qkv"])
    @pytest.mark.parametrize(("length", "grid", "skip"), GRIDS)
    def test_lengths(
        self, host: Host, device: str, length: int, grid: Grid, skip: int, on: str
    ) -> None:
        problem = Problem(RPEConfig(on=on), device, grid=grid, skip=skip, batch=1, heads=1)
        assert problem.grad_out.shape[2] == length
        problem.check(host)

    def test_without_terms(self, host: Host, device: str) -> None:
        Problem(None, device, grid=(14, 14)).check(host)

    def test_a_contextual_term_and_a_bias(self, host: Host, device: str) -> None:
        problem = Problem(RPEConfig(on="qk"), device)
        more = Problem(RPEConfig(method="euclidean", mode="bias", on="qk"), device)
        for key, buckets in more.maps.items():
            problem.leaves[f"{key}.bias"] = more.leaves[key]
            problem.maps[f"{key}.bias"] = buckets
        problem.check(host)

    def test_large_scores(self, host: Host, device: str) -> None:
        """Weights near 0 and 1, and a reference of the softmax that has to move."""
        problem = Problem(RPEConfig(on="qkv"), device, grid=(14, 14))
        for name in "qk":
            problem.leaves[name] *= torch.linspace(0.2, 5, 197, device=device)[:, None].to(
                problem.grad_out.dtype
            )
        problem.check(host)

    def test_scale(self, host: Host, device: str) -> None:
        problem = Problem(RPEConfig(on="qkv"), device)
        problem.options["scale"] = 0.3
        problem.check(host)

    def test_key_padding(self, host: Host, device: str) -> None:
        problem = Problem(RPEConfig(on="qkv"), device, batch=4, grid=(9, 9))
        mask = torch.rand(4, 82, device=device) < 0.4
        mask[1], mask[2, :64], mask[3] = False, True, True
        problem.options["key_padding_mask"] = mask
        results = problem.check(host)
        assert not results["out"][3].any()
        for name in "qkv":
            assert not results[name][3].any()
        for name in "kv":
            assert not results[name].transpose(1, 2)[mask].any()

    def test_key_padding_with_a_bias(self, host: Host, device: str) -> None:
        problem = Problem(RPEConfig(mode="bias", on="qk"), device)
        problem.options["key_padding_mask"] = torch.rand(2, 46, device=device) < 0.4
        problem.check(host)


def test_one_token(device: str) -> None:
    problem = Problem(RPEConfig(on="qkv"), device, grid=(1, 1), skip=0)
    results = problem.run(impl="fused")
    (table,) = (x for name, x in problem.leaves.items() if name.startswith("rpe_v"))
    (buckets,) = (m for name, m in problem.maps.items() if name.startswith("rpe_v"))
    expected = problem.leaves["v"] + table[:, buckets.ids[0]]
    torch.testing.assert_close(results["out"], expected, atol=0.02, rtol=0.01)
    torch.testing.assert_close(results["v"], problem.grad_out)
    assert results["q"].abs().max() < 0.1  # rounding: the weight is always 1


def test_an_empty_batch(device: str) -> None:
    results = Problem(RPEConfig(on="qkv"), device, batch=0).run(impl="fused")
    assert results["out"].shape == (0, 2, 46, 64)
    assert not any(x.any() for name, x in results.items() if name.startswith("rpe"))


@pytest.mark.parametrize("change", ["contiguous", "odd", "shifted", "strided"])
def test_memory_layout_does_not_matter(device: str, change: str) -> None:
    def changed(x: Tensor) -> Tensor:
        if change == "contiguous":
            return x.contiguous()
        if change == "odd":  # rows that begin between multiples of 16 bytes
            return nn.functional.pad(x, (1, 2))[..., 1:-2]
        if change == "shifted":  # contiguous, but not from a multiple of 16 bytes on
            return nn.functional.pad(x.flatten(), (1, 0))[1:].view(x.shape)
        return x.repeat_interleave(2, -1)[..., ::2]

    problem = Problem(RPEConfig(on="qkv"), device)
    expected = problem.run(impl="fused")
    for name in problem.leaves:
        problem.leaves[name] = changed(problem.leaves[name])
    problem.grad_out = changed(problem.grad_out)
    results = problem.run(impl="fused")
    assert all(torch.equal(results[name], expected[name]) for name in expected)


def test_two_runs_have_the_same_bits(device: str) -> None:
    problem = Problem(RPEConfig(on="qkv"), device, grid=(14, 14), batch=3)
    problem.options["dropout_p"] = 0.1
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(problem.run(impl="fused"))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_the_last_image_of_a_batch_fares_as_alone(device: str) -> None:
    """On a GPU with more pairs than 32 bits count: 4000 x 14 x 197 x 197."""
    batch, heads = (4000, 14) if device == "cuda" else (5, 3)
    problem = Problem(RPEConfig(on="qkv"), device, grid=(14, 14), batch=batch, heads=heads)
    results = problem.run(impl="fused")
    for name in "qkv":
        problem.leaves[name] = problem.leaves[name][-1:]
    problem.grad_out = problem.grad_out[-1:]
    alone = problem.run(impl="fused")
    assert all(torch.equal(results[name][-1:], alone[name]) for name in ("out", *"qkv"))


def philox(seed: int, c0: Tensor, c1: Tensor, c2: Tensor) -> list[Tensor]:
    """Philox4x32-10 of counters (c0, c1, c2, 0), int64 tensors of one shape."""
    c = [c0, c1, c2, torch.zeros_like(c0)]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        # Products of 32-bit numbers need more than int64's 63 bits: in two halves.
        high, low = zip(
            *(
                (
                    (m * (x >> 16) + (m * (x & 0xFFFF) >> 16)) >> 16,
                    m * x & 0xFFFFFFFF,
                )
                for m, x in ((0xD2511F53, c[0]), (0xCD9E8D57, c[2]))
            ),
            strict=True,
        )
        c = [high[1] ^ c[1] ^ key[0], low[1], high[0] ^ c[3] ^ key[1], low[0]]
        key = [
            (k + step) & 0xFFFFFFFF for k, step in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True)
        ]
    return c


class TestDropout:
    P = 0.3

    def test_philox(self, device: str) -> None:
        """The first known answer of the generator's authors."""
        zero = torch.zeros((), dtype=torch.int64)
        words = [f"{int(word):08x}" for word in philox(0, zero, zero, zero)]
        assert words == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]

    @pytest.mark.parametrize("on", ["k", "qkv"])
    def test_against_eager_with_the_same_mask(self, host: Host, device: str, on: str) -> None:
        problem = Problem(RPEConfig(on=on), device, batch=3, grid=(9, 9), dtype=torch.float16)
        problem.options["dropout_p"] = self.P

        def run() -> dict[str, Tensor]:
            torch.manual_seed(5)
            return problem.run(impl="fused")

        results = host.same_bits_in_both_orders(run)
        torch.manual_seed(5)
        seed = int(torch.randint(2**63 - 1, (1,), device=device))
        images, queries, keys = torch.meshgrid(
            torch.arange(6), torch.arange(82), torch.arange(82), indexing="ij"
        )
        words = torch.stack(philox(seed, queries // 2, keys // 2, images))
        drawn = words.gather(0, (queries % 2 * 2 + keys % 2)[None])[0]
        kept = (drawn >= int(self.P * 2**32)).view(3, 2, 82, 82).double()
        assert kept.mean().item() == pytest.approx(1 - self.P, abs=0.01)
        exact = with_mask(problem, kept.to(device) / (1 - self.P))
        for name, want in exact.items():
            error = (results[name].double() - want).norm() / want.norm()
            assert error < 2 * torch.finfo(torch.float16).eps, name


def with_mask(problem: Problem, kept: Tensor) -> dict[str, Tensor]:
    """Output and gradients in float64, the weights multiplied by `kept`."""
    leaves = {name: x.double().requires_grad_() for name, x in problem.leaves.items()}
    q, k, v = (leaves[name] for name in "qkv")
    scores = q @ k.mT
    table = {name[:5]: x for name, x in leaves.items()}
    of = {name[:5]: m for name, m in problem.maps.items()}

    def looked_up(x: Tensor, name: str) -> Tensor:
        return (x @ table[name]).gather(-1, of[name].ids.long().expand(*x.shape[:2], -1, -1))

    if "rpe_k" in of:
        scores = scores + looked_up(q, "rpe_k")
    if "rpe_q" in of:
        scores = scores + looked_up(k, "rpe_q").mT
    weights = (scores * q.shape[-1] ** -0.5).softmax(-1) * kept
    out = weights @ v
    if "rpe_v" in of:
        sums = bucket_sum(weights, of["rpe_v"].ids, of["rpe_v"].num_buckets)
        out = out + sums @ table["rpe_v"]
    grads = torch.autograd.grad(out, list(leaves.values()), problem.grad_out.double())
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def test_a_second_derivative_is_refused(device: str) -> None:
    q = torch.randn(1, 1, 5, 32, device=device).bfloat16().requires_grad_()
    out = irpe_attention(q, q, q, impl="fused")
    with pytest.raises(ConfigError, match=r"^impl: expected .* second derivatives, .*'fused'"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


def test_too_many_buckets_for_shared_memory(device: str) -> None:
    buckets = BucketMap.build("product", 20, 20, 1, ratio=3.9).to(device)
    assert len(buckets.used_ids) == 226
    q = torch.randn(1, 1, 401, 64, device=device).bfloat16()
    tables = [torch.zeros(1, 64, 226, device=device).bfloat16()] * 4
    tables += [torch.zeros(1, 226, 64, device=device).bfloat16()] * 2
    arguments = (
        q,
        q,
        q,
        tables,
        [packed_ids(buckets)] * 6,
        [0, 0, 1, 1, 2, 2],
        None,
        None,
        0.125,
        0.0,
        1,
    )
    with pytest.raises(RuntimeError, match=r"expected tables whose lookups fit .* got 464, 464"):
        torch.ops.irpe_ds.attention_forward(*arguments)
