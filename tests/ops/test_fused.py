"""impl="fused" as PyTorch's users meet it: layouts, masks, dropout, derivatives, compilation.

`test_fused_forward.py` and `test_fused_backward.py` go through what the kernels can compute.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from irpe_ds.errors import ConfigError
from irpe_ds.ops import irpe_attention
from irpe_ds.ops.reference import bucket_sum
from irpe_ds.rpe.buckets import BucketMap
from tests.ops.fused_problems import Case, Problem

pytest_plugins = ["tests.ops.fused_devices"]

QKV = Case("qkv", grid=(5, 9), head_dim=32)


def test_large_scores(device: str) -> None:
    """Weights near 0 and 1, and a reference of the softmax that has to move."""
    problem = Problem(QKV, device)
    for name in "qk":
        problem.leaves[name] *= torch.linspace(0.2, 5, 46, device=device)[:, None].bfloat16()
    problem.check_errors(problem.run())


def test_scale(device: str) -> None:
    problem = Problem(QKV, device)
    problem.options["scale"] = 0.3
    problem.check_errors(problem.run())


def test_a_scale_that_reverses_the_softmax_is_refused(device: str) -> None:
    problem = Problem(QKV, device)
    problem.options["scale"] = -1.0
    with pytest.raises(ConfigError, match=r"^scale: expected a positive number"):
        problem.run()


def test_without_terms(device: str) -> None:
    problem = Problem(Case("", grid=(7, 7)), device)
    problem.check_errors(problem.run())


@pytest.mark.parametrize("case", [QKV, Case("qk", mode="bias", grid=(5, 9))])
def test_key_padding(device: str, case: Case) -> None:
    problem = Problem(case._replace(batch=4), device)
    mask = torch.rand(4, 46, device=device) < 0.4
    mask[1], mask[2, :32], mask[3] = False, True, True
    problem.options["key_padding_mask"] = mask
    results = problem.run()
    problem.check_errors(results)
    assert not results["out"][3].any()
    for name in "qkv":
        assert not results[name][3].any()
    for name in "kv":
        assert not results[name].transpose(1, 2)[mask].any()


def test_one_token(device: str) -> None:
    problem = Problem(Case("qkv", grid=(1, 1), num_prefix=0), device)
    results = problem.run()
    expected = problem.leaves["v"] + problem.leaves["rpe_v0"][:, problem.maps["rpe_v0"].ids[0]]
    torch.testing.assert_close(results["out"], expected, atol=0.02, rtol=0.01)
    torch.testing.assert_close(results["v"], problem.grad_out)
    assert results["q"].abs().max() < 0.1  # rounding: the weight is always 1


def test_an_empty_batch(device: str) -> None:
    results = Problem(QKV._replace(batch=0), device).run()
    assert results["out"].shape == (0, 2, 46, 32)
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

    problem = Problem(QKV, device)
    expected = problem.run()
    for name in problem.leaves:
        problem.leaves[name] = changed(problem.leaves[name])
    problem.grad_out = changed(problem.grad_out)
    results = problem.run()
    assert all(torch.equal(results[name], expected[name]) for name in expected)


def test_the_last_image_of_a_batch_fares_as_alone(device: str) -> None:
    """On a GPU with more pairs than 32 bits count: 4000 x 14 x 197 x 197."""
    case = QKV._replace(batch=5, heads=3)
    if device == "cuda":
        case = Case("qkv", batch=4000, heads=14)
    problem = Problem(case, device)
    results = problem.run()
    for name in "qkv":
        problem.leaves[name] = problem.leaves[name][-1:]
    problem.grad_out = problem.grad_out[-1:]
    alone = problem.run()
    assert all(torch.equal(results[name][-1:], alone[name]) for name in ("out", *"qkv"))


def test_repeated_runs_give_the_same_bits(device: str) -> None:
    problem = Problem(Case("qkv", batch=256, heads=6) if device == "cuda" else QKV, device)
    first = problem.run()
    for _ in range(10 if device == "cuda" else 1):
        again = problem.run()
        assert all(torch.equal(again[name], x) for name, x in first.items())


def philox(seed: int, c0: Tensor, c1: Tensor, c2: Tensor) -> list[Tensor]:
    """Philox4x32-10 of counters (c0, c1, c2, 0), int64 tensors of one shape."""
    c = [c0, c1, c2, torch.zeros_like(c0)]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        # Products of 32-bit numbers need more than int64's 63 bits: in two halves.
        high, low = zip(
            *(
                ((m * (x >> 16) + (m * (x & 0xFFFF) >> 16)) >> 16, m * x & 0xFFFFFFFF)
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
    P = 0.25
    CASE = QKV._replace(batch=3, dtype=torch.float16)

    def test_philox(self) -> None:
        """The first known answer of the generator's authors."""
        zero = torch.zeros((), dtype=torch.int64)
        words = [f"{int(word):08x}" for word in philox(0, zero, zero, zero)]
        assert words == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]

    def kept(self, seed: int) -> Tensor:
        """(B, H, L, L) bool: the weights that are left, as dropout.cuh draws them."""
        height, width = self.CASE.grid
        # Rows in groups of 8 of one grid column, the class token in a free row of the first one.
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        group, row = torch.tensor([0, *x.flatten()]), torch.tensor([height, *y.flatten()])
        key = torch.tensor([height * width, *range(height * width)])  # the class token comes last
        images = torch.arange(self.CASE.batch * self.CASE.heads)
        counters = torch.broadcast_tensors(
            (group // 2 * 8 + row)[:, None], key // 16 * 4 + key % 8 // 2, images[:, None, None]
        )
        words = torch.stack(philox(seed, *counters))
        place = (key % 16 // 8 * 2 + group[:, None] % 2).expand(*counters[0].shape)
        drawn = words.gather(0, place[None])[0] >> (key % 2 * 16) & 0xFFFF
        return (drawn >= self.P * 2**16).view(self.CASE.batch, self.CASE.heads, *drawn.shape[1:])

    @pytest.mark.parametrize("on", ["k", "qkv"])  # two strips over keys, and one
    def test_against_eager_with_the_same_mask(self, device: str, on: str) -> None:
        problem = Problem(self.CASE._replace(on=on), device)
        problem.options["dropout_p"] = self.P
        runs = []
        for _ in range(2):
            torch.manual_seed(5)
            runs.append(problem.run())
        assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
        torch.manual_seed(5)
        kept = self.kept(int(torch.randint(2**63 - 1, (1,), device=device)))
        assert kept.double().mean().item() == pytest.approx(1 - self.P, abs=0.01)
        exact = with_mask(problem, kept.to(device).double() / (1 - self.P))
        for name, want in exact.items():
            error = (runs[0][name].double() - want).norm() / want.norm()
            assert error < 2 * torch.finfo(torch.float16).eps, name


def with_mask(problem: Problem, kept: Tensor) -> dict[str, Tensor]:
    """Output and gradients in float64, the weights multiplied by `kept`; at most one term each."""
    leaves = {name: x.double().requires_grad_() for name, x in problem.leaves.items()}
    q, k, v = (leaves[name] for name in "qkv")
    ids = {name: m.ids.long() for name, m in problem.maps.items()}

    def looked_up(x: Tensor, name: str) -> Tensor:
        return (x @ leaves[name]).gather(-1, ids[name].expand(*x.shape[:2], -1, -1))

    scores = q @ k.mT + looked_up(q, "rpe_k0")
    if "rpe_q0" in leaves:
        scores = scores + looked_up(k, "rpe_q0").mT
    weights = (scores * q.shape[-1] ** -0.5).softmax(-1) * kept
    out = weights @ v
    if "rpe_v0" in leaves:
        buckets = problem.maps["rpe_v0"]
        out = out + bucket_sum(weights, buckets.ids, buckets.num_buckets) @ leaves["rpe_v0"]
    grads = torch.autograd.grad(out, list(leaves.values()), problem.grad_out.double())
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def test_a_second_derivative_is_refused(device: str) -> None:
    q = torch.randn(1, 1, 5, 32, device=device).bfloat16().requires_grad_()
    out = irpe_attention(q, q, q, impl="fused")
    with pytest.raises(ConfigError, match=r"^impl: expected .* second derivatives, .*'fused'"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


def test_what_pytorch_asks_of_an_operator(device: str) -> None:
    problem = Problem(QKV, device)
    arguments = problem.arguments()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    forward, backward = torch.ops.irpe_ds.fused_forward, torch.ops.irpe_ds.fused_backward
    torch.library.opcheck(forward.default, (*arguments, True), test_utils=tests)
    inputs = (problem.grad_out, *forward(*arguments, True), *arguments)
    torch.library.opcheck(backward.default, inputs, test_utils=tests)
    grads = backward(*inputs)[3:]
    assert [grad.shape for grad in grads] == [table.shape for table in arguments.tables]


def test_compiled_before_it_ran(device: str) -> None:
    """The factors, made while PyTorch traces, are real tensors that live on."""
    from irpe_ds.ops.factors import factor
    from irpe_ds.ops.fused_op import shape

    problem = Problem(QKV, device)
    expected = problem.run()
    factor.cache_clear()
    shape.cache_clear()
    compiled: Any = torch.compile(problem.run, fullgraph=False, backend="aot_eager")
    for _ in range(2):
        results = compiled()
        assert all(torch.equal(results[name], expected[name]) for name in expected)


def test_training_after_inference(device: str) -> None:
    problem = Problem(QKV, device)
    with torch.inference_mode():
        problem.run(backward=False)
    problem.run()


def test_a_bias_beside_a_contextual_term_is_refused(device: str) -> None:
    buckets = BucketMap.build("product", 2, 3, 1).to(device)
    q = torch.randn(1, 1, 7, 32, device=device).bfloat16()
    tables = [torch.zeros(shape, device=device) for shape in ((1, 32, 50), (1, 50))]
    terms = [((table, buckets),) for table in tables]
    with pytest.raises(ConfigError, match="must all be contextual or all biases"):
        irpe_attention(q, q, q, rpe_q=terms[0], rpe_k=terms[1], impl="fused")
