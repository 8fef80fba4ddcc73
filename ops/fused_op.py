"""The kernels of csrc/fused as operators of PyTorch: `irpe_ds::fused_forward`, `fused_backward`.

B images, H heads, L tokens, D head dimension, N buckets.
"""

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from irpe_ds.errors import ConfigError
from irpe_ds.ops import fused_kernels
from irpe_ds.ops.factors import Factors, MapSpec, factor, same_classes
from irpe_ds.ops.fused_kernels import Call, Device, Operand
from irpe_ds.ops.fused_plan import NO_RPE, Rpe, Shape
from irpe_ds.ops.inputs import TermSpec

TERMS = "Tensor[] tables, int[] targets, str[] methods, float[] ratios, bool[] biases, int[] grid"
OPTIONS = "Tensor? key_padding_mask, Tensor? seed, float scale, float dropout_p"
SCHEMAS = {
    "fused_forward": f"(Tensor q, Tensor k, Tensor v, {TERMS}, {OPTIONS}, bool keep_sums) "
    "-> (Tensor, Tensor, Tensor)",
    "fused_backward": "(Tensor grad_out, Tensor out, Tensor lse, Tensor sums_v, "
    f"Tensor q, Tensor k, Tensor v, {TERMS}, {OPTIONS}) -> Tensor[]",
}


class Role(NamedTuple):
    """Terms that a kernel looks up together."""

    terms: tuple[int, ...]
    """Their places among the call's."""
    maps: tuple[MapSpec, ...]
    is_bias: bool
    transposed: bool
    """Whether the lookups belong to the tokens that pass by."""

    def factors(self, device: torch.device) -> Factors:
        return factor(self.maps, device, transposed=self.transposed)


@functools.cache
def roles(specs: tuple[TermSpec, ...], *, keys: bool) -> dict[str, Role]:
    """Who looks up what, by the name of the kernels' operand.

    Queries own the lookups on keys and values, and keys those on queries. A bias belongs to
    neither: it is the strips' own, and one on queries is one on keys by negated offsets.

    Args:
        keys: in the pass over keys, in place of one over queries.
    """
    own, found = "q" if keys else "k", {}
    for target in "qkv":
        terms = [n for n, spec in enumerate(specs) if _place(spec, own) == target]
        if terms:
            negated = [specs[n].is_bias and specs[n].target != own for n in terms]
            maps = [
                MapSpec(specs[n].method, *specs[n].grid, specs[n].skip, specs[n].ratio, minus)
                for n, minus in zip(terms, negated, strict=True)
            ]
            is_bias = specs[terms[0]].is_bias
            transposed = (target == "q") != keys
            found[target] = Role(tuple(terms), tuple(maps), is_bias, transposed)
    return found


def _place(spec: TermSpec, own: str) -> str:
    return own if spec.is_bias else spec.target


@functools.cache
def shape(
    grid: tuple[int, int, int],
    specs: tuple[TermSpec, ...],
    dtype: torch.dtype,
    head_dim: int,
    *,
    keys: bool,
    has_mask: bool = False,
    has_dropout: bool = False,
) -> Shape:
    """What the kernels are compiled for.

    Args:
        grid: height, width and prefix tokens.

    Raises:
        ValueError: terms that the kernels cannot read.
    """
    cpu, (height, width, num_prefix) = torch.device("cpu"), grid
    found = roles(specs, keys=keys)
    factors = {target: role.factors(cpu) for target, role in found.items()}
    rpes = {
        target: Rpe.of(factors[target], num_prefix, role.is_bias) for target, role in found.items()
    }
    k, v = factors.get("k"), factors.get("v")
    same = k is not None and v is not None and same_classes(k, v)
    rpe_q, rpe_k, rpe_v = (rpes.get(target, NO_RPE) for target in "qkv")
    places = (height, width), num_prefix
    return Shape(dtype, head_dim, *places, rpe_q, rpe_k, rpe_v, same, has_mask, has_dropout)


class Arguments(NamedTuple):
    """Those that both operators have."""

    q: Tensor
    k: Tensor
    v: Tensor
    tables: list[Tensor]
    """Contextual, (H or 1, N, D), or a bias, (H or 1, N)."""
    targets: list[int]
    methods: list[str]
    ratios: list[float]
    biases: list[bool]
    grid: list[int]
    """Height, width and prefix tokens."""
    key_padding_mask: Tensor | None
    seed: Tensor | None
    scale: float
    dropout_p: float

    @property
    def specs(self) -> tuple[TermSpec, ...]:
        height, width, skip = self.grid
        each = zip(self.targets, self.methods, self.ratios, self.biases, strict=True)
        return tuple(
            TermSpec("qkv"[target], method, (height, width), skip, ratio, is_bias)
            for target, method, ratio, is_bias in each
        )

    def call(self, *, keys: bool) -> Call:
        """The arguments of the kernels for queries, or of the one for keys."""
        q, k, v = (_with_aligned_rows(x) for x in (self.q, self.k, self.v))
        height, width, num_prefix = self.grid
        compiled_for = shape(
            (height, width, num_prefix),
            self.specs,
            q.dtype,
            q.shape[-1],
            keys=keys,
            has_mask=self.key_padding_mask is not None,
            has_dropout=self.dropout_p > 0,
        )
        operands: dict[str, Operand | None] = dict.fromkeys("qkv")
        for target, role in roles(self.specs, keys=keys).items():
            factors = role.factors(q.device)
            tables = [self.tables[n] for n in role.terms]
            rpe = getattr(compiled_for, f"rpe_{target}")
            if role.is_bias:
                tables = [(table / self.scale).unsqueeze(-1) for table in tables]
            operands[target] = Operand(by_slot(tables, factors, rpe), factors)
        mask = None if self.key_padding_mask is None else self.key_padding_mask.contiguous()
        rpe_q, rpe_k, rpe_v = operands.values()
        options = (mask, self.dropout_p, self.seed)
        return Call(q, k, v, rpe_q, rpe_k, rpe_v, compiled_for, self.scale, *options)


def by_slot(tables: list[Tensor], factors: Factors, rpe: Rpe) -> Tensor:
    """The terms' tables by class and slot, added up, as the kernels read them.

    A product with constant one-hots: exact, and its adjoint sums in a fixed order.

    Args:
        tables: (H or 1, N, X) for each map of `factors`.

    Returns:
        (H or 1, row classes x slots, X)
    """
    terms = [
        one_hot.to(table.dtype) @ table
        for table, one_hot in zip(tables, _one_hots(tables, factors, rpe), strict=True)
    ]
    return sum(terms[1:], terms[0]).contiguous()


def _one_hots(tables: list[Tensor], factors: Factors, rpe: Rpe) -> list[Tensor]:
    """(row classes x slots, N) for each map: which bucket is in which slot."""
    buckets, prefix = factors.buckets[:, :, :-1], factors.buckets[:, :, -1:]
    free = rpe.slots - buckets.shape[2]  # the prefix tokens' bucket comes last
    slots = torch.cat([buckets, prefix.expand(-1, -1, free)], 2).flatten(1)
    return [F.one_hot(ids, table.shape[1]) for table, ids in zip(tables, slots, strict=True)]


def _with_aligned_rows(x: Tensor) -> Tensor:
    """The kernels copy 16 bytes at a time."""
    aligned = x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:-1])
    return x if aligned and x.stride(-1) == 1 else x.contiguous().clone()


def fused_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The output, (B, H, L, D) in memory (B, L, H, D); log-sum-exp, (B, H, L) float32; and if the
    last argument, keep_sums, says so, the bucket sums of the weights for the terms on values, which
    fused_backward needs: (B, L, H, row classes x slots)."""
    *common, keep_sums = arguments
    x = Arguments(*common)
    return fused_kernels.forward(x.call(keys=False), device_of(x.q), keep_sums)


def fused_backward(
    grad_out: Tensor, out: Tensor, lse: Tensor, sums_v: Tensor, *arguments: Any
) -> list[Tensor]:
    """Gradients of q, k, v and of every table."""
    x, grad_out = Arguments(*arguments), _with_aligned_rows(grad_out)
    device, sums = device_of(x.q), {"v": sums_v}
    call = x.call(keys=False)
    grad_q, delta, sums["k"] = fused_kernels.backward_queries(call, out, lse, grad_out, device)
    if call.shape.same_classes and sums_v.numel():
        _remove_delta_error(sums["k"], sums_v)
    mirrored = x.call(keys=True)
    grad_k, grad_v, sums["q"] = fused_kernels.backward_keys(mirrored, lse, delta, grad_out, device)
    grads = [torch.zeros_like(table) for table in x.tables]
    for target, owners in (("k", x.q), ("v", grad_out), ("q", x.k)):
        keys = target == "q"
        role = roles(x.specs, keys=keys).get(target)
        if role is None or (keys and role.is_bias):
            continue
        scale = 1.0 if target == "v" else x.scale
        tables = [x.tables[n] for n in role.terms]
        rpe = getattr((mirrored if keys else call).shape, f"rpe_{target}")
        one_hots = _one_hots(tables, role.factors(x.q.device), rpe)
        for n, one_hot in zip(role.terms, one_hots, strict=True):
            grads[n] = _table_grad(x.tables[n], owners, sums[target], one_hot, scale)
    return [grad_q, grad_k, grad_v, *grads]


def _remove_delta_error(sums: Tensor, weights: Tensor) -> None:
    """Of the bucket sums of dS = P (dP - delta), (B, L, H, row classes x slots), in place.

    Over all buckets of a query dS sums up to 0. What is there instead is the rounding error of
    delta, which comes from the output in 16 bits: each bucket has as much of it as it has weight.
    Terms on values make the output, and so this error, large.

    Args:
        weights: bucket sums of P, of the same shape.
    """
    error = sums.sum(-1, keepdim=True, dtype=torch.float32).to(sums.dtype)
    sums.addcmul_(error, weights, value=-1)


def _table_grad(
    table: Tensor, owners: Tensor, sums: Tensor, one_hot: Tensor, scale: float
) -> Tensor:
    """The adjoint of the lookups: scale sum over tokens of owner x^T sums, by bucket.

    Args:
        owners: (B, H, L, D), whose products with the table are looked up.
        sums: (B, L, H, row classes x slots), of the gradients of what is looked up.
    """
    if table.dim() == 2:
        by_class = sums.float().sum((0, 1))  # (H, row classes x slots)
        if table.shape[0] == 1:
            by_class = by_class.sum(0, keepdim=True)
        return (by_class @ one_hot.float()).to(table.dtype)
    if table.shape[0] == 1:
        products = sums.flatten(0, 2).mT @ owners.transpose(1, 2).flatten(0, 2)
        by_class = products[None]
    else:
        by_class = sums.flatten(0, 1).permute(1, 2, 0) @ owners.transpose(0, 1).flatten(1, 2)
    return (one_hot.float().mT @ by_class.float() * scale).to(table.dtype)


def device_of(x: Tensor) -> Device:
    """The GPU of a tensor."""
    return fused_kernels.device_of(x.device.index)


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *common, keep_sums = arguments
    x = Arguments(*common)
    lse = x.q.new_empty(x.q.shape[:3], dtype=torch.float32)
    height, width, num_prefix = x.grid
    compiled_for = shape((height, width, num_prefix), x.specs, x.q.dtype, x.q.shape[-1], keys=False)
    sums_v = fused_kernels.empty_sums(x.q, compiled_for.rpe_v if keep_sums else NO_RPE)
    return fused_kernels.empty_like_tokens(x.q), lse, sums_v


def _fake_backward(
    grad_out: Tensor, out: Tensor, lse: Tensor, sums_v: Tensor, *arguments: Any
) -> list[Tensor]:
    x = Arguments(*arguments)
    grads = [fused_kernels.empty_like_tokens(x.q) for _ in range(3)]
    return [*grads, *(table.new_empty(table.shape) for table in x.tables)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *common, _ = inputs
    x = Arguments(*common)
    ctx.save_for_backward(*output, x.q, x.k, x.v, x.key_padding_mask, x.seed, *x.tables)
    ctx.constants = (x.targets, x.methods, x.ratios, x.biases, x.grid)
    ctx.numbers = (x.scale, x.dropout_p)


def _backward(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        expected = "an implementation with second derivatives, 'gather' or 'reference'"
        raise ConfigError("impl", expected, "'fused' under create_graph=True")
    out, lse, sums_v, q, k, v, mask, seed, *tables = ctx.saved_tensors
    options = (tables, *ctx.constants, mask, seed, *ctx.numbers)
    grads = torch.ops.irpe_ds.fused_backward(grad_out, out, lse, sums_v, q, k, v, *options)
    # torch 2.6 to 2.14 takes empty lists for lists of tensors, and asks for as many gradients.
    constants: list[Any] = [None if tables else []] * 4
    return *grads[:3], grads[3:], *constants, *([None] * 6)


LIBRARY = torch.library.Library("irpe_ds", "FRAGMENT")
for _function, _fake in ((fused_forward, _fake_forward), (fused_backward, _fake_backward)):
    _name = _function.__name__
    LIBRARY.define(_name + SCHEMAS[_name])
    LIBRARY.impl(_name, _function, "CUDA")
    torch.library.register_fake(f"irpe_ds::{_name}", _fake, lib=LIBRARY)
torch.library.register_autograd(
    "irpe_ds::fused_forward", _backward, setup_context=_setup, lib=LIBRARY
)
