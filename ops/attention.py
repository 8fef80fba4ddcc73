"""The public op: attention with contextual or bias relative position on queries, keys, values."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from irpe_ds.errors import ConfigError
from irpe_ds.ops.dispatch import attention_function
from irpe_ds.ops.inputs import DispatchKey, Inputs
from irpe_ds.ops.tracing import traced_as_constant
from irpe_ds.rpe.buckets import BucketMap
from irpe_ds.rpe.tables import Term


def irpe_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rpe_q: Sequence[Term] = (),
    rpe_k: Sequence[Term] = (),
    rpe_v: Sequence[Term] = (),
    scale: float | None = None,
    dropout_p: float = 0.0,
    key_padding_mask: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """softmax(scale q k^T + RPE_k + RPE_q) (v + RPE_v), as `ops/reference.py` writes it out.

    Args:
        q, k, v: (B, H, L, D) of one floating dtype; q is not yet scaled.
        rpe_q, rpe_k: terms, each a (table, BucketMap) pair; the table is contextual,
            (H or 1, D, num_buckets), or a bias, (H or 1, num_buckets).
        rpe_v: terms with tables of (H or 1, num_buckets, D).
        scale: factor on q; default D ** -0.5.
        dropout_p: probability of dropping an attention weight.
        key_padding_mask: (B, L) bool, True where a key must not be attended to. Where no key
            is left the result is zero, as in torch.nn.functional.scaled_dot_product_attention.
        impl: `auto`, or the name of one implementation, which then runs or raises;
            `irpe_ds.ops.resolve_impl` tells which one `auto` picks. `cpu`, `fused` and `flex` have
            no second derivative, nor does `low_rank` where PyTorch picks a fused kernel.

    Returns:
        (B, H, L, D) in the dtype of q; under autocast in its dtype, as in PyTorch's own attention.

    Raises:
        ConfigError: an argument of the wrong shape, dtype or device, or an `impl` that is unknown
            or does not run here.
    """
    _check_inputs(q, k, v, dropout_p, key_padding_mask)
    device = q.device.type
    autocast = _has_autocast(device) and torch.is_autocast_enabled(device)
    if autocast and q.dtype != torch.float64:
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    x = Inputs(
        q,
        k,
        v,
        rpe_q=_checked_terms("rpe_q", rpe_q, q),
        rpe_k=_checked_terms("rpe_k", rpe_k, q),
        rpe_v=_checked_terms("rpe_v", rpe_v, q),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        dropout_p=dropout_p,
        key_padding_mask=key_padding_mask,
    )
    key = DispatchKey.of(device, q.dtype, q.shape[-1], x.rpe_q, x.rpe_k, x.rpe_v, dropout_p > 0)
    attend = attention_function(impl, key)
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        return attend(x)


@traced_as_constant  # torch 2.8 cannot trace it
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def _check_inputs(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, key_padding_mask: Tensor | None
) -> None:
    if q.dim() != 4 or not q.is_floating_point():
        raise ConfigError("q", "a floating tensor (B, H, L, D)", f"{q.dtype} {tuple(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        if (x.shape, x.dtype, x.device) != (q.shape, q.dtype, q.device):
            expected = f"{q.dtype} {tuple(q.shape)} on {q.device} as q"
            raise ConfigError(name, expected, f"{x.dtype} {tuple(x.shape)} on {x.device}")
    if not 0 <= dropout_p < 1:
        raise ConfigError("dropout_p", "a probability in [0, 1)", dropout_p)
    if key_padding_mask is not None:
        expected_shape = (q.shape[0], q.shape[2])
        mask = (key_padding_mask.dtype, tuple(key_padding_mask.shape), key_padding_mask.device)
        if mask != (torch.bool, expected_shape, q.device):
            expected = f"torch.bool {expected_shape} on {q.device}"
            got = f"{mask[0]} {mask[1]} on {mask[2]}"
            raise ConfigError("key_padding_mask", expected, got)


def _checked_terms(name: str, terms: Sequence[Term], q: Tensor) -> tuple[Term, ...]:
    """The terms with tables cast to q's dtype, for autocast and mixed precision."""
    for number, term in enumerate(terms):
        where = f"{name}[{number}]"
        # No match statement: torch.compile of torch 2.8 cannot trace one.
        if not isinstance(term, (tuple, list)) or len(term) != 2:
            raise ConfigError(where, "a pair (table, BucketMap)", type(term).__name__)
        table, buckets = term
        if not isinstance(table, Tensor) or not isinstance(buckets, BucketMap):
            got = f"({type(table).__name__}, {type(buckets).__name__})"
            raise ConfigError(where, "a pair (table, BucketMap)", got)
        _check_table(where, table, buckets, q, on_values=name == "rpe_v")
    return tuple((table.to(q.dtype), buckets) for table, buckets in terms)


def _check_table(
    where: str, table: Tensor, buckets: BucketMap, q: Tensor, *, on_values: bool
) -> None:
    _, heads, length, head_dim = q.shape
    tokens, n = buckets.ids.shape[0], buckets.num_buckets
    if tokens != length:
        (height, width), skip = buckets.grid, buckets.skip
        expected = f"{tokens} tokens ({height}x{width} patches + {skip} prefix)"
        raise ConfigError(where, expected, f"{length} in q")
    if buckets.ids.device != q.device or table.device != q.device:
        got = f"table on {table.device}, ids on {buckets.ids.device}"
        raise ConfigError(where, f"table and ids on {q.device} as q", got)
    shapes = [(n, head_dim)] if on_values else [(head_dim, n), (n,)]
    fits = table.dim() >= 2 and table.shape[0] in (1, heads) and tuple(table.shape[1:]) in shapes
    if not table.is_floating_point():
        raise ConfigError(where, "a floating point table", table.dtype)
    if not fits:
        leading = "1" if heads == 1 else f"1 or {heads}"
        expected = " or ".join(f"({leading}, {', '.join(map(str, s))})" for s in shapes)
        raise ConfigError(where, f"a table {expected}", tuple(table.shape))
