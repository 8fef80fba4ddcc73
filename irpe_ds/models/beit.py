"""BEiT's attention, whose own biases stay: they are one more term of the op."""

from typing import Any

import torch
from timm.layers import resize_rel_pos_bias_table
from timm.models import register_notrace_module
from timm.models.beit import gen_relative_position_index
from torch import Tensor, nn

from irpe_ds.models.attention import RPEAttention
from irpe_ds.rpe.buckets import BucketMap
from irpe_ds.rpe.tables import Term


class OffsetMap(BucketMap):
    """A bucket for every offset, and three for pairs with the class token: BEiT's own map."""

    def __init__(self, height: int, width: int) -> None:
        nn.Module.__init__(self)
        self.method, self.grid, self.skip, self._ratio = "offset", (height, width), 1, "0.0"
        ids = gen_relative_position_index(self.grid, device=torch.device("cpu"))
        self.num_buckets = (2 * height - 1) * (2 * width - 1) + 3
        self.register_buffer("ids", ids.int(), persistent=False)
        self.register_buffer("used_ids", ids.unique(), persistent=False)

    def reset_parameters(self) -> None:
        for own, new in zip(self.buffers(), OffsetMap(*self.grid).buffers(), strict=True):
            own.copy_(new)


@register_notrace_module
class RPEBeitAttention(RPEAttention):
    """Replaces the attention of BEiT and BEiT v2."""

    relative_position_bias_table: nn.Parameter | None
    """(buckets of `offsets`, H)"""
    window_size: tuple[int, int]
    """The grid."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.relative_position_index = None  # `offsets` has it
        if self.relative_position_bias_table is not None:
            self._map_offsets()

    def forward(
        self, *args: Any, shared_rel_pos_bias: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """As without biases shared by all layers, which `equip` refuses."""
        return super().forward(*args, **kwargs)

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Interpolate the biases to another grid; BEiT's set_input_size calls it."""
        table = self.relative_position_bias_table
        if table is None or window_size == self.window_size:
            return
        old, self.window_size = self.window_size, window_size
        self._map_offsets()
        shape = (self.offsets.num_buckets, self.num_heads)
        with torch.no_grad():
            resized = resize_rel_pos_bias_table(table, window_size, shape, old)
        self.relative_position_bias_table = nn.Parameter(resized, table.requires_grad)

    def _map_offsets(self) -> None:
        self.offsets = OffsetMap(*self.window_size).to(self.proj.weight.device)

    def _terms(self) -> tuple[tuple[Term, ...], ...]:
        rpe_q, rpe_k, rpe_v = super()._terms()
        if self.relative_position_bias_table is not None:
            rpe_k = (*rpe_k, (self.relative_position_bias_table.T, self.offsets))
        return rpe_q, rpe_k, rpe_v
