"""Every implementation: a loop written from the formula, gradients, masks, low precision."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from irpe_ds import ops
from irpe_ds.errors import ConfigError
from irpe_ds.ops.reference import bucket_sum
from irpe_ds.rpe.buckets import BucketMap
from irpe_ds.rpe.config import RPEConfig
from irpe_ds.rpe.tables import Term

Attention = Callable[..., Tensor]

ENCODINGS = [
    RPEConfig(method=method, mode=mode, on=on, ratio=1.9, shared_heads=shared)
    for method in ("product", "euclidean", "quantization", "cross")
    for mode, on in (("contextual", "qkv"), ("bias", "qk"))
    for shared in (True, False)
]


def ids(rpe: RPEConfig) -> str:
    return f"{rpe.method}-{rpe.mode}-{'shared' if rpe.shared_heads else 'per_head'}"


def tables_of(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Every table in the arguments of irpe_attention, as `rpe_k[0]`."""
    return {
        f"{name}[{number}]": table
        for name in ("rpe_q", "rpe_k", "rpe_v")
        for number, (table, _) in enumerate(inputs.get(name, ()))
    }


def attention_by_loops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rpe_q: Sequence[Term] = (),
    rpe_k: Sequence[Term] = (),
    rpe_v: Sequence[Term] = (),
    kept: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """S, P and O entry by entry; kept[b] lists the keys that image b has, default all."""
    B, H, L, D = q.shape
    scale = D**-0.5

    def score(x: Tensor, table: Tensor, head: int, bucket: Tensor) -> Tensor:
        of_head = table[head if table.shape[0] > 1 else 0]
        return of_head[bucket] if of_head.dim() == 1 else scale * x @ of_head[:, bucket]

    out = torch.zeros_like(v)
    for b in range(B):
        keys = range(L) if kept is None else kept[b]
        for h in range(H):
            for i in range(L):
                scores = []
                for j in keys:
                    s = scale * q[b, h, i] @ k[b, h, j]
                    s = s + sum(score(q[b, h, i], t, h, m.ids[i, j]) for t, m in rpe_k)
                    s = s + sum(score(k[b, h, j], t, h, m.ids[j, i]) for t, m in rpe_q)
                    scores.append(s)
                for p, j in zip(torch.stack(scores).softmax(0), keys, strict=True):
                    value = v[b, h, j]
                    for table, buckets in rpe_v:
                        value = value + table[h if len(table) > 1 else 0][buckets.ids[i, j]]
                    out[b, h, i] += p * value
    return out


class TestFormula:
    @pytest.mark.parametrize("rpe", ENCODINGS, ids=ids)
    def test_equals_the_loops(
        self, irpe_attention: Attention, make_inputs: Callable, rpe: RPEConfig
    ) -> None:
        inputs = make_inputs(rpe)
        with torch.no_grad():
            expected = attention_by_loops(**inputs)
            torch.testing.assert_close(irpe_attention(**inputs), expected)

    def test_terms_of_different_kinds_add_up(
        self, irpe_attention: Attention, make_inputs: Callable
    ) -> None:
        inputs = make_inputs(RPEConfig(on="qkv"))
        more = make_inputs(RPEConfig(method="cross", mode="bias", on="qk", shared_heads=False))
        for name in ("rpe_q", "rpe_k"):
            inputs[name] += more[name]
        inputs["rpe_v"] += make_inputs(RPEConfig(method="euclidean", on="v"))["rpe_v"]
        with torch.no_grad():
            torch.testing.assert_close(irpe_attention(**inputs), attention_by_loops(**inputs))

    def test_scale_multiplies_contextual_terms_but_no_bias(
        self, irpe_attention: Attention, make_inputs: Callable
    ) -> None:
        contextual = make_inputs(RPEConfig(on="qkv"))
        bias = make_inputs(RPEConfig(mode="bias", on="qk"))
        inputs = {
            **contextual,
            "rpe_k": contextual["rpe_k"] + bias["rpe_k"],
            "rpe_q": contextual["rpe_q"] + bias["rpe_q"],
        }
        scaled = {  # the same, with the scale moved into k and the tables of the keys
            **inputs,
            "k": inputs["k"] * 3,
            "rpe_k": ((contextual["rpe_k"][0][0] * 3, contextual["rpe_k"][0][1]), bias["rpe_k"][0]),
        }
        out = irpe_attention(**inputs, scale=3.0)
        torch.testing.assert_close(out, irpe_attention(**scaled, scale=1.0))

    def test_without_terms_is_torch_s_attention(
        self, irpe_attention: Attention, make_inputs: Callable
    ) -> None:
        inputs = make_inputs()
        expected = torch.nn.functional.scaled_dot_product_attention(*inputs.values())
        torch.testing.assert_close(irpe_attention(**inputs), expected)

    def test_one_token(self, irpe_attention: Attention, make_inputs: Callable) -> None:
        inputs = make_inputs(RPEConfig(on="qkv", shared_heads=False), grid=(1, 1), skip=0)
        ((table, buckets),) = inputs["rpe_v"]
        expected = inputs["v"] + table[:, buckets.ids[0]]
        torch.testing.assert_close(irpe_attention(**inputs), expected)

    def test_an_empty_batch(self, irpe_attention: Attention, make_inputs: Callable) -> None:
        inputs = make_inputs(RPEConfig(on="qkv"), batch=0)
        out = irpe_attention(**inputs)
        assert out.shape == (0, 2, 7, 4)
        out.sum().backward()
        assert all(not table.grad.any() for table in tables_of(inputs).values())

    def test_strides_do_not_matter(self, irpe_attention: Attention, make_inputs: Callable) -> None:
        inputs = make_inputs(RPEConfig(on="qkv"))
        strided = {
            name: x.transpose(1, 2).contiguous().transpose(1, 2)
            for name, x in inputs.items()
            if name in "qkv"
        }
        for name in ("rpe_q", "rpe_k", "rpe_v"):
            ((table, buckets),) = inputs[name]
            strided[name] = ((table.mT.contiguous().mT, buckets),)
        assert not strided["q"].is_contiguous()
        torch.testing.assert_close(irpe_attention(**strided), irpe_attention(**inputs))


class TestGradient:
    @pytest.mark.parametrize("rpe", ENCODINGS, ids=ids)
    def test_gradcheck(
        self, irpe_attention: Attention, make_inputs: Callable, rpe: RPEConfig
    ) -> None:
        inputs = make_inputs(rpe, grid=(2, 2), batch=1, head_dim=2)
        tables = tables_of(inputs)

        def attention(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
            terms = {name: x for name, x in inputs.items() if name not in "qkv"}
            return irpe_attention(q, k, v, **terms)

        assert torch.autograd.gradcheck(
            attention, (inputs["q"], inputs["k"], inputs["v"], *tables.values()), fast_mode=True
        )


def test_a_second_derivative_is_right_or_refused(
    irpe_attention: Attention, make_inputs: Callable
) -> None:
    inputs = make_inputs(RPEConfig(on="qkv"))
    out = irpe_attention(**inputs)
    if irpe_attention.keywords["impl"] == "cpu":
        with pytest.raises(ConfigError, match=r"^impl: expected .* second derivatives, .*'cpu'"):
            torch.autograd.grad(out.sum(), inputs["q"], create_graph=True)
        return
    (grad,) = torch.autograd.grad(out.square().sum(), inputs["q"], create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), inputs["q"])
    expected = ops.irpe_attention(**inputs, impl="reference").square().sum()
    (grad,) = torch.autograd.grad(expected, inputs["q"], create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(grad.square().sum(), inputs["q"])[0])


class TestKeyPadding:
    def test_equals_removing_the_keys(
        self, irpe_attention: Attention, make_inputs: Callable
    ) -> None:
        inputs = make_inputs(RPEConfig(on="qkv"))
        kept = [[0, 1, 4, 6], [2]]
        mask = torch.ones(2, 7, dtype=torch.bool)
        for b, keys in enumerate(kept):
            mask[b, keys] = False
        out = irpe_attention(**inputs, key_padding_mask=mask)
        with torch.no_grad():
            torch.testing.assert_close(out, attention_by_loops(**inputs, kept=kept))
        out.sum().backward()
        for name in "kv":
            gone = inputs[name].grad.transpose(1, 2)[mask]
            assert not gone.any()

    def test_without_a_key_it_is_zero_as_in_torch(
        self, irpe_attention: Attention, make_inputs: Callable
    ) -> None:
        inputs = make_inputs(RPEConfig(on="qkv"))
        q, k, v = (inputs[name].requires_grad_() for name in "qkv")
        mask = torch.tensor([[True] * 7, [False] * 7])
        out = irpe_attention(**inputs, key_padding_mask=mask)
        assert not out[0].any()
        assert not scaled_dot_product_attention(q, k, v, ~mask[:, None, None])[0].any()
        torch.testing.assert_close(out[1], irpe_attention(**inputs)[1])
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        assert all(not grad[0].any() and grad[1].isfinite().all() for grad in grads)


class TestDropout:
    P = 0.25

    @pytest.fixture
    def probabilities(self, irpe_attention: Attention) -> Callable[..., Tensor]:
        """The weights themselves: the output for values that are unit vectors."""

        def read(inputs: dict[str, Any], dropout_p: float) -> Tensor:
            inputs = {name: x for name, x in inputs.items() if name != "rpe_v"}
            identity = torch.eye(inputs["v"].shape[-1], dtype=torch.float64)
            inputs["v"] = identity.expand_as(inputs["v"])
            torch.manual_seed(7)
            return irpe_attention(**inputs, dropout_p=dropout_p)

        return read

    def test_drops_weights_and_scales_the_others(
        self, probabilities: Callable[..., Tensor], make_inputs: Callable
    ) -> None:
        inputs = make_inputs(RPEConfig(on="qkv"), batch=200, grid=(2, 3), skip=2, head_dim=8)
        dropped, full = probabilities(inputs, self.P), probabilities(inputs, 0.0)
        kept = dropped != 0
        torch.testing.assert_close(dropped, kept * full / (1 - self.P))
        share, n = kept.double().mean().item(), kept.numel()
        assert share == pytest.approx(1 - self.P, abs=5 * math.sqrt(self.P * (1 - self.P) / n))
        assert torch.equal(probabilities(inputs, self.P), dropped)  # one seed, one mask

    def test_one_mask_for_values_and_their_encoding(
        self,
        irpe_attention: Attention,
        probabilities: Callable[..., Tensor],
        make_inputs: Callable,
    ) -> None:
        inputs = make_inputs(RPEConfig(on="qkv"), grid=(2, 3), skip=2, head_dim=8)
        probs = probabilities(inputs, self.P)
        ((table, buckets),) = inputs["rpe_v"]
        expected = probs @ inputs["v"] + torch.einsum(
            "bhij,ijd->bhid", probs, table[0][buckets.ids]
        )
        torch.manual_seed(7)
        torch.testing.assert_close(irpe_attention(**inputs, dropout_p=self.P), expected)


class TestLowPrecision:
    @pytest.mark.parametrize(
        ("dtype", "epsilon"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
    )
    @pytest.mark.parametrize("method", ["product", "euclidean"])
    def test_error_against_float64(
        self,
        irpe_attention: Attention,
        make_inputs: Callable,
        method: str,
        dtype: torch.dtype,
        epsilon: float,
    ) -> None:
        """Large buckets are the danger: sums over many keys in few bits would lose the last."""
        rpe = RPEConfig(method=method, on="qkv")
        inputs = make_inputs(rpe, grid=(14, 14), heads=3, head_dim=32, dtype=dtype)
        exact = {
            name: x.detach().double().requires_grad_()
            if name in "qkv"
            else tuple((table.detach().double().requires_grad_(), m) for table, m in x)
            for name, x in inputs.items()
        }
        grad_out = torch.randn_like(inputs["q"])
        out, expected = irpe_attention(**inputs), irpe_attention(**exact)
        assert out.dtype == dtype
        out.backward(grad_out)
        expected.backward(grad_out.double())
        pairs = {"out": (out, expected)}
        leaves, exact_leaves = inputs | tables_of(inputs), exact | tables_of(exact)
        for name in (*"qkv", *tables_of(inputs)):
            pairs[name] = (leaves[name].grad, exact_leaves[name].grad)
        for name, (got, want) in pairs.items():
            error = (got.double() - want).abs().max() / want.abs().max()
            assert error < 8 * epsilon, f"{name}: {error:.2e}"

    def test_tables_in_float32_serve_queries_in_bfloat16(
        self, irpe_attention: Attention, make_inputs: Callable
    ) -> None:
        rpe = RPEConfig(on="qkv")
        inputs = make_inputs(rpe, dtype=torch.bfloat16) | {
            name: terms
            for name, terms in make_inputs(rpe, dtype=torch.float32).items()
            if name.startswith("rpe")
        }
        out = irpe_attention(**inputs)
        assert out.dtype == torch.bfloat16
        out.sum().backward()
        assert all(table.grad.dtype == torch.float32 for table in tables_of(inputs).values())

    def test_autocast(self, irpe_attention: Attention, make_inputs: Callable) -> None:
        inputs = make_inputs(RPEConfig(on="qkv"), dtype=torch.float32)
        expected = irpe_attention(**inputs)
        with torch.autocast("cpu", torch.bfloat16):
            out = irpe_attention(**inputs)
        torch.testing.assert_close(out.float(), expected, atol=0.1, rtol=0.05)
        with torch.autocast("cpu", torch.bfloat16):
            expected.sum().backward()  # of a forward outside
        out.sum().backward()
        assert all(table.grad.isfinite().all() for table in tables_of(inputs).values())


def test_compiles_as_one_graph(irpe_attention: Attention, make_inputs: Callable) -> None:
    compiled = torch.compile(irpe_attention, fullgraph=True, backend="aot_eager")
    for rpe in (RPEConfig(on="qkv", shared_heads=False), RPEConfig(method="euclidean", on="qkv")):
        inputs = make_inputs(rpe, dtype=torch.float32)
        leaves = [inputs[name] for name in "qkv"] + list(tables_of(inputs).values())
        expected, out = irpe_attention(**inputs), compiled(**inputs)
        torch.testing.assert_close(out, expected)
        for got, want in zip(
            torch.autograd.grad(out.sum(), leaves),
            torch.autograd.grad(expected.sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(got, want)


def test_bucket_sum() -> None:
    ids = torch.tensor([[0, 0, 2], [1, 1, 1], [2, 1, 0]])
    probs = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [1.0, 0.0, 0.0]])
    sums = bucket_sum(probs.expand(2, 3, 3, 3), ids, 4)
    expected = torch.tensor([[0.75, 0, 0.25, 0], [0, 1, 0, 0], [0, 0, 1, 0]])
    torch.testing.assert_close(sums, expected.expand(2, 3, 3, 4))


def test_values_are_never_expanded_to_every_pair(
    irpe_attention: Attention,
) -> None:
    """An (L, L, D) table, as the released implementation makes it, is the largest tensor it has."""
    buckets = BucketMap.build("product", 6, 6, 1)
    q = torch.randn(1, 1, 37, 64, requires_grad=True)
    table = torch.randn(1, buckets.num_buckets, 64, requires_grad=True)
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    with Sizes():
        irpe_attention(q, q, q, rpe_v=((table, buckets),)).sum().backward()
    assert 0 < largest < 37 * 37 * 64
