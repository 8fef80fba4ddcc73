"""Multi-head attention with relative position for an encoder of one's own."""

import torch
from timm.layers import Attention
from torch import Tensor

from irpe_ds.errors import ConfigError
from irpe_ds.models.attention import RPEAttention
from irpe_ds.ops.dispatch import check_name
from irpe_ds.rpe.config import RPEConfig
from irpe_ds.rpe.tables import build_maps


class RPEMultiheadAttention(RPEAttention):
    """Self-attention with arguments and shapes of torch.nn.MultiheadAttention, batch first.

    Args:
        grid: rows and columns of patches.
        num_prefix_tokens: class and register tokens, which come before the patches.
        impl: implementation of the op, as in `irpe_attention`.

    Raises:
        ConfigError: an invalid size or implementation.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        rpe: RPEConfig,
        grid: tuple[int, int],
        num_prefix_tokens: int = 0,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ConfigError("embed_dim", f"a multiple of num_heads {num_heads}", embed_dim)
        check_name(impl)
        maps = build_maps(rpe, *grid, num_prefix_tokens)
        attention = Attention(
            embed_dim,
            num_heads,
            qkv_bias=bias,
            proj_bias=bias,
            attn_drop=dropout,
            device=device,
            dtype=dtype,
        )
        on = attention.proj.weight.device
        super().__init__(attention, rpe, tuple(each.to(on) for each in maps), impl)

    def forward(self, query: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """(B, L, embed_dim) -> (B, L, embed_dim), without weights.

        Args:
            key_padding_mask: (B, L) bool, True for keys that are to be ignored.

        Raises:
            ConfigError: L is not the number of tokens, or a mask of another shape or dtype.
        """
        return self.attend(query, None, key_padding_mask)
