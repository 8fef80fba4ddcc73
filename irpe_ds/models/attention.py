"""Multi-head attention with relative position: projections around one op."""

import torch
from timm.layers import Attention
from timm.models import register_notrace_module
from torch import Tensor, nn

from irpe_ds.errors import ConfigError
from irpe_ds.ops import DispatchKey, irpe_attention
from irpe_ds.rpe.buckets import BucketMap
from irpe_ds.rpe.config import RPEConfig
from irpe_ds.rpe.tables import CrossRPETable, RPETable, Term, build_table, count_buckets


def first_layer(model: nn.Module) -> "RPEAttention | None":
    """The first attention with relative position; None in a model without."""
    return next((m for m in model.modules() if isinstance(m, RPEAttention)), None)


@register_notrace_module  # one node of timm's feature extractors: they cannot look into the op
class RPEAttention(nn.Module):
    """Replaces a timm `Attention`: keeps its modules and adds `rpe_q`, `rpe_k`, `rpe_v`.

    Tables are initialised to zero, so the output is unchanged until training updates them.
    """

    qkv: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    attn_drop: nn.Dropout
    norm: nn.Module
    proj: nn.Module
    proj_drop: nn.Module
    rpe_q: RPETable | CrossRPETable | None
    rpe_k: RPETable | CrossRPETable | None
    rpe_v: RPETable | CrossRPETable | None

    def __init__(
        self, attention: Attention, rpe: RPEConfig, maps: tuple[BucketMap, ...], impl: str = "auto"
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.scale, self.impl, self.rpe = attention.scale, impl, rpe
        for name, child in attention.named_children():
            self.add_module(name, child)
        weight = attention.qkv.weight
        for target in "qkv":
            form = (self.num_heads, self.head_dim, weight.device, weight.dtype)
            table = build_table(rpe, target, maps, *form) if target in rpe.on else None
            self.add_module(f"rpe_{target}", table)
        self.train(attention.training)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(B, L, C) -> (B, L, C), prefix tokens first.

        Raises:
            ConfigError: a mask was given, or L is not the number of tokens of the bucket map.
        """
        if isinstance(x, torch.fx.Proxy):
            expected = "a tensor: torch.export or timm's create_feature_extractor can trace it"
            raise ConfigError("x", expected, "one of torch.fx.symbolic_trace")
        if attn_mask is not None or is_causal:
            raise ConfigError("attn_mask", "None: iRPE is defined on the whole grid", "a mask")
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, L, D)
        rpe_q, rpe_k, rpe_v = self._terms()
        out = irpe_attention(
            self.q_norm(q).to(v.dtype),  # under autocast a norm returns float32
            self.k_norm(k).to(v.dtype),
            v,
            rpe_q=rpe_q,
            rpe_k=rpe_k,
            rpe_v=rpe_v,
            scale=self.scale,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            impl=self.impl,
        )
        out = self.norm(out.transpose(1, 2).reshape(batch, length, -1))
        gate = getattr(self, "gate", None)  # older releases of timm have none
        if gate is not None:
            out = out * gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def dispatch_key(self, device_type: str, dtype: torch.dtype) -> DispatchKey:
        """The key of this layer's calls in training for `irpe_ds.ops.resolve_impl`."""
        rpe_q, rpe_k, rpe_v = self._terms()
        has_dropout = self.attn_drop.p > 0
        return DispatchKey.of(device_type, dtype, self.head_dim, rpe_q, rpe_k, rpe_v, has_dropout)

    def describe(self) -> str:
        """The encoding in words, with the buckets in use on the current grid."""
        maps = tuple(m for m in self.modules() if isinstance(m, BucketMap))  # shared by q, k, v
        rpe, used = self.rpe, count_buckets(maps)
        return f"{rpe.mode} {rpe.method} RPE on {rpe.on} ({used} buckets in use)"

    def _terms(self) -> tuple[tuple[Term, ...], ...]:
        tables = (self.rpe_q, self.rpe_k, self.rpe_v)
        return tuple(() if table is None else table.terms() for table in tables)
