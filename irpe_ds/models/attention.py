"""Multi-head attention with relative position: projections around one op."""

import torch
from timm.layers import apply_rot_embed_cat
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
    """Replaces a timm attention: keeps its modules and adds `rpe_q`, `rpe_k`, `rpe_v`.

    Tables are initialised to zero, so the output is unchanged until training updates them.
    """

    num_heads: int
    num_prefix_tokens: int
    scale: float
    qkv: nn.Module | None
    q_norm: nn.Module
    k_norm: nn.Module
    attn_drop: nn.Dropout
    norm: nn.Module
    proj: nn.Linear
    proj_drop: nn.Module
    q_bias: Tensor
    k_bias: Tensor
    v_bias: Tensor
    rpe_q: RPETable | CrossRPETable | None
    rpe_k: RPETable | CrossRPETable | None
    rpe_v: RPETable | CrossRPETable | None

    def __init__(
        self, attention: nn.Module, rpe: RPEConfig, maps: tuple[BucketMap, ...], impl: str = "auto"
    ) -> None:
        super().__init__()
        vars(self).update(vars(attention))  # modules, parameters, buffers and settings
        self.impl, self.rpe = impl, rpe
        for name in ("q_norm", "k_norm", "norm"):
            if not hasattr(self, name):
                self.add_module(name, nn.Identity())
        weight = self.proj.weight
        self.head_dim = weight.shape[1] // self.num_heads
        for target in "qkv":
            form = (self.num_heads, self.head_dim, weight.device, weight.dtype)
            table = build_table(rpe, target, maps, *form) if target in rpe.on else None
            self.add_module(f"rpe_{target}", table)
        self.train(attention.training)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        rope: Tensor | None = None,
    ) -> Tensor:
        """(B, L, C) -> (B, L, C), prefix tokens first.

        Args:
            attn_mask: (B, 1, 1, L) bool, True for keys that take part; others are not supported.
            rope: sines and cosines, (L without prefix tokens, 2 D) or with leading dimensions.

        Raises:
            ConfigError: another mask, or L is not the number of tokens of the bucket map.
        """
        if isinstance(x, torch.fx.Proxy):
            expected = "a tensor: torch.export or timm's create_feature_extractor can trace it"
            raise ConfigError("x", expected, "one of torch.fx.symbolic_trace")
        return self.attend(x, rope, _ignored_keys(x, attn_mask, is_causal))

    def attend(self, x: Tensor, rope: Tensor | None, key_padding_mask: Tensor | None) -> Tensor:
        """As `forward`, with the op's mask: (B, L) bool, True for keys that are to be ignored."""
        q, k, v = self.project(x, rope)
        rpe_q, rpe_k, rpe_v = self._terms()
        out = irpe_attention(
            q,
            k,
            v,
            rpe_q=rpe_q,
            rpe_k=rpe_k,
            rpe_v=rpe_v,
            scale=self.scale,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            key_padding_mask=key_padding_mask,
            impl=self.impl,
        )
        return self.merge(out, x)

    def reset_parameters(self) -> None:
        """Reset what EVA and BEiT hold beside their layers to zero, the initialisation."""
        for own in (*self.parameters(recurse=False), *self.buffers(recurse=False)):
            nn.init.zeros_(own)

    def project(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, C) -> queries, keys and values of the op, (B, H, L, D) each."""
        q, k, v = self._projections(x)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self._rotated(q, rope), self._rotated(k, rope)
        if k.shape[1] < self.num_heads:  # grouped queries
            k, v = (t.repeat_interleave(self.num_heads // t.shape[1], dim=1) for t in (k, v))
        return q.to(v.dtype), k.to(v.dtype), v  # under autocast a norm returns float32

    def merge(self, out: Tensor, x: Tensor) -> Tensor:
        """The op's result (B, H, L, D) -> (B, L, C); x is what was projected."""
        out = self.norm(out.transpose(1, 2).flatten(2))
        gate = getattr(self, "gate", None)  # older releases of timm have none
        if gate is not None:
            out = out * gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def dispatch_key(self, device_type: str, dtype: torch.dtype) -> DispatchKey:
        """The key of this layer's calls in training for `irpe_ds.ops.resolve_impl`."""
        rpe_q, rpe_k, rpe_v = self._terms()
        has_dropout = self.attn_drop.p > 0
        return DispatchKey.of(device_type, dtype, self.head_dim, rpe_q, rpe_k, rpe_v, has_dropout)

    def _projections(self, x: Tensor) -> tuple[Tensor, ...]:
        """q (B, H, L, D), k and v, which may have fewer heads."""
        if self.qkv is None:  # three layers, each with a name of its own
            layers = (getattr(self, f"{target}_proj") for target in "qkv")
            return tuple(self._heads(layer(x)) for layer in layers)
        qkv = self.qkv(x)  # a call, because ZeRO-3 gathers the weight around it
        if getattr(self, "q_bias", None) is not None:  # EVA and BEiT; those on keys are zero
            qkv = qkv + torch.cat((self.q_bias, self.k_bias, self.v_bias)).to(qkv.dtype)
        return tuple(self._heads(part) for part in qkv.chunk(3, dim=-1))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _rotated(self, x: Tensor, rope: Tensor) -> Tensor:
        """(B, H, L, D) with all but the prefix tokens rotated."""
        prefix, patches = x.tensor_split([self.num_prefix_tokens], dim=2)
        half = getattr(self, "rotate_half", False)
        return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=half)], dim=2)

    def describe(self) -> str:
        """The encoding in words, with the buckets in use on the current grid."""
        maps = tuple(m for m in self.modules() if isinstance(m, BucketMap))  # shared by q, k, v
        rpe, used = self.rpe, count_buckets(maps)
        return f"{rpe.mode} {rpe.method} RPE on {rpe.on} ({used} buckets in use)"

    def _terms(self) -> tuple[tuple[Term, ...], ...]:
        tables = (self.rpe_q, self.rpe_k, self.rpe_v)
        return tuple(() if table is None else table.terms() for table in tables)


def _ignored_keys(x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """timm's mask of keys that take part as the op's, (B, L) and True for the others."""
    if attn_mask is None and not is_causal:
        return None
    expected = f"a bool mask of keys {(len(x), 1, 1, x.shape[1])}, True for those that take part"
    if is_causal or attn_mask is None:
        raise ConfigError("attn_mask", expected, "is_causal=True")
    if attn_mask.dtype != torch.bool or attn_mask.shape != (len(x), 1, 1, x.shape[1]):
        got = f"{attn_mask.dtype} {tuple(attn_mask.shape)}".removeprefix("torch.")
        raise ConfigError("attn_mask", expected, got)
    return ~attn_mask[:, 0, 0]
